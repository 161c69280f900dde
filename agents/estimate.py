"""What a run will cost, measured on a handful of episodes and one backward pass: `--dry-run`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from agents import demonstrate, warm
from agents.imitate import batch_of, record
from agents.ledger import Ledger
from agents.models import parameters, trained_parameters
from agents.session import Session
from policy_opt.batch import Batch
from policy_opt.need import LOGP
from policy_opt.protocols import Job

PROBE = 32
"""Episodes that are played to measure."""


def estimate(session: Session) -> str:
    """Tokens, memory and time to expect, as lines of text."""
    c = session.config
    sampled, ledgers, seconds = _rollout(session)
    length = sum(len(x) for x in ledgers) / len(ledgers)
    update = _update(session, ledgers)
    episodes = c.groups * c.group_size
    factor = episodes / len(ledgers) / session.world.size
    parts = factor * seconds, factor * update * _passes(session)
    per_step = max(parts) if c.ahead.on else sum(parts)
    evaluation = (2 * c.eval.episodes + c.eval.hard_episodes) / len(ledgers) * seconds / session.world.size
    model = parameters(session.model)
    trained = trained_parameters(session.model)
    which = "" if trained == model else f" ({trained:,} trained, in adapters)"
    return "\n".join([
        f"model      {model:,} parameters{which}, {session.world.size} process(es), "
        f"{torch.get_num_threads()} thread(s) each",
        f"episode    {length:.0f} tokens, {sampled / len(ledgers):.0f} of them sampled"
        f" ({'before any warm start' if c.warm.when != 'never' else 'as the model stands'})",
        f"iteration  {episodes} episodes, {episodes * length:,.0f} tokens, about {per_step:.1f} s",
        f"run        {c.steps} iterations, {c.steps * episodes * length:,.0f} tokens, "
        f"about {(c.steps * per_step + evaluation) / 60:.1f} minutes with evaluations, warm start not included",
        f"memory     about {_memory(session, model) / 2**20:,.0f} MiB for weights, optimizers, keys and values",
    ])  # fmt: skip


def _rollout(session: Session) -> tuple[int, list[Ledger], float]:
    """Sampled tokens, ledgers and seconds of a few training episodes."""
    jobs = [Job(i % session.tasks, group=i, member=0) for i in range(PROBE)]
    began = time.perf_counter()
    played = session.player(jobs)
    seconds = time.perf_counter() - began
    ledgers = [t.ledger for t in played if t.ledger is not None and t.ledger.sampled]
    if not ledgers:  # the policy says nothing: scripted episodes show what there is to read
        weights = demonstrate.demonstrator_weights(session.make_env, session.config.warm.scripts) or {"oracle": 1.0}
        demos = demonstrate.demonstrations(session.make_env, weights, range(PROBE), 0, session.player.limits.max_turns)
        ledgers = warm.fitting([record(session.chat, demo) for demo in demos], session.player.limits.max_context)[0]
    return sum(x.sampled for x in ledgers), ledgers, seconds


def _update(session: Session, ledgers: Sequence[Ledger]) -> float:
    """Seconds of one forward and backward over these episodes."""
    b: Batch = batch_of(ledgers)
    began = time.perf_counter()
    session.learner.backward(b, [LOGP], lambda rows, live: {"logp_BT": torch.ones_like(live["logp_BT"])})
    for p in session.model.parameters():
        p.grad = None
    return time.perf_counter() - began


def _passes(session: Session) -> float:
    """Forward-and-backward passes of an iteration, extra forwards counted as a third."""
    schedule = sum(step.epochs for step in session.recipe.schedule.steps)
    forwards = sum(need.when != "loss" for need in session.recipe.needs)
    return schedule + forwards / 3


def _memory(session: Session, model: int) -> float:
    """Bytes: weights, gradients and two moments of the policy; copies of the bank; keys and values of the engine."""
    width = torch.finfo(next(session.model.parameters()).dtype).bits // 8
    trained = sum(spec.optimizer is not None for spec in session.recipe.models.values())
    frozen = len(session.recipe.models) - trained
    config = session.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * head * session.player.engine.rows * session.player.limits.max_context
    own = trained_parameters(session.model)  # what is under adapters is there once
    return width * (model - own + own * (4 * (1 + trained) + frozen) + cache)
