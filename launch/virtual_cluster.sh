#!/bin/bash
# A virtual cluster on one machine: M nodes x W ranks, a network card of its own for every rank.
#
#   launch/virtual_cluster.sh run nodes=4 ranks=4 rate=10mbit -- COMMAND...    one COMMAND per rank, torchrun's environment
#   launch/virtual_cluster.sh rate CLUSTER 50mbit|none                         change every link of a running cluster
#   launch/virtual_cluster.sh down CLUSTER                                     end its ranks, remove its namespaces
#
# Every node is a network namespace (lcxPID-n0, lcxPID-n1, ...) with W veth links (link0 ... linkW-1) into one bridge, which
# has a namespace of its own, so the machine's network is untouched and nothing leaves it. `tc tbf` holds what a link sends to
# the rate. The network is built on rails: rank (node i, local w) has the address 10.77.w.(i+1) on link w and binds gloo
# to that link (GLOO_SOCKET_IFNAME). Ranks of one node therefore talk over loopback, ranks with the same local number over
# their own two links, and (i, w) reaches (j, v) over the links of rail v.
#
# Needs root and iproute2. Cleans up when COMMAND ends, fails or is interrupted, when a rank dies, and with until=stdin when
# the other end of standard input closes; a cluster whose script was killed outright is removed by the next start.
set -u

die() { echo "virtual_cluster.sh: $*" >&2; exit 2; }
namespaces() { ip netns list 2>/dev/null | awk '{print $1}' | grep "^$1-" || true; }

need() {
    [ "$(id -u)" = 0 ] || die "needs root to make network namespaces: run it again with sudo"
    for tool in ip tc; do
        command -v "$tool" >/dev/null || die "needs the command '$tool': install iproute2 (apt-get install iproute2)"
    done
}

down() { # CLUSTER: end what still runs inside, then remove; the links go with their namespaces
    local ns pid
    for signal in TERM KILL; do
        for ns in $(namespaces "$1"); do
            for pid in $(ip netns pids "$ns" 2>/dev/null); do kill -"$signal" "$pid" 2>/dev/null && busy=1; done
        done
        [ -n "${busy:-}" ] && sleep 0.3
        busy=""
    done
    for ns in $(namespaces "$1"); do ip netns del "$ns"; done
}

sweep() { # clusters whose script is gone
    local ns owner
    for ns in $(ip netns list 2>/dev/null | awk '{print $1}' | grep -E '^lcx[0-9]+-switch$'); do
        owner=${ns#lcx}; owner=${owner%-switch}
        kill -0 "$owner" 2>/dev/null || down "lcx$owner"
    done
}

set_rate() { # CLUSTER RATE|none
    local ns link
    for ns in $(namespaces "$1" | grep -v -- '-switch$'); do
        for link in $(ip -n "$ns" -o link show type veth | awk -F'[ @:]+' '{print $2}'); do
            if [ "$2" = none ]; then
                tc -n "$ns" qdisc del dev "$link" root 2>/dev/null
            else
                tc -n "$ns" qdisc replace dev "$link" root tbf rate "$2" burst 32kb limit 4mb \
                    || die "tc does not take rate=$2; write it as 10mbit, 1gbit or none"
            fi
        done
    done
    return 0
}

build() { # CLUSTER NODES RANKS
    local switch="$1-switch" ns i w
    ip netns add "$switch" || die "this machine does not let root make network namespaces (a container needs CAP_SYS_ADMIN and CAP_NET_ADMIN)"
    ip -n "$switch" link add bridge type bridge || die "this kernel has no bridge device"
    ip -n "$switch" link set bridge up
    for ((i = 0; i < $2; i++)); do
        ns="$1-n$i"
        ip netns add "$ns" && ip -n "$ns" link set lo up || return 1
        # one subnet per rail on a shared bridge: a link answers for its own address only. Reno without the restart after
        # idling keeps a link full (measured: 9.5 of 10 Mbit/s, the rest is headers; bbr and cubic vary from 7.8 to 9.5).
        # A socket may queue 32 KiB on its link: with Linux's 4 MiB a whole block would stand in front of the other
        # direction's acknowledgements, which no network card does (measured: 4.0 s instead of 2.7 s for three hops)
        ip netns exec "$ns" sh -c 'echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore; echo 2 >/proc/sys/net/ipv4/conf/all/arp_announce
            echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter; echo 0 >/proc/sys/net/ipv4/conf/default/rp_filter
            cd /proc/sys/net/ipv4; echo reno >tcp_congestion_control; echo 0 >tcp_slow_start_after_idle
            echo 32768 >tcp_limit_output_bytes' || return 1
        for ((w = 0; w < $3; w++)); do
            ip -n "$ns" link add "link$w" type veth peer name "n${i}l$w" netns "$switch" \
                && ip -n "$switch" link set "n${i}l$w" master bridge up \
                && ip -n "$ns" addr add "10.77.$w.$((i + 1))/24" dev "link$w" \
                && ip -n "$ns" link set "link$w" up || return 1
        done
    done
}

start_ranks() { # CLUSTER NODES RANKS COMMAND...: fills `pids`
    local cluster=$1 nodes=$2 ranks=$3 i w
    shift 3
    for ((i = 0; i < nodes; i++)); do
        for ((w = 0; w < ranks; w++)); do
            RANK=$((i * ranks + w)) LOCAL_RANK=$w GROUP_RANK=$i WORLD_SIZE=$((nodes * ranks)) LOCAL_WORLD_SIZE=$ranks \
                MASTER_ADDR=10.77.0.1 MASTER_PORT=29511 GLOO_SOCKET_IFNAME="link$w" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
                LONGCTX_VIRTUAL_CLUSTER="$cluster" ip netns exec "$cluster-n$i" "$@" &
            pids+=($!)
        done
    done
}

run() {
    local nodes="" ranks="" rate=none until=command status=0 left
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        case "$1" in
            nodes=*) nodes=${1#*=} ;;
            ranks=*) ranks=${1#*=} ;;
            rate=*) rate=${1#*=} ;;
            until=stdin | until=command) until=${1#*=} ;;
            *) die "unknown argument '$1'; known: nodes=, ranks=, rate=, until=stdin, then -- COMMAND" ;;
        esac
        shift
    done
    shift
    [[ "$nodes" =~ ^[1-9][0-9]?$ && "$ranks" =~ ^[1-9][0-9]?$ && $# -gt 0 ]] \
        || die "usage: $0 run nodes=M ranks=W [rate=10mbit] -- COMMAND..."
    need
    sweep
    local cluster="lcx$$" pids=() watcher=""
    trap 'trap "" INT TERM HUP; kill -TERM "${pids[@]}" $watcher 2>/dev/null; down '"$cluster" EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    build "$cluster" "$nodes" "$ranks" || die "could not build the namespaces"
    set_rate "$cluster" "$rate"
    if [ "$until" = stdin ]; then
        exec 3<&0
        { cat <&3 >/dev/null; kill -TERM $$; } 2>/dev/null &
        watcher=$!
        disown "$watcher"
    fi
    start_ranks "$cluster" "$nodes" "$ranks" "$@"
    for ((left = nodes * ranks; left > 0; left--)); do
        wait -n || { status=$?; break; }
    done
    exit "$status"
}

case "${1:-}" in
    run) shift; run "$@" ;;
    rate) [ $# = 3 ] || die "usage: $0 rate CLUSTER RATE|none"; need; set_rate "$2" "$3" ;;
    down) [ $# = 2 ] || die "usage: $0 down CLUSTER"; need; down "$2" ;;
    *) sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
