"""The skill table: how probable the model makes the right text, on names that training never shows.

For each marked span, the product of its tokens' probabilities is exactly the chance that a sample at
temperature 1 is right; the table averages it over spans (greedy: the share of spans whose every token is the
most probable).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from agents.bundled.corpus import arithmetic, chains, copying, dialogues, hops, tables
from agents.bundled.corpus.names import Names
from agents.bundled.packing import encode


@dataclass(frozen=True)
class Skill:
    """One row of the table."""

    name: str
    """What is measured, in words."""
    sampled: float
    """Mean probability of a right span at temperature 1."""
    greedy: float
    """Share of spans that greedy decoding gets right."""
    spans: int
    """How many were measured."""


def _dialogue(kind: str, whole_turns: bool) -> Callable[[np.random.Generator], str]:
    def draw(rng: np.random.Generator) -> str:
        while True:
            talk = dialogues.make(Names(rng, True), whole_turns, (kind,))
            if not (talk.think or talk.chatty):
                return talk.text()

    return draw


def _of(kind: Callable[[Names], str]) -> Callable[[np.random.Generator], str]:
    return lambda rng: kind(Names(rng, True))


DRAWS: dict[str, Callable[[np.random.Generator], str]] = {
    "copy: repeated list": _of(copying.repeated_list),
    "copy: echo": _of(copying.echo),
    "order of look-ups in a phrase": _of(hops.orders),
    "look-up: pairs": _of(tables.pairs),
    "look-up: sentences": _of(tables.sentences),
    "look-up: entity and attribute": _of(tables.records),
    "look-up: two hops, step shown": _of(lambda n: chains.two_relations(n, True)),
    "look-up: two hops, direct": _of(lambda n: chains.two_relations(n, False)),
    "expression from a sentence": _of(arithmetic.expressions),
    "comparison of two numbers": _of(arithmetic.comparisons),
    "count": _of(arithmetic.counts),
    "small sums": _of(arithmetic.sums),
    "call: copied argument (chain)": _dialogue("chain", False),
    "call: copied argument (search)": _dialogue("search", False),
    "call: copied argument (calculation)": _dialogue("calculation", False),
    "whole turn (chain)": _dialogue("chain", True),
    "whole turn (search)": _dialogue("search", True),
    "whole turn (calculation)": _dialogue("calculation", True),
    "whole turn (action)": _dialogue("action", True),
}


@torch.no_grad()
def measure(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: int = 40, seed: int = 1
) -> list[Skill]:
    """The table, from `documents` documents per skill."""
    table = []
    for row, (name, draw) in enumerate(DRAWS.items()):
        sampled: list[float] = []
        greedy: list[bool] = []
        for i in range(documents):
            ids, marks = encode(tokenizer, draw(np.random.default_rng([seed, row, i])))
            ids, marks = (
                ids[: model.config.max_position_embeddings],
                marks[: model.config.max_position_embeddings],
            )
            logits_TV = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
            target_T = torch.tensor(ids[1:])
            logp_T = logits_TV.log_softmax(-1).gather(1, target_T[:, None])[:, 0]
            right_T = logits_TV.argmax(-1) == target_T
            for start, end in _runs(marks[1:]):
                sampled.append(float(logp_T[start:end].sum().exp()))
                greedy.append(bool(right_T[start:end].all()))
        table.append(Skill(name, float(np.mean(sampled)), float(np.mean(greedy)), len(sampled)))
    return table


def _runs(marks: list[int]) -> list[tuple[int, int]]:
    """[start, end) of every run of tokens of one mark."""
    edges = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(marks)]
    return [(a, b) for a, b in pairwise(edges) if marks[a]]
