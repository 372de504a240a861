#!/usr/bin/env bash
# Runs one tinymim command as N processes on this machine, for example one per GPU.
#   launch/local.sh [--dry_run] N train --config configs/distill_s.py --workdir runs/s
# Each process gets the same number of GPUs. Ctrl-C, SIGTERM or SIGHUP: all processes save the same step and stop (exit
# status 75). A second Ctrl-C: they end at once, without saving. When one process fails, the others have $GRACE seconds
# (30) to end too. The exit status is that of the first process that failed. --dry_run prints the commands.
set -uo pipefail
set -m # each process has its own process group, so that a terminal's Ctrl-C reaches only this script

dry_run=
if [[ ${1:-} == --dry_run ]]; then
  dry_run=1
  shift
fi
if [[ ${1:-} == --help || $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0"
  [[ ${1:-} == --help ]] && exit 0 || exit 2
fi
processes=$1
shift

platform=cpu gpus=0
if command -v nvidia-smi >/dev/null; then
  # Without a working driver it prints an error message instead.
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ')
  ((gpus)) || echo "local.sh: nvidia-smi lists no GPU, so the CPU is used; run nvidia-smi to see why" >&2
fi
if ((gpus)); then
  platform=gpu
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l); fi
  if ((gpus % processes)); then
    echo "local.sh: $gpus GPUs cannot be divided evenly among $processes processes; set CUDA_VISIBLE_DEVICES or another N" >&2
    exit 2
  fi
fi
source "$(dirname "$0")/env.sh" "$platform"
export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-127.0.0.1:${PORT:-$((20000 + $$ % 12000))}}
export JAX_NUM_PROCESSES=$processes

pids=()
interrupts=0
signal_all() { # signal; to the groups of all processes
  for pid in "${pids[@]}"; do kill "-$1" -- "-$pid" 2>/dev/null; done
}
# Not to the groups: each program ends its own decoding processes.
stop() { kill -TERM "${pids[@]}" 2>/dev/null; }
trap '((++interrupts == 1)) && stop || signal_all KILL' INT
trap stop TERM HUP

for ((i = 0; i < processes; i++)); do
  own=("JAX_PROCESS_ID=$i")
  if ((gpus)); then
    each=$((gpus / processes))
    own+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, $((i * each)) $((i * each + each - 1)))")
  fi
  if [[ -n $dry_run ]]; then
    printf '%q ' env "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS" "JAX_NUM_PROCESSES=$processes" "${own[@]}" "$TINYMIM" "$@"
    echo
  else
    # TINYMIM_PARENT: it ends by itself when this script is killed with kill -9.
    env "${own[@]}" "TINYMIM_PARENT=$$" "$TINYMIM" "$@" &
    pids+=($!)
  fi
done

status=0 deadline=
while ((${#pids[@]})); do
  left=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    wait "$pid"
    code=$?
    if ((code && !status)); then
      status=$code
      deadline=$((SECONDS + ${GRACE:-30}))
    fi
  done
  pids=("${left[@]}")
  if [[ -n $deadline ]] && ((SECONDS >= deadline && ${#pids[@]})); then
    echo "local.sh: one process ended with exit status $status; ${#pids[@]} others did not end by themselves and are killed" >&2
    signal_all KILL
    deadline=
  fi
  ((${#pids[@]})) && sleep 0.2
done
exit "$status"
