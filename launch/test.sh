#!/usr/bin/env bash
# Sets up .venv, then runs lint, format check, import rule and all tests.
# Usage: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports
# One process per core; each gets its own eight-device CPU mesh (conftest.py).
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
