"""The verbs of the command line, each with its schema and its function.

Both are named as text, so that `longctx theta` never imports the libraries of `longctx train`.

A verb with spaces has subverbs; its root config is the name with underscores (`lora extract` ->
configs/lora_extract.yaml). With a hyphen in place of the space it is the same verb (`lora-extract`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    name: str
    schema: str
    run: str
    help: str
    words: bool = False  # run takes the words of the command line too
    # keys of the files and of the folders that the verb writes, where its config has them
    files: tuple[str, ...] = ("png", "draw.svg")
    folders: tuple[str, ...] = ("out", "plots", "run_dir", "cache", "folder")

    @property
    def root(self) -> str:
        return self.name.replace(" ", "_")


_ALL = [
    Verb("train", "longctx.config.train:TrainConfig", "longctx.run.train:run",
         "extend a model's context stage by stage, then make the adapter and evidence that the config asks for"),
    Verb("submit", "longctx.config.submit:SubmitConfig", "longctx.run.submit:run",
         "check a training command and put it into Slurm's queue", words=True),
    # The run's folders may be on another machine than its plan is made on.
    Verb("plan", "longctx.config.plan:PlanConfig", "longctx.planner.run:run",
         "estimate memory and time of every stage before anything starts; draw schedules", folders=()),
    Verb("theta", "longctx.config.theta:ThetaConfig", "longctx.theta.run:run",
         "show theta by every published rule and how far each reaches; search for a better one"),
    Verb("data", "longctx.config.data_verbs:PrepareConfig", "longctx.data.run:run",
         "tokenize every source once, into shards that training reads"),
    Verb("data stats", "longctx.config.data_verbs:StatsConfig", "longctx.data.stats:run",
         "show how long the documents are, and how often a curriculum reads each"),
    Verb("data synth", "longctx.config.data_verbs:SynthesizeConfig", "longctx.data.generate:run",
         "make long documents with known answers: needles, chains, tables, copying, variables",
         files=("out",), folders=("cache",)),
    Verb("import", "longctx.config.imports:ImportConfig", "longctx.model.imported:run",
         "turn a GGUF file into a model folder that the other verbs read"),
    Verb("eval", "longctx.config.eval:EvalConfig", "longctx.eval.run:run",
         "measure needle grids and loss by position, of one model or several side by side"),
    Verb("lora extract", "longctx.config.lora:ExtractConfig", "longctx.lora.commands:run_extract",
         "write the difference of two models as a LoRA, with the RoPE and window of the tuned one"),
    Verb("lora merge", "longctx.config.lora:MergeConfig", "longctx.lora.commands:run_merge",
         "merge an adapter into another fine-tune of the same base"),
    Verb("lora info", "longctx.config.lora:InfoConfig", "longctx.lora.info:run",
         "show an adapter's ranks, size and spectra, or estimate the size of one not yet made"),
    Verb("report", "longctx.config.report:ReportConfig", "longctx.report.page:run",
         "write a run's results as one HTML page"),
    Verb("preflight", "longctx.config.preflight:PreflightConfig", "longctx.run.preflight:run",
         "check that a launcher's ranks meet, and their nodes, clocks, shared folder and links"),
    Verb("doctor", "longctx.config.doctor:DoctorConfig", "longctx.doctor:run",
         "show this machine's GPUs, packages and kernels, and why a kernel cannot be used"),
    Verb("bench attention", "longctx.config.bench:BenchAttentionConfig", "longctx.bench.attention:run",
         "time the ring beside one device's own attention"),
    Verb("bench hierarchy", "longctx.config.bench:BenchHierarchyConfig", "longctx.bench.hierarchy:run",
         "time every schedule over slow links, on a virtual cluster (needs root)"),
    Verb("bench step", "longctx.config.bench_step:BenchStepConfig", "longctx.bench.step:run",
         "time a training step beside plain transformers, and measure its memory"),
    Verb("bench longest", "longctx.config.bench_longest:BenchLongestConfig", "longctx.bench.longest:run",
         "find the longest sequence that one device can train on, beside the plan"),
    Verb("bench peak", "longctx.config.bench_peak:BenchPeakConfig", "longctx.bench.peak:run",
         "measure the matrix products per second that this device reaches"),
    Verb("bench data", "longctx.config.data_verbs:BenchDataConfig", "longctx.bench.data:run",
         "time tokenizing, packing and reading beside what the machine can do", files=("out",), folders=()),
    Verb("bench lora", "longctx.config.lora:BenchLoraConfig", "longctx.bench.lora:run",
         "time extraction as a whole process beside mergekit's", files=("out",), folders=("folder",)),
    Verb("bench theta", "longctx.config.bench_theta:BenchThetaConfig", "longctx.bench.theta:run",
         "train the same under every theta rule, and compare the models"),
    Verb("bench faults", "longctx.config.faults:FaultsConfig", "longctx.bench.faults:run",
         "kill a tiny run again and again, damage its checkpoints, compare the final weights"),
]  # fmt: skip

VERBS: dict[str, Verb] = {verb.name: verb for verb in _ALL}
