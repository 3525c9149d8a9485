#!/usr/bin/env bash
# A person runs this, or make, or the build of the image: the one set-up.
#
# `make train`, `make test` and the Dockerfile all come through here, so what works for one works for all.
#
# It makes .venv beside job/: a Python that MXNet 1.9.1 accepts, the exact packages of requirements-*.txt, and Horovod
# built against them. Each stage leaves a stamp with a hash of what it was made from, so a second call finds nothing to
# do, a changed lock redoes only what it touches, and a call that was cut short is taken up where it can be trusted.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # sh launch/setup.sh
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/setup.sh [--gpu] [--no-data] [--no-dev]

Makes .venv (Python packages, and Horovod built from source) and fetches Fashion-MNIST.
You can run it again at any time: work that is done is not done again.

  --gpu       for NVIDIA GPUs: MXNet for CUDA 11, Horovod over NCCL
  --no-data   leave the data set for later
  --no-dev    leave out what only tests and lint need, for a machine that only trains (always so with --gpu)
  --help      this text

environment:
  PYTHON      the Python to use (3.9, 3.10 or 3.11); otherwise the first that fits on PATH
  JOBS        compilers at once (default: one for each core, if the memory is enough)
END
}

me=launch/setup.sh
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
# shellcheck source=launch/shared/environment.sh
. "$root/launch/shared/environment.sh"
unset PYTHONPATH PYTHONHOME
# Each of these has pip put packages elsewhere than into .venv, or other ones there.
pip_misleads='target prefix root user dry-run python platform python-version implementation abi editable no-binary'
for name in $pip_misleads; do
  name=${name//-/_}
  unset "PIP_${name^^}"
done
leave_out LD_LIBRARY_PATH 'libmpi.so*' 'libopen-rte.so*' 'libopen-pal.so*' 'libpmix.so*'
venv=$root/.venv
state=$root/.setup # the log and the lock live outside .venv, so that they outlive one that is thrown away
log=$state/log
variant=cpu
with_data=yes
without_dev=''
total=6
step=0

main() {
  while (($#)); do
    case $1 in
      --gpu) variant=gpu ;;
      --no-data) with_data=no total=5 ;;
      --no-dev) without_dev=' --no-dev' ;;
      -h | --help) usage && exit 0 ;;
      *) usage >&2 && exit 2 ;;
    esac
    shift
  done
  lock=$root/requirements-$variant.txt

  # What Horovod is built with. Both controllers: Gloo needs nothing on the machine, MPI is the faster one.
  build_options=(HOROVOD_WITH_MXNET=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITH_MPI=1
    HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1)
  if [[ $variant == gpu ]]; then
    # Not verified on a GPU: no machine of ours has one that MXNet 1.9.1 can use. What is verified: these wheels carry
    # every library that libmxnet.so names, and the linker finds them where link_cuda_libraries puts them.
    build_options+=(HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED)
  fi

  take_lock
  if ! environment_ready; then
    start_log
    choose_python
    stage "making .venv with Python $python_version" make_venv
    stage "installing the packages of ${lock##*/}" install_packages
    stage "building Horovod $(locked horovod) with Gloo and MPI (about 2 minutes)" build_horovod
    stage "checking that MXNet and Horovod work" check
    stamp ready "$(key ready)"
  else
    say "setup: .venv is ready"
  fi
  fetch_data
}

# --- keys and stamps -------------------------------------------------------------------------------------------------

# A stage is done when its stamp holds the hash of all that it depends on. The path is part of it, as scripts in .venv
# carry it: a checkout that was moved is set up again.
key() { # key STAGE
  local inputs
  inputs="$(readlink -f "$venv") $python_version $variant$without_dev"
  case $1 in
    venv) ;;
    packages) inputs+=$(cat "$lock") ;;
    horovod) inputs+=" ${build_options[*]} $(grep -E '^(horovod|mxnet[a-z0-9-]*|numpy|openmpi|cmake)==' "$lock")" ;;
    ready) inputs+=" ${build_options[*]} $(cat "$lock")" ;;
  esac
  sha256sum <<<"$inputs" | cut -d ' ' -f 1
}

stamped() { [[ -f $venv/.stamps/$1 && $(<"$venv/.stamps/$1") == "$2" ]]; }
stamp() { mkdir -p "$venv/.stamps" && echo "$2" >"$venv/.stamps/$1"; }
unstamp() { rm -f "$venv/.stamps/$1"; }

environment_ready() {
  [[ -f $venv/.stamps/ready ]] || return 1
  # Run it: a .venv whose Python was since removed is no environment.
  python_version=$("$venv/bin/python" -c "$print_version" 2>/dev/null) || return 1
  if [[ -n ${PYTHON:-} && $("$PYTHON" -c "$print_version" 2>/dev/null) != "$python_version" ]]; then return 1; fi
  stamped ready "$(key ready)"
}

# Two set-ups in one checkout would tear each other's .venv apart. The second waits, then finds the work done.
take_lock() {
  mkdir -p "$state"
  exec 9>"$state/lock"
  if ! flock --nonblock 9; then
    say "setup: another set-up is at work in this checkout; waiting for it (its log: $log)"
    flock 9
  fi
}

# --- stages ----------------------------------------------------------------------------------------------------------

# Minor versions only: a .venv outlives a security update of its Python.
print_version='import sys; print("%d.%d" % sys.version_info[:2])'
# Printed by a candidate: its version, or why it will not do.
probe_python='
import sys
version = "%d.%d" % sys.version_info[:2]
if not (3, 9) <= sys.version_info[:2] < (3, 12):
    sys.exit("is %s, too %s" % (version, "old" if sys.version_info < (3, 9) else "new"))
try:
    import ensurepip, venv
except ImportError:
    sys.exit("is %s but cannot make a virtual environment: apt-get install python%s-venv"
             % (version, version))
print(version)
'

choose_python() {
  next_step "looking for Python 3.9 to 3.11 and a C++ compiler"
  local candidate reason rejected=() candidates=(python3.11 python3.10 python3.9 python3)
  # A link to an environment that is ready for this lock has been taken; what else it leads to belongs to somebody.
  if [[ -L $venv ]] && compgen -G "$venv/*" >/dev/null; then
    fail "$venv is a link to $(readlink -f "$venv"), which is not the environment of this checkout." \
      "Remove the link (rm $venv), or set up the checkout that it leads to; then run this again."
  fi
  [[ $(uname -sm) == "Linux x86_64" ]] ||
    fail "MXNet 1.9.1 exists only for Linux on x86-64, and this is $(uname -sm)."
  if [[ -n ${PYTHON:-} ]]; then
    candidates=("$PYTHON")
  elif python_version=$("$venv/bin/python" -c "$print_version" 2>/dev/null) && venv_is_sound; then
    candidates=("$venv/bin/python") # the one that was chosen once, be it on PATH or not
  fi
  python=''
  for candidate in "${candidates[@]}"; do
    if ! command -v "$candidate" >/dev/null; then
      rejected+=("$candidate is not on PATH")
    # Only running it tells: a pyenv shim is on PATH whether or not there is a Python behind it.
    elif reason=$("$candidate" -c "$probe_python" 2>&1); then
      python=$(command -v "$candidate") python_version=$reason
      break
    else
      reason=${reason%%$'\n'*}
      if [[ $reason == is\ * ]]; then rejected+=("$candidate $reason"); else rejected+=("$candidate does not run: $reason"); fi
    fi
  done
  [[ -n $python ]] || fail "MXNet 1.9.1 needs Python 3.9, 3.10 or 3.11, and none was found:" \
    "${rejected[@]/#/  }" \
    "Get one in any of these ways, then run this again:" \
    "  apt-get install python3.11 python3.11-venv                 (Debian 12; Ubuntu 22.04 has 3.10)" \
    "  uv python install 3.11     then  PYTHON=\"\$(uv python find 3.11)\" make setup" \
    "  pyenv install 3.11         then  PYTHON=\"\$(pyenv prefix 3.11)/bin/python\" make setup"

  local tool missing=()
  for tool in gcc g++ make; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  if ((${#missing[@]})); then
    fail "Horovod is built from source, and this machine lacks: ${missing[*]}." "Install them: apt-get install build-essential"
  fi
  if [[ $variant == gpu ]]; then
    [[ -x ${HOROVOD_CUDA_HOME:-${CUDA_HOME:-/usr/local/cuda}}/bin/nvcc ]] || command -v nvcc >/dev/null ||
      fail "Horovod's NCCL operations need nvcc, and there is none." \
        "Install the CUDA 11 toolkit (or use a CUDA 11.8 devel image) and name it: CUDA_HOME=/usr/local/cuda-11.8"
  fi
  end_step "Python $python_version"
}

# A stamp alone does not tell: pip may have been made to put the packages elsewhere.
packages_are_there() {
  "$venv/bin/python" -c '# no "import mxnet", which needs a driver
import importlib.util, sys
sys.exit(not importlib.util.find_spec("mxnet"))' 2>/dev/null
}

# Without the packages stamp it was cut short while pip wrote into it, and nothing in it can be trusted.
venv_is_sound() { packages_are_there && stamped venv "$(key venv)" && [[ -f $venv/.stamps/packages ]]; }

make_venv() {
  if venv_is_sound && "$venv/bin/python" -c ''; then
    echo "keeping $venv"
    return
  fi
  rm -rf "$venv"
  "$python" -m venv "$venv"
  stamp venv "$(key venv)"
}

# Reads `pip config list`, and prints what files (pip.conf) say as variables: the words of a section for one command, such
# as [install], count more than those for all.
print_pip_settings='
import ast, sys
settings = {}
lines = [line.partition("=") for line in sys.stdin.read().splitlines()]
for place, _, value in sorted(lines, key=lambda line: not line[0].startswith("global.")):
    section, _, name = place.rpartition(".")
    if section in ("global", "install", "wheel") and name not in sys.argv[1].split():
        settings[name] = " ".join(ast.literal_eval(value).split())
for name, value in settings.items():
    print("PIP_" + name.upper().replace("-", "_") + "=" + value, end="\0")
'

# A file of the user or of the site may mislead pip as the variables do, and no option undoes that. So pip reads none of
# them, and gets the rest of what they say, such as the index and its certificates, as variables.
lead_pip() {
  local setting
  while IFS= read -r -d '' setting; do
    if [[ ! -v ${setting%%=*} ]]; then export "${setting?}"; fi
  done < <("$venv/bin/python" -m pip config list | "$venv/bin/python" -c "$print_pip_settings" "$pip_misleads")
  export PIP_CONFIG_FILE=/dev/null
}

install_packages() {
  if stamped packages "$(key packages)"; then return; fi
  lead_pip
  unstamp packages
  unstamp ready
  lock_entries not horovod >"$state/requirements.txt"
  if [[ -n $without_dev ]]; then leave_out_dev; fi
  "$venv/bin/python" -m pip install --require-hashes -r "$state/requirements.txt"
  if [[ $variant == gpu ]]; then link_cuda_libraries; fi
  stamp packages "$(key packages)"
}

# libmxnet.so looks for its libraries beside itself (RPATH $ORIGIN), so links there serve every way of starting Python;
# LD_LIBRARY_PATH would have to be carried to every rank on every host. libnccl.so is for Horovod's own link.
link_cuda_libraries() {
  local packages
  packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  ln -sf libnccl.so.2 "$packages/nvidia/nccl/lib/libnccl.so"
  (cd "$packages/mxnet" && ln -sf ../nvidia/*/lib/*.so* .)
}

build_horovod() {
  if stamped horovod "$(key horovod)"; then return; fi
  lead_pip
  unstamp horovod
  rm -rf "$state/wheel"
  lock_entries only horovod >"$state/requirements-horovod.txt"
  local bin=$venv/bin python=$venv/bin/python tool
  # Open MPI's compilers answer CMake without quoting, so Horovod cannot be built under a path with a space in it.
  # There it sees .venv under a plain name instead, for as long as the build takes.
  if [[ $venv == *[[:space:]]* ]]; then
    alias=$(mktemp -d)
    trap 'rm -r "$alias"' EXIT # of this stage, which is a process of its own
    ln -s "$venv" "$alias/venv"
    mkdir "$alias/bin"
    for tool in mpicc mpicxx mpiexec; do # CMake looks for the compilers beside mpiexec
      printf '#!/bin/sh\n"%s/bin/%s" "$@" | sed "s|%s|%s/venv|g"\n' "$venv" "$tool" "$venv" "$alias" >"$alias/bin/$tool"
    done
    chmod +x "$alias/bin/"*
    bin=$alias/bin:$alias/venv/bin python=$alias/venv/bin/python
  fi
  local options=("${build_options[@]}")
  if [[ $variant == gpu ]]; then options+=("HOROVOD_NCCL_HOME=$(dirname "$venv"/lib/python3*/site-packages/nvidia/nccl/lib)"); fi
  # --no-cache-dir: pip would offer a Horovod wheel that some other project built, with other options.
  # MAKEFLAGS: Horovod takes its number of compilers from it, and a surrounding make must not lend it its own.
  # The rpath finds libmpi.so (in .venv/lib) and libmxnet.so from where Horovod's own library lies.
  env "${options[@]}" PATH="$bin:$PATH" MAKEFLAGS="-j$(jobs_that_fit)" \
    LDFLAGS="-Wl,-rpath,\$ORIGIN/../../../..:\$ORIGIN/../../mxnet ${LDFLAGS:-}" \
    "$python" -m pip wheel --verbose --no-cache-dir --no-build-isolation --no-deps --require-hashes \
    --wheel-dir "$state/wheel" -r "$state/requirements-horovod.txt"
  # In two steps, because the Python that installs writes its own name into horovodrun.
  "$venv/bin/python" -m pip install --no-deps --force-reinstall "$state"/wheel/horovod-*.whl
  rm -r "$state/wheel"
  stamp horovod "$(key horovod)"
}

check() {
  local report wanted
  report=$("$venv/bin/horovodrun" --check-build)
  echo "$report"
  for wanted in MXNet MPI Gloo $([[ $variant == cpu ]] || echo NCCL); do
    if ! grep -qF "[X] $wanted" <<<"$report"; then
      unstamp horovod
      echo "error: horovodrun --check-build does not list $wanted"
      return 1
    fi
  done
  # The GPU build of MXNet links the driver's own library, which a machine that only builds an image does not have.
  if [[ $variant == gpu ]] && ! ldconfig -p | grep -q 'libcuda\.so\.1'; then
    echo "no NVIDIA driver here: the imports are not checked"
    return
  fi
  "$venv/bin/python" -c 'import mxnet, horovod.mxnet'
  "$venv/bin/mpirun" --version
}

# A stage of its own: it needs the network (or Debian's package), and has its own way of saying what it found.
fetch_data() {
  if [[ $with_data == no ]]; then return; fi
  if ((step)); then say "setup: [$total/$total] fetching Fashion-MNIST"; fi
  (cd "$root" && "$venv/bin/python" -m job.data) || {
    say "setup: the environment is ready, the data set is not; what to do is said above. Then run this again."
    exit 1
  }
}

# --- the lock file ---------------------------------------------------------------------------------------------------

# An entry is its first line and the indented lines after it.
lock_entries() { # lock_entries only|not PACKAGE
  awk -v mode="$1" -v name="$2" '/^[^ #]/ { mine = index($0, name "==") == 1 } (mode == "only") == mine' "$lock"
}

# The GPU lock has its versions from the CPU lock and leaves out `dev` (see `make lock`). So what the CPU lock has beyond
# it, other than MXNet's own build for CPUs, is for development; and so is NVIDIA's compiler where there is no GPU.
leave_out_dev() {
  awk -v variant="$variant" '{ name = $1; sub(/==.*/, "", name) }
    FNR == NR { trains[name]; next }
    /^[^ #]/ { mine = name == "mxnet" || (name in trains && (variant == "gpu" || name !~ /^nvidia-/)) }
    mine' "$root/requirements-gpu.txt" "$state/requirements.txt" >"$state/requirements-no-dev.txt"
  mv "$state/requirements-no-dev.txt" "$state/requirements.txt"
}

locked() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" "$lock" | head -n 1; }

# A compiler on MXNet's headers takes about 1.5 GB. One core with enough memory beats 64 that are killed.
jobs_that_fit() {
  local cores memory
  cores=$(nproc)
  memory=$(awk '/^MemAvailable:/ { print int($2 / 1500000) }' /proc/meminfo)
  if ((memory < cores)); then cores=$((memory > 0 ? memory : 1)); fi
  echo "${JOBS:-$cores}"
}

# --- telling what happens --------------------------------------------------------------------------------------------

say() { printf '%s\n' "$*"; }

start_log() {
  : >"$log"
  log_start=1
}

next_step() {
  step=$((step + 1))
  title="setup: [$step/$total] $1"
  started=$SECONDS
  log_start=$(($(wc -l <"$log") + 1))
  printf '=== %s\n' "$title" >>"$log"
  if [[ -t 1 ]]; then printf '%s ...' "$title"; fi
}

end_step() {
  if [[ -t 1 ]]; then printf '\r\033[K'; fi
  say "$title ... ${1:+$1, }$((SECONDS - started)) s"
}

# Runs a stage in the background, all its output into the log, and shows that it lives.
stage() { # stage TITLE FUNCTION
  local status=0 shown=$SECONDS
  next_step "$1"
  set -m # a process group of its own, so that Ctrl-C can end the compilers too
  "$2" >>"$log" 2>&1 </dev/null &
  running=$!
  set +m
  while kill -0 "$running" 2>/dev/null; do
    if [[ -t 1 ]] && ((SECONDS > shown)); then
      shown=$SECONDS
      printf '\r\033[K%.*s' "$(($(tput cols 2>/dev/null || echo 80) - 1))" "$title ... $((SECONDS - started)) s  $(last_news)"
    elif ((SECONDS >= shown + 15)); then
      shown=$SECONDS
      say "$title ... $((SECONDS - started)) s so far: $(last_news)"
    fi
    sleep 0.1
  done
  wait "$running" || status=$?
  running=''
  if ((status)); then explain_failure; fi
  end_step
}

# The last thing that a person could follow: what pip fetches, or how far the compiler is.
last_news() {
  tail -n +"$log_start" "$log" | grep -oE '\[ *[0-9]+%\] (Building|Linking|Built).*|(Collecting|Downloading|Installing|Building) .*' |
    tail -n 1 | sed -E 's|Building CXX object .*/(.*)\.o$|compiling \1|; s|^Installing collected packages.*|installing what was downloaded|' | cut -c -70 || true
}

fail() { # fail REASON [LINE...]
  if [[ -t 1 ]]; then echo; fi
  { say "$title: failed" && printf '  %s\n' "$@"; } | tee -a "$log" >&2
  exit 1
}

# The lines of this stage that look like the reason, and advice for the reasons that are common.
explain_failure() {
  local output reason advice
  output=$(tail -n +"$log_start" "$log")
  # The first ones: what follows a compiler's error is mostly its echo.
  reason=$(grep -E '[Ee]rror: |(^| )ERROR: |CMake Error|No space left|Killed signal|\[Errno' <<<"$output" | head -n 6 || true)
  if [[ -z $reason ]]; then reason=$(tail -n 6 <<<"$output"); fi
  case $output in
    *"No space left"*) advice="The disk is full: .venv and its build take about 2 GB. Free some, then run this again." ;;
    *"Killed signal"* | *"std::bad_alloc"*) advice="The compiler ran out of memory. Try again with one at a time: JOBS=1 make setup" ;;
    *"Temporary failure in name resolution"* | *"Max retries exceeded"* | *"Read timed out"* | *"Connection"*"refused"*)
      advice="The package index was not reached. Check the network, or pip's own settings (pip config list), then run this again." ;;
    *"DO NOT MATCH THE HASHES"*)
      advice="A package differs from the one that was locked: a damaged download (pip cache purge), or a changed package. Do not work around it." ;;
    *) advice="The whole story is in the log. Running this again takes up the work at this step." ;;
  esac
  if [[ -t 1 ]]; then printf '\r\033[K'; fi
  {
    say "$title: failed after $((SECONDS - started)) s"
    cut -c -200 <<<"$reason" | sed 's/^/  | /'
    say "  $advice"
    say "  log: $log"
  } >&2
  exit 1
}

running=''
stop() { # on a signal: end the whole process group of the stage
  trap - EXIT INT TERM
  if [[ -n $running ]]; then kill -TERM -- "-$running" 2>/dev/null || true; fi
  say "" "setup: stopped. What was finished stays; run this again to go on." >&2
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM HUP

main "$@"
