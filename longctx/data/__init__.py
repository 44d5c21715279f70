"""Documents for a curriculum: where they come from, how they become tokens, and which of them stand in
sequence i of a stage.

Nothing here imports torch, transformers or datasets before it is needed.
"""

from longctx.data.haystack import NeedleWriter
from longctx.data.stage_data import LocalSequence, PackedSequence, StageData
from longctx.data.stage_opening import open_stage
from longctx.data.synth import Answer, SynthDocument, make_task

__all__ = [
    "Answer",
    "LocalSequence",
    "NeedleWriter",
    "PackedSequence",
    "StageData",
    "SynthDocument",
    "make_task",
    "open_stage",
]
