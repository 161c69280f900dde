"""The warm start: a model imitates an environment's demonstrators for under a minute; the result is kept by content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agents.checkpoint import load_tensors
from agents.config import OptimConfig, WarmConfig
from agents.dist import World
from agents.forward import Convention
from agents.imitate import digest, imitate
from agents.learner import LMLearner
from agents.ledger import Ledger
from agents.models import fingerprint
from agents.sharding import collect

OnStep = Callable[[int, int, float], None]
_RECIPE = 1
"""Counted up whenever the same demonstrations and settings would give other weights."""


def cache_folder() -> Path:
    """Where warm starts are kept: $PALAESTRA_CACHE, or `palaestra` in the user's cache folder."""
    own = os.environ.get("PALAESTRA_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palaestra"


def demo_tasks(config: WarmConfig, pool: int, seed: int) -> list[int]:
    """Which training tasks are demonstrated: distinct ones, spread over the pool."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x57A27]))
    return sorted(int(i) for i in rng.permutation(pool)[: min(config.episodes, pool)])


def warm_start(
    model: nn.Module,
    ledgers: Sequence[Ledger],
    config: WarmConfig,
    convention: Convention,
    *,
    seed: int,
    micro_tokens: int,
    packing: Literal["auto", "always", "never"] = "auto",
    recompute: bool = False,
    world: World,
    on_step: OnStep,
) -> str:
    """Imitate the ledgers, or load what the same call gave before; returns `trained` or `cached`."""
    layout = (packing, recompute, micro_tokens, world.size)
    file = cache_folder() / "warm" / f"{cache_key(model, ledgers, config, convention, seed, layout)}.safetensors"
    if world.from_main(config.cache and file.is_file()):
        load_tensors(model.state_dict(), load_file(file), file)
        return "cached"
    learner = LMLearner(
        model, OptimConfig(lr=config.lr, beta2=0.98, weight_decay=0.01),
        convention=convention, world=world, micro_tokens=micro_tokens,
        packing=packing, recompute=recompute,
    )  # fmt: skip
    imitate(learner, ledgers, epochs=config.epochs, batch=config.batch, seed=seed, progress=on_step)
    if config.cache:
        own = {name: collect(t.detach()) for name, t in model.state_dict(keep_vars=True).items()}
        if world.main:
            _keep(own, file)
    return "trained"


def cache_key(
    model: nn.Module,
    ledgers: Sequence[Ledger],
    config: WarmConfig,
    convention: Convention,
    seed: int,
    layout: Sequence[str | int] = (),
) -> str:
    """Content hash of everything that the result depends on: weights, demonstrated tokens, settings.

    layout: how rows are laid out and shared, which rounding depends on, so that a cached start is the one that the
        same command would compute.
    """
    settings = {**asdict(config), **asdict(convention), "seed": seed, "layout": list(layout), "recipe": _RECIPE}
    for name in ("when", "cache", "episodes", "scripts"):  # choose what to show or whether to look, not the result
        settings.pop(name)
    text = json.dumps([fingerprint(model), digest(ledgers), settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _keep(state: dict[str, Tensor], file: Path) -> None:
    """Write to the cache, atomically; a cache that cannot be written to is no error."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in state.items()}, beside)
        os.replace(beside, file)
    except Exception:
        beside.unlink(missing_ok=True)


def fitting(ledgers: Sequence[Ledger], max_context: int) -> tuple[list[Ledger], int]:
    """The ledgers whose every segment fits the context, and how many do not."""
    kept = [x for x in ledgers if max(len(s) for s in x.segments) <= max_context]
    return kept, len(ledgers) - len(kept)
