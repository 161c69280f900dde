"""Optimizers by name, and their state as plain trees keyed by parameter name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from agents import lora
from agents.cli import UsageError, nearest
from agents.config import OptimConfig
from agents.models import is_tiny
from policy_opt.bank import OPTIMIZERS, Optim
from policy_opt.errors import RecipeError
from policy_opt.options import part

ADAPTERS = 10
"""Times the default rate where only adapters are trained: their best rate is about ten times that of full weights."""


def resolved(config: OptimConfig, model: nn.Module) -> OptimConfig:
    """The configuration with a learning rate: what it names, or the default for a model of this size and kind."""
    if config.lr is not None:
        return config
    return replace(config, lr=(5e-4 if is_tiny(model) else 1e-6) * (ADAPTERS if lora.layers(model) else 1))


def seeded(config: OptimConfig, seed: int) -> OptimConfig:
    """The configuration with a seed: its own, or that of the run."""
    return config if config.seed is not None else replace(config, seed=seed)


def build(model: nn.Module, config: OptimConfig, own: Optim | None = None) -> torch.optim.Optimizer:
    """The optimizer over a model's trainable parameters, by name, so that noise is a function of the name.

    own: the wish of a recipe, in place of what the configuration names; its rate and decay stand in `config` already.
    UsageError on an unknown name or option.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [(n, p) for n, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    rate = resolved(config, model).lr
    assert rate is not None
    return replace(own or described(config), lr=rate).build(
        [g for g in groups if g["params"]], rate, config.seed or 0,
        fused=all(p.is_floating_point() for p in model.parameters()),
    )  # fmt: skip


def described(config: OptimConfig) -> Optim:
    """What the configuration names: `lion`, or with options of its own, `lion_k(kappa=huber(e=0.05))`."""
    if config.name.isidentifier() and config.name.lower() not in OPTIMIZERS:
        raise UsageError(f"unknown optimizer `{config.name}`{nearest(config.name, OPTIMIZERS)}")
    try:
        named = part("optimizer", config.name.lower() if config.name.isidentifier() else config.name)
        for inner in (named, named.direction):
            if inner is not None and (inner.lr, inner.betas, inner.weight_decay) != (None, None, 0.0):
                raise UsageError(
                    f"--optim.name {config.name}: rate, betas and decay are said with --optim.lr, --optim.beta1, "
                    "--optim.beta2 and --optim.weight-decay"
                )
        return _with_betas(named, (config.beta1, config.beta2))
    except RecipeError as error:
        raise UsageError(str(error)) from error


def _with_betas(optim: Optim, betas: tuple[float, float]) -> Optim:
    """The optimizer, or the one whose direction it converts, with these decay rates."""
    if optim.direction is not None:
        return replace(optim, direction=_with_betas(optim.direction, betas))
    return replace(optim, betas=betas)


def state_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """State per parameter name, so that it does not depend on the order of parameter groups."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: dict(state) for p, state in optimizer.state.items()}


def restore(optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Inverse of `state_of`; UsageError where a name is unknown to the model."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, entry in state.items():
        if name not in parameters:
            raise UsageError(f"the optimizer's state names `{name}`, which the model does not have")
        parameter = parameters[name]
        optimizer.state[parameter] = {k: _placed(v, parameter) for k, v in entry.items()}


def _placed(value: Any, parameter: nn.Parameter) -> Any:
    """A copy beside the parameter; counters (no axes) stay where they are."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(parameter.device, copy=True) if value.ndim else value.clone()
