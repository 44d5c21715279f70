#!/usr/bin/env bash
# The same command on every node; NODE_RANK differs (0 on the first), HEAD is the first node's address.
#   NODES=4 NODE_RANK=0 HEAD=10.0.0.1 GPUS=8 launch/torchrun.sh model.path=... curriculum=8k_to_1048k engine=deepspeed
# On exit status 75 (saved on a signal, to be requeued) the command is started again up to REQUEUES times.
set -uo pipefail
nodes="${NODES:-1}" rank="${NODE_RANK:-0}" head="${HEAD:-localhost}" port="${PORT:-29500}"
per_node="${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c . || true)}"
[ "${per_node:-0}" -gt 0 ] || per_node=1
python="${PYTHON:-python}"
# torchrun gives ranks so many seconds after a signal; a run that needs longer to a save says so.
export LONGCTX_SIGNAL_LEAD="${LONGCTX_SIGNAL_LEAD:-${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-30}}"
# A rank of this node that leaves with 75 says so in this file: torchrun makes every status 1.
export LONGCTX_REQUEUE="$(mktemp)"
trap 'rm -f "$LONGCTX_REQUEUE"' EXIT
trap 'exit 130' INT  # torchrun itself ends with 1
for attempt in $(seq 0 "${REQUEUES:-3}"); do
  "$python" -m torch.distributed.run --nnodes "$nodes" --node-rank "$rank" --nproc-per-node "$per_node" \
    --master-addr "$head" --master-port "$port" -m longctx.run "$@"
  status=$?
  [ -s "$LONGCTX_REQUEUE" ] || exit "$status"
  : > "$LONGCTX_REQUEUE"
  echo "longctx: saved and requeued (attempt $((attempt + 1)))" >&2
done
exit 75
