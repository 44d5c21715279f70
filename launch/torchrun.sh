#!/usr/bin/env bash
# The same command on every node; NODE_RANK differs (0 on the first), HEAD is the first node's address.
#   NODES=4 NODE_RANK=0 HEAD=10.0.0.1 GPUS=8 launch/torchrun.sh model.path=... curriculum=8k_to_1048k engine=deepspeed
# It starts GPUS ranks with torchrun's environment. The run's ranks meet at HEAD:PORT (29500; a free port on one node).
# SIGUSR1, SIGTERM and SIGHUP are passed on to the ranks: they save and the script leaves with 75. After SIGUSR1, or a
# signal that only a rank got, it starts the ranks again, launch.requeues times at most.
# Status: 0 done, 2 bad input, 1 failure, 75 saved, 130 interrupted. `torchrun -m longctx.run ...` works too, without
# these signals and statuses.
set -uo pipefail
# Signals are held back until Python handles them, from its first instruction on.
hold=()
env --block-signal=USR1,TERM,HUP true 2>/dev/null && hold=(env --block-signal=USR1,TERM,HUP)  # coreutils 8.31 and later
exec "${hold[@]}" "${PYTHON:-python}" -m longctx.run.node "$@"
