"""What `longctx bench faults` can be told."""

from __future__ import annotations

from longctx.config.base import Format, Text, schema


@schema
class FaultsConfig:
    """kills: SIGKILLs at random instants; sigterms: requests to stop. damage: also spoil checkpoints and the
    disk.

    nproc: ranks of the run. steps: its optimizer steps. seed: of the instants. keep: leave the folder `out`
    behind.
    """

    kills: int = 50
    sigterms: int = 10
    damage: bool = True
    nproc: int = 2
    steps: int = 60
    seed: int = 0
    out: Text = ""
    format: Format = "text"

    def __post_init__(self) -> None:
        if min(self.kills, self.sigterms) < 0:
            raise ValueError(f"kills={self.kills} and sigterms={self.sigterms} must be 0 or more")
        if self.nproc < 1 or self.steps < 10 or self.steps % 2:
            raise ValueError(f"nproc={self.nproc} must be 1 or more, and steps={self.steps} even and 10 or more")
