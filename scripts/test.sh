#!/usr/bin/env bash
# The test suite with its dependencies:  scripts/test.sh [--python 3.12] [pytest arguments]
# A process for every core, four at most; a file's tests stay together, and no file is kept for
# last because it has few of them: those are the long ones. `-n 0`: one process.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
version=""
if [ "${1:-}" = "--python" ]; then
  version=$2
  shift 2
fi
env=".venv${version:+-$version}"
make_env "$env" "$(find_python "$version")" "[dev]"
exec "$env/bin/python" -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
