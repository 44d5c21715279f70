"""Stages resolved to numbers; see longctx.curriculum.resolve."""

from longctx.curriculum.resolve import resolve
from longctx.curriculum.select import selected
from longctx.curriculum.stage import Advance, LearningRate, Stage, check_divides

__all__ = ["Advance", "LearningRate", "Stage", "check_divides", "resolve", "selected"]
