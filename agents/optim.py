"""Optimizers by name, and their state as plain trees keyed by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from agents import lora
from agents.cli import UsageError, nearest
from agents.config import OptimConfig
from agents.models import is_tiny
from agents.sharding import local, part_of, whole_like
from policy_opt.bank import OPTIMIZERS, Optim
from policy_opt.errors import RecipeError
from policy_opt.optimizers.kappa import L1, HalfSq, Huber, L1Threshold
from policy_opt.optimizers.stosignsgd import SignConversion
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
    Of a model that is split over processes it steps the rows that this one holds (`hand_over`).
    UsageError on an unknown name or option, RecipeError where rows alone do not tell what the step is.
    """
    wanted = own or described(config)
    split = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    if split and not by_element(wanted):
        raise RecipeError(
            f"{wanted.name} steps whole tensors, and with FSDP no process holds one; take an optimizer that works "
            f"element by element, {', '.join(sorted(BY_ELEMENT))}, or DDP"
        )
    trained = [
        (name, nn.Parameter(local(p)) if name in split else p)
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    groups = [
        {"params": [(n, p) for n, p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [(n, p) for n, p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    rate = resolved(config, model).lr
    assert rate is not None
    built: Any = replace(wanted, lr=rate).build(
        [g for g in groups if g["params"]], rate, config.seed or 0,
        fused=all(p.is_floating_point() for p in model.parameters()),
    )  # fmt: skip
    if split and isinstance(getattr(built, "direction", None), SignConversion):
        built.direction = replace(built.direction, noise=_Rows(built.direction.noise, split))
    return built


BY_ELEMENT = frozenset(
    "adadelta adagrad adam adamax adamw asgd lion lion_k momentum nadam radam rmsprop rprop sgd stosignsgd".split()
)
"""Optimizers whose step of a number depends on that number's gradients alone (lion_k: with most of its functions)."""


def by_element(optim: Optim) -> bool:
    """Whether rows of a tensor can be stepped without the others."""
    inner = optim.direction is None or by_element(optim.direction)
    return optim.name in BY_ELEMENT and isinstance(optim.kappa, (type(None), L1, L1Threshold, Huber, HalfSq)) and inner


@dataclass(frozen=True)
class _Rows:
    """Noise of the rows that this process holds: those of the whole tensor's, whatever the number of processes."""

    noise: Callable[[str, int, Tensor], Tensor]
    split: Mapping[str, Tensor]

    def __call__(self, name: str, step: int, like: Tensor) -> Tensor:
        parameter = self.split[name]
        return part_of(self.noise(name, step, like.new_empty(parameter.shape)), parameter)


def steps(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """What it steps, by the names that the model knows."""
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def hand_over(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give the optimizer the gradients of the rows that this process holds of a split model."""
    parameters = dict(model.named_parameters())
    for name, rows in steps(optimizer):
        whole = parameters[name]
        assert whole.grad is not None
        rows.data, rows.grad = local(whole), local(whole.grad)


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
    """State per parameter name, so that it does not depend on the order of parameter groups.

    Of a split model the first process gets whole tensors; all of them call this.
    """
    parameters = dict(model.named_parameters())
    known = [(name, p) for name, p in steps(optimizer) if p in optimizer.state]
    return {name: {k: _whole(v, parameters[name]) for k, v in optimizer.state[p].items()} for name, p in known}


def _whole(value: Any, parameter: Tensor) -> Any:
    return whole_like(value, parameter) if isinstance(value, Tensor) and value.ndim else value


def restore(optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Inverse of `state_of`; UsageError where a name is unknown to the model."""
    parameters, stepped = dict(model.named_parameters()), dict(steps(optimizer))
    counters = {
        id(p): p.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
        for group in optimizer.param_groups
        for p in group["params"]
    }
    optimizer.state.clear()
    for name, entry in state.items():
        if name not in stepped:
            raise UsageError(f"the optimizer's state names `{name}`, which the model does not have")
        p = stepped[name]
        optimizer.state[p] = {k: _placed(v, parameters[name], counters[id(p)]) for k, v in entry.items()}


def _placed(value: Any, parameter: Tensor, counters: torch.device) -> Any:
    """A copy beside the parameter, of its rows here; counters (no axes) where the optimizer's kernel wants them."""
    if not isinstance(value, Tensor):
        return value
    if not value.ndim:
        return value.to(counters, copy=True)
    return part_of(value, parameter).to(parameter.device, copy=True)
