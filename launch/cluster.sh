#!/usr/bin/env bash
# A person runs this, or the launcher pod: several machines over ssh. It finds Python; launch/cluster.py does the work.
[ -n "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # sh launch/cluster.sh
set -euo pipefail

me=launch/cluster.sh
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)
# shellcheck source=launch/shared/environment.sh
. "$root/launch/shared/environment.sh"
use_environment
forget_other_jobs
exec python "$root/launch/cluster.py" "$@"
