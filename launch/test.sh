#!/usr/bin/env bash
# Sets up .venv, then runs lint, format check, import rule and all tests.
# Usage: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh dev
# The TPU compiler, for the tests that compile for TPUs; beside the environment,
# since JAX would look for a TPU in every program that finds it.
libtpu=.venv/libtpu
tpu_compiler() {
  [[ -d $libtpu ]] || .venv/bin/python -m pip install --quiet --no-deps \
    --disable-pip-version-check --target "$libtpu" "libtpu==0.0.42.*" ||
    echo "no libtpu: the tests that compile for TPUs are skipped" >&2
}
# Spark, for the test that it prepares the same data as DuckDB.
spark() {
  ! command -v java > /dev/null || .venv/bin/python -m pip install --quiet \
    --disable-pip-version-check "pyspark>=4,<5" ||
    echo "no pyspark: its tests are skipped" >&2
}
# Both download much: beside each other, and beside what needs neither. Where
# that fails, they are not left behind.
trap wait EXIT
tpu_compiler & spark &
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports
wait
export PYTHONPATH="$PWD/$libtpu${PYTHONPATH:+:$PYTHONPATH}"
# One process per core; each gets its own eight-device CPU mesh (conftest.py).
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
