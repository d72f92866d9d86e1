#!/usr/bin/env bash
# From a fresh clone to a table: installs into .venv and runs the whole loop on simulated data.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
make_env .venv "$(find_python "")" ""
.venv/bin/loopfm run configs/synthetic.py "$@"
