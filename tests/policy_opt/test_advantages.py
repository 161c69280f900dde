"""Facts of group advantages, whitening and GAE, on random batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy_opt import Batch
from policy_opt.advantages import GAE, GroupCentre, GroupNorm, LeaveOneOut, RewardToGo, Whiten
from policy_opt.rewards import TokenReward
from tests.policy_opt.drawn import CTX, quick, random_batch, seeds


@pytest.mark.filterwarnings("ignore:.*groups of one member")
@quick
@given(seed=seeds, scale=st.floats(0.1, 100), shift=st.floats(-100, 100))
def test_group_advantages(seed, scale, shift):
    b = random_batch(seed)
    moved = b.over(reward_B=b["reward_B"] * scale + shift)
    index_B, count = b.index()
    size_B = torch.bincount(index_B)[index_B]
    norm, centre, others = (
        part(b, CTX)["adv_B"] for part in (GroupNorm(eps=0.0), GroupCentre(), LeaveOneOut())
    )
    for adv_B in (norm, centre, others):
        total_Q = torch.zeros(count, dtype=torch.double).index_add_(0, index_B, adv_B * (size_B > 1))
        assert total_Q.abs().max() < 1e-9
    several = size_B > 1
    torch.testing.assert_close(
        GroupNorm(eps=0.0)(moved, CTX)["adv_B"][several], norm[several], rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(GroupCentre()(moved, CTX)["adv_B"], centre * scale, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(centre, (size_B - 1) / size_B * others)
    assert not others[~several].any() and not centre[~several].any()
    torch.testing.assert_close(norm[~several], b["reward_B"][~several])


def test_two_members_with_different_rewards_get_one_over_root_two():
    b = random_batch(0, rows=2, groups=1, reward_B=torch.tensor([5.0, 3.0]).double())
    assert GroupNorm(eps=0.0)(b, CTX)["adv_B"].tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])


@quick
@given(seed=seeds, value=st.floats(-1e6, 1e6))
def test_equal_rewards_give_exactly_zero(seed, value):
    b = random_batch(seed, groups=1, reward_B=torch.full((8,), value, dtype=torch.float64))
    for part in (GroupNorm(), GroupNorm(eps=0.0), GroupCentre(), LeaveOneOut()):
        assert not part(b, CTX)["adv_B"].any()


def test_integer_rewards_and_float32():
    b = random_batch(0, reward_B=torch.tensor([1, 0, 1, 0, 1, 0, 1, 1]))
    assert GroupNorm()(b, CTX)["adv_B"].dtype == torch.float32


def test_a_branched_trajectory_counts_once():
    reward = torch.tensor([1.0, 1.0, 0.0, 0.0]).double()
    rows = {"reward_B": reward, "parent_B": torch.tensor([-1, 0, -1, -1])}
    b = Batch.build(mask_BT=torch.ones(4, 2), group_B=torch.zeros(4), **rows)
    found = GroupCentre()(b, CTX)["adv_B"]
    torch.testing.assert_close(found, reward - 1 / 3)


@quick
@given(seed=seeds)
def test_whitened_over_policy_tokens(seed):
    b = TokenReward()(random_batch(seed), CTX)
    for before in (RewardToGo(gamma=0.9)(b, CTX), GroupCentre()(b, CTX)):
        if float((before.per_token("adv")[b.mask_BT]).var()) < 1e-3:
            continue
        adv = Whiten(eps=0.0)(before, CTX).per_token("adv")[b.mask_BT]
        assert float(adv.mean()) == pytest.approx(0, abs=1e-9) and float(adv.var()) == pytest.approx(1)


@quick
@given(seed=seeds)
def test_gae_limits(seed):
    b = TokenReward()(random_batch(seed), CTX)
    reward_B1, value = b["reward_B"][:, None], b["values_old_BT"]
    found = GAE(gamma=1.0, lam=1.0)(b, CTX)
    torch.testing.assert_close(found["adv_BT"], torch.where(b.mask_BT, reward_B1 - value, 0.0))
    torch.testing.assert_close(found["returns_BT"], torch.where(b.mask_BT, reward_B1.expand_as(value), 0.0))
    one = GAE(gamma=0.9, lam=0.0)(b, CTX)["adv_BT"]
    for i in range(b.B):
        at = b.mask_BT[i].nonzero().squeeze(1)
        after = torch.cat([value[i, at[1:]], torch.zeros(1)])
        torch.testing.assert_close(one[i, at], b["token_reward_BT"][i, at] + 0.9 * after - value[i, at])


@quick
@given(seed=seeds, at=st.integers(0, 6))
def test_tool_output_changes_no_advantage(seed, at):
    """Inserting masked tokens anywhere leaves the other tokens' advantages and returns as they are."""
    b = TokenReward()(random_batch(seed), CTX)
    keep = torch.cat([torch.arange(at), torch.arange(at + 2, 8)])

    def insert(x):
        return torch.cat(
            [x[:, :at], torch.full_like(x[:, :2], False if x.dtype == torch.bool else 7), x[:, at:]], 1
        )

    names = ("mask_BT", "token_reward_BT", "values_old_BT")
    wide = Batch.build(group_B=b["group_B"], **{name: insert(b[name]) for name in names})
    for part in (GAE(gamma=0.9, lam=0.8), RewardToGo(gamma=0.9)):
        expected, found = part(b, CTX), part(wide, CTX)
        for name in part.writes:
            torch.testing.assert_close(found[name][:, keep], expected[name])
            assert not found[name][:, at : at + 2].any()
