"""`longctx bench faults`: kill a tiny run at random times, continue it, and compare what it leaves at the end.

The runs save a checkpoint after every step, so many kills interrupt a save; larger runs are killed inside background
saves (`faults_saves`). The exported model, the last checkpoint and the metrics must equal, bit for bit, those of a run
without kills.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any

from longctx import console
from longctx.bench.faults_saves import kill_in_saves
from longctx.bench.faults_soak import KINDS, Soak
from longctx.config.faults import FaultsConfig
from longctx.errors import RunFailed


def run(config: FaultsConfig) -> int:
    """Kill, terminate and damage runs, and print a summary. Raises RunFailed at the first wrong result."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.out or temporary)
        rng = random.Random(config.seed)
        soak, saves = Soak(config, folder, rng), Soak(config, folder, rng, large=True)
        damage = _disturb(soak) if config.kills or config.sigterms or config.damage else {}
        parts = kill_in_saves(saves) if config.kills_in_saves else {}
        summary = {
            "kills": dict(soak.kills), "sigterms": soak.sigterms, "damage": damage,
            "kills_in_saves": dict(saves.kills), "parts_of_saves": parts,
            "runs": soak.runs + saves.runs, "bit_equal": True, "steps_lost_at_most": soak.most_lost,
            "seconds_to_end_after_a_dead_rank": round(max(soak.slowest_end, saves.slowest_end), 1),
            "seconds": round(time.monotonic() - began, 1), "nproc": config.nproc, "steps": config.steps,
        }  # fmt: skip
    _report(summary, config)
    return 0


def _disturb(soak: Soak) -> dict[str, str]:
    """Kill, terminate and damage the tiny runs; returns what was said about each kind of damage."""
    soak.begin("undisturbed")
    soak.keep_results(soak.start())
    _kill(soak)
    _terminate(soak)
    return _damage(soak) if soak.config.damage else {}


def _kill(soak: Soak) -> None:
    """Kill runs until the wanted number of kills is reached, then let the last run finish."""
    if not soak.config.kills:
        return
    soak.begin()
    while soak.kills.total() < soak.config.kills:
        started = soak.start()
        before = started.step()
        starting = soak.rng.random() < 0.15
        alive = started.wait_for(soak.rng.uniform(0.0, 1.0)) if starting else started.wait_for_step(before + 1)
        alive = alive and started.wait_for(soak.rng.uniform(0.0, 0.7))
        if not alive:
            soak.finish(started)
            soak.begin()
            continue
        kind = soak.rng.choice(KINDS) if soak.config.nproc > 1 else "everything"
        reached = started.step()
        soak.kill(started, kind)
        soak.kills[kind] += 1
        soak.most_lost = max(soak.most_lost, reached - started.saved_step())
        console.say(f"kill {soak.kills.total()}/{soak.config.kills}: {kind} at step {reached}")
    soak.finish(soak.start())


def _terminate(soak: Soak) -> None:
    """Send SIGTERM at random times, also during the start; the run must save, lose no step and exit with 75."""
    if not soak.config.sigterms:
        return
    soak.begin()
    while soak.sigterms < soak.config.sigterms:
        started = soak.start()
        starting = soak.rng.random() < 0.3
        alive = started.wait_for(soak.rng.uniform(0.0, 1.0)) if starting else started.wait_for_step(started.step() + 1)
        if not (alive and started.wait_for(soak.rng.uniform(0.0, 0.3))):
            soak.finish(started)
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
    soak.finish(soak.start())


def _damage(soak: Soak) -> dict[str, str]:
    """Damage the newest checkpoint of a stopped run, or fill its disk; it must report this and finish the same."""
    found = {}
    for name in ("truncated", "flipped byte", "full disk"):
        soak.begin()
        started = soak.start()
        if not started.wait_for_step(6):
            raise RunFailed(f"the run ended before it could be damaged: {started.wait()}")
        started.terminate()
        limit = None
        if name == "full disk":
            limit = largest_file(soak.path) - 1024
        else:
            damage_checkpoint(soak.path, name)
        text = soak.finish(soak.start(file_limit=limit), checkpoint=limit is None)
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


def _report(summary: dict[str, Any], config: FaultsConfig) -> None:
    if config.format == "json":
        console.emit_json(summary)
        return
    kills, in_saves, parts = (_counted(summary[name]) for name in ("kills", "kills_in_saves", "parts_of_saves"))
    console.emit(
        f"kills: {kills}; in background saves: {in_saves} (while {parts}); SIGTERMs: {summary['sigterms']}; "
        f"{summary['runs']} runs, all ended with the weights, checkpoint and metrics of the undisturbed one, bit for "
        f"bit; at most {summary['steps_lost_at_most']} steps done again after a kill; {summary['seconds']:.0f} s"
    )


def _counted(found: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.items()) or "none"
