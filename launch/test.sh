#!/usr/bin/env bash
# The same set-up as the quickstart, then format, lint, types, import layers and the tests. Arguments go to
# pytest: launch/test.sh tests/attention -k zigzag
. "$(dirname "$0")/setup.sh" train,dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
bin="$PWD/.venv/bin"
if [ $# -eq 0 ]; then
  "$bin/ruff" format --check .
  "$bin/ruff" check .
  "$bin/lint-imports"
  "$bin/pyright"
fi
exec "$PYTHON" -m pytest "$@"
