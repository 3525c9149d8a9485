#!/usr/bin/env bash
# A worker pod runs this when it has to go (its preStop hook): its ranks get the signal, and time for their checkpoint.
#
# Without this, SIGTERM would reach sshd alone, and the ranks would be killed with the container. The agent of
# launch/cluster.sh passes it on. All ranks of the job stop after the same step, with a checkpoint; then the others go on
# without this pod (--min-np), or launcher.sh goes on when all pods are back.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # sh launch/kubernetes/prestop.sh
set -uo pipefail
seconds=${1:-100} # shorter than terminationGracePeriodSeconds, which this counts against

touch /tmp/job-leaving # sshd answers a little longer than the ranks live: launcher.sh must not come back to this pod

# Processes with an argument .../agent.py of its own; a shell that names it within a longer command is none of them.
agents() { grep --no-messages --files-with-matches --null-data --line-regexp --extended-regexp \
  '(.*/)?launch/hosts/agent\.py' /proc/[0-9]*/cmdline | cut -d / -f 3; }

mapfile -t running < <(agents)
if ((${#running[@]})); then kill -TERM "${running[@]}"; fi
end=$((SECONDS + seconds))
while [[ -n $(agents) ]] && ((SECONDS < end)); do sleep 0.2; done
