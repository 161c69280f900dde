"""Everything a run needs, built from its configuration: environment, model, engine, actor, learner, loop."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import policy_opt
from agents import ahead, lora
from agents.actor import LMActor, Player, refuse_truncated
from agents.chat import ChatFormat
from agents.cli import UsageError, assignments, check_ranges
from agents.config import TrainConfig
from agents.dist import World
from agents.engines.base import SampleParams
from agents.engines.build import build_engine
from agents.environment import env_maker, lived
from agents.forward import Convention
from agents.learner import LMLearner
from agents.models import DTYPES, chat_of, is_tiny, load_model
from agents.optim import seeded
from agents.rollout import Limits, MakeEnv
from policy_opt.errors import RecipeError
from policy_opt.loop import Loop, RunSize
from policy_opt.recipe import Recipe

if TYPE_CHECKING:
    from envs import Verdict


@dataclass
class Session:
    """The pieces of one process of a run."""

    config: TrainConfig
    world: World
    recipe: Recipe
    make_env: MakeEnv
    tasks: int
    """Size of the pool of training tasks."""
    model: Any
    tokenizer: Any
    chat: ChatFormat
    convention: Convention
    player: Player
    actor: LMActor
    learner: LMLearner
    loop: Loop
    notes: tuple[str, ...]
    """Warnings that came up while building, for the display."""


def derived(seed: int, purpose: str) -> int:
    """A seed for one purpose, independent of those for others."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little")


def env_arguments(config: TrainConfig) -> dict[str, Any]:
    """Keyword arguments of the environment, as the configuration names them."""
    arguments = assignments(config.env_args, "--env-args")
    if config.level is not None:
        arguments["level"] = int(config.level) if config.level.isdigit() else config.level
    if config.reward is not None:
        arguments["reward"] = config.reward
    return arguments


def env_facts(make_env: MakeEnv, most_tasks: int) -> tuple[int, float, Verdict | None]:
    """Training tasks (at most so many), the lowest reward, and a verdict: of a task that nobody worked on.

    Raises UsageError where there is nothing to train on.
    """
    env = make_env().unwrapped
    try:
        known = env.task_count("train") if "train" in env.splits else 0
        if known == 0:
            raise UsageError(f"{env.name or type(env).__name__} has no training tasks: it is for evaluation only")
        return min(most_tasks, known or most_tasks), env.lowest_reward, _sample(env)
    finally:
        env.close()


def _sample(env: Any) -> Verdict | None:
    """The verdict on doing nothing; None where the environment fails even at that, which the rollout will count."""
    try:
        env.reset(seed=0, options={"index": 0, "split": "train"})
        return env.finish("unplayed")[1]["verdict"]
    except Exception:
        return None


def with_temperature(recipe: Recipe, temperature: float) -> Recipe:
    """The recipe with the run's temperature in the place of its own, where it has the usual 1.

    Raises RecipeError where both name one and they differ.
    """
    own = recipe.sampler.temperature
    if own not in (1.0, temperature) and temperature != 1.0:
        raise RecipeError(
            f"{recipe.slug}: the recipe samples at temperature {own}, --rollout.temperature says {temperature}; "
            f"leave the option out, or change the recipe with --set sampler.temperature={temperature}"
        )
    if temperature == 1.0 or own == temperature:
        return recipe
    phases = tuple(replace(phase, recipe=with_temperature(phase.recipe, temperature)) for phase in recipe.phases)
    return recipe.replace(sampler=replace(recipe.sampler, temperature=temperature), phases=phases)


def build(config: TrainConfig, world: World) -> Session:
    """Build a session. Raises UsageError, UnknownEnv, RecipeError or ChatFormatError on what the user got wrong."""
    check_ranges(config)
    lora.check(config.lora)
    if world.sharding is not None:
        refuse_split(config)
    recipe = policy_opt.get(config.algo)
    recipe = recipe.set(*config.set) if config.set else recipe
    recipe.check()
    recipe = with_temperature(recipe, config.rollout.temperature)
    recipe, corrected = ahead.corrected(recipe, config.ahead)
    temperature = (recipe.phases[0].recipe if recipe.phases else recipe).sampler.temperature
    refuse_truncated(config.rollout.top_k, config.rollout.top_p, temperature)
    share = -(-config.workers // world.size)
    make_env = env_maker(config.env, env_arguments(config), share, config.worker)
    tasks, lowest, sample = env_facts(make_env, config.train_tasks)
    dtype = DTYPES["float64" if config.dtype == "float64" else "float32"]
    model, tokenizer = load_model(config.model, dtype)
    if config.lora.rank:
        lora.adapt(model, config.lora, config.seed)
    whole = placed(model, world)
    torch.set_num_threads(config.threads or (1 if is_tiny(model) else torch.get_num_threads()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chat = chat_of(model, tokenizer)
        player = _player(config, world, make_env, whole, chat, lowest, temperature)
    convention = Convention(temperature, tuple(chat.banned_ids))
    learner = LMLearner(
        model, seeded(config.optim, config.seed), convention=convention, world=world,
        micro_tokens=micro_tokens(config, model), packing=config.packing, recompute=config.recompute,
    )  # fmt: skip
    layout = learner.settle()
    player.version = lambda: learner.version
    actor = LMActor(player, dtype, sample)
    if unserved := recipe.hooks - actor.hooks:
        raise UsageError(
            f"{recipe.slug} draws with the rule `{min(unserved)}`, which the engine {config.engine} does not have: "
            f"take --engine hf"
        )
    size = RunSize(tasks, config.groups, config.group_size, config.seed)
    loop = Loop(recipe, actor, learner, size, config.ahead.staleness if config.ahead.on else None)
    if config.ahead.on:
        actor.ahead = ahead.build(config, world, player, model)
    notes = (
        *corrected, *layout, *lived(config.worker, share, world.size), *(str(w.message) for w in caught)
    )  # fmt: skip
    return Session(
        config, world, recipe, make_env, tasks, model, tokenizer, chat, convention, player, actor, learner, loop, notes
    )


Whole = Callable[[], AbstractContextManager[Any]]
"""Opens the policy with whole weights; all processes call it."""


def placed(model: Any, world: World) -> Whole:
    """Put a model where the run computes, or split it over the processes; how to get at its whole weights then."""
    if world.sharding is None:
        model.to(world.device)
        return lambda: nullcontext(model)
    return partial(world.sharding.shard(model).gathered, dtype=world.precision)


def refuse_split(config: TrainConfig) -> None:
    """UsageError on what FSDP does not go together with."""
    if config.ahead.on and config.engine == "hf":
        raise UsageError(
            "--ahead.on with FSDP and --engine hf: a second process would hold whole weights beside every process; "
            "take --engine vllm, or leave out --ahead.on"
        )


def micro_tokens(config: TrainConfig, model: Any) -> int:
    """Tokens of a training micro-batch."""
    return config.micro_tokens or (1024 if is_tiny(model) else 8192)


def max_context(config: TrainConfig, model: Any) -> int:
    """Tokens that an episode may hold."""
    if config.rollout.max_context is not None:
        return config.rollout.max_context
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    return min(512 if is_tiny(model) else 4096, positions)


def _player(
    config: TrainConfig,
    world: World,
    make_env: MakeEnv,
    whole: Whole,
    chat: ChatFormat,
    error_reward: float,
    temperature: float,
) -> Player:
    r = config.rollout
    params = SampleParams(temperature, r.top_k, r.top_p, r.max_new_tokens)
    with whole() as model:
        context = max_context(config, model)
        engine, sync = build_engine(config, world, model, chat, params, context)
    limits = Limits(
        max_turns=r.max_turns or 64, max_new_tokens=r.max_new_tokens, max_context=context,
        error_reward=error_reward,
    )
    return Player(make_env, chat, engine, limits, config.seed, world, sync=sync, whole=whole)
