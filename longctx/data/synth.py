"""Synthetic long documents with known answers, for training and for evaluation.

A task inserts lines (needles) into a haystack at given depths and asks for them at the end. It returns the tokens,
the loss weights and the positions of the answers; the length is exact. Single needles follow the pass-key test of
Mohtashami and Jaggi (2305.16300); several needles, chains and variables follow RULER (2404.06654). Unlike RULER, the
needles are lines instead of sentences in essays, and every answer is six digits. longctx.data.needle_keys divides the
keys between training and evaluation.

L tokens of a document, A answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from longctx.config.data import SynthTask
from longctx.data.haystack import Haystack, NeedleWriter
from longctx.data.needle_keys import KeySide, draw_keys, draw_values
from longctx.errors import UserError


@dataclass(frozen=True)
class Answer:
    """One answer: tokens[start:end] answer the question about `key`; `depth` is its needle's depth, 0 to 1."""

    start: int
    end: int
    key: str
    text: str
    depth: float


@dataclass(frozen=True)
class SynthDocument:
    """A synthetic document.

    tokens: int32 [L]. weights: float32 [L], the loss weight of predicting each token, 0 for the first. answers: in
    order. needles: the position at which each inserted line begins.
    """

    tokens: np.ndarray
    weights: np.ndarray
    answers: tuple[Answer, ...]
    needles: tuple[int, ...]


@dataclass(frozen=True)
class _Question:
    before: str
    answer: str
    after: str
    key: str
    insert: int


def make_task(
    task: SynthTask,
    length: int,
    rng: np.random.Generator,
    haystack: Haystack,
    *,
    keys: KeySide,
    tokenizer: NeedleWriter | Any,
) -> SynthDocument:
    """Make one document of exactly `length` tokens.

    haystack: (rng, n) -> n tokens, see longctx.data.haystack. keys: the side from which keys are drawn. tokenizer: a
    NeedleWriter, or a fast Hugging Face tokenizer, from which a NeedleWriter is made (this reads its vocabulary).
    Raises UserError when the length cannot hold the task.
    """
    writer = tokenizer if isinstance(tokenizer, NeedleWriter) else NeedleWriter(tokenizer)
    if task.kind == "copy":
        return _copy(task, length, rng, writer)
    lines, questions = _TASKS[task.kind](task, rng, keys)
    depths = rng.random(task.inserts) if task.depths is None else np.array(task.depths)
    return _assemble(task, length, rng, haystack, writer, lines, depths, questions)


def _needles(task: SynthTask, rng: np.random.Generator, split: KeySide) -> tuple[list[str], list[_Question]]:
    taken: set[str] = set()
    keys = draw_keys(rng, task.count, split, taken)
    values = draw_values(rng, task.count, taken)
    lines = [task.needle_template.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
    asked = rng.permutation(task.count)[: task.questions].tolist()
    return lines, [_ask(task, keys[i], values[i], i) for i in asked]


def _chained(task: SynthTask, rng: np.random.Generator, split: KeySide) -> tuple[list[str], list[_Question]]:
    taken: set[str] = set()
    keys = draw_keys(rng, task.links, split, taken)
    links = [*keys, *draw_values(rng, 1, taken)]
    lines = [task.needle_template.format(key=a, value=b) for a, b in pairwise(links)]
    return lines, [_ask(task, links[0], links[-1], task.links - 1)]


def _table(task: SynthTask, rng: np.random.Generator, split: KeySide) -> tuple[list[str], list[_Question]]:
    lines, questions = _needles(task, rng, split)
    moved = [_Question(q.before, q.answer, q.after, q.key, 0) for q in questions]
    return ["\n".join(lines)], moved


def _variables(task: SynthTask, rng: np.random.Generator, split: KeySide) -> tuple[list[str], list[_Question]]:
    taken: set[str] = set()
    values = draw_keys(rng, task.count, split, taken)
    lines: list[str] = []
    chains: list[list[str]] = []
    for value in values:
        names = draw_keys(rng, task.links, split, taken)
        origins = [value, *(f"VAR {name}" for name in names[:-1])]
        lines += [task.needle_template.format(key=n, value=o) for n, o in zip(names, origins, strict=True)]
        chains.append(names)
    asked = rng.permutation(task.count)[: task.questions].tolist()
    return lines, [_ask(task, values[i], " ".join(chains[i]), i * task.links) for i in asked]


_TASKS = {
    "needle": _needles,
    "needles": _needles,
    "chained": _chained,
    "table": _table,
    "variables": _variables,
}


def _ask(task: SynthTask, key: str, answer: str, insert: int) -> _Question:
    before, after = task.question_template.split("{value}")
    return _Question("\n" + before.format(key=key), answer, after.format(key=key), key, insert)


def _assemble(
    task: SynthTask,
    length: int,
    rng: np.random.Generator,
    haystack: Haystack,
    writer: NeedleWriter,
    lines: list[str],
    depths: np.ndarray,
    questions: list[_Question],
) -> SynthDocument:
    inserts = [writer.tokens(line + "\n") for line in lines]
    asks = [writer.marked(q.before, q.answer, q.after) for q in questions]
    fixed = len(writer.head) + sum(map(len, inserts)) + sum(len(tokens) for tokens, _, _ in asks)
    # A needle may need a newline before it; tokens reserved for unneeded newlines become haystack at the end.
    spare = len(writer.newline) * len(inserts)
    filler_length = length - fixed - spare
    if filler_length < 0:
        raise UserError(
            f"a {task.kind} task with {len(lines)} lines and {len(asks)} questions needs {fixed + spare} "
            f"tokens, and length={length} has fewer; take a longer length or a smaller count"
        )
    filler = haystack(rng, filler_length + spare)
    positions, at_line = _insert_positions(filler[:filler_length], depths, writer.newline_after)
    order = np.argsort(positions, kind="stable").tolist()
    parts: list[np.ndarray] = [writer.head]
    at, done = len(writer.head), 0
    starts = [0] * len(inserts)
    for i in order:
        piece = inserts[i] if at_line[i] else np.concatenate([writer.newline, inserts[i]])
        parts += [filler[done : positions[i]], piece]
        starts[i] = at + int(positions[i]) - done + (0 if at_line[i] else len(writer.newline))
        at += int(positions[i]) - done + len(piece)
        done = int(positions[i])
    rest = length - at - sum(len(tokens) for tokens, _, _ in asks)
    parts.append(filler[done : done + rest])
    at += rest
    answers: list[Answer] = []
    for question, (tokens, low, high) in zip(questions, asks, strict=True):
        depth = float(depths[question.insert])
        answers.append(Answer(at + low, at + high, question.key, question.answer, depth))
        parts.append(tokens)
        at += len(tokens)
    weights = _weights(length, answers, 2.0 if task.answer_weight is None else task.answer_weight, task.other_weight)
    return SynthDocument(np.concatenate(parts), weights, tuple(answers), tuple(starts))


def _insert_positions(
    filler: np.ndarray, depths: np.ndarray, newline_after: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Choose each needle's position: the line start nearest to its depth, or the exact depth if no start is near."""
    targets = np.round(depths * len(filler)).astype(np.int64)
    line_starts = np.concatenate([[0], np.flatnonzero(newline_after[filler]) + 1])
    right = np.minimum(np.searchsorted(line_starts, targets), len(line_starts) - 1)
    left = np.maximum(right - 1, 0)
    nearer_left = np.abs(line_starts[left] - targets) <= np.abs(line_starts[right] - targets)
    nearest = np.where(nearer_left, line_starts[left], line_starts[right])
    at_line = np.abs(nearest - targets) <= max(16, len(filler) // 50)
    return np.where(at_line, nearest, targets), at_line


def _copy(task: SynthTask, length: int, rng: np.random.Generator, writer: NeedleWriter) -> SynthDocument:
    """Make a copy task: a random segment of ordinary tokens, repeated to the document's end."""
    head = len(writer.head)
    most = (length - head) // 2
    if most < 1 or (task.segment or 1) > most:
        raise UserError(f"segment={task.segment} does not fit twice into length={length}; at most {most} fits")
    symbols = writer.digits if task.symbols == "digits" else writer.ordinary
    if not len(symbols):
        raise UserError("symbols=digits copies tokens made of digits, and the tokenizer has none; take symbols=all")
    size = task.segment or int(rng.integers(min(8, most), most + 1))
    tokens = np.empty(length, np.int32)
    tokens[:head] = writer.head
    tokens[head:] = np.resize(symbols[rng.integers(0, len(symbols), size=size)], length - head)
    answer = Answer(head + size, length, "", "", 0.0)
    weights = _weights(length, [answer], task.answer_weight, task.other_weight)
    return SynthDocument(tokens, weights, (answer,), (head,))


def _weights(length: int, answers: list[Answer], ratio: float | None, other: float) -> np.ndarray:
    """Return the loss weights, float32 [L]: `other` for every token that belongs to no answer, 0 for the first.

    The answers' weights sum to `ratio` times the sum of the other weights. Each answer token weighs 1 when the other
    weights are 0 or ratio is None.
    """
    weights = np.full(length, other, np.float32)
    weights[0] = 0.0
    spans = [slice(answer.start, answer.end) for answer in answers]
    for span in spans:
        weights[span] = 0.0
    count = sum(answer.end - answer.start for answer in answers)
    share = float(weights.sum(dtype=np.float64)) * (ratio or 0.0) / count if ratio is not None and other > 0 else 1.0
    for span in spans:
        weights[span] = share
    return weights
