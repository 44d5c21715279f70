"""Needle in a haystack: a line with a six-digit value is hidden in real text, the question comes at the end.

Default: one haystack carries a needle at every depth, each with its own key, and asks for all of them one
after the other (the multi-key variant of RULER 2404.06654; harder than one needle, and five cells for one
forward). An answer counts when every one of its tokens is the arg max given the tokens before it, which is
what greedy decoding would write. Logits are formed at the answers only. `single` hides one needle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from longctx.config.data import SynthTask
from longctx.config.eval import NeedleConfig
from longctx.data.haystack import Haystack, NeedleWriter
from longctx.data.synth import SynthDocument, make_task
from longctx.errors import UserError
from longctx.eval.grid import Grid

if TYPE_CHECKING:
    import torch

    from longctx.distributed.ranks import Ranks

# next-token scores at the positions `where` of a prompt: (tokens [S], where [A]) -> [A, vocabulary]
Predict = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Prompt:
    """One haystack of a grid: its place in the arrays, its tokens and the depth index of each answer."""

    seed: int
    length: int
    document: SynthDocument
    depth_index: tuple[int, ...]


def prompts(config: NeedleConfig, writer: NeedleWriter, haystack: Haystack) -> Iterator[Prompt]:
    """Every haystack of a grid, the same ones for every model: drawn from (seed, length, number) alone."""
    task = SynthTask(kind="needles", needle=config.needle, question=config.question)
    for i, seed in enumerate(config.seeds):
        for j, length in enumerate(config.lengths):
            for number in range(config.per_cell):
                for together in _shares(config):
                    rng = np.random.default_rng([seed, length, number, *together])
                    depths = tuple(config.depths[d] for d in together)
                    asked = replace(task, count=len(depths), questions=len(depths), depths=depths)
                    document = make_task(asked, length, rng, haystack, keys="eval", tokenizer=writer)
                    index = tuple(config.depths.index(answer.depth) for answer in document.answers)
                    yield Prompt(i, j, document, index)


def check_lengths(config: NeedleConfig, writer: NeedleWriter, haystack: Haystack) -> None:
    """Raises UserError when the shortest length cannot hold its needles and questions."""
    shortest = replace(config, lengths=(min(config.lengths),), per_cell=1, seeds=config.seeds[:1])
    try:
        for _ in prompts(shortest, writer, haystack):
            pass
    except UserError as error:
        raise UserError(f"lengths: {error}, or ask for one needle a prompt (single)") from None


def _shares(config: NeedleConfig) -> list[tuple[int, ...]]:
    """Which depths share a haystack: all of them, or each alone."""
    every = tuple(range(len(config.depths)))
    return [(d,) for d in every] if config.single else [every]


def grid(
    predict: Predict,
    config: NeedleConfig,
    writer: NeedleWriter,
    haystack: Haystack,
    *,
    label: str,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Grid:
    """Ask every prompt whose number is `rank` modulo `world`; sum the grids of all ranks with `combine`.

    predict: next-token scores, see Predict; tick is called after each haystack. workers: prompts at once on a CPU
    (None: as many as torch has threads; 1 on a GPU, whose memory one prompt may fill).
    """
    import torch

    shape = (len(config.seeds), len(config.lengths), len(config.depths))
    hits, asked = np.zeros(shape, np.int64), np.zeros(shape, np.int64)

    def ask(prompt: Prompt) -> list[bool]:
        answers = prompt.document.answers
        where = np.concatenate([np.arange(a.start - 1, a.end - 1) for a in answers])
        tokens = torch.from_numpy(prompt.document.tokens.astype(np.int64))
        best = predict(tokens, torch.from_numpy(where)).argmax(-1).cpu().numpy()
        right = best == prompt.document.tokens[where + 1]
        ends = np.cumsum([a.end - a.start for a in answers])
        return [bool(part.all()) for part in np.split(right, ends[:-1])]

    mine = [prompt for number, prompt in enumerate(prompts(config, writer, haystack)) if number % world == rank]
    with _threads(workers) as pool:
        for prompt, found in zip(mine, pool.map(ask, mine), strict=True):
            for hit, depth in zip(found, prompt.depth_index, strict=True):
                hits[prompt.seed, prompt.length, depth] += hit
                asked[prompt.seed, prompt.length, depth] += 1
            tick()
    return Grid(label, config.lengths, config.depths, config.seeds, hits, asked)


@contextmanager
def _threads(workers: int | None) -> Iterator[ThreadPoolExecutor]:
    """A prompt per thread, each computing with one: faster on a CPU than all threads on one small matrix."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if workers == 1 else 1)
    try:
        with ThreadPoolExecutor(workers or before) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def haystacks(config: NeedleConfig) -> int:
    """How many forwards a grid takes, for a progress bar."""
    return len(config.seeds) * len(config.lengths) * config.per_cell * len(_shares(config))


def combine(part: Grid, ranks: Ranks) -> Grid:
    """The sum of every rank's part, on all ranks."""
    both = ranks.sum(np.stack([part.hits, part.asked]).ravel().tolist())
    hits, asked = np.array(both).astype(np.int64).reshape(2, *part.hits.shape)
    return replace(part, hits=hits, asked=asked)
