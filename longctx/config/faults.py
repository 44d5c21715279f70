"""Config schema of `longctx bench faults`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from longctx.config.base import Format, NotNegative, PerMachine, Positive, Seed, Text, schema


@schema
class FaultsConfig:
    """The root of configs/bench_faults.yaml."""

    kills: NotNegative = 50  #: SIGKILLs at random instants, saves and starts included: of everything, or of one rank
    #: SIGKILLs inside background saves of a larger model: of everything, or of one rank
    kills_in_saves: NotNegative = 20
    sigterms: NotNegative = 10  #: SIGTERMs: the run must save and leave with status 75
    damage: bool = True  #: then try a truncated checkpoint file, a flipped byte, and a disk that takes no checkpoint
    nproc: PerMachine = 2  #: ranks of the run
    steps: Annotated[Positive, Field(ge=10, multiple_of=2)] = 60  #: optimizer steps of the run
    seed: Seed = 0  #: random seed of the instants of the kills
    out: Text = ""  #: keep the runs in this folder; empty: a temporary one
    format: Format = "text"  #: format of what is printed
