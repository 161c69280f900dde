"""The warm start: a model imitates an environment's demonstrators for under a minute; the result is kept by content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import nn

from agents.cli import UsageError, assignments, nearest
from agents.config import OptimConfig, WarmConfig
from agents.dist import World
from agents.engines.base import Key, Said, Voice
from agents.engines.scripted import Scripted
from agents.forward import Convention
from agents.imitate import Conversation, digest, imitate
from agents.learner import LMLearner
from agents.ledger import Ledger
from agents.models import fingerprint
from agents.rollout import Limits, MakeEnv, play_text
from policy_opt.protocols import Job

OnStep = Callable[[int, int, float], None]
_RECIPE = 1
"""Counted up whenever the same demonstrations and settings would give other weights."""


def cache_folder() -> Path:
    """Where warm starts are kept: $PALAESTRA_CACHE, or `palaestra` in the user's cache folder."""
    own = os.environ.get("PALAESTRA_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palaestra"


class _Listening:
    """A speaker that plays scripts and notes which tools each episode was offered."""

    def __init__(self, weights: Mapping[str, float]):
        self.scripts = Scripted(weights)
        self.tools: dict[Key, Sequence[Mapping[str, Any]]] = {}

    def begin(self, env: Any, seed: Key) -> Voice:
        voice = self.scripts.begin(env, seed)

        def listen(messages: Sequence[Mapping[str, Any]], obs: Mapping[str, Any], max_new_tokens: int) -> Said:
            self.tools.setdefault(seed, obs.get("tools", ()))
            return voice(messages, obs, max_new_tokens)

        return listen


def demonstrations(
    make_env: MakeEnv, weights: Mapping[str, float], tasks: Sequence[int], seed: int, max_turns: int
) -> list[Conversation]:
    """One episode per training task by scripts drawn with these weights; those that failed are left out."""
    speaker = _Listening(weights)
    jobs = [Job(task, group=i, member=0) for i, task in enumerate(tasks)]
    played = play_text(jobs, make_env, speaker, Limits(max_turns=max_turns), seed)
    return [
        Conversation(tuple(t.messages), tuple(speaker.tools.get((seed, t.group, t.member), ())))
        for t in played if t.turns and not t.stop_reason.startswith("error:")
    ]


def demonstrator_weights(make_env: MakeEnv, chosen: Sequence[str] = ()) -> dict[str, float]:
    """Shares of the scripts to imitate: those chosen (NAME=SHARE), or the environment's own; empty where it has none.

    Raises UsageError for a script that the environment does not have, and for a share that is no number above zero.
    """
    env = make_env()
    core: Any = getattr(env, "unwrapped", env)
    env.close()
    if not chosen:
        return dict(getattr(core, "demonstrators", {}))
    shares = assignments(chosen, "--warm.scripts")
    for name, share in shares.items():
        if name not in core.scripts:
            raise UsageError(f"--warm.scripts: no script `{name}`{nearest(name, core.scripts)}")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < float("inf"):
            raise UsageError(f"--warm.scripts {name}={share}: a share is a number above zero")
    return {name: float(share) for name, share in shares.items()}


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
    world: World,
    on_step: OnStep,
) -> str:
    """Imitate the ledgers, or load what the same call gave before; returns `trained` or `cached`."""
    file = cache_folder() / "warm" / f"{cache_key(model, ledgers, config, convention, seed)}.safetensors"
    if world.from_main(config.cache and file.is_file()):
        model.load_state_dict(load_file(file))
        return "cached"
    learner = LMLearner(
        model, OptimConfig(lr=config.lr, beta2=0.98, weight_decay=0.01),
        convention=convention, world=world, micro_tokens=micro_tokens,
    )  # fmt: skip
    imitate(learner, ledgers, epochs=config.epochs, batch=config.batch, seed=seed, progress=on_step)
    if config.cache and world.main:
        _keep(model, file)
    return "trained"


def cache_key(
    model: nn.Module, ledgers: Sequence[Ledger], config: WarmConfig, convention: Convention, seed: int
) -> str:
    """Content hash of everything that the result depends on: weights, demonstrated tokens, settings."""
    settings = {**asdict(config), **asdict(convention), "seed": seed, "recipe": _RECIPE}
    for name in ("when", "cache", "episodes", "scripts"):  # choose what to show or whether to look, not the result
        settings.pop(name)
    text = json.dumps([fingerprint(model), digest(ledgers), settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _keep(model: nn.Module, file: Path) -> None:
    """Write to the cache, atomically; a cache that cannot be written to is no error."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, beside)
        os.replace(beside, file)
    except Exception:
        beside.unlink(missing_ok=True)


def fitting(ledgers: Sequence[Ledger], max_context: int) -> tuple[list[Ledger], int]:
    """The ledgers whose every segment fits the context, and how many do not."""
    kept = [x for x in ledgers if max(len(s) for s in x.segments) <= max_context]
    return kept, len(ledgers) - len(kept)
