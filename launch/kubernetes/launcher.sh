#!/usr/bin/env bash
# The launcher pod of the MPIJob runs this: launch/cluster.sh, again after a preemption, never after a real failure.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # sh launch/kubernetes/launcher.sh
set -uo pipefail

usage() {
  cat <<'END'
usage: launch/kubernetes/launcher.sh [--min-np N [--max-np M]] HOSTFILE [arguments of job/train.py]

Waits until every host of HOSTFILE answers, then runs launch/cluster.sh HOSTFILE with the arguments. If it ends with
75 (preempted), or because a worker was lost, this waits for the workers and runs it again. If it fails while all workers
are there, the failure is final. It is noted on the workers, so that another launcher pod does not repeat it.

With --min-np the job goes on when workers come and go (docs/elastic.md). Then this waits until N ranks have a place, and
a little longer for more. The hosts that may join are those that discover_hosts.sh beside HOSTFILE prints, or HOSTFILE.

environment:
  JOB_WORKERS_TIMEOUT_SECONDS   longest wait for the workers (default 3600: a preempted worker needs a new node)
  JOB_MORE_WORKERS_SECONDS      with --min-np, wait for more workers than it takes (default 30)

exit codes:   0 done, 1 failed, 2 bad configuration or usage, 75 this pod itself was asked to go
END
}

root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../.." && pwd -P)
timeout=${JOB_WORKERS_TIMEOUT_SECONDS:-3600}
more=${JOB_MORE_WORKERS_SECONDS:-30}
if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage && exit 0; fi
least='' options=() enough_of=all
while [[ ${1:-} =~ ^--(min|max)-np$ ]]; do
  if ! [[ ${2:-} =~ ^[1-9][0-9]{0,4}$ ]]; then
    echo "launcher.sh: $1 takes a number of ranks, not '${2:-}'" >&2
    exit 2
  fi
  if [[ $1 == --min-np ]]; then least=$2 enough_of=enough; fi
  options+=("$1" "$2")
  shift 2
done
if [[ ! -r ${1:-} ]]; then
  echo "launcher.sh: cannot read the hostfile '${1:-}'; the MPI operator mounts it as /etc/mpi/hostfile" >&2
  exit 2
fi
hostfile=$1
hosts=() # that are listed
there=() # that the job was started with
slots=1  # of each
read_hosts() { # the operator lists more hosts, or fewer, when the number of workers is changed
  local listed
  mapfile -t listed < <(grep -oE '^[^#[:space:]]+' "$hostfile")
  if ((${#listed[@]})); then hosts=("${listed[@]}"); fi
  if [[ $(<"$hostfile") =~ slots=([1-9][0-9]*) ]]; then slots=${BASH_REMATCH[1]}; fi
}
read_hosts
if ! ((${#hosts[@]})); then
  echo "launcher.sh: no host in $hostfile" >&2
  exit 2
fi
if [[ $least && -x ${hostfile%/*}/discover_hosts.sh ]]; then
  options+=(--discover "${hostfile%/*}/discover_hosts.sh" --slots-per-host "$slots") # it prints names alone
fi

# The root file system of a pod is read-only. So what is compiled for a rank is kept in the /tmp of its pod, for the next.
export NUMBA_CACHE_DIR=${NUMBA_CACHE_DIR:-/tmp/numba}
options+=(-x NUMBA_CACHE_DIR)

say() { echo "launcher.sh: $*" >&2; }
on() { ssh -n "$1" "$2" 2>/dev/null; } # run $2 on the host $1

# A pod's /tmp lives as long as the pod. So a mark there tells this pod from the one that replaces it.
any() { # any COMMAND: whether it succeeds on one host at least
  local host
  for host in "${hosts[@]}"; do
    if ((stopped)); then return 1; fi # each may take ten seconds
    if on "$host" "$1"; then return 0; fi
  done
  return 1
}
note_failure() { # on all that can be reached
  local host
  for host in "${hosts[@]}"; do on "$host" 'touch /tmp/job-failed'; done
}

# Whether a worker stays, nothing that an earlier launcher has started runs there any more, and it is now marked.
ready='test ! -e /tmp/job-leaving && ! grep -sqzxE "(.*/)?launch/hosts/agent\.py" /proc/[0-9]*/cmdline && touch /tmp/job-here'
look_for_workers() {
  local host
  there=()
  for host in "${hosts[@]}"; do
    if ((stopped)); then return; fi
    if on "$host" "$ready"; then there+=("$host"); fi
  done
}
enough() { # whether the job can begin
  if [[ $least ]]; then ((${#there[@]} * slots >= least)); else ((${#there[@]} == ${#hosts[@]})); fi
}

wait_for_workers() {
  local began=$SECONDS since='' # there were enough
  while true; do
    read_hosts
    if any 'test -e /tmp/job-failed'; then
      say "the job has failed in an earlier launcher pod, whose log says why; it is not repeated"
      exit 1
    fi
    look_for_workers
    if ((stopped)); then exit 75; fi
    if ! enough; then
      since=''
    elif ((${#there[@]} == ${#hosts[@]} || SECONDS >= ${since:=$SECONDS} + more)); then
      return
    elif ((SECONDS == since)); then
      say "${#there[@]} of ${#hosts[@]} workers answer, which are enough; waiting $more s for the others"
    fi
    if ((SECONDS >= began + timeout)); then
      say "within $timeout s not ${enough_of} workers answered: ${hosts[*]}"
      note_failure
      exit 1
    fi
    sleep 1
  done
}
same_workers() {
  local host
  for host in "${there[@]}"; do
    on "$host" 'test -e /tmp/job-here && test ! -e /tmp/job-leaving' || return 1
  done
}

stopped=0
child=
trap 'stopped=1; if [[ $child ]]; then kill -TERM "$child" 2>/dev/null; fi' TERM INT

while true; do
  wait_for_workers
  "$root/launch/cluster.sh" "${options[@]}" "$hostfile" "${@:2}" &
  child=$!
  if ((stopped)); then kill -TERM "$child"; fi
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
    say "preempted; going on when $enough_of workers are ready"
  elif same_workers; then
    note_failure
    exit "$status"
  else
    say "exit code $status, and a worker is gone; going on from the last checkpoint"
  fi
done
