#!/usr/bin/env bash
# Makes .venv and installs the package into it; a second run does nothing
# unless setup.cfg changed. Usage: bash launch/setup.sh [extras]
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}"
# Every extra installed so far stays wanted, so quickstart and tests share one
# environment without reinstalling each other's.
stamp=.venv/installed_${extras:-base}
wanted="$(cksum setup.cfg pyproject.toml)"
if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then exit 0; fi
python="${PYTHON:-python3}"
"$python" - <<'PY' || { echo "onerec_jax needs Python >= 3.11; name one with PYTHON=/path/to/python" >&2; exit 1; }
import sys
sys.exit(sys.version_info < (3, 11))
PY
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
echo "Installing onerec_jax${extras:+[$extras]} into .venv (a minute or two) ..."
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
echo "$wanted" > "$stamp"
