#!/usr/bin/env bash
# Runs the tests of liger-kernel's operators without a GPU, under Triton's interpreter. The two packages lie beside .venv, in
# .venv-liger, because nothing else uses them on a CPU.
. "$(dirname "$0")/setup.sh" train,dev
packages=(liger-kernel==0.8.5 "triton==3.9.*")
place=.venv-liger
[ "$(cat "$place/made-from" 2>/dev/null)" = "${packages[*]}" ] || {
  rm -rf "$place"
  "$PYTHON" -m pip --disable-pip-version-check install --quiet --no-deps --no-compile --target "$place" "${packages[@]}"
  echo "${packages[*]}" >"$place/made-from"
}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD:$PWD/$place" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TRITON_INTERPRET=1 # which Triton reads while torch imports it
exec "$PYTHON" -m pytest tests/model/test_fused.py "$@"
