#!/usr/bin/env bash
# Runs one tinymim command on all hosts of a Cloud TPU VM slice.
#
#   launch/tpu_vm.sh up --name b --zone us-central2-b --type v4-32 --spot --delete \
#     --setup 'mountpoint -q /data || sudo mount -t nfs 10.0.0.2:/share /data' \
#     -- train --config configs/distill_b.py --workdir /data/runs/b distill.teacher.path=/data/teachers/mae_vit_large
#
# Actions:
#   up       create what is missing, install, run and follow the log; after a preemption create the slice again and
#            resume. If the command is running already, follow it. Exit status of the command: 0 done, 1 error.
#   create   request a queued resource; with --wait return when it is ready
#   install  copy the last commit of this checkout to all hosts and install it, with the locked versions
#   run      start the command on all hosts under nohup
#   logs     follow the log of host 0, or of --worker N
#   status   of the queued resource, the VM and the command on each host
#   stop     all hosts save the same step and stop; `up` or `run` resumes
#   delete   delete the queued resource and the VM
#
# Options:
#   --name NAME, --zone ZONE, --project ID   of the slice, which may be an existing VM
#   --type TYPE          what to create: v4-32, v5litepod-64, v5p-32, v6e-16, ...
#   --runtime VERSION    software of the VM (default: the one for its type)
#   --spot               create it preemptible, at a fraction of the price
#   --setup COMMAND      run on every host before tinymim starts: mounts a shared file system
#   --create_flags FLAGS, --ssh_flags FLAGS  more options for gcloud: '--network=vpc', '--internal-ip'
#   --restarts N         at most N restarts after crashes and stalls (default 10); preemptions do not count
#   --poll SECONDS       time between two checks (default 30)
#   --delete             delete the slice when the command has succeeded
#   --dry_run            only print the gcloud calls
#
# --workdir must be on a file system that all hosts share and that remains when they are deleted.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
exec 3>&1 # where --dry_run prints, even inside $(...)

main() {
  [[ $# -gt 0 && $1 != --help && $1 != -h ]] || { usage; exit $(($# == 0 ? 2 : 0)); }
  action=$1
  shift
  name='' zone='' project='' type='' runtime='' spot='' setup='' create_flags='' ssh_flags=''
  restarts=10 poll=30 delete='' dry_run='' wait='' worker=0 created='' follower='' answer=''
  while (($#)); do
    case $1 in
      --name | --zone | --project | --type | --runtime | --setup | --create_flags | --ssh_flags | --restarts | --poll | --worker)
        (($# > 1)) || fail "$1 takes a value"
        printf -v "${1#--}" %s "$2"
        shift 2
        ;;
      --spot | --delete | --dry_run | --wait)
        printf -v "${1#--}" yes
        shift
        ;;
      --help | -h) usage && exit ;;
      --) shift && break ;;
      *) fail "$1 is unknown (--help lists the options); the tinymim command stands behind --" ;;
    esac
  done
  [[ -n $name && -n $zone ]] || fail "--name and --zone are needed"
  words=("$@")
  case $action in
    up | run)
      ((${#words[@]})) || fail "no command: launch/tpu_vm.sh $action ... -- train --config FILE --workdir DIR"
      check_workdir
      ;;&
    up) up ;;
    create) create && { [[ -z $wait ]] || until_ready; } ;;
    install) install ;;
    run) run ;;
    logs) on_hosts "$worker" "tinymim/launch/tpu_host.sh log" ;;
    status) status ;;
    stop) on_hosts all "tinymim/launch/tpu_host.sh stop" ;;
    delete) delete ;;
    *) fail "$action is none of up, create, install, run, logs, status, stop, delete" ;;
  esac
}

up() {
  local failures=0 installed='' verdict
  trap 'end_log; say "no longer following the log; the command goes on, and the same line follows it again"; exit 130' INT TERM
  while true; do
    until_ready
    if [[ $(hosts) != *running* || -n $dry_run ]]; then
      [[ -n $installed ]] || install || fail "installing failed"
      installed=yes
      run || fail "the command did not start on all hosts"
    fi
    follow
    case $verdict in
      done)
        say "done"
        [[ -n $delete ]] && { delete; return; }
        remind
        return 0
        ;;
      resume) say "preempted: going on" ;;
      lost) say "the slice is gone: going on" && installed='' ;;
      crashed)
        ((++failures <= restarts)) || { remind; fail "ended by crashes or stalls $failures times: given up"; }
        say "ended by a crash or a stall, restart $failures of $restarts"
        ;;
      stopped) say "stopped: the same line resumes" && remind && return 75 ;;
      *) remind && return 1 ;;
    esac
  done
}

# Prints host 0's log until the command has ended on all hosts, and sets `verdict`.
follow() {
  local states unreachable=0
  verdict=''
  begin_log
  until [[ -n $verdict ]]; do
    if [[ -n $dry_run ]]; then
      wait "$follower"
      hosts >/dev/null
      verdict=done
      return
    fi
    nap
    ask hosts
    states=$answer
    if [[ -z $states ]]; then
      # A host that does not answer may be restarting, or deleted with the slice.
      ask condition
      case $answer in
        lost | missing) verdict=lost ;;
        ready) ((++unreachable % 10)) || say "the hosts did not answer $unreachable times" ;;
      esac
    elif [[ $states == *running* ]]; then
      kill -0 "$follower" 2>/dev/null || begin_log 0
    else
      verdict=$(judge "$states")
      # The error may come from a host that is gone: check whether the slice still exists.
      [[ $verdict == error || $verdict == crashed ]] && nap && ask condition && [[ $answer == @(lost|missing) ]] && verdict=lost
      [[ $verdict == error ]] && say "ended: ${states//$'\n'/, }"
    fi
  done
  for _ in {1..20}; do kill -0 "$follower" 2>/dev/null && sleep 0.2; done # waits for the last lines of the log
  end_log
}

# Puts the output into `answer`. Bash ignores a Ctrl-C during $(gcloud ...), but not during `wait`.
ask() {
  local file
  file=$(mktemp)
  "$@" >"$file" &
  wait $!
  answer=$(<"$file")
  rm "$file"
}

begin_log() { # first line to show: +1 for the whole log, 0 for new lines only
  set -m # its own process group, which is killed as a whole
  on_hosts 0 "tinymim/launch/tpu_host.sh log${1:+ $1}" </dev/null &
  follower=$!
  set +m
}

end_log() {
  [[ -n $follower ]] || return # an empty id would mean this script's own group
  kill -TERM -- "-$follower" 2>/dev/null
  wait "$follower" 2>/dev/null
  follower=''
}

# What the exit statuses of all hosts mean together; tinymim's are 0, 1, 75 preempted, 86 stalled.
judge() {
  local state ends='' verdict=done
  while read -r state; do
    case $state in
      "exited 0") ;;
      "exited 75") ends+=resume ;;
      "exited 86" | lost | "exited "1[2-9]? | "exited "2??) ends+=crashed ;;
      stopped) ends+=stopped ;;
      *) ends+=error ;;
    esac
  done <<<"$1"
  for state in resume crashed error stopped; do [[ $ends == *$state* ]] && verdict=$state; done
  echo "$verdict"
}

until_ready() {
  local now before='' attempts=0
  while true; do
    now=$(condition)
    [[ $now == "$before" || -n $dry_run ]] || say "$name is $now"
    case $now in
      ready) return ;;
      missing) create || fail "the queued resource was refused" ;;
      lost)
        ((++attempts <= 3)) || fail "lost or refused 3 times before it was ready"
        delete && create || fail "it could not be created again"
        ;;
      stopped) fail "the VM is stopped: gcloud compute tpus tpu-vm start $name --zone $zone" ;;
      unknown) [[ -n $before ]] || fail "gcloud does not say what $name is" ;;
    esac
    before=$now
    nap
  done
}

# Prints ready, missing, lost (must be deleted and created again), stopped, unknown, or pending.
condition() {
  local queue node
  queue=$(look queued-resources state.state) node=$(look tpu-vm state)
  if [[ -n $dry_run ]]; then
    [[ -n $created ]] && echo ready || echo missing
    return
  fi
  case $queue/$node in
    UNKNOWN/* | */UNKNOWN) echo unknown ;;
    MISSING/MISSING) echo missing ;;
    SUSPENDED/* | FAILED/* | */PREEMPTED | */TERMINATED | ACTIVE/MISSING) echo lost ;;
    SUSPENDING/* | DELETING/*) echo pending ;;
    */READY) echo ready ;;
    */STOPPED) echo stopped ;;
    *) echo pending ;;
  esac
}

look() { # group, field; prints its value, MISSING if the resource does not exist, UNKNOWN if gcloud fails
  local value errors
  errors=$(mktemp)
  if value=$(tpus "$1" describe "$name" --format "value($2)" 2>"$errors"); then
    echo "$value"
  elif grep -q NOT_FOUND "$errors"; then
    echo MISSING
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
  rm -f "$errors"
}

create() {
  [[ -n $type ]] || fail "there is no $name in $zone: give --type to create one"
  if [[ -z $runtime ]]; then
    case $type in
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      *) runtime=tpu-ubuntu2204-base ;;
    esac
  fi
  say "asking for $name, $type"
  # shellcheck disable=SC2086
  tpus queued-resources create "$name" --node-id "$name" --accelerator-type "$type" --runtime-version "$runtime" \
    ${spot:+--spot} $create_flags && created=yes
}

delete() {
  local queue node
  queue=$(look queued-resources state.state)
  if [[ -n $dry_run || $queue != MISSING ]]; then
    tpus queued-resources delete "$name" --force
    return
  fi
  node=$(look tpu-vm state)
  [[ $node == MISSING ]] || tpus tpu-vm delete "$name"
}

install() {
  local folder changed copied
  folder=$(mktemp -d)
  if [[ -z $dry_run ]]; then
    changed=$(git -C "$root" status --porcelain) || fail "$root is not a git checkout, and the last commit is what is copied"
    [[ -z $changed ]] || say "not committed, so not copied:"$'\n'"$changed"
    git -C "$root" archive --format=tar.gz --output="$folder/tinymim.tar.gz" HEAD || return
  fi
  # shellcheck disable=SC2086
  tpus tpu-vm scp "$folder/tinymim.tar.gz" "$name:tinymim.tar.gz" --worker all $ssh_flags
  copied=$?
  rm -r "$folder"
  ((copied == 0)) && on_hosts all "$unpack"
}

# The images have Python 3.10; uv installs a newer one.
unpack='set -e
mkdir -p tinymim
rm -rf tinymim/tinymim_jax tinymim/configs tinymim/launch
tar -xzf tinymim.tar.gz -C tinymim
cd tinymim
export PATH=$HOME/.local/bin:$PATH
command -v uv >/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet uv
test -d .venv || uv venv --quiet --python 3.12
uv pip install --quiet --constraint requirements.txt --editable ".[tpu,gcs]"'

run() {
  local command
  printf -v command ' %q' "${words[@]}"
  on_hosts all "${setup:+{ $setup; \} && }tinymim/launch/tpu_host.sh start$command"
}

hosts() { # prints a line per host: running, exited N, stopped, lost, none; nothing unless all of them answer
  local lines
  lines=$(on_hosts all "tinymim/launch/tpu_host.sh status 2>/dev/null || echo tinymim: none") &&
    sed -n 's/.*tinymim: \(running\|exited [0-9]*\|stopped\|lost\|none\)$/\1/p' <<<"$lines"
}

status() {
  say "queued resource: $(look queued-resources state.state)"
  say "VM: $(look tpu-vm state)"
  on_hosts all "tinymim/launch/tpu_host.sh status 2>/dev/null || echo tinymim: none"
}

on_hosts() { # which, command
  # shellcheck disable=SC2086
  tpus tpu-vm ssh "$name" --worker "$1" --command "$2" $ssh_flags
}

# Every call of gcloud.
tpus() {
  local command=(gcloud compute tpus "$@" --zone "$zone" ${project:+--project "$project"} --quiet)
  if [[ -n $dry_run ]]; then
    printf '%q ' "${command[@]}" >&3
    echo >&3
  else
    "${command[@]}" 3>&-
  fi
}

check_workdir() {
  local i
  for ((i = 0; i < ${#words[@]} - 1; i++)); do
    if [[ ${words[i]} == --workdir && ${words[i + 1]} != /* ]]; then
      say "--workdir ${words[i + 1]} is on each host's own disk: other hosts do not see it, and it is deleted with the VM." \
        "Mount a shared file system with --setup and give a path on it"
    fi
  done
}

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; }
say() { echo "tpu_vm.sh: $*" >&2; }
remind() { say "$name still exists and is paid for: launch/tpu_vm.sh delete --name $name --zone $zone"; }
nap() { [[ -n $dry_run ]] || { sleep "$poll" & wait $!; }; }
fail() {
  say "$*"
  exit 1
}

main "$@"
