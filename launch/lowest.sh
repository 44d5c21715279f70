#!/usr/bin/env bash
# Makes .venv-lowest with the least releases that pyproject.toml promises (launch/lowest.txt), and runs the smoke on them:
# a two-rank training of two stages, adapter, merge, PEFT, eval, theta, a notebook's use (tests/test_versions.py), the
# precision of every engine's gradients, exports, and what the evaluation hands to transformers as its attention.
# Arguments go to pytest instead: launch/lowest.sh tests/lora. The same smoke with the pinned set: pytest -m smoke
. "$(dirname "$0")/setup.sh" train,test lowest
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[ $# -gt 0 ] || set -- -m "smoke or not slow" tests/test_versions.py tests/train/test_precision.py tests/model/test_export.py \
  tests/eval/test_last_layer.py
exec "$PYTHON" -m pytest "$@"
