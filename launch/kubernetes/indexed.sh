#!/usr/bin/env bash
# The pods of the elastic Indexed Job run this: sshd in each, and in the pod with index 0 launcher.sh too.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # sh launch/kubernetes/indexed.sh
set -uo pipefail

usage() {
  cat <<'END'
usage: launch/kubernetes/indexed.sh --min-np N [--max-np M] [arguments of job/train.py]

Runs sshd. In the pod with index 0 it also runs launch/kubernetes/launcher.sh, with all pods of the job for hosts. When a
pod has to go, its ranks stop with all others, after a checkpoint, and the others go on without it.

environment:
  JOB_COMPLETION_INDEX   set by Kubernetes
  JOB_HOSTS              the number of pods
  JOB_RANKS_PER_HOST     ranks in each pod
  JOB_COORDINATOR        the DNS name of pod 0, such as train-0.train

exit codes:   75 this pod was asked to go, 3 its sshd has ended; in pod 0 those of launcher.sh
END
}

here=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P)
if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage && exit 0; fi
for name in JOB_COMPLETION_INDEX JOB_HOSTS JOB_RANKS_PER_HOST JOB_COORDINATOR; do
  if [[ ! ${!name:-} ]]; then
    echo "indexed.sh: $name is not set; --help tells what it is" >&2
    exit 2
  fi
done
options=()
while [[ ${1:-} =~ ^--(min|max)-np$ ]]; do
  options+=("$1" "${2:-}")
  shift 2
done

/usr/sbin/sshd -De -f ~/.sshd_config &
sshd=$!
if ((JOB_COMPLETION_INDEX == 0)); then
  hostfile=$(mktemp -d)/hostfile
  for ((index = 0; index < JOB_HOSTS; index++)); do
    echo "${JOB_COORDINATOR/-0./-$index.} slots=$JOB_RANKS_PER_HOST"
  done >"$hostfile"
  exec "$here/launcher.sh" "${options[@]}" "$hostfile" "$@"
fi

# 75 is what the job's podFailurePolicy forgives. sshd would not pass SIGTERM on to the ranks.
trap '"$here/prestop.sh"; exit 75' TERM
wait "$sshd"
echo "indexed.sh: sshd has ended" >&2
exit 3
