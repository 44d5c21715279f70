"""Resolves a curriculum to stages of plain numbers; see longctx.curriculum.resolve."""

from longctx.curriculum.resolve import resolve
from longctx.curriculum.select import selected
from longctx.curriculum.stage import Advance, LearningRate, Stage

__all__ = ["Advance", "LearningRate", "Stage", "resolve", "selected"]
