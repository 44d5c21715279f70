"""Needle in a haystack: a line with a six-digit value is hidden in real text, and the question follows at the end.

By default, one haystack holds a needle at every depth, each with its own key, and all of them are asked for one after
the other. This is the multi-key variant of RULER (2404.06654): it is harder than one needle and fills all depths with
one forward pass. With `single`, each haystack holds one needle. An answer counts as found when each of its tokens is
the arg max given the tokens before it, as in greedy decoding. Logits are computed at the answers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
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

# Next-token logits at the positions `where` of a prompt: (tokens [S], where [A]) -> [A, vocabulary].
Predict = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Prompt:
    """One haystack of a grid, with its questions.

    seed, length: indices into the grid's arrays. depth_index: the index of the depth of each answer.
    """

    seed: int
    length: int
    document: SynthDocument
    depth_index: tuple[int, ...]


def prompts(config: NeedleConfig, writer: NeedleWriter, haystack: Haystack) -> Iterator[Prompt]:
    """Yield every prompt of a grid; seed, length and number determine a prompt, so all models get the same ones."""
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
    """Raise UserError when the shortest length cannot hold its needles and questions."""
    shortest = replace(config, lengths=(min(config.lengths),), per_cell=1, seeds=config.seeds[:1])
    try:
        for _ in prompts(shortest, writer, haystack):
            pass
    except UserError as error:
        raise UserError(f"lengths: {error}, or single=true, which asks for one needle a prompt") from None


def _shares(config: NeedleConfig) -> list[tuple[int, ...]]:
    """Return the groups of depths that share a haystack: one group of all, or one for each depth."""
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
    """Measure this rank's part of a grid: the prompts whose number is `rank` modulo `world`.

    `combine` adds the parts of all ranks. predict: see Predict. tick: called after each haystack. workers: prompts
    that are computed at once; None uses torch's number of threads. Give 1 on a GPU, where one prompt may fill the
    memory.
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


def _threads(workers: int | None) -> AbstractContextManager[ThreadPoolExecutor]:
    """Compute one prompt per thread, which is faster on a CPU than several threads on one small matrix."""
    import torch

    from longctx.threads import one_thread_each

    return ThreadPoolExecutor(1) if workers == 1 else one_thread_each(workers or torch.get_num_threads())


def haystacks(config: NeedleConfig) -> int:
    """Return the number of prompts of a grid, for a progress bar."""
    return len(config.seeds) * len(config.lengths) * config.per_cell * len(_shares(config))


def combine(part: Grid, ranks: Ranks) -> Grid:
    """Add the parts of all ranks; every rank returns the sum."""
    both = ranks.sum(np.stack([part.hits, part.asked]).ravel().tolist())
    hits, asked = np.array(both).astype(np.int64).reshape(2, *part.hits.shape)
    return replace(part, hits=hits, asked=asked)
