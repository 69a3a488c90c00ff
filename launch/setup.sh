#!/usr/bin/env bash
# Makes .venv and installs the package into it; a second run does nothing
# unless setup.cfg changed or the first was interrupted. $PYTHON names the
# Python to take. Usage: bash launch/setup.sh [extras]
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}"
# Every extra installed so far stays wanted, so quickstart and tests share one
# environment without reinstalling each other's.
stamp=.venv/installed_${extras:-base}
unfinished=.venv/unfinished
wanted="$(cksum setup.cfg pyproject.toml)"
if [[ ! -e "$unfinished" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then exit 0; fi
# Run, not only looked up: a version manager's stub is there without its Python.
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' &> /dev/null; }
python="${PYTHON:-}"
for name in python3 python3.11 python3.12 python3.13; do
  if [[ -z "$python" ]] && new_enough "$name"; then python="$name"; fi
done
new_enough "${python:-python3}" || { echo "onerec_jax needs Python >= 3.11; name one with PYTHON=/path/to/python" >&2; exit 1; }
# After an interrupted run all is installed once more: pip takes a half-written
# package for an installed one.
again=""
if [[ -e "$unfinished" ]]; then again=--force-reinstall; fi
if ! .venv/bin/python -m pip install --help &> /dev/null; then
  # One that was made otherwise and only lacks pip gets it and keeps the rest.
  if [[ -e "$unfinished" || ! -x .venv/bin/python ]]; then rm -rf .venv; fi
  mkdir -p .venv
  touch "$unfinished"
  "$python" -m venv .venv
fi
touch "$unfinished"
echo "Installing onerec_jax${extras:+[$extras]} into .venv (a minute or two) ..."
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
  $again -e ".${extras:+[$extras]}"
# What pip would do on one core. Some packages bring files that do not compile.
.venv/bin/python -m compileall -qq -j 0 .venv/lib || true
echo "$wanted" > "$stamp"
rm "$unfinished"
