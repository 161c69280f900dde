"""Partial rollouts on the table: what a budget cuts off goes on under the policy of then, and nothing is done twice."""

from __future__ import annotations

import pytest
import torch

import policy_opt
from policy_opt import Job, Loop, RecipeError, RunSize
from policy_opt.table import TableActor, TableLearner, World

WORLD = World(tasks=4, turns=2, actions=2)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_every_token_is_in_one_window(window: int) -> None:
    """T-PPO's accounting: a token enters the policy's loss once and the critic's at most once."""
    learner = TableLearner(WORLD)
    recipe = policy_opt.get("t_ppo").set(f"curriculum.window={window}")
    loop = Loop(recipe, TableActor(WORLD, learner), learner, RunSize(4, groups=3, group_size=4))
    learned: dict[tuple[int, int], int] = {}
    for _ in range(12):
        b, _ = loop.iterate()
        assert int((b.mask_BT & (b.version_BT == b.version_BT.max())).sum(1).max()) <= window
        for row in range(b.B):
            name = int(b["group_B"][row]), int(b["member_B"][row])
            learned[name] = learned.get(name, 0) + int(b["window_BT"][row].sum())
            assert learned[name] == int(b.mask_BT[row].sum())
            assert bool(b["finished_B"][row]) == (learned[name] == 4)
        cut_B = b["finished_B"] == 0
        assert not b["reward_B"][cut_B].any() and not b["done_BT"][cut_B].any()
    assert max(learned.values()) == 4


def test_tokens_keep_their_log_probs() -> None:
    learner = TableLearner(WORLD)
    actor = TableActor(WORLD, learner)
    first = actor.play([Job(0, 0, m, budget=3) for m in range(3)])
    learner.tables["policy"].data += torch.rand(learner.tables["policy"].shape, dtype=torch.float64)
    learner.version = 1
    last = actor.play([Job(0, 0, m, resume=True) for m in range(3)])
    old_BT = first.mask_BT
    assert old_BT.sum(1).tolist() == [3] * 3 and last["finished_B"].tolist() == [1] * 3
    for name in ("tokens_BT", "logp_sampler_BT", "version_BT"):
        assert torch.equal(last[name][old_BT], first[name][old_BT])
    assert last.version_BT[last.mask_BT & ~old_BT].tolist() == [1] * 3
    with pytest.raises(RecipeError, match="no unfinished episode of group 0 has member 1"):
        actor.play([Job(0, 0, 1, resume=True)])


def test_a_window_without_resume_is_refused() -> None:
    with pytest.raises(RecipeError, match="nobody goes on with them"):
        policy_opt.get("grpo").set("curriculum.window=3").check()
