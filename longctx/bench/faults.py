"""`longctx bench faults`: kill a tiny run at random times, continue it, and compare its weights at the end.

The runs save a checkpoint after every step, so many kills interrupt a save. The exported model must equal, byte for
byte, that of a run without kills.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longctx import console
from longctx.bench.faults_run import StartedRun, make_run
from longctx.config.faults import FaultsConfig
from longctx.errors import RunFailed

KINDS = ("everything", "rank")
SLOWEST_END = 30.0  # seconds within which a run must end after a rank has died


@dataclass
class Soak:
    """The state of the soak test: the current run, and the kills and runs so far."""

    config: FaultsConfig
    folder: Path
    wanted: str
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    sigterms: int = 0
    runs: int = 0
    slowest_end: float = 0.0
    most_lost: int = 0
    path: Path = field(default_factory=Path)

    def begin(self) -> None:
        self.runs += 1
        self.path = make_run(self.folder / f"run{self.runs:03d}", self.folder / "documents", self.config)

    def ended(self) -> None:
        """Check a finished run: its weights must equal those of the undisturbed run."""
        found = weights_of(self.path)
        if found != self.wanted:
            raise RunFailed(
                f"{self.path} ended with other weights ({found[:12]}) than the undisturbed run "
                f"({self.wanted[:12]}) after {sum(self.kills.values())} kills"
            )


def run(config: FaultsConfig) -> int:
    """Kill, terminate and damage runs, and print a summary. Raises RunFailed at the first wrong result."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.out or temporary)
        reference = make_run(folder / "undisturbed", folder / "documents", config)
        status, text = StartedRun(reference, config.nproc).wait()
        if status != 0:
            raise RunFailed(f"the undisturbed run failed with status {status}: {text[-2000:]}")
        soak = Soak(config, folder, weights_of(reference), random.Random(config.seed))
        _kill(soak)
        _terminate(soak)
        damage = _damage(soak) if config.damage else {}
        summary = {
            "kills": dict(soak.kills), "sigterms": soak.sigterms, "runs": soak.runs, "damage": damage,
            "bit_equal": True, "steps_lost_at_most": soak.most_lost,
            "seconds_to_end_after_a_dead_rank": round(soak.slowest_end, 1),
            "seconds": round(time.monotonic() - began, 1), "nproc": config.nproc, "steps": config.steps,
        }  # fmt: skip
    _report(summary, config)
    return 0


def _kill(soak: Soak) -> None:
    """Kill runs until the wanted number of kills is reached, then let the last run finish."""
    soak.begin()
    while sum(soak.kills.values()) < soak.config.kills:
        started = StartedRun(soak.path, soak.config.nproc)
        before = started.step()
        starting = soak.rng.random() < 0.15
        alive = started.wait_for(soak.rng.uniform(0.0, 1.0)) if starting else started.wait_for_step(before + 1)
        alive = alive and started.wait_for(soak.rng.uniform(0.0, 0.7))
        if not alive:
            _finish(soak, started)
            soak.begin()
            continue
        kind = soak.rng.choice(KINDS) if soak.config.nproc > 1 else "everything"
        reached = started.step()
        seconds = started.kill(kind, soak.rng)
        soak.kills[kind] += 1
        soak.most_lost = max(soak.most_lost, reached - started.saved_step())
        soak.slowest_end = max(soak.slowest_end, seconds if kind == "rank" else 0.0)
        if seconds > SLOWEST_END:
            raise RunFailed(f"{seconds:.0f} s after the kill of one {kind} the run was still there")
        console.say(f"kill {sum(soak.kills.values())}/{soak.config.kills}: {kind} at step {reached}")
    _finish(soak, StartedRun(soak.path, soak.config.nproc))


def _terminate(soak: Soak) -> None:
    """Send SIGTERM at random times, also during the start; the run must save, lose no step and exit with 75."""
    if not soak.config.sigterms:
        return
    soak.begin()
    while soak.sigterms < soak.config.sigterms:
        started = StartedRun(soak.path, soak.config.nproc)
        starting = soak.rng.random() < 0.3
        alive = started.wait_for(soak.rng.uniform(0.0, 1.0)) if starting else started.wait_for_step(started.step() + 1)
        if not (alive and started.wait_for(soak.rng.uniform(0.0, 0.3))):
            _finish(soak, started)
            soak.begin()
            continue
        status, text = started.terminate()
        if status == 0:  # it finished before it handled the signal
            soak.ended()
            soak.begin()
            continue
        if status != 75 or started.step() != started.saved_step():
            raise RunFailed(
                f"SIGTERM gave status {status} at step {started.step()}, step {started.saved_step()} being "
                f"saved: {text[-2000:]}"
            )
        soak.sigterms += 1
        console.say(f"sigterm {soak.sigterms}/{soak.config.sigterms}: saved at step {started.saved_step()}")
    _finish(soak, StartedRun(soak.path, soak.config.nproc))


def _finish(soak: Soak, started: StartedRun) -> str:
    status, text = started.wait()
    if status != 0:
        raise RunFailed(f"{soak.path} did not come to its end: status {status}: {text[-2000:]}")
    soak.ended()
    return text


def _damage(soak: Soak) -> dict[str, str]:
    """Damage the newest checkpoint of a stopped run, or fill its disk; it must report this and finish the same."""
    found = {}
    for name in ("truncated", "flipped byte", "full disk"):
        soak.begin()
        started = StartedRun(soak.path, soak.config.nproc)
        if not started.wait_for_step(6):
            raise RunFailed(f"the run ended before it could be damaged: {started.wait()}")
        started.terminate()
        limit = None
        if name == "full disk":
            limit = largest_file(soak.path) - 1024
        else:
            damage_checkpoint(soak.path, name)
        text = _finish(soak, StartedRun(soak.path, soak.config.nproc, file_limit=limit))
        told = [line for line in text.splitlines() if "damaged" in line or "not written" in line or "failed" in line]
        if not told:
            raise RunFailed(f"nothing was said about the {name}: {text[-2000:]}")
        found[name] = " ".join(told[0].split())
        console.say(f"{name}: {found[name]}")
    return found


def newest_rank_file(run: Path) -> Path:
    return max(run.glob("stages/*/checkpoints/step*/rank00000.safetensors"), key=lambda path: path.parent.name)


def largest_file(run: Path) -> int:
    """Return the size in bytes of the newest checkpoint's largest file; the exported model is smaller."""
    return max(path.stat().st_size for path in newest_rank_file(run).parent.glob("rank*.safetensors"))


def damage_checkpoint(run: Path, how: str) -> None:
    file = newest_rank_file(run)
    content = bytearray(file.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    else:
        content[len(content) * 2 // 3] ^= 0x10
    file.write_bytes(bytes(content))


def weights_of(run: Path) -> str:
    """Return the SHA-256 of the last stage's exported weights."""
    files = sorted((run / "stages" / "s128" / "model").glob("*.safetensors"))
    if not files:
        raise RunFailed(f"{run} has exported nothing")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _report(summary: dict[str, Any], config: FaultsConfig) -> None:
    if config.format == "json":
        console.emit_json(summary)
        return
    kills = ", ".join(f"{count} of {kind}" for kind, count in summary["kills"].items()) or "none"
    console.emit(
        f"kills: {kills}; SIGTERMs: {summary['sigterms']}; {summary['runs']} runs, all ended with the "
        f"weights of the undisturbed one, bit for bit; at most {summary['steps_lost_at_most']} steps done "
        f"again after a kill; {summary['seconds']:.0f} s"
    )
