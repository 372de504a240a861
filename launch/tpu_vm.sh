#!/usr/bin/env bash
# Runs one tinymim command on every host of a Cloud TPU VM slice, and follows the log of the first one.
#   TPU=my-slice ZONE=us-central2-b launch/tpu_vm.sh [--dry_run] train --config configs/distill_b.py --workdir gs://bucket/b ...
# Copies this checkout, installs it with the `tpu` extra, and starts the command under nohup: it survives a lost
# connection. Run the same line again to resume. --dry_run prints the gcloud calls.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry_run ]]; then
  dry_run=1
  shift
fi
if [[ $# -eq 0 || -z ${TPU:-} || -z ${ZONE:-} ]]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)

call() {
  if [[ -n $dry_run ]]; then
    printf 'gcloud'
    printf ' %q' "$@"
    echo
  else
    gcloud "$@"
  fi
}

on_workers() {  # which workers, command
  call compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker "$1" --command "$2"
}

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$root" archive --format=tar.gz --output="$archive" HEAD
call compute tpus tpu-vm scp "$archive" "$TPU:tinymim.tar.gz" --zone "$ZONE" --worker all
on_workers all "mkdir -p tinymim && tar -xzf tinymim.tar.gz -C tinymim && cd tinymim &&
  python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[tpu]'"
printf -v command ' %q' "$@"
on_workers all "cd tinymim && nohup .venv/bin/tinymim$command > tinymim.log 2>&1 < /dev/null & sleep 1"
on_workers 0 "tail -n +1 -F tinymim/tinymim.log"
