"""Imitation: conversations as ledgers, and maximum likelihood on the tokens that the policy would have sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from agents.batching import picture_columns
from agents.chat import ChatFormat, text_of
from agents.cli import UsageError
from agents.learner import LMLearner
from agents.ledger import Ledger
from policy_opt.batch import Batch
from policy_opt.need import LOGP


@dataclass(frozen=True)
class Conversation:
    """What imitation needs of an episode."""

    messages: tuple[Mapping[str, Any], ...]
    """In order; the assistant's are imitated."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tool schemas on offer."""


def record(chat: ChatFormat, conversation: Conversation) -> Ledger:
    """The ledger that a policy saying these very texts would have left, log-probs unknown (0).

    Raises UsageError where the conversation does not alternate between the environment and the assistant.
    """
    ledger, turn = Ledger(), 0
    history: list[Mapping[str, Any]] = []
    pending: list[Mapping[str, Any]] = []
    tools = conversation.tools
    for message in conversation.messages:
        if message["role"] != "assistant":
            pending.append(message)
            continue
        if not pending:
            raise UsageError("a conversation to imitate has two assistant messages in a row, or begins with one")
        if turn == 0:
            fed = chat.opening(pending, tools)
            ledger.observe(fed, turn, pictures=chat.shown(fed, pending))
        elif chat.rewrites(history, pending, tools):
            fed = chat.opening([*history, *pending], tools)
            ledger.branch(fed, turn, pictures=chat.shown(fed, [*history, *pending]))
        else:
            fed = chat.continuation(pending, history=history, tools=tools)
            ledger.observe(fed, turn, pictures=chat.shown(fed, pending))
        ids = chat.turn_ids(text_of(message["content"]))
        ledger.act(ids, [0.0] * len(ids), turn, version=0)
        history += [*pending, message]
        pending, turn = [], turn + 1
    if turn == 0:
        raise UsageError("a conversation to imitate has no assistant message")
    return ledger


def batch_of(ledgers: Sequence[Ledger]) -> Batch:
    """One row per segment, padded on the right."""
    segments = [s for ledger in ledgers for s in ledger.segments]
    pictures = [p for ledger in ledgers for p in ledger.pictures.values()]
    length_B = torch.tensor([len(s) for s in segments])
    tokens_BT = torch.zeros(len(segments), int(length_B.max()), dtype=torch.long)
    mask_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    for i, segment in enumerate(segments):
        tokens_BT[i, : len(segment)] = torch.tensor(segment.ids)
        mask_BT[i, : len(segment)] = torch.tensor(segment.mask, dtype=torch.bool)
    real_BT = torch.arange(tokens_BT.shape[1]) < length_B[:, None]
    return Batch.build(
        mask_BT=mask_BT, group_B=torch.arange(len(segments)), tokens_BT=tokens_BT, real_BT=real_BT,
        **(picture_columns(segments, pictures, tokens_BT.shape[1]) if pictures else {}),
    )  # fmt: skip


def digest(ledgers: Sequence[Ledger]) -> str:
    """SHA-256 of ids, masks and pictures: equal for equal demonstrations, wherever they came from."""
    out = hashlib.sha256()
    for ledger in ledgers:
        for segment in ledger.segments:
            shown = [span.ref for span in segment.spans if span.kind == "image"]
            out.update(repr((segment.ids, segment.mask, *shown)).encode())
    return out.hexdigest()


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: up over a tenth of the steps, then down linearly to a tenth."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 1.0 - 0.9 * (step - warm) / max(1, steps - warm)


def imitate(
    learner: LMLearner,
    ledgers: Sequence[Ledger],
    *,
    epochs: int,
    batch: int,
    seed: int,
    progress: Callable[[int, int, float], None] = lambda step, steps, nll: None,
) -> list[float]:
    """Minimise the mean negative log-likelihood of policy tokens; returns it per optimizer step (nats per token).

    `progress(step, steps, nll)` is called after each. The order is a function of the seed.
    """
    if not ledgers:
        raise UsageError("there is nothing to imitate")
    draw = torch.Generator().manual_seed(seed)
    per_epoch = -(-len(ledgers) // batch)
    losses: list[float] = []
    for _ in range(epochs):
        order = torch.randperm(len(ledgers), generator=draw).tolist()
        for start in range(0, len(order), batch):
            b = batch_of([ledgers[i] for i in order[start : start + batch]])
            losses.append(_step(learner, b, schedule(len(losses), epochs * per_epoch)))
            progress(len(losses), epochs * per_epoch, losses[-1])
    return losses


def _step(learner: LMLearner, b: Batch, lr_scale: float) -> float:
    weight_BT = b.mask_BT.double() / b.mask_BT.sum()
    streams = learner.backward(b, [LOGP], lambda rows, live: {"logp_BT": -weight_BT[rows]})
    learner.step(lr_scale)
    return float(-(streams["logp_BT"] * weight_BT).sum())


def likelihood(learner: LMLearner, ledgers: Sequence[Ledger]) -> float:
    """Mean negative log-likelihood of policy tokens, nats."""
    b = batch_of(ledgers)
    return float(-learner.score(b, [LOGP])["logp_BT"][b.mask_BT].mean())
