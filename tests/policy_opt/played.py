"""Batches that several test modules draw: groups of episodes of several turns, as an actor delivers them."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st

from policy_opt import Batch, Ctx
from policy_opt.table import World

quick = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 10**6)
CTX = Ctx()
WORLD = World(tasks=4, turns=2, actions=2)


def played(seed: int, rows: int = 8, width: int = 9, turns: int = 3, **columns) -> Batch:
    """Groups of four with ids of their own, turns of several tokens, holes in the mask, a token in every row."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=g) < 0.7
    mask[torch.arange(rows), torch.randint(width, (rows,), generator=g)] = True
    double = {"generator": g, "dtype": torch.float64}
    columns_given = {
        "turn_BT": (torch.arange(width) * turns // width).expand(rows, -1),
        "member_B": torch.arange(rows) % 4,
        "reward_B": torch.randint(2, (rows,), generator=g).double(),
        "correct_B": torch.randint(2, (rows,), generator=g).double(),
        "length_B": torch.randint(1, 50, (rows,), generator=g),
        "first_call_B": torch.randint(-1, 40, (rows,), generator=g),
        "finished_B": torch.randint(2, (rows,), generator=g).double(),
        "token_reward_BT": torch.randn(rows, width, **double),
        "values_old_BT": torch.randn(rows, width, **double),
        "logp_old_BT": -torch.rand(rows, width, **double),
        "logp_ref_BT": -2 * torch.rand(rows, width, **double),
        "logp_sampler_BT": torch.zeros(rows, width, dtype=torch.float64),
    }
    ids = torch.arange(rows) // 4 * 7 + 2
    return Batch.build(mask_BT=mask, group_B=ids, **{**columns_given, **columns})


def close(found, expected, **options) -> None:
    torch.testing.assert_close(found, expected, **{"rtol": 1e-9, "atol": 1e-9, **options})
