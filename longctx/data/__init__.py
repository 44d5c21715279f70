"""Documents for a curriculum: where they come from, how they become tokens, and which of them stand in
sequence i of a stage.

Nothing here imports torch, transformers or datasets before it is needed.
"""

from longctx.data.opening import open_stage
from longctx.data.stage import LocalSequence, PackedSequence, StageData
from longctx.data.synth import Answer, SynthDocument, make_task
from longctx.data.writer import Writer

__all__ = [
    "Answer",
    "LocalSequence",
    "PackedSequence",
    "StageData",
    "SynthDocument",
    "Writer",
    "make_task",
    "open_stage",
]
