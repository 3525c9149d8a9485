#!/usr/bin/env bash
# A worker pod runs this when it has to go (its preStop hook): its ranks get the signal, and time for their checkpoint.
#
# Without this, SIGTERM would reach sshd alone, and the ranks would be killed with the container. All ranks of the job
# stop after the same step, with a checkpoint, and leave with exit code 75; launcher.sh goes on when all pods are back.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # sh launch/kubernetes/prestop.sh
set -uo pipefail
seconds=${1:-100} # shorter than terminationGracePeriodSeconds, which this counts against

touch /tmp/job-leaving # sshd answers a little longer than the ranks live: launcher.sh must not come back to this pod

# Processes with an argument .../train.py of its own; a shell that names it within a longer command is none of them.
ranks() { grep --no-messages --files-with-matches --null-data --line-regexp --extended-regexp '(.*/)?train\.py' \
  /proc/[0-9]*/cmdline | cut -d / -f 3; }

mapfile -t running < <(ranks)
if ((${#running[@]})); then kill -TERM "${running[@]}"; fi
end=$((SECONDS + seconds))
while [[ -n $(ranks) ]] && ((SECONDS < end)); do sleep 0.2; done
