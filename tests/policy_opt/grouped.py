"""Groups of several sizes with scattered rows, and calls of parts on them."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st

import policy_opt
from policy_opt import Batch, Ctx
from policy_opt.advantages import groups

quick = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 10**6)
BEFORE = "step(source=retrospect(window=1, warmup=1), terms=term(clip(), weights=('w_retrospect',)))"
EARLY = f"schedule.steps=({BEFORE}, step())"
"""PIPO's schedule, with its first step from the second iteration on."""


def some(seed: int, rewards: str = "any", sizes: tuple[int, ...] | None = None) -> Batch:
    """Groups of 2 to 6 with scattered rows, gaps in the ids, holes in the mask."""
    g = torch.Generator().manual_seed(seed)
    sizes = sizes or tuple(torch.randint(2, 7, (4,), generator=g).tolist())
    ids = [(7 * q + 3, m) for q, n in enumerate(sizes) for m in range(n)]
    order = torch.randperm(len(ids), generator=g).tolist()
    group, member = zip(*[ids[i] for i in order], strict=True)
    rows = len(ids)
    binary = (torch.rand(rows, generator=g) < 0.5).double()
    graded = (torch.randint(0, 9, (rows,), generator=g) / 8).double()
    reward = {"binary": binary, "graded": graded, "any": binary if seed % 2 else graded}[rewards]
    mask = torch.rand(rows, 5, generator=g) < 0.7
    mask[:, 1] = True
    return Batch.build(
        mask_BT=mask,
        group_B=list(group),
        member_B=list(member),
        reward_B=reward,
        correct_B=(reward > 0.5).double(),
        length_B=torch.randint(1, 9, (rows,), generator=g),
        truncated_B=(torch.rand(rows, generator=g) < 0.2).double(),
        answer_B=torch.randint(-1, 3, (rows,), generator=g),
        scores_BK=torch.stack([reward, graded], 1),
        logp_sampler_BT=torch.zeros(rows, 5).double(),
        logp_old_BT=-torch.rand(rows, 5, generator=g).double(),
    )


def call(b: Batch, *parts, ctx: Ctx | None = None) -> Batch:
    for part in parts:
        b = part(b, ctx or Ctx())
    return b


def flow(slug: str, *settings: str):
    """The parts of a recipe between rollout and loss."""
    recipe = policy_opt.get(slug).set(*settings)
    return [p for stage in ("signals", "reward", "advantage", "credit") for p in getattr(recipe, stage)]


def per_group(b: Batch, value_B: torch.Tensor) -> torch.Tensor:
    return groups(b).sums(value_B)


def close(a, b, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
