"""How long a run needs to leave on a signal, beside the time that its scheduler gives it.

A scheduler sends its signal some seconds before it kills: LONGCTX_SIGNAL_LEAD says how many (launch/slurm.sbatch and
launch/torchrun.sh set it). A signal waits until ranks look for one again, between two micro-batches or two steps, and
for the save after that.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from longctx.console import warn

if TYPE_CHECKING:
    from longctx.train.ranks import Ranks

MARGIN = 1.3


class Lead:
    """seconds: what the scheduler gives, None where nobody said. save_seconds: what the last save took."""

    def __init__(self) -> None:
        text = os.environ.get("LONGCTX_SIGNAL_LEAD", "")
        self.seconds = float(text) if text.replace(".", "", 1).isdigit() else None
        self.save_seconds = 0.0
        self._waits: list[float] = []
        self._warned = 0.0

    def check(self, wait: float, ranks: Ranks) -> None:
        """wait: seconds that a signal waits at most in a step like the last one. Warns when that and a save take longer
        than is given, and again only when that grows by half.
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
            f"given: what was trained since the last checkpoint may be lost. Start it with SBATCH_SIGNAL=USR1@{give} "
            f"(launch/slurm.sbatch) or TORCH_ELASTIC_SHUTDOWN_TIMEOUT={give} (launch/torchrun.sh), lower "
            "engine.micro_batch, or save more often with checkpoint.minutes"
        )
