"""The verbs of the command line: for each its schema and the function that does it, named as text so that
`longctx theta` never imports what `longctx train` needs.

A verb with spaces has subverbs; its root config is the name with underscores (`lora-extract` ->
configs/lora_extract.yaml, `bench attention` -> configs/bench_attention.yaml).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    name: str
    schema: str
    run: str
    help: str

    @property
    def root(self) -> str:
        return self.name.replace("-", "_").replace(" ", "_")


_ALL = [
    Verb("train", "longctx.config.train:TrainConfig", "longctx.train.run:run",
         "extend a model's context, stage by stage"),
    Verb("plan", "longctx.config.plan:PlanConfig", "longctx.plan.run:run",
         "memory and time of every stage before anything starts; timelines of schedules"),
    Verb("bench attention", "longctx.config.bench:BenchAttentionConfig", "longctx.bench.attention:run",
         "the ring beside one device's own attention"),
    Verb("bench hierarchy", "longctx.config.bench:BenchHierarchyConfig", "longctx.bench.hierarchy:run",
         "every schedule behind slow links, on a virtual cluster (root)"),
    Verb("theta", "longctx.config.theta:ThetaConfig", "longctx.theta.run:run",
         "thetas by every rule, what they support, and a search for better ones"),
]  # fmt: skip

VERBS: dict[str, Verb] = {verb.name: verb for verb in _ALL}
