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
         "extend a model's context, stage by stage"),
    Verb("submit", "longctx.config.submit:SubmitConfig", "longctx.run.submit:run",
         "a training command as a Slurm job, checked before it is queued", words=True),
    Verb("eval", "longctx.config.eval:EvalConfig", "longctx.eval.run:run",
         "needles found and loss by position, of one model or of several side by side"),
    Verb("import", "longctx.config.imports:ImportConfig", "longctx.model.imported:run",
         "a model from a GGUF file as a folder that everything else reads"),
    Verb("report", "longctx.config.report:ReportConfig", "longctx.report.page:run",
         "a run on one static page"),
    Verb("doctor", "longctx.config.doctor:DoctorConfig", "longctx.doctor:run",
         "what this machine offers, and which attention kernel would serve"),
    Verb("preflight", "longctx.config.preflight:PreflightConfig", "longctx.run.preflight:run",
         "do the ranks of a launcher meet; their nodes, clocks, shared folder and links, in a minute"),
    Verb("bench faults", "longctx.config.faults:FaultsConfig", "longctx.bench.faults:run",
         "a soak: kill a tiny run again and again, damage its checkpoints, compare the final weights"),
    # The run's folders may be on another machine than its plan is made on.
    Verb("plan", "longctx.config.plan:PlanConfig", "longctx.planner.run:run",
         "memory and time of every stage before anything starts; timelines of schedules", folders=()),
    Verb("bench step", "longctx.config.bench_step:BenchStepConfig", "longctx.bench.step:run",
         "one training step beside plain transformers: tokens per second and memory"),
    Verb("bench longest", "longctx.config.bench_longest:BenchLongestConfig", "longctx.bench.longest:run",
         "the longest sequence of a training step that one device takes, beside the plan"),
    Verb("bench peak", "longctx.config.bench_peak:BenchPeakConfig", "longctx.bench.peak:run",
         "the matrix rate this device reaches"),
    Verb("bench attention", "longctx.config.bench:BenchAttentionConfig", "longctx.bench.attention:run",
         "the ring beside one device's own attention"),
    Verb("bench hierarchy", "longctx.config.bench:BenchHierarchyConfig", "longctx.bench.hierarchy:run",
         "every schedule behind slow links, on a virtual cluster (root)"),
    Verb("theta", "longctx.config.theta:ThetaConfig", "longctx.theta.run:run",
         "thetas by every rule, what they support, and a search for better ones"),
    Verb("bench theta", "longctx.config.bench_theta:BenchThetaConfig", "longctx.bench.theta:run",
         "the same training under every theta rule, and what the models can do"),
    Verb("lora extract", "longctx.config.lora:ExtractConfig", "longctx.lora.commands:run_extract",
         "what training changed, as a LoRA: measured, sign checked, with rope and window"),
    Verb("lora merge", "longctx.config.lora:MergeConfig", "longctx.lora.commands:run_merge",
         "adapters into a fine-tune of their base, with the window they carry"),
    Verb("lora info", "longctx.config.lora:InfoConfig", "longctx.lora.info:run",
         "an adapter's ranks, size and spectra; the size of one not yet made"),
    Verb("bench lora", "longctx.config.lora:BenchLoraConfig", "longctx.bench.lora:run",
         "extraction as a whole process beside mergekit's", files=("out",), folders=("folder",)),
    Verb("data", "longctx.config.data_verbs:PrepareConfig", "longctx.data.run:run",
         "tokenize every source once, into shards that training reads"),
    Verb("data stats", "longctx.config.data_verbs:StatsConfig", "longctx.data.stats:run",
         "how long the documents are, and how often a curriculum sees them"),
    Verb("data synth", "longctx.config.data_verbs:SynthesizeConfig", "longctx.data.generate:run",
         "long documents with known answers: needles, chains, tables, copying, variables",
         files=("out",), folders=("cache",)),
    Verb("bench data", "longctx.config.data_verbs:BenchDataConfig", "longctx.bench.data:run",
         "tokenizing, packing and reading beside what the machine can do", files=("out",), folders=()),
]  # fmt: skip

VERBS: dict[str, Verb] = {verb.name: verb for verb in _ALL}
