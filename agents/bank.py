"""The models of a run: the policy and those beside it, each with its optimizer or none, stepped and saved together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from agents import lora, optim
from agents.config import OptimConfig
from agents.critic import Critic, trunk_of
from agents.dist import World
from agents.sharding import Sharded, collect, local, total_norm
from policy_opt.bank import ModelSpec, Optim
from policy_opt.errors import RecipeError, unknown

T = TypeVar("T")


@dataclass
class Member:
    """A model of the bank, the policy included."""

    model: Any
    """A causal LM, or a Critic."""
    config: OptimConfig
    """How it is stepped."""
    optimizer: torch.optim.Optimizer | None
    """None: frozen."""
    spec: ModelSpec | None = None
    """What the recipe said of it; None for the policy."""
    own: Optim | None = None
    """A recipe's wish for its optimizer; None: what `config` names."""
    steps: int = 0
    """Optimizer steps so far."""
    shares: bool | None = None
    """Whether it can compute an opening once for several padded rows; None: not tried yet."""
    packs: bool | None = None
    """Whether it can take rows end to end; None: not tried yet."""
    sharded: Sharded | None = None
    """How it is split over the processes; None: it is whole."""
    base: frozenset[str] = frozenset()
    """Names of the weights under its adapters, which are never trained and not saved with it."""

    def rate(self) -> float:
        """Learning rate of the next step, warm-up included."""
        warm = min(1.0, (self.steps + 1) / self.config.warmup) if self.config.warmup else 1.0
        assert self.config.lr is not None  # the bank resolves it
        return self.config.lr * warm

    def run(self, work: Callable[[], T]) -> T:
        """Do work that uses the model's trunk and head; what is to have a gradient must be returned, and be no view."""
        return work() if self.sharded is None else self.sharded(work)

    def whole(self, device: str | None = None) -> AbstractContextManager[Any]:
        """The model, or where it is split over processes an equal one with whole weights; all of them call this.

        device: where whole weights go; None: beside the split ones.
        """
        return nullcontext(self.model) if self.sharded is None else self.sharded.gathered(device)

    def parameters(self) -> list[nn.Parameter]:
        """What its optimizer steps."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def own_state(self) -> dict[str, Tensor]:
        """The model's state by name, without the weights under its adapters; the tensors are its own."""
        state = self.model.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if name not in self.base}

    def step(self, world: World, lr_scale: float) -> float:
        """Sum gradients over processes, clip, step, clear; the gradient's norm before clipping.

        A gradient that is not finite changes nothing, and neither does one that is zero everywhere: a step that
        nothing asked for must not coast on the last one's momentum.
        """
        parameters = self.parameters()
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [local(p.grad) for p in parameters if p.grad is not None]
        if self.sharded is None:
            world.sum_(grads)
        norm = total_norm(grads, split=self.sharded is not None)
        if math.isfinite(norm) and norm > 0:
            if 0 < self.config.clip < norm:
                torch._foreach_mul_(grads, self.config.clip / norm)
            assert self.optimizer is not None
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate() * lr_scale
            if self.sharded is not None:
                optim.hand_over(self.optimizer, self.model)
            self.optimizer.step()
        self.steps += 1
        for p in parameters:
            p.grad = None
        return norm


class Bank:
    """Models by name; `policy` is always there."""

    def __init__(self, policy: Any, config: OptimConfig, world: World | None = None):
        self.sharding = world.sharding if world else None
        self.config = optim.resolved(config, policy)
        self.shared = frozenset() if self.sharding else lora.frozen(policy)  # each split model has its own shards
        self.members: dict[str, Member] = {
            "policy": self._member(policy, self.config, trained=True)
        }

    def __getitem__(self, name: str) -> Member:
        if name not in self.members:
            raise RecipeError(unknown("model of the bank", name, self.members))
        return self.members[name]

    @property
    def policy(self) -> Member:
        """The model that is trained and that samples."""
        return self.members["policy"]

    def prepare(self, models: Mapping[str, ModelSpec], optimizer: Optim | None) -> None:
        """Build the models that are not there yet. `optimizer` is a recipe's wish for the policy."""
        wanted = _merged(optimizer, self.config) if optimizer is not None else self.config
        policy = self.policy
        if (wanted, optimizer) != (policy.config, policy.own):
            policy.config, policy.own = wanted, optimizer
            policy.optimizer = optim.build(policy.model, wanted, optimizer)
        for name, spec in models.items():
            if name not in self.members:
                self.members[name] = self._build(name, spec)
            elif self.members[name].spec != spec:
                raise RecipeError(f"model `{name}` of the bank is declared twice: {self.members[name].spec}, {spec}")

    def _member(
        self, model: Any, config: OptimConfig, trained: bool, spec: ModelSpec | None = None, own: Optim | None = None
    ) -> Member:
        """A model, split over the processes where the run's are, with its optimizer."""
        base = lora.base_names(model)
        if not trained:
            model.requires_grad_(False)
        sharded = self.sharding.shard(model) if self.sharding else None
        optimizer = optim.build(model, config, own) if trained else None
        return Member(model, config, optimizer, spec, own, sharded=sharded, base=base)

    def rest(self) -> None:
        """No pass is under way: what split models gathered for one is let go."""
        for member in self.members.values():
            if member.sharded is not None:
                member.sharded.rest()

    def _build(self, name: str, spec: ModelSpec) -> Member:
        with self.policy.whole("cpu") as policy:
            model = self._made(name, spec, policy)
        if spec.optimizer is None:
            return self._member(model, self.config, False, spec)
        return self._member(model, _merged(spec.optimizer, self.config), True, spec, spec.optimizer)

    def _made(self, name: str, spec: ModelSpec, policy: Any) -> Any:
        if spec.role == "critic":
            return Critic(policy, self.shared)
        if spec.role == "copy" and spec.source == "policy":
            return lora.twin(policy, self.shared)
        if spec.role in ("copy", "teacher", "reward"):
            from agents.models import load_model

            weight = next(policy.parameters())
            return load_model(spec.source, weight.dtype)[0].to(weight.device)
        raise RecipeError(f"model `{name}` of the bank: a language-model learner cannot build a {spec.role}")

    @cached_property
    def fingerprint(self) -> str | None:
        """Of the base weights under adapters, which never change; None where all weights are trained."""
        return lora.fingerprint(self.policy.model) if self.policy.base else None

    @torch.no_grad()
    def sync(self, name: str, decay: float) -> None:
        """Model `name` becomes decay * itself + (1 - decay) * policy; of a critic, its trunk."""
        target, source = self[name].model, self.policy.model
        if isinstance(target, Critic):
            target, source = target.trunk, trunk_of(source)
        for old, new in zip(target.parameters(), source.parameters(), strict=True):
            if not new.requires_grad:  # a base weight under adapters: the same in both
                continue
            old, new = local(old), local(new)
            old.copy_(new) if decay == 0 else old.mul_(decay).add_(new, alpha=1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer states and counters of every model; of base weights under adapters their fingerprint.

        Where models are split over the processes, all of them call this, and the first one gets the tensors.
        """
        return {
            name: {
                "model": {name: collect(t.detach()) for name, t in m.own_state().items()},
                "base": self.fingerprint if name == "policy" else None,
                "optimizer": optim.state_of(m.optimizer, m.model) if m.optimizer is not None else None,
                "steps": m.steps,
            }
            for name, m in self.members.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; RecipeError where the names differ, CheckpointError where tensors do."""
        from agents.checkpoint import CheckpointError, load_tensors

        if state.keys() != self.members.keys():
            raise RecipeError(f"the state holds models {sorted(state)}, the run {sorted(self.members)}")
        if state["policy"].get("base") != self.fingerprint:
            raise CheckpointError("the adapters belong to another base model, or its weights have changed since")
        for name, entry in state.items():
            member = self.members[name]
            load_tensors(member.own_state(), entry["model"], f"model `{name}` of the checkpoint")
            if member.optimizer is not None:
                optim.restore(member.optimizer, member.model, entry["optimizer"])
            member.steps = entry["steps"]


def _merged(own: Optim, run: OptimConfig) -> OptimConfig:
    """A recipe's rate and decay with the run's clipping, warm-up and seed; the run's rate where it names none."""
    assert run.lr is not None  # the bank resolves it
    rate = own.lr if own.lr is not None else run.lr * own.lr_scale
    return replace(run, lr=rate, weight_decay=own.weight_decay)
