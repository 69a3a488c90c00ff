#!/usr/bin/env bash
# From nothing to recommendations: makes .venv, installs the package, then runs
# the whole way (launch/quickstart.py; all flags go there, --help lists them).
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
exec .venv/bin/python -m launch.quickstart "$@"
