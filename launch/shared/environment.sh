# shellcheck shell=bash disable=SC2154
# What the shell launchers share. To be sourced, with `root`, the project's folder, and `me`, what messages begin with.

set +o posix # where sh is bash
# A container may run as a user whom it does not know. Then mpirun crashes, and what looks for ~ has none.
if [[ -z ${HOME:-} ]]; then
  HOME=~
  if [[ ! -d $HOME || $HOME == / ]]; then HOME=${TMPDIR:-/tmp}/home-$UID; fi
  export HOME
fi
unset CDPATH # `cd` would print where it went, and may go elsewhere

say() { echo "$me: $*" >&2 || true; } # whoever read it may be gone

# Puts .venv first, and out of its way what a site's modules or an earlier job have left in the environment and nobody
# can mean: each of these made ranks that crash, wait for ever, or train on their own.
use_environment() {
  if [[ -d $root/.venv ]]; then
    PATH=$root/.venv/bin:$PATH
    unset PYTHONHOME
    leave_out PYTHONPATH numpy mxnet horovod numba pydantic pydantic_core yaml psutil rich tensorboardX
    leave_out LD_LIBRARY_PATH 'libmpi.so*' 'libopen-rte.so*' 'libopen-pal.so*' 'libpmix.so*'
  fi
  if ! { command -v horovodrun && command -v python; } >/dev/null; then
    say "no Horovod in .venv nor on PATH; \`make setup\` installs it"
    exit 1
  fi
}

# The folders of the list $1 that hold one of the other arguments, which .venv has as well.
leave_out() {
  local name=$1 rest=${!1:-} folder pattern found kept='' left_out=''
  [[ -n $rest ]] || return 0
  rest+=:
  while [[ -n $rest ]]; do
    folder=${rest%%:*} rest=${rest#*:}
    for pattern in "${@:2}"; do
      for found in "$folder"/$pattern; do # the pattern is one
        if [[ -n $folder && -e $found && $folder != "$root"/.venv/* ]]; then left_out+="${left_out:+, }$folder" && continue 3; fi
      done
    done
    kept+=${kept:+:}$folder
  done
  [[ -n $left_out ]] || return 0
  say "$name without $left_out, which would hide packages of .venv"
  if [[ -n $kept ]]; then export "$name=$kept"; else unset "$name"; fi
}

# Variables that say where a rank of another job is. PMIx's and PMI's are from an srun or mpirun around this.
forget_other_jobs() {
  local name place='RANK|SIZE|LOCAL_RANK|LOCAL_SIZE|CROSS_RANK|CROSS_SIZE|HOSTNAME'
  for name in $(compgen -e); do
    if [[ $name =~ ^HOROVOD_($place|ELASTIC|CONTROLLER|CPU_OPERATIONS|GLOO_RENDEZVOUS_ADDR|GLOO_RENDEZVOUS_PORT)$ ||
      $name =~ ^(OMPI_COMM_WORLD|PMI|PMI2|PMIX)_ && $name != PMIX_MCA_* ]]; then unset "$name"; fi
  done
}

# The exit codes of the contract: 0 done, 2 bad configuration or usage, 75 preempted, and 1 for all else, such as 139.
contract() {
  case $1 in 0 | 2 | 75) return "$1" ;; *) return 1 ;; esac
}

# The children of process $1, in `children`: as /proc lists them, without a fork, and with the dead ones that it has not
# waited for. Nothing where the kernel keeps no such list.
find_children() {
  local file found
  children=()
  for file in "/proc/$1/task/"*/children; do
    found=()
    { read -r -a found <"$file"; } 2>/dev/null || true # there is no newline at its end
    children+=("${found[@]}")
  done
}

# All that descends from process $1, added to `family`.
find_family() {
  local pid children
  find_children "$1"
  for pid in "${children[@]}"; do
    family+=("$pid")
    find_family "$pid"
  done
}
