"""What the data verbs and a training stage may say about documents: sources, mixes, packing, synthetic tasks.

A source is where documents come from; a mix names the share of every source in a stage and how long its
documents shall be there. Rules follow Fu et al. 2402.10171 (keep the domain mix, change length inside a
domain) and ProLong 2410.02660 (a share of full-length documents beside packed short ones).
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import field as _field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from longctx.config.base import AboveZero, Count, Length, LengthOrZero, Positive, Share, Text, ZeroOrMore, schema
from longctx.errors import nearest

TaskKind = Literal["needle", "needles", "chained", "table", "copy", "variables"]

_TEMPLATES: dict[str, tuple[str, str]] = {
    "needle": ("The pass key of {key} is {value}.", "What is the pass key of {key}? {value}"),
    "needles": ("The pass key of {key} is {value}.", "What is the pass key of {key}? {value}"),
    "chained": ("The pass key of {key} is {value}.", "Following the pass keys from {key} ends at {value}"),
    "table": ("{key}: {value}", "In the table, {key} has the value {value}"),
    "copy": ("", ""),
    "variables": ("VAR {key} = {value}.", "The variables that hold {key} are {value}"),
}


@schema
class SynthTask:
    """A synthetic task with known answers; see longctx.data.synth."""

    kind: TaskKind = "needle"  #: kind of the hidden facts and questions
    count: Positive = 1  #: number of needles, table rows, or (variables) chains
    questions: Positive = 1  #: number of needles, rows or chains that are asked for at the end
    links: Positive = 3  #: links of a chain
    #: where in the haystack each needle goes (0 its start, 1 its end); null: random
    depths: tuple[Share, ...] | None = None
    needle: str | None = None  #: phrasing of the hidden fact, with {key} and {value}
    question: str | None = None  #: phrasing of the question at the end, with {key} and {value}
    #: the answers' loss weight over that of all other tokens together; null: 2, and every token alike for copy
    answer_weight: ZeroOrMore | None = None
    other_weight: ZeroOrMore = 1.0  #: loss weight of other tokens; 0: only answers train
    segment: Positive | None = None  #: tokens of a copied segment; null: random, up to half of the document
    symbols: Literal["all", "digits"] = "all"  #: symbols of a copied segment; fewer are learned sooner

    def __post_init__(self) -> None:
        if self.questions > self.count and self.kind != "chained":
            raise ValueError(f"questions={self.questions} asks for more than the count={self.count} needles hold")
        if self.kind in ("needle", "chained") and self.questions > 1:
            raise ValueError(
                f"questions={self.questions} does not fit kind={self.kind}, which asks one; use kind=needles"
            )
        if self.kind == "needle" and self.count != 1:
            raise ValueError(f"count={self.count} does not fit kind=needle, which hides one; use kind=needles")
        if self.depths is not None and len(self.depths) != self.inserts:
            raise ValueError(f"depths={list(self.depths)} must name {self.inserts} places for kind={self.kind}")
        for name in ("needle", "question"):
            check_template(name, getattr(self, name))

    @property
    def inserts(self) -> int:
        """How many separate places of the haystack the task writes to."""
        return {"needle": 1, "needles": self.count, "chained": self.links, "table": 1, "copy": 0,
                "variables": self.count * self.links}[self.kind]  # fmt: skip

    @property
    def needle_template(self) -> str:
        return _TEMPLATES[self.kind][0] if self.needle is None else self.needle

    @property
    def question_template(self) -> str:
        return _TEMPLATES[self.kind][1] if self.question is None else self.question


def check_template(name: str, template: str | None) -> None:
    """Raise ValueError unless a needle's or question's phrasing has {key} and {value} as often as it must."""
    if template is None:
        return
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"{name}={template!r} is not a template: {error}; write {{key}} and {{value}}") from None
    # A question may repeat its key ("What is the key of X? The key of X is ..."); a needle states it once.
    keys = fields.count("key")
    enough = keys >= 1 if name == "question" else keys == 1
    if not enough or fields.count("value") != 1 or {*fields} != {"key", "value"}:
        often = "at least once" if name == "question" else "once"
        raise ValueError(f"{name}={template!r} must hold {{key}} {often} and {{value}} once, and no other field")


SourceKind = Literal["stdlib", "text", "hub", "chat", "synth"]


@schema
class SourceConfig:
    """Where documents come from."""

    #: stdlib: the Python standard library on this machine; text: files; hub: a dataset through Hugging Face datasets;
    #: chat: conversations ({role, content} lists) from path or name; synth: generated
    kind: SourceKind
    #: a file or folder of .txt, .md, .jsonl (each also .gz or .zst), .parquet or .arrow (save_to_disk)
    path: Text | None = None
    name: Text | None = None  #: a hub dataset's name
    subset: Text | None = None  #: the hub dataset's configuration
    split: str = "train"  #: the hub dataset's split
    field: str | None = None  #: column of text or messages (null: so named); for stdlib, docs takes docstrings alone
    include: list[str] = _field(default_factory=list)  #: patterns on file names below path, such as ['*.md']
    exclude: list[str] = _field(default_factory=list)  #: patterns on file names that are left out
    rows: Count | None = None  #: read only so many rows of a hub dataset
    min_len: LengthOrZero = 0  #: documents of fewer tokens are left out; 0: none
    max_len: Length | None = None  #: documents of more tokens are left out; null: none
    #: tokens that carry loss; assistant: those of the assistant's turns (chat)
    loss: Literal["all", "assistant"] = "all"
    #: the assistant's tokens weigh this multiple of all others of a conversation
    answer_weight: AboveZero | None = None
    task: SynthTask | None = None  #: what a synth source generates
    haystack: str | None = None  #: the source of the text in which the task is hidden

    def __post_init__(self) -> None:
        if self.kind == "text" and not self.path:
            raise ValueError("path is missing; a text source is a file or folder, for example data.path=books")
        if self.kind == "hub" and not self.name:
            raise ValueError("name is missing; a hub source is a dataset's name, for example name=wikitext")
        if self.kind == "chat" and bool(self.path) == bool(self.name):
            raise ValueError("a chat source has either a path (data.path=FOLDER) or a hub dataset's name")
        if self.kind == "synth" and (self.task is None or not self.haystack):
            raise ValueError("a synth source names its task and, as haystack, the source of its straw")
        if self.kind != "synth" and (self.task is not None or self.haystack is not None):
            raise ValueError(f"task and haystack belong to kind=synth, not to kind={self.kind}")
        if self.kind != "chat" and (self.loss != "all" or self.answer_weight is not None):
            raise ValueError(f"loss and answer_weight belong to kind=chat, not to kind={self.kind}")
        if self.loss == "assistant" and self.answer_weight is not None:
            raise ValueError(
                f"answer_weight={self.answer_weight:g} weighs the assistant's tokens against the others, which carry "
                "no loss under loss=assistant; leave one of the two out"
            )
        from_hub = {"name": self.name, "subset": self.subset, "rows": self.rows, "split": self.split}
        foreign = [key for key, value in from_hub.items() if value not in (None, "train")]
        if foreign and not self.name:
            raise ValueError(
                f"{foreign[0]} belongs to a dataset of the hub (kind=hub), not to files (kind={self.kind})"
            )
        if self.name and self.kind not in ("hub", "chat"):
            raise ValueError(f"name={self.name} is a dataset of the hub, which needs kind=hub, not kind={self.kind}")
        if "[" in self.split:
            raise ValueError(
                f"split={self.split} is a part of a split, and a dataset's files are read whole; name a split (train, "
                "train+test), and for its first rows give rows=N"
            )
        if self.max_len is not None and self.max_len < self.min_len:
            raise ValueError(f"max_len={self.max_len} is below min_len={self.min_len}")

    @property
    def column(self) -> str:
        return self.field or ("messages" if self.kind == "chat" else "text")


@schema
class LengthPolicy:
    """How long a source's documents are within a stage.

    natural: as they come. upsample: documents of min_len tokens and more make up `share` of the source's tokens.
    prolong: `share` of the source's tokens are full sequences made of single long documents, the rest is packed
    from shorter ones (0.75 is Qwen2.5-1M's). joined: documents joined without boundaries to full sequences. cut:
    consecutive pieces of at most `length` tokens, and of the stage's length where that is shorter; attention within
    short pieces costs little. For synth sources: full (the stage's length), fixed (length), loguniform (min_len to
    the stage's length).
    """

    #: policy of document lengths
    kind: Literal["natural", "upsample", "prolong", "joined", "cut", "full", "fixed", "loguniform"]
    min_len: Length | None = None  #: tokens: the shortest long document (upsample), or the shortest drawn (loguniform)
    share: Share | None = None  #: share of the source's tokens in long documents
    length: Length | None = None  #: tokens of every document (fixed), or of the longest piece (cut)

    def __post_init__(self) -> None:
        needs = {"upsample": ("min_len", "share"), "prolong": ("share",), "fixed": ("length",), "cut": ("length",)}
        needs["loguniform"] = ("min_len",)
        for name in ("min_len", "share", "length"):
            given, wanted = getattr(self, name) is not None, name in needs.get(self.kind, ())
            if given != wanted:
                rule = "is missing" if wanted else "does not apply"
                raise ValueError(f"{name} {rule} for the length policy {self.kind}")


def _policy(value: Any) -> Any:
    """`length: full` is short for `length: {kind: full}`, `length: {prolong: {...}}` for kind and the rest."""
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, Mapping) and len(value) == 1 and "kind" not in value:
        ((kind, rest),) = value.items()
        if isinstance(rest, Mapping):
            return {"kind": kind, **rest}
    return value


@schema
class MixEntry:
    """A source's part in a mix."""

    weight: ZeroOrMore  #: the source's share of the stage's tokens
    #: policy of the source's document lengths; null: natural, and full for synth sources
    length: Annotated[LengthPolicy | None, BeforeValidator(_policy)] = None


def _entry(value: Any) -> Any:
    """`stdlib: 0.4` is short for `stdlib: {weight: 0.4}`."""
    return {"weight": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


Mix = dict[str, Annotated[MixEntry, BeforeValidator(_entry)]]


@schema
class DataConfig:
    """Sources by name, mixes by name (a stage names one), and how documents become sequences."""

    sources: dict[str, SourceConfig]
    mixes: dict[str, Mix]
    #: files or a folder for data=text, data=chat and data=prolong, which read it through their sources
    path: Text | None = None
    packing: Literal["best_fit", "concat"] = "best_fit"  #: best_fit keeps documents whole, concat joins and splits
    document_mask: bool = True  #: attention stays within a document
    #: predict trains on a document's first token too, which only makes sense without document masks
    first_token: Literal["skip", "predict"] = "skip"
    heldout: Annotated[Share, Field(lt=1)] = 0.05  #: share of documents (by hash of the file's name) not trained
    max_epochs: AboveZero = 4.0  #: warn when a source is repeated more often
    max_bad: Share = 0.01  #: share of broken lines that is skipped with a count
    bos: bool = True  #: put the tokenizer's mark before each document; conversations have their template's marks
    eos: bool = True  #: put the tokenizer's mark after each document; synthetic ones end with their answer instead

    def __post_init__(self) -> None:
        if not self.sources or not self.mixes:
            raise ValueError("sources and mixes must each name at least one")
        if self.first_token == "predict" and self.document_mask:
            raise ValueError(
                "first_token=predict would predict a token from nothing; set document_mask=false or first_token=skip"
            )
        for name, source in self.sources.items():
            self._check_haystack(name, source)
        for name, mix in self.mixes.items():
            self._check_mix(name, mix)

    def _check_haystack(self, name: str, source: SourceConfig) -> None:
        straw = source.haystack
        if straw is not None and (straw not in self.sources or self.sources[straw].kind == "synth"):
            texts = [key for key, other in self.sources.items() if other.kind != "synth"]
            raise ValueError(f"sources.{name}.haystack={straw} is not a source of text; known: {', '.join(texts)}")

    def _check_mix(self, name: str, mix: Mix) -> None:
        for source, entry in mix.items():
            where = f"mixes.{name}.{source}"
            if source not in self.sources:
                near = nearest(source, self.sources)
                hint = f"did you mean {near!r}?" if near else f"known: {', '.join(self.sources)}"
                raise ValueError(f"{where} is not a source; {hint}")
            synth = self.sources[source].kind == "synth"
            kind = "" if entry.length is None else entry.length.kind
            if kind and synth != (kind in ("full", "fixed", "loguniform")):
                fits = "full, fixed or loguniform" if synth else "natural, upsample, prolong, joined or cut"
                raise ValueError(f"{where}.length={kind} does not fit a {self.sources[source].kind} source; use {fits}")
        if not mix:
            raise ValueError(f"mixes.{name} names no source; give each of its sources a weight, such as text: 1.0")
        total = sum(entry.weight for entry in mix.values())
        if abs(total - 1) > 1e-3:
            parts = ", ".join(f"{key} {entry.weight:g}" for key, entry in mix.items())
            raise ValueError(
                f"mixes.{name}: the weights {parts} sum to {total:g}, not to 1; scale them"
                + (f", for example by 1/{total:g}" if total > 0 else "")
            )
