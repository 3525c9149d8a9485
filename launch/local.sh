#!/usr/bin/env bash
# A person runs this: one machine, N ranks.
# It checks the configuration once, before any rank starts, and then is `mpirun` or `horovodrun` with
# the options that one always wants. The working directory stays yours: relative paths are from there.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # sh launch/local.sh
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/local.sh [-np N] [--min-np M] [--gloo] [--dry-run] [arguments of job/train.py]

  -np N       ranks (default: one for each GPU, or 2 without a GPU)
  --min-np M  when a rank dies, the others go on at once, as long as M ranks can (over Gloo; docs/elastic.md)
  --gloo      use Gloo; the default is MPI if there is an mpirun, because it is faster on one machine
  --dry-run   print the command and stop
  --help      this text; `python job/train.py --help` lists the arguments of train.py

example:      launch/local.sh -np 4 --config configs/smoke.yaml run.dir=runs/first
environment:
  JOB_END_TIMEOUT_SECONDS  from the first rank that has ended to the end of all, before they are killed (default: 60)

exit codes:   0 done, 1 failed, 2 bad configuration or usage (nothing was started), 75 preempted with a checkpoint
              written, 130 or 143 stopped by a signal without a checkpoint

To continue a run that was stopped, give the same command again: it adds run.resume=auto, unless your arguments have
run.resume or run.overwrite. SIGTERM or SIGUSR1 stops all ranks after their step, with a checkpoint; a second one
stops them at once. After Ctrl-C they have about a second.
END
}

me=launch/local.sh
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
# shellcheck source=launch/shared/environment.sh
. "$root/launch/shared/environment.sh"
ranks=
least=
controller=
dry_run=no
resume=(run.resume=auto)
arguments=()

while (($#)); do
  case $1 in
    -np) ranks=${2:-nothing} && shift ;;
    --min-np) least=${2:-nothing} && shift ;;
    --gloo) controller=gloo ;;
    --dry-run) dry_run=yes ;;
    -h | --help) usage && exit 0 ;;
    run.resume=* | run.overwrite=*) resume=() && arguments+=("$1") ;;
    *) arguments+=("$1") ;;
  esac
  shift || break # -np without its number
done
arguments+=("${resume[@]}")

use_environment
forget_other_jobs
if [[ -z $ranks ]]; then
  ranks=$(python -I "$root/job/distributed/gpus.py") # as MXNet will see them
  if [[ $ranks == 0 ]]; then ranks=2; fi
fi
if ! [[ $ranks =~ ^[1-9][0-9]{0,4}$ ]]; then
  say "-np takes a number of ranks, 1 or more, not '$ranks'"
  exit 2
fi
if [[ -n $least ]] && ! { [[ $least =~ ^[1-9][0-9]{0,4}$ ]] && ((least <= ranks)); }; then
  say "--min-np takes a number of ranks, from 1 to that of -np, $ranks; not '$least'"
  exit 2
fi
end_timeout=${JOB_END_TIMEOUT_SECONDS:-60}
if ! [[ $end_timeout =~ ^[1-9][0-9]{0,5}$ ]]; then
  say "JOB_END_TIMEOUT_SECONDS takes a number of seconds, 1 or more, not '$end_timeout'"
  exit 2
fi
if [[ -n $least ]]; then
  command=(python "$root/launch/elastic" -np "$ranks" --min-np "$least" "${arguments[@]}")
  [[ $dry_run == yes ]] || exec "${command[@]}"
  printf '%q ' "${command[@]}" && echo
  exit 0
fi
if [[ -z $controller ]] && command -v mpirun >/dev/null; then controller=mpi; fi

training=(python "$root/job/train.py" "${arguments[@]}")
if [[ $controller == mpi ]]; then
  # What benchmarks/step_time.py found fastest. A rank that waits yields its core; messages go through shared memory
  # alone, without the call that containers forbid; no other machine is asked for, by ssh or by a batch system.
  # Open MPI refuses root, unless told twice, who is the only user that many containers have.
  # What a site's module says of mapping and binding is for its clusters: unset. PMIx keeps its data in memory (hash): in
  # shared files it waits for a lock for ever where TMPDIR is full or files run out. regx naive: the other kind cannot
  # spell a host name with an underscore.
  settings=(HOROVOD_CONTROLLER=mpi HOROVOD_CPU_OPERATIONS=mpi PMIX_MCA_gds=hash)
  as_root=(OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1)
  command=(env "${settings[@]}" "${as_root[@]}" mpirun -np "$ranks" --host "localhost:$ranks" --bind-to none
    --mca mpi_yield_when_idle 1 --mca pml ob1 --mca btl "vader,self" --mca btl_vader_single_copy_mechanism none
    --mca regx naive --mca plm isolated --mca ras "^slurm,tm,lsf,gridengine" "${training[@]}")
  for name in $(compgen -e); do
    if [[ $name =~ ^OMPI_MCA_(rmaps|orte|hwloc_base_binding_policy|mtl|regx|ess|routed|oob) ]]; then unset "$name"; fi
  done
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
env HOROVOD_RANK=0 HOROVOD_SIZE="$ranks" HOROVOD_CONTROLLER="${controller:-gloo}" \
  python "$root/job/train.py" --check "${arguments[@]}" >/dev/null || contract $?

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

# An mpirun that runs out of files waits for ever, before it has started a rank.
files=$((64 + 16 * ranks))
if [[ $(ulimit -S -n) != unlimited ]] && (($(ulimit -S -n) < files)) && ! ulimit -S -n $files 2>/dev/null; then
  say "a process may open only $(ulimit -H -n) files here, and the launcher of $ranks ranks may need $files: raise the" \
    "hard limit (ulimit -H -n; in a container --ulimit nofile=4096)"
  exit 1
fi

# A rank that leaves with a checkpoint writes to it: no launcher tells that from a failure.
if ! preempted=$(mktemp 2>/dev/null); then
  say "cannot write to ${TMPDIR:-/tmp}; make that folder, free some of its disk, or name another one with TMPDIR"
  exit 1
fi
trap 'rm -rf "$preempted" ${shared:+"$shared"}' EXIT
export JOB_PREEMPTED_FILE=$preempted
# A folder of its own for the memory that ranks share: an mpirun that is killed leaves 4 MiB a rank.
if [[ $controller == mpi ]] && shared=$(mktemp -d /dev/shm/local.sh.XXXXXX 2>/dev/null); then
  export OMPI_MCA_btl_vader_backing_directory=$shared
fi
stopped=0
watching='' killing=''

# First the launcher, which would otherwise report, and wait for, each of the others.
kill_all() {
  local family=() pid
  find_family "$launcher"
  kill -KILL -- "-$launcher" 2>/dev/null || true
  for pid in "${family[@]}"; do kill -KILL -- "-$pid" "$pid" 2>/dev/null || true; done
}
# Waits, while the launcher and this script are there. A sleep that outlives them must hold nobody's pipe.
pause() { sleep 1 >/dev/null 2>&1 && [[ -d /proc/$launcher ]] && kill -0 $$ 2>/dev/null; }
kill_after() { # kill_after SECONDS WORDS
  local seconds=$1
  while ((seconds-- > 0)); do pause || return 0; done
  say "$2; killing what is left"
  kill_all
}
dead() { # whether process $1 is
  local line=')  Z'
  { read -r line <"/proc/$1/stat"; } 2>/dev/null || true
  [[ ${line##*) } == Z* ]]
}
# The ranks are the children of mpirun, which may wait for ever when it has lost one.
watch_ranks() {
  local pid children seen=' '
  while pause; do
    find_children "$launcher"
    for pid in "${children[@]}"; do [[ $seen == *" $pid "* ]] || seen+="$pid "; done
    for pid in $seen; do
      if dead "$pid"; then
        kill_after "$end_timeout" "a rank ended $end_timeout s ago, and mpirun is still there"
        return
      fi
    done
  done
}
# shellcheck disable=SC2329 # the traps call them
pass_on() {
  if ((stopped)) && [[ -z $killing ]]; then
    kill_after $((end_timeout < 10 ? end_timeout : 10)) 'not over some seconds after the second signal' &
    killing=$!
  fi
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

# In the background, for a shell that waits for a foreground command hears no signal. A signal to this script, and
# Ctrl-C, goes on to the launcher in a process group of its own, so that it gets it once. `stty tostop` stops background
# groups that write to the terminal, and this one for ever, unless the signal is ignored.
trap '' TTOU
set -m
"${command[@]}" </dev/null &
launcher=$!
set +m
trap '' PIPE # not before the launcher, which would inherit it
trap 'pass_on INT 130' INT
trap preempt TERM HUP USR1
if [[ $controller == mpi ]]; then
  watch_ranks &
  watching=$!
fi

status=0
wait "$launcher" || status=$?
if ((stopped)); then # the signal ended the wait, not yet the launcher
  while kill -0 -- "-$launcher" 2>/dev/null; do sleep 0.1; done
fi
for pid in $watching $killing; do kill "$pid" 2>/dev/null || true; done

if [[ -s $preempted ]] || ((status == 75)); then
  say 'preempted, with a checkpoint written; the same command goes on from there'
  exit 75
fi
if ((stopped)); then exit "$stopped"; fi
exit $((status ? 1 : 0))
