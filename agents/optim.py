"""Optimizers by name, and their state as plain trees keyed by parameter name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from agents.cli import UsageError, nearest
from agents.config import OptimConfig
from agents.models import is_tiny


def resolved(config: OptimConfig, model: nn.Module) -> OptimConfig:
    """The configuration with a learning rate: what it names, or the default for a model of this size."""
    return config if config.lr is not None else replace(config, lr=5e-4 if is_tiny(model) else 1e-6)


def build(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over a model's trainable parameters. UsageError on an unknown name."""
    classes = {
        name.lower(): cls for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    cls = classes.get(config.name.lower())
    if cls is None:
        raise UsageError(f"unknown optimizer `{config.name}`{nearest(config.name, classes)}")
    accepted = inspect.signature(cls).parameters
    options: dict[str, Any] = {"lr": resolved(config, model).lr}
    if "betas" in accepted:
        options["betas"] = (config.beta1, config.beta2)
    elif "momentum" in accepted:
        options["momentum"] = config.beta1
    if "fused" in accepted:
        options["fused"] = all(p.is_floating_point() for p in model.parameters())
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return cls([g for g in groups if g["params"]], **options)


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
