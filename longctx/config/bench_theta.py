"""Config schema of `longctx bench theta`: a training to repeat under every rule, and what the models are asked."""

from __future__ import annotations

from pydantic import Field

from longctx.config.base import Format, Given, Samples, Text, Window, schema
from longctx.config.eval import NeedleConfig
from longctx.config.theta import SearchConfig
from longctx.config.train import TrainConfig
from longctx.rope import make_rule

BENCH_RULES = ("ntk", "dynamic-ntk", "scaling-law", "yarn", "searched")


@schema
class BenchThetaConfig:
    """The same training under each rule, and what the models can do before and after it."""

    train: TrainConfig  #: the run every rule gets, its curriculum's rule replaced
    #: names of rules, and `searched` for thetas found by `trials` on the base at every stage
    rules: list[Text] = Field(default_factory=lambda: list(BENCH_RULES))
    trials: SearchConfig = SearchConfig()
    needle: NeedleConfig = NeedleConfig(per_cell=4)
    documents: Samples = 16  #: held-out texts at the last stage's length, for the last-quarter loss
    base_length: Window = 512  #: tokens of the short text on which the loss is measured too
    source: Text = "stdlib"  #: source of haystack and text
    out: Given = "runs/bench_theta"  #: folder of runs and tables
    format: Format = "text"  #: format of what is printed

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError("rules is empty; name at least one, such as dynamic-ntk")
        for rule in self.rules:
            if rule != "searched":
                make_rule(rule, {}, "rules")
        if self.train.model.path is None:
            raise ValueError("train.model.path is missing: the bench extends a model that exists")
