"""Gradient checkpointing: a layer keeps its input only, and computes the rest again in the backward pass.

transformers' own layers do it while they are in training mode. Only the layers themselves are put into it, not what
is in them, so that no dropout wakes up; and only while the learner is at work, never while the engine samples. A
vision tower keeps its activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from agents.critic import decoder_of
from agents.packed import attention


@contextmanager
def recomputed(models: Iterable[Any]) -> Iterator[None]:
    """Forward passes of these models keep what a layer begins with; a cache of keys and values cannot be used."""
    layers: list[Any] = []
    try:
        for model in models:
            config = decoder_of(model).config
            for layer in _layers(model):
                layer._gradient_checkpointing_func = partial(_checkpoint, config)
                layer.gradient_checkpointing = layer.training = True
                layers.append(layer)
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


def _checkpoint(config: Any, function: Any, *args: Any) -> Any:
    """The second pass attends as the first one did, whatever the model is set to by then."""
    def contexts() -> tuple[Any, Any]:
        return nullcontext(), attention(config, config._attn_implementation)

    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _layers(model: Any) -> list[Any]:
    return [m for m in decoder_of(model).modules() if isinstance(m, GradientCheckpointingLayer)]


def can_recompute(model: Any) -> bool:
    """Whether the model's layers can, and give the very same gradient; tried on a few tokens."""
    if not _layers(model):
        return False
    trunk = decoder_of(model)
    weight = next(trunk.parameters())
    tokens_1T = torch.arange(6, device=weight.device)[None] % int(trunk.config.get_text_config().vocab_size)
    trained = [p for p in trunk.parameters() if p.requires_grad]
    found = []
    for models in ((), (model,)):
        with recomputed(models), torch.enable_grad():
            out = trunk(input_ids=tokens_1T, use_cache=False).last_hidden_state
            found.append(torch.autograd.grad(out.square().sum(), trained, allow_unused=True))
    return all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(*found, strict=True)
    )
