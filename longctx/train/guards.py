"""Guards against bad steps: NaN or infinity stops the run, a loss spike skips the step.

All ranks see the same global loss and norm, so they decide alike without communication. A failing batch is written to
RUN/failures with its documents and the ranks whose own loss was not finite, so that it can be replayed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from longctx.errors import RunFailed
from longctx.storage.files import write_text
from longctx.train.batch import MicroBatch

if TYPE_CHECKING:
    from longctx.config.train import GuardsConfig
    from longctx.distributed.ranks import Ranks

MINIMUM_HISTORY = 10
# What a message advises to lower: the first has no effect on a stage that has the second.
RATE = "curriculum.lr.peak (curriculum.stages.NAME.lr.peak where the stage has its own)"


class Guards:
    """The guards of one stage.

    recent: losses of the last steps taken. spikes, mute: steps in a row that were skipped, up to the last step, for a
    loss that was too high and for a batch without a label. The three are part of the checkpoint, so that a resumed run
    decides the same.
    """

    def __init__(
        self, config: GuardsConfig, run: Path, ranks: Ranks, recent: list[float], *, spikes: int = 0, mute: int = 0
    ) -> None:
        self.config, self.run, self.ranks, self.recent = config, run, ranks, recent
        self.spikes, self.mute = spikes, mute

    def check_finite(self, loss: float, norm: float, own: float, batches: Sequence[MicroBatch], step: int) -> None:
        """Raise RunFailed where loss or norm is not finite; own: this rank's share of the loss."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        documents = [name for batch in batches for name in batch.documents()]
        reports = self.ranks.gather({"rank": self.ranks.rank, "finite": math.isfinite(own), "documents": documents})
        culprits = [report["rank"] for report in reports if not report["finite"]]
        what = f"loss={loss}" if not math.isfinite(loss) else f"gradient norm={norm} (loss {loss:.4f})"
        path = self.run / "failures" / f"step{step:08d}.json"
        if self.ranks.first:
            path.parent.mkdir(exist_ok=True)
            write_text(path, json.dumps({"step": step, "loss": str(loss), "grad_norm": str(norm), "ranks": reports}))
        where = f" on rank {culprits[0]}" if culprits else ""
        raise RunFailed(
            f"{what} at step {step}{where}; the step was not taken. The batch's documents and ranks are in "
            f"{path}. The last checkpoint stands: look at the documents, or lower {RATE}"
        )

    def is_mute(self, weight: float, step: int) -> bool:
        """Whether no token of the step's batch carries loss, so that the step must be skipped.

        Raises RunFailed at the guards.max_skipped_steps-th such batch in a row: a run that trains nothing is a mistake.
        """
        self.mute = 0 if weight > 0 else self.mute + 1
        if self.mute >= self.config.max_skipped_steps:
            raise RunFailed(
                f"no token carried loss in {self.mute} steps in a row, up to step {step}: nothing is being trained. "
                "Nearly all tokens of the stage's data are masked: look at the weights and at loss=assistant in "
                "data.sources, take more sequences per step (curriculum.stages.NAME.batch), or raise "
                "guards.max_skipped_steps (configs/train.yaml)"
            )
        return weight == 0

    def is_spike(self, loss: float) -> bool:
        """Whether the step should be skipped; a step that is not skipped enters the history.

        Raises RunFailed at the guards.max_skipped_steps-th skip in a row: the loss has risen, and would rise no further
        only because nothing is trained.
        """
        limit = self.config.spike_factor
        if limit is not None and len(self.recent) >= MINIMUM_HISTORY and loss > limit * median(self.recent):
            self.spikes += 1
            if self.spikes >= self.config.max_skipped_steps:
                raise RunFailed(
                    f"the loss ({loss:.4f}) has been above guards.spike_factor={limit:g} times the recent median "
                    f"({median(self.recent):.4f}) for {self.spikes} steps: this is no spike. The last checkpoint "
                    f"stands; lower {RATE}, look at the data from here on, or raise guards.spike_factor "
                    "(configs/train.yaml)"
                )
            return True
        self.spikes = 0
        self.recent.append(loss)
        del self.recent[: -self.config.spike_median_steps]
        return False
