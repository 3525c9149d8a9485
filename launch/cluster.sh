#!/usr/bin/env bash
# A person runs this, or the launcher pod: several machines over ssh. It finds Python; launch/cluster.py does the work.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
if [[ -d $root/.venv ]]; then PATH=$root/.venv/bin:$PATH; fi
if ! { command -v horovodrun && command -v python; } >/dev/null; then
  echo "launch/cluster.sh: no Horovod in .venv nor on PATH; \`make setup\` installs it" >&2
  exit 1
fi
exec python "$root/launch/cluster.py" "$@"
