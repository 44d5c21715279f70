#!/usr/bin/env bash
# Several NCCL ranks on one GPU, to try and to test runs of many ranks on a machine with a single GPU.
#
#   launch/one_gpu.sh 2 longctx train experiment=quickstart engine.device=cuda model.dtype=bf16
#   launch/one_gpu.sh 4 python my_training.py
#
# COMMAND runs once per rank in torchrun's environment; `longctx train` becomes `python -m longctx.run`, as under torchrun.
# NCCL compares hosts when it looks for duplicate GPUs, so every rank gets a host name of its own (NCCL_HOSTID), and the
# ranks talk through sockets on the loopback device, as nodes do.
# Sends, receives, communicators, streams, timeouts and aborts are NCCL's real ones; times are not those of a cluster,
# because the processes share the GPU in slices. On a machine with several GPUs the first visible one is used.
#
# The exit status is that of the first rank that ended otherwise than with 0; the others get 15 seconds to end.
set -u
usage() { echo "usage: launch/one_gpu.sh RANKS COMMAND..." >&2; exit 2; }
[ $# -ge 2 ] && [[ "$1" =~ ^[1-9][0-9]?$ ]] || usage
ranks=$1
shift
if [ "${1##*/}" = longctx ] && [ "${2:-}" = train ]; then
    python=$(dirname "$(command -v "$1")")/python
    [ -x "$python" ] || python=python3
    shift 2
    set -- "$python" -m longctx.run "$@"
elif [[ "${2:-} ${3:-} ${4:-}" =~ ^-m\ longctx\ train$ ]]; then
    set -- "$1" -m longctx.run "${@:5}"
fi

export NCCL_NET=Socket NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 NCCL_NVLS_ENABLE=0 GLOO_SOCKET_IFNAME=lo
visible=${CUDA_VISIBLE_DEVICES-0}
export CUDA_VISIBLE_DEVICES=${visible%%,*}
export WORLD_SIZE=$ranks LOCAL_WORLD_SIZE=$ranks MASTER_ADDR=127.0.0.1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
for ((try = 0; try < 50; try++)); do
    MASTER_PORT=$((20000 + RANDOM % 20000))
    (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null || break # nobody answers: the port is free
done
export MASTER_PORT

pids=()
tell() { for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null; done; }
trap 'tell TERM' TERM
trap 'tell USR1' USR1
trap 'tell INT; interrupted=1' INT
interrupted=0
for ((rank = 0; rank < ranks; rank++)); do
    RANK=$rank LOCAL_RANK=$rank NCCL_HOSTID="longctx-rank-$rank" "$@" &
    pids+=($!)
done

status=0 left=$ranks deadline=0
while [ "$left" -gt 0 ]; do
    left=0
    for index in "${!pids[@]}"; do
        if kill -0 "${pids[index]}" 2>/dev/null; then
            left=$((left + 1))
        elif [ -z "${ended[index]:-}" ]; then
            wait "${pids[index]}"
            ended[index]=$?
            if [ "${ended[index]}" != 0 ] && [ "$status" = 0 ]; then
                status=${ended[index]}
                deadline=$((SECONDS + 15))
            fi
        fi
    done
    if [ "$deadline" -gt 0 ] && [ "$SECONDS" -ge "$deadline" ]; then tell KILL; fi
    [ "$left" -gt 0 ] && sleep 0.1
done
[ "$interrupted" = 1 ] && exit 130
exit "$status"
