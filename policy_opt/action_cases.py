"""Cases of golden numbers whose rows are actions: one stream of them, cut into episodes where `continues` is 0.

An episode becomes a row, its actions one after the other, each a turn as wide as the file's rows. Values are only
moved, there and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from policy_opt.vectors import Trace

CELLS = ("values_old", "values_new", "logp_new", "logp_old", "entropy", "mask")
"""Inputs per token of an action."""


def episodes(continues: Sequence[float]) -> list[list[int]]:
    """Actions of each episode."""
    found: list[list[int]] = [[]]
    for action, goes_on in enumerate(continues):
        found[-1].append(action)
        if not goes_on:
            found.append([])
    return [actions for actions in found if actions]


def one_episode_per_row(given: Mapping[str, Any]) -> dict[str, Any]:
    """`Vectors.arrange`: tokens of N actions [N, T] and a reward and `continues` of each [N], by episode."""
    played, T = episodes(given["continues"]), len(given["mask"][0])
    width = T * max(map(len, played))

    def row(actions: list[int], cells: Sequence[Sequence[Any]]) -> list[Any]:
        flat = [x for i in actions for x in cells[i]]
        return flat + [0] * (width - len(flat))

    last = [max((j for j in range(T) if m[j]), default=-1) for m in given["mask"]]
    paid = [[float(r) * (j == k) for j in range(T)] for r, k in zip(given["step_rewards"], last, strict=True)]
    turns = [[i] * T for i in range(len(last))]
    return {
        **{name: [row(actions, given[name]) for actions in played] for name in CELLS},
        "token_rewards": [row(actions, paid) for actions in played],
        "turns": [row(actions, turns) for actions in played],
        "finished": [1 - given["continues"][actions[-1]] for actions in played],
        "after": [float(given["bootstrap_value"])] * len(played),
    }


def by_action(t: Trace, value_BT: Tensor, padding: float = 0.0) -> list[list[float]]:
    """Tokens of episodes back at their actions [N, T]; `padding` outside the mask."""
    T = len(t.given["mask"][0])
    masked_BT = value_BT.where(t["mask_BT"], padding)
    places = [(e, k) for e, played in enumerate(episodes(t.given["continues"])) for k in range(len(played))]
    return [masked_BT[e, k * T : (k + 1) * T].tolist() for e, k in places]
