"""Training of the bundled model: packed documents, one thread, exact resume."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from agents.bundled import mixture
from agents.bundled import model as architecture
from agents.bundled import tokenizer as tokenizers
from agents.bundled.corpus.marks import unmark
from agents.bundled.corpus.names import Names, vocabulary
from agents.bundled.optimizer import optimizers
from agents.bundled.packing import Rows, rows

TOKENS_PER_MINUTE = 400_000
LENGTHS = (128, 256, 256, 512)


@dataclass(frozen=True)
class Plan:
    """One build; the result is a function of this alone (and of the machine's arithmetic)."""

    seed: int = 0
    """Of the weights and of every document."""
    steps: int = 4000
    """Optimizer steps."""
    tokens: int = 2048
    """Tokens per step."""
    lr: float = 5e-3
    """Peak learning rate of both optimizers."""
    warmup: int = 50
    """Steps until the peak."""
    decay: float = 0.8
    """Share of the steps, at the end, in which the rate falls to zero."""
    background: float = 0.1
    """Share of the tokens outside of marks that are trained on as well (drawn at random)."""
    checkpoint: int = 250
    """Steps between checkpoints."""

    @classmethod
    def of_minutes(cls, minutes: float, **changes: Any) -> Plan:
        """As many steps as a slow core does in `minutes`: a count, not a clock, so that builds repeat."""
        plan = cls(**changes)
        return cls(**{**plan.__dict__, "steps": max(1, int(minutes * TOKENS_PER_MINUTE / plan.tokens))})

    def rate(self, step: int) -> float:
        """Warm-up, plateau, linear fall to zero."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup, left)


def make_tokenizer(seed: int) -> PreTrainedTokenizerBase:
    """The tokenizer, from a sample of the corpus, invented names and the word lists."""
    rng = np.random.default_rng([seed, 0])
    names = Names(rng)
    texts = [tokenizers.without_tags(unmark(mixture.document(rng, 0.5))) for _ in range(2000)]
    texts += [names.name() for _ in range(70_000)]
    texts += [word for word in [*vocabulary(), *tokenizers.COMMON.split()] for _ in range(200)]
    return tokenizers.train(texts)


def loss_of(model: Qwen3ForCausalLM, batch: Rows) -> torch.Tensor:
    """Weighted mean negative log-probability of the weighted tokens, each given those before it."""
    hidden_ND = model.model(input_ids=batch.ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)
    weight_N = F.pad(batch.weight_BT[:, 1:], (0, 1)).flatten()
    target_N = F.pad(batch.ids_BT[:, 1:], (0, 1)).flatten()
    chosen_M = weight_N.nonzero()[:, 0]  # the output layer is a fifth of the work: skip what has no weight
    nll_M = F.cross_entropy(model.lm_head(hidden_ND[chosen_M]), target_N[chosen_M], reduction="none")
    return (nll_M * weight_N[chosen_M]).sum() / weight_N.sum()


@dataclass(frozen=True)
class Progress:
    """What a step reports."""

    step: int
    """Steps done."""
    loss: float
    """Weighted loss of the last step, nats per token."""
    tokens_per_second: float
    """Since the build was started or resumed."""


def train(
    plan: Plan,
    work: Path,
    report: Callable[[Progress], None] = lambda p: None,
    on_checkpoint: Callable[[Qwen3ForCausalLM, PreTrainedTokenizerBase, int], None] = lambda m, t, s: None,
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """Trains, or goes on from the checkpoint in `work` if it is of the same plan."""
    tokenizer = make_tokenizer(plan.seed)
    model = architecture.create(tokenizer, plan.seed)
    opts = optimizers(model, plan.lr)
    first = _resume(plan, work, model, opts)
    model.train()
    started = time.monotonic()
    for step in range(first, plan.steps):
        rng = np.random.default_rng([plan.seed, 1, step])
        length = min(LENGTHS[int(rng.integers(len(LENGTHS)))], 128 if step < plan.warmup * 3 else 2048)
        batch = rows(tokenizer, rng, step / plan.steps, plan.tokens, length, plan.background)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = plan.rate(step)
            opt.step()
            opt.zero_grad()
        done = step + 1 - first
        report(Progress(step + 1, float(loss.detach()), done * plan.tokens / (time.monotonic() - started)))
        if (step + 1) % plan.checkpoint == 0 or step + 1 == plan.steps:
            _checkpoint(plan, work, model, opts, step + 1)
            on_checkpoint(model, tokenizer, step + 1)
    return model.eval(), tokenizer


def _checkpoint(plan: Plan, work: Path, model, opts, step: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    part = work / "checkpoint.pt.part"
    torch.save(
        {
            "plan": dict(plan.__dict__),
            "step": step,
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in opts],
        },
        part,
    )
    os.replace(part, work / "checkpoint.pt")


def _resume(plan: Plan, work: Path, model, opts) -> int:
    """Loads the checkpoint of this plan; the step to go on from (0 without one)."""
    path = work / "checkpoint.pt"
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    if saved["plan"] != dict(plan.__dict__):
        raise ValueError(f"{path} is of another plan ({saved['plan']}); remove it or build elsewhere")
    model.load_state_dict(saved["model"])
    for opt, state in zip(opts, saved["optimizers"], strict=True):
        opt.load_state_dict(state)
    return saved["step"]
