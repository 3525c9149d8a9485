#!/usr/bin/env bash
# The launcher pod of the MPIJob runs this: launch/cluster.sh, again after a preemption, never after a real failure.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # sh launch/kubernetes/launcher.sh
set -uo pipefail

usage() {
  cat <<'END'
usage: launch/kubernetes/launcher.sh HOSTFILE [arguments of job/train.py]

Waits until every host of HOSTFILE answers, then runs launch/cluster.sh HOSTFILE with the arguments. If it ends with
75 (preempted), or because a worker was lost, this waits for the workers and runs it again. If it fails while all workers
are there, the failure is final. It is noted on the workers, so that another launcher pod does not repeat it.

environment:
  JOB_WORKERS_TIMEOUT_SECONDS   longest wait for the workers (default 3600: a preempted worker needs a new node)

exit codes:   0 done, 1 failed, 2 bad configuration or usage, 75 this pod itself was asked to go
END
}

root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../.." && pwd -P)
timeout=${JOB_WORKERS_TIMEOUT_SECONDS:-3600}
if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage && exit 0; fi
if [[ ! -r ${1:-} ]]; then
  echo "launcher.sh: cannot read the hostfile '${1:-}'; the MPI operator mounts it as /etc/mpi/hostfile" >&2
  exit 2
fi
hostfile=$1
mapfile -t hosts < <(grep -oE '^[^#[:space:]]+' "$hostfile")
if ! ((${#hosts[@]})); then
  echo "launcher.sh: no host in $hostfile" >&2
  exit 2
fi

say() { echo "launcher.sh: $*" >&2; }
on() { ssh -n "$1" "$2"; } # run $2 on the host $1

# A pod's /tmp lives as long as the pod. So a mark there tells this pod from the one that replaces it.
each() { # each COMMAND: whether it succeeds on every host
  local host
  for host in "${hosts[@]}"; do on "$host" "$1" 2>/dev/null || return 1; done
}
any() { # any COMMAND: whether it succeeds on one host at least
  local host
  for host in "${hosts[@]}"; do
    if on "$host" "$1" 2>/dev/null; then return 0; fi
  done
  return 1
}
note_failure() { any 'touch /tmp/job-failed; false'; } # on all that can be reached

wait_for_workers() {
  local end=$((SECONDS + timeout))
  while true; do
    if ((stopped)); then exit 75; fi
    if any 'test -e /tmp/job-failed'; then
      say "the job has failed in an earlier launcher pod, whose log says why; it is not repeated"
      exit 1
    fi
    if each 'test ! -e /tmp/job-leaving && touch /tmp/job-here'; then return; fi
    if ((SECONDS >= end)); then
      say "within $timeout s not all workers answered: ${hosts[*]}"
      note_failure
      exit 1
    fi
    sleep 1
  done
}
same_workers() { each 'test -e /tmp/job-here && test ! -e /tmp/job-leaving'; }

stopped=0
child=
trap 'stopped=1; if [[ $child ]]; then kill -TERM "$child" 2>/dev/null; fi' TERM INT

while true; do
  wait_for_workers
  "$root/launch/cluster.sh" "$hostfile" "${@:2}" &
  child=$!
  while true; do # a signal ends the wait, not the child
    wait "$child" && status=0 || status=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=

  if ((status == 0)); then exit 0; fi
  if ((stopped)); then
    say "asked to go; the pod that replaces this one goes on from the checkpoint"
    exit 75
  fi
  if ((status == 75)); then
    say "preempted; going on when all workers are ready"
  elif same_workers; then
    note_failure
    exit "$status"
  else
    say "exit code $status, and a worker is gone; going on from the last checkpoint when all are ready"
  fi
done
