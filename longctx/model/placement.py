"""Loads or initialises a model one parameter at a time, so that a rank can shard each before the next one exists.

The callback `place` gets every parameter once, in the same order on all ranks, as soon as it holds its values; it may
replace the parameter's data. The values equal those of a model that is made in one piece: a loaded parameter is placed
when transformers registers it, and a random one is drawn at the usual point from the same random state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook as on_module
from torch.nn.modules.module import register_module_parameter_registration_hook as on_parameter

Place = Callable[[nn.Parameter], None]

_READ_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"  # 1 stops transformers' threads, which otherwise read the whole model ahead


@contextmanager
def placed_as_loaded(place: Place, config: Any) -> Iterator[None]:
    """Place each parameter that from_pretrained loads inside this context.

    The caller places the rest: the two tables of a tied model, which transformers compares first, and parameters that
    the folder does not hold.
    """
    table = (config.vocab_size, config.hidden_size) if config.tie_word_embeddings else None

    def registered(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if getattr(parameter, "_is_hf_initialized", False) and tuple(parameter.shape) != table:
            place(parameter)

    before = os.environ.get(_READ_AHEAD)
    os.environ[_READ_AHEAD] = "1"
    hook = on_parameter(registered)
    try:
        yield
    finally:
        hook.remove()
        if before is None:
            del os.environ[_READ_AHEAD]
        else:
            os.environ[_READ_AHEAD] = before


@contextmanager
def placed_as_drawn(place: Place) -> Iterator[None]:
    """Place each parameter that from_config draws inside this context.

    torch draws a module's parameters when it makes the module, and transformers draws them again. The first values only
    advance the random state and are dropped; the second are placed.
    """
    from transformers import PreTrainedModel

    draw = PreTrainedModel._initialize_weights

    def made(parent: nn.Module, name: str, module: nn.Module) -> None:
        if not getattr(module, "_is_hf_initialized", False):
            for key, parameter in module.named_parameters(recurse=False):
                module._parameters[key] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    def drawn(model: Any, module: nn.Module, *arguments: Any) -> None:
        fresh = [
            (key, nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad))
            for key, parameter in module._parameters.items()
            if parameter is not None and parameter.is_meta
        ]
        module._parameters.update(fresh)
        draw(model, module, *arguments)
        for _, parameter in fresh:
            place(parameter)

    hook = on_module(made)
    patched: Any = PreTrainedModel
    patched._initialize_weights = drawn
    try:
        yield
    finally:
        patched._initialize_weights = draw
        hook.remove()
