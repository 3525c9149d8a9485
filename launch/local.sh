#!/usr/bin/env bash
# A person runs this: one machine, N ranks.
# It checks the configuration once, before any rank starts, and then is `mpirun` or `horovodrun` with
# the options that one always wants. The working directory stays yours: relative paths are from there.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/local.sh [-np N] [--gloo] [--dry-run] [arguments of job/train.py]

  -np N       ranks (default: one for each GPU, or 2 without a GPU)
  --gloo      use Gloo; the default is MPI if there is an mpirun, because it is faster on one machine
  --dry-run   print the command and stop
  --help      this text; `python job/train.py --help` lists the arguments of train.py

example:      launch/local.sh -np 4 --config configs/smoke.yaml run.dir=runs/first
exit codes:   0 done, 1 failed, 2 bad configuration or usage (nothing was started), 75 preempted with a checkpoint
              written, 130 or 143 stopped by a signal without a checkpoint

To continue a run that was stopped, give the same command again: it adds run.resume=auto, unless your arguments have
run.resume or run.overwrite. SIGTERM or SIGUSR1 stops all ranks after their step, with a checkpoint; a second one
stops them at once. After Ctrl-C they have about a second.
END
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
ranks=$(timeout 20 nvidia-smi -L 2>/dev/null | grep -c '^GPU') || ranks=2
controller=
dry_run=no
resume=(run.resume=auto)
arguments=()

while (($#)); do
  case $1 in
    -np) ranks=${2:-nothing} && shift ;;
    --gloo) controller=gloo ;;
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
if [[ -z $controller ]] && command -v mpirun >/dev/null; then controller=mpi; fi

training=(python "$root/job/train.py" "${arguments[@]}")
if [[ $controller == mpi ]]; then
  # What benchmarks/step_time.py found fastest. A rank that waits yields its core; messages go through shared memory
  # alone, without the call that containers forbid; no other machine is asked for, by ssh or by a batch system.
  # Open MPI refuses root, unless told twice, who is the only user that many containers have.
  settings=(HOROVOD_CONTROLLER=mpi HOROVOD_CPU_OPERATIONS=mpi "HOROVOD_CYCLE_TIME=${HOROVOD_CYCLE_TIME:-0.5}")
  as_root=(OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1)
  command=(env "${settings[@]}" "${as_root[@]}" mpirun -np "$ranks" --host "localhost:$ranks" --bind-to none
    --mca mpi_yield_when_idle 1 --mca pml ob1 --mca btl "vader,self" --mca btl_vader_single_copy_mechanism none
    --mca plm isolated --mca ras "^slurm,tm,lsf,gridengine" "${training[@]}")
else
  # --disable-cache: horovodrun would remember for an hour what it once found out about a host, right or wrong.
  command=(horovodrun --disable-cache --gloo -np "$ranks" -H "localhost:$ranks" "${training[@]}")
fi

if [[ $dry_run == yes ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi

# One message now instead of N messages and a launcher's traceback later. The number of ranks is part of the check.
env HOROVOD_RANK=0 HOROVOD_SIZE="$ranks" python "$root/job/train.py" --check "${arguments[@]}" >/dev/null || exit

if [[ $controller == mpi ]]; then
  stop=USR1 # mpirun hands it on; at SIGTERM it kills
  # mpirun gives each rank a terminal: without a size, and even if there is none to show it on.
  if [[ -t 1 ]]; then
    export JOB_TERMINAL=yes
    { size=$(stty size <&3 2>/dev/null) || size='0 0'; } 3>&1
    if ((${size#* })); then export COLUMNS=${size#* }; fi
  else
    export TERM=dumb
  fi
else
  stop=TERM # which horovodrun hands on; SIGUSR1 would end it
fi

# In the background, for a shell that waits for a foreground command hears no signal. A signal to this script, and
# Ctrl-C, goes on to the launcher in a process group of its own, so that it gets it once.
preempted=$(mktemp) # a rank that leaves with a checkpoint writes to it: no launcher tells that from a failure
trap 'rm -f "$preempted"' EXIT
export JOB_PREEMPTED_FILE=$preempted
stopped=0
say() { echo "launch/local.sh: $*" >&2 || true; } # whoever read it may be gone
# shellcheck disable=SC2329 # the traps call them
pass_on() {
  stopped=$2
  kill -"$1" -- "-$launcher" 2>/dev/null || true
}
# shellcheck disable=SC2329
preempt() {
  local before=$stopped
  pass_on "$stop" 143
  stop=TERM
  ((before)) || say 'stopping after this step, with a checkpoint; a second signal stops at once'
}
set -m
"${command[@]}" </dev/null &
launcher=$!
set +m
trap '' PIPE # not before the launcher, which would inherit it
trap 'pass_on INT 130' INT
trap preempt TERM HUP USR1

status=0
wait "$launcher" || status=$?
if ((stopped)); then # the signal ended the wait, not yet the launcher
  while kill -0 -- "-$launcher" 2>/dev/null; do sleep 0.1; done
fi

if [[ -s $preempted ]] || ((status == 75)); then
  say 'preempted, with a checkpoint written; the same command goes on from there'
  exit 75
fi
if ((stopped)); then exit "$stopped"; fi
exit $((status ? 1 : 0))
