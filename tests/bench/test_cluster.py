"""The virtual cluster: environment, own links, rates, and complete removal however it ends. Needs root."""

import os
import subprocess
import time

import pytest

from longctx.bench import cluster
from longctx.errors import RunFailed, UserError

needs_root = pytest.mark.skipif(cluster.missing() is not None, reason=str(cluster.missing()))


def start(*arguments, **options):
    command = [str(cluster.script()), "run", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def namespaces(process):
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"lcx{process.pid}-")]


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the cluster did not get there"
        time.sleep(0.05)


@pytest.mark.root
@needs_root
def test_every_rank_has_torchruns_environment_and_its_own_address():
    variables = "$RANK $LOCAL_RANK $GROUP_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE"
    show = f"echo {variables} $(ip -o -4 addr show $GLOO_SOCKET_IFNAME)"
    process = start("nodes=2", "ranks=2", "--", "sh", "-c", show)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    lines = sorted(line.split() for line in out.splitlines())
    assert [line[:5] for line in lines] == [[str(r), str(r % 2), str(r // 2), "4", "2"] for r in range(4)]
    addresses = [next(word for word in line if word.startswith("10.77.")) for line in lines]
    assert addresses == ["10.77.0.1/24", "10.77.1.1/24", "10.77.0.2/24", "10.77.1.2/24"]
    assert namespaces(process) == []


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("how", ["terminate", "close", "fail"])
def test_nothing_is_left_behind(how):
    command = 'test $RANK = 1 && test "$0" = fail && exit 7; sleep 60'
    process = start("nodes=2", "ranks=1", "until=stdin", "--", "sh", "-c", command, how, stdin=subprocess.PIPE)
    if how != "fail":
        wait_for(lambda: len(namespaces(process)) == 3)
    if how == "terminate":
        process.terminate()
    elif how == "close":
        process.stdin.close()
    status = process.wait(timeout=30)
    assert status == {"terminate": 143, "close": 143, "fail": 7}[how]
    assert namespaces(process) == []


@pytest.mark.root
@needs_root
def test_links_are_held_to_the_rate_and_released():
    process = start("nodes=2", "ranks=1", "rate=10mbit", "--", "sleep", "60")
    try:
        wait_for(lambda: "10Mbit" in shaping(process))
        cluster.set_rate(f"lcx{process.pid}", "50mbit")
        assert "50Mbit" in shaping(process)
        cluster.set_rate(f"lcx{process.pid}", "none")
        assert "tbf" not in shaping(process)
        with pytest.raises(RunFailed, match="rate=fast"):
            cluster.set_rate(f"lcx{process.pid}", "fast")
    finally:
        process.terminate()
        process.wait(timeout=30)


def shaping(process):
    command = ["tc", "-n", f"lcx{process.pid}-n1", "qdisc", "show", "dev", "link0"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def test_bad_arguments_are_explained():
    for arguments, message in [
        (["nodes=2", "--", "true"], "usage"),
        (["nodes=2", "ranks=1", "speed=1", "--", "true"], "unknown argument 'speed=1'"),
        (["nodes=0", "ranks=1", "--", "true"], "usage"),
    ]:
        process = start(*arguments)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 2
        assert message in errors


@pytest.mark.skipif(os.geteuid() != 0, reason="changing to an unprivileged user needs root")
def test_without_root_it_says_so():
    process = start("nodes=1", "ranks=1", "--", "true", user=65534, cwd="/")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "needs root" in errors


def test_missing_tools_are_a_user_error(monkeypatch):
    monkeypatch.setattr(cluster.shutil, "which", lambda tool: None)
    with pytest.raises(UserError, match="install iproute2"):
        cluster.require()
