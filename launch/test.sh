#!/usr/bin/env bash
# Sets up .venv as the quickstart does, then checks format, lint, import layers and types, and runs the tests on all
# cores. Arguments go to pytest instead: launch/test.sh tests/attention -k zigzag. LONGCTX_CHECKED=1 leaves out the checks.
. "$(dirname "$0")/setup.sh" train,dev
cores="$(env -u OMP_NUM_THREADS nproc)"  # nproc answers OMP_NUM_THREADS where it is set
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ $# -gt 0 ]; then
  exec "$PYTHON" -m pytest "$@"
fi
[ -n "${LONGCTX_CHECKED:-}" ] || bash launch/check.sh
# A file's tests share fixtures, so each file goes to one worker, in the order of tests/conftest.py. There is one worker
# more than cores, because the first files wait for Slurm and for ranks that wait for each other.
exec "$PYTHON" -m pytest -n "$((cores + 1))" --maxprocesses 8 --dist loadfile --no-loadscope-reorder
