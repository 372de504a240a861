#!/usr/bin/env bash
# Called by tpu_vm.sh on each host of a slice: runs one tinymim command in the background, independent of the connection.
#   launch/tpu_host.sh start train --config ...   launch/tpu_host.sh status | log [LINES] | stop
# status prints `tinymim: ` and one of: running, exited CODE, stopped (by stop), lost (the host was restarted), none.
# log follows the log from its beginning, or from its last LINES lines, until the command ends. stop sends SIGTERM: all
# hosts save the same step. Log, process id and exit status are in background/.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
mkdir -p background

# The command and its children hold this lock. Unlike a process id it cannot survive a restart of the host.
running() { ! flock --nonblock background/lock true; }

case ${1:-} in
  start)
    exec 9>background/lock
    if ! flock --nonblock 9; then
      echo "tinymim: still running on $(hostname)" >&2
      exit 1
    fi
    rm -f background/{status,stopped,pid}
    [[ -e background/log ]] && mv background/log background/log.previous
    shift
    setsid nohup launch/tpu_host.sh in_background "$@" >background/log 2>&1 </dev/null &
    for _ in {1..100}; do [[ -e background/pid ]] && exit; sleep 0.1; done
    cat background/log >&2
    exit 1
    ;;
  in_background)
    shift
    source launch/env.sh tpu
    "$TINYMIM" "$@" &
    echo $! >background/pid
    wait $!
    echo $? >background/status
    ;;
  status)
    if running; then
      echo "tinymim: running"
    elif [[ -e background/stopped ]]; then
      echo "tinymim: stopped"
    elif [[ -e background/status ]]; then
      echo "tinymim: exited $(<background/status)"
    elif [[ -e background/pid ]]; then
      echo "tinymim: lost"
    else
      echo "tinymim: none"
    fi
    ;;
  log) exec tail --lines "${2:-+1}" --follow --pid "$(<background/pid)" background/log ;;
  stop)
    if running; then
      touch background/stopped
      kill -TERM "$(<background/pid)"
    fi
    ;;
  *)
    sed -n '2,6s/^# \{0,1\}//p' launch/tpu_host.sh >&2
    exit 2
    ;;
esac
