#!/usr/bin/env bash
# Checks and measures longctx on this machine's first GPU in at most 6 minutes, and writes one table.
#
#   bash launch/gpu_check.sh                    gates, then benchmarks
#   bash launch/gpu_check.sh tests              gates only: kernels against fp64, NCCL with several ranks on the GPU, runs
#   bash launch/gpu_check.sh bench              benchmarks only
#   bash launch/gpu_check.sh kernels attention  parts by name; `gpu_check.sh help` lists them
#   bash launch/gpu_check.sh smollm2 minutes=8     a real model from 8,192 to 65,536 tokens; by name only
#   bash launch/gpu_check.sh longest minutes=60    the longest full step of an 8B model; by name only
#   bash launch/gpu_check.sh fa4_all minutes=15    flash-attn 4 in every shape; by name only
#   bash launch/gpu_check.sh out=FOLDER minutes=10 ...
#
# It needs torch, transformers, pytest and longctx's own packages. What it lacks (a GPU, flash-attn, liger-kernel,
# ring-flash-attn) is skipped with the reason. FOLDER (runs/gpu_check) gets table.txt, table.json and the output of every part.
# The exit status is 1 when a gate failed or a floor was missed, and 0 otherwise.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-}"
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python; } || python=python3
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export WANDB_MODE=disabled FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
exec "$python" -m longctx.bench.gpu_check "$@"
