#!/usr/bin/env bash
# Runs one tinymim command as N processes on this machine, for example one for each GPU.
#   launch/local.sh [--dry_run] N train --config configs/distill_s.py --workdir runs/s
# The GPUs are dealt out evenly. Ctrl-C or SIGTERM: all processes save the same step and stop (exit status 75); Ctrl-C
# again: they end at once, unsaved. When one process fails, the others have $GRACE seconds (30) to end as well.
# The exit status is that of the first process that failed. --dry_run prints what would be run.
set -uo pipefail
set -m # each process leads a group of its own: a terminal's Ctrl-C reaches this script alone

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
if command -v nvidia-smi >/dev/null && gpus=$(nvidia-smi --list-gpus | wc -l) && ((gpus > 0)); then
  platform=gpu
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l); fi
  if ((gpus % processes)); then
    echo "local.sh: $gpus GPUs cannot be dealt out evenly to $processes processes; set CUDA_VISIBLE_DEVICES or another N" >&2
    exit 2
  fi
fi
source "$(dirname "$0")/env.sh" "$platform"
export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-127.0.0.1:${PORT:-$((20000 + $$ % 12000))}}
export JAX_NUM_PROCESSES=$processes

pids=()
interrupts=0
everyone() { # signal
  for pid in "${pids[@]}"; do kill "-$1" -- "-$pid" 2>/dev/null; done
}
# Only the program itself gets SIGTERM: its decoding processes end with it.
stop() { kill -TERM "${pids[@]}" 2>/dev/null; }
trap '((++interrupts == 1)) && stop || everyone KILL' INT
trap stop TERM HUP

for ((i = 0; i < processes; i++)); do
  own=("JAX_PROCESS_ID=$i" "TINYMIM_PARENT=$$") # each ends by itself when this script is killed with kill -9
  if ((gpus)); then
    each=$((gpus / processes))
    own+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, $((i * each)) $((i * each + each - 1)))")
  fi
  if [[ -n $dry_run ]]; then
    printf '%q ' env "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS" "JAX_NUM_PROCESSES=$processes" "${own[@]}" "$TINYMIM" "$@"
    echo
  else
    env "${own[@]}" "$TINYMIM" "$@" &
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
    echo "local.sh: one process ended with exit status $status, ${#pids[@]} did not end by themselves: killed" >&2
    everyone KILL
    deadline=
  fi
  ((${#pids[@]})) && sleep 0.2
done
exit "$status"
