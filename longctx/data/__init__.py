"""Training data: sources are read, tokenized into shards, mixed, and packed into the sequences of each stage.

No module imports torch, transformers or datasets before it needs them.
"""

from longctx.data.haystack import NeedleWriter
from longctx.data.stage_data import LocalSequence, PackedSequence, StageData
from longctx.data.stage_opening import open_stage_data
from longctx.data.synth import Answer, SynthDocument, make_task

__all__ = [
    "Answer",
    "LocalSequence",
    "NeedleWriter",
    "PackedSequence",
    "StageData",
    "SynthDocument",
    "make_task",
    "open_stage_data",
]
