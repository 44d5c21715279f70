"""Compares the time that a run needs to leave on a signal with the time that its scheduler gives it.

A scheduler sends its signal some seconds before it kills: LONGCTX_SIGNAL_LEAD says how many (launch/slurm.sbatch and
launch/torchrun.sh set it). A run needs the time until its ranks look for a signal again, between two micro-batches or
two steps, and the time of a save.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from longctx.console import warn

if TYPE_CHECKING:
    from longctx.distributed.ranks import Ranks

MARGIN = 1.3


class Lead:
    """The seconds the scheduler gives after its signal (None: unknown), and the seconds of the last save."""

    def __init__(self) -> None:
        text = os.environ.get("LONGCTX_SIGNAL_LEAD", "")
        self.seconds = float(text) if text.replace(".", "", 1).isdigit() else None
        self.save_seconds = 0.0
        self._waits: list[float] = []
        self._warned = 0.0

    def check(self, wait: float, ranks: Ranks) -> None:
        """Warn when a signal's wait and a save take longer than the scheduler gives.

        It warns again only when that time has grown by half.

        wait: seconds that a signal waits at most in a step like the last one.
        """
        if self.seconds is None or not ranks.first:
            return
        self._waits = [*self._waits[-4:], wait]  # the first step of a stage may be slow for other reasons
        usual = sorted(self._waits)[(len(self._waits) - 1) // 2]
        needed = usual + self.save_seconds
        if len(self._waits) < 2 or needed <= max(self.seconds, 1.5 * self._warned):
            return
        self._warned = needed
        give = math.ceil(MARGIN * needed)
        warn(
            f"this run needs up to {needed:.0f} s to leave on a signal ({usual:.0f} s until ranks look for one between "
            f"micro-batches, {self.save_seconds:.0f} s for a save), and LONGCTX_SIGNAL_LEAD={self.seconds:.0f} are "
            f"given: what was trained since the last checkpoint may be lost. Start it with SBATCH_SIGNAL=B:USR1@{give} "
            f"(launch/slurm.sbatch) or TORCH_ELASTIC_SHUTDOWN_TIMEOUT={give} (torchrun), lower "
            "engine.micro_batch, or save more often with checkpoint.every_minutes"
        )
