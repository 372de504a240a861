# The environment of every run that launch/ starts: `source launch/env.sh tpu`, or gpu. Variables that are set are kept.
#
# | set | value | why |
# |---|---|---|
# | JAX_PLATFORMS | tpu,cpu or cuda,cpu | an accelerator that does not start, or lacks its plugin, is then an error; by default JAX falls back to the CPU |
# | XLA_PYTHON_CLIENT_MEM_FRACTION | 0.9 | JAX takes 0.75 of the memory of a GPU; a tenth is enough for CUDA, cuDNN and NCCL |
# | XLA_FLAGS | --xla_gpu_enable_latency_hiding_scheduler=true | gradients are summed over GPUs during the backward pass |
# | NCCL_DEBUG | WARN | NCCL reports failures; by default it prints nothing |
#
# XLA ends a process that has an unknown flag: the one above exists in jaxlib 0.10, 0.11 and 0.12. Not set:
#
# | not set | why |
# |---|---|
# | LIBTPU_INIT_ARGS | libtpu 0.0.42 for v5e:4x4 compiles a data-parallel step to the same three all-reduces with --xla_tpu_enable_async_collective_fusion, --xla_tpu_enable_data_parallel_all_reduce_opt, --xla_enable_async_all_reduce or none; with parameters split over chips the gathers are asynchronous without a flag |
# | XLA_PYTHON_CLIENT_PREALLOCATE | memory that is allocated at the start does not fragment |
# | NCCL_SOCKET_IFNAME, NCCL_IB_HCA | NCCL finds them; set them where the documentation of a cluster says so |
# | CUDA_VISIBLE_DEVICES | every process sees all GPUs of its node and uses its own, so that NCCL copies between them directly |

case ${1:-} in
  tpu) export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} ;;
  gpu)
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
    export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}" # of two equal flags the last one counts
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    ;;
esac

# The tinymim of this checkout's environment, or else the one in PATH.
if [[ -z ${TINYMIM:-} ]]; then
  TINYMIM=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/tinymim
  [[ -x $TINYMIM ]] || TINYMIM=tinymim
fi
export TINYMIM
