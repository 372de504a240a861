#!/usr/bin/env bash
# Runs one tinymim command as N processes on this machine, for example one for each GPU.
#   launch/local.sh [--dry_run] 2 train --config configs/distill_s.py --workdir runs/s
# --dry_run prints what would be run. The exit status is that of the first process that fails.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry_run ]]; then
  dry_run=1
  shift
fi
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
processes=$1
shift

export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-127.0.0.1:${PORT:-9871}}
export JAX_NUM_PROCESSES=$processes

pids=()
# Ctrl-C and SIGTERM reach every process as SIGTERM: all of them save the same step and stop.
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM
for ((i = 0; i < processes; i++)); do
  command=(env "JAX_PROCESS_ID=$i" "JAX_LOCAL_DEVICE_IDS=${LOCAL_DEVICE_IDS:-$i}" tinymim "$@")
  # Without GPUs each process has its own CPU devices.
  if ! command -v nvidia-smi >/dev/null; then
    command=(env "JAX_PROCESS_ID=$i" tinymim "$@")
  fi
  if [[ -n $dry_run ]]; then
    echo "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES=$processes ${command[*]}"
  else
    "${command[@]}" &
    pids+=($!)
  fi
done

status=0
for pid in "${pids[@]}"; do
  # A trapped signal ends `wait` early; waiting again gives the process's own status.
  code=0
  wait "$pid" || code=$?
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" && code=0 || code=$?; done
  ((status == 0)) && status=$code
done
exit "$status"
