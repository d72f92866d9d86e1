#!/usr/bin/env bash
# The standard benchmark beside FuxiCTR (17 to 26 minutes on 2 cores):  scripts/bench.sh [options]
# Writes benchmarks/<device>-<date>.json and .svg. The peer gets an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
python=$(find_python "")
make_env .venv "$python" ""
peer=${LOOPFM_PEER_PYTHON:-.venv-peers/bin/python}
if ! "$peer" -c 'import torch, fuxictr' 2>/dev/null && [ -z "${LOOPFM_PEER_PYTHON:-}" ]; then
  echo "installing the peer into .venv-peers ..." >&2
  "$python" -m venv .venv-peers
  .venv-peers/bin/python -m pip install -q 'torch>=2.4' 'fuxictr>=2.3.10' || true
fi
exec .venv/bin/loopfm bench --peer fuxictr --peer-python "$peer" --rounds 3 --seconds 1 --out benchmarks "$@"
