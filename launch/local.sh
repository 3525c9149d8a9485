#!/usr/bin/env bash
# One machine, N ranks. It checks the configuration once, before any rank starts, and then is `horovodrun` with the
# options that one always wants. The working directory stays yours: relative paths in the arguments are from there.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/local.sh [-np N] [--mpi] [--dry-run] [arguments of job/train.py]

  -np N       ranks (default: one a GPU; without GPUs 2)
  --mpi       coordinate over MPI instead of Gloo: faster collectives on one machine
  --dry-run   print the command and stop
  --help      this text; `python job/train.py --help` lists the arguments of train.py

example:      launch/local.sh -np 4 --config configs/smoke.yaml run.dir=runs/first
exit codes:   0 done, 1 failed, 2 bad configuration or usage (nothing was started), 75 preempted with a checkpoint
              written, 130 or 143 stopped by a signal without one

A run that was stopped goes on when the same command is given again: run.resume=auto is added, unless the arguments
hold run.resume or run.overwrite. SIGTERM stops all ranks after their step, with a checkpoint.
END
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
ranks=$(timeout 20 nvidia-smi -L 2>/dev/null | grep -c '^GPU') || ranks=2
controller=(--gloo)
dry_run=no
resume=(run.resume=auto)
arguments=()

while (($#)); do
  case $1 in
    -np) ranks=${2:-nothing} && shift ;;
    --mpi) controller=(--mpi --mpi-args="--mca mpi_yield_when_idle 1") ;; # a waiting rank gives its core to a working one
    --dry-run) dry_run=yes ;;
    -h | --help) usage && exit 0 ;;
    run.resume=* | run.overwrite=*) resume=() && arguments+=("$1") ;;
    *) arguments+=("$1") ;;
  esac
  shift || break # -np without its number
done
arguments+=("${resume[@]}")

if ! [[ $ranks =~ ^[1-9][0-9]{0,4}$ ]]; then
  echo "launch/local.sh: -np takes a number of ranks, 1 or more, not '$ranks'" >&2
  exit 2
fi

if [[ -d $root/.venv ]]; then PATH=$root/.venv/bin:$PATH; fi
if ! { command -v horovodrun && command -v python; } >/dev/null; then
  echo "launch/local.sh: no Horovod in .venv nor on PATH; \`make setup\` installs it" >&2
  exit 1
fi

# --disable-cache: horovodrun would remember for an hour what it once found out about a host, right or wrong.
command=(horovodrun --disable-cache "${controller[@]}" -np "$ranks" -H "localhost:$ranks"
  python "$root/job/train.py" "${arguments[@]}")

if [[ $dry_run == yes ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi

# One message now instead of N messages and a launcher's traceback later. The number of ranks is part of the check.
env HOROVOD_RANK=0 HOROVOD_SIZE="$ranks" python "$root/job/train.py" --check "${arguments[@]}" >/dev/null || exit

# Open MPI refuses root, who is the only user that many containers have.
if [[ ${controller[0]} == --mpi ]]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi

# In the background, for a shell that waits for a foreground command hears no signal. A signal to this script, and
# Ctrl-C, goes on to the launcher, which ends its ranks: SIGTERM, and after 5 s SIGKILL. To its whole group, because
# under MPI horovodrun has become a shell that would die alone and leave mpirun behind.
#
# SIGUSR1 would end horovodrun; as SIGTERM it stops the ranks just as well, each of which may get either.
preempted=$(mktemp) # the ranks write to it as they leave with 75, of which horovodrun makes 1
trap 'rm -f "$preempted"' EXIT
export JOB_PREEMPTED_FILE=$preempted
stopped=0
# shellcheck disable=SC2329 # the traps call it
pass_on() {
  stopped=$2
  kill -"$1" -- "-$launcher" 2>/dev/null || true
}
set -m # a group of its own: Ctrl-C reaches it through pass_on, once
"${command[@]}" </dev/null &
launcher=$!
set +m
trap 'pass_on INT 130' INT
trap 'pass_on TERM 143' TERM HUP USR1

status=0
wait "$launcher" || status=$?
if ((stopped)); then # the signal ended the wait, not yet the launcher
  while kill -0 -- "-$launcher" 2>/dev/null; do sleep 0.1; done
fi

if ((status)) && [[ -s $preempted ]]; then
  echo "launch/local.sh: preempted, with a checkpoint written; the same command goes on from there" >&2
  exit 75
fi
if ((stopped)); then exit "$stopped"; fi
exit $((status ? 1 : 0))
