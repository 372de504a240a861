# Environment of every run that launch/ starts; `source launch/env.sh tpu`, or gpu. What is already set is left as it is.
#
# | set | value | why |
# |---|---|---|
# | JAX_PLATFORMS | tpu,cpu or cuda,cpu | an accelerator that is there and does not start, or lacks its plugin, is an error; by default JAX goes on on the CPU |
# | XLA_PYTHON_CLIENT_MEM_FRACTION | 0.9 | JAX takes 0.75 of a GPU; a tenth is enough for CUDA, cuDNN and NCCL |
# | XLA_FLAGS | --xla_gpu_enable_latency_hiding_scheduler=true | gradients are summed over GPUs while the backward pass goes on |
# | NCCL_DEBUG | WARN | NCCL says what failed; it is silent by default |
#
# An unknown flag ends the process at its start: the flag above exists in jaxlib 0.10, 0.11 and 0.12. Left alone:
#
# | left | why |
# |---|---|
# | LIBTPU_INIT_ARGS | libtpu 0.0.42 for v5e:4x4 compiles a data-parallel step to the same three all-reduces with --xla_tpu_enable_async_collective_fusion, --xla_tpu_enable_data_parallel_all_reduce_opt, --xla_enable_async_all_reduce or none; with parameters split over chips the gathers are asynchronous without a flag |
# | XLA_PYTHON_CLIENT_PREALLOCATE | memory taken at once does not fragment |
# | NCCL_SOCKET_IFNAME, NCCL_IB_HCA | NCCL finds them; set them where a cluster's handbook says so |
# | CUDA_VISIBLE_DEVICES | every process sees all GPUs of its node and takes its own: NCCL copies between them directly |

case ${1:-} in
  tpu) export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} ;;
  gpu)
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
    export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}" # of two, the last one holds
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    ;;
esac

# The program: the one of this checkout's environment, or that of the PATH.
if [[ -z ${TINYMIM:-} ]]; then
  TINYMIM=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/tinymim
  [[ -x $TINYMIM ]] || TINYMIM=tinymim
fi
export TINYMIM
