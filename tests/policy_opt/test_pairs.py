"""Pairs of trajectories out of groups, and partners under a foreign prompt."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import policy_opt
from policy_opt import Batch, Ctx, concat
from policy_opt.pairs import GroupPairs
from policy_opt.preferences import LogisticPairs, log_ratios
from tests.policy_opt.paired import disjoint, live, played, pull, quick, seeds


def named(b: Batch) -> list[tuple[int, int, int]]:
    """Pairs as (group, better member, worse member)."""
    return [(int(b["group_B"][i]), int(b["member_B"][i]), int(b["member_B"][j])) for i, j in b.pairs_P2.tolist()]


@quick
@given(seed=seeds, best=st.sampled_from(["high", "low"]), margin=st.sampled_from([0.0, 1.0]))
def test_every_couple_of_a_group_that_differs(seed, best, margin):
    b = played(seed)
    found = GroupPairs(best=best, margin=margin, per_group=None)(b, Ctx())
    reward, group = b["reward_B"] * (1 if best == "high" else -1), b["group_B"]
    couples = itertools.product(range(b.B), repeat=2)
    wanted = [(i, j) for i, j in couples if group[i] == group[j] and reward[i] > reward[j] + margin]
    assert [tuple(pair) for pair in found.pairs_P2.tolist()] == wanted


@quick
@given(seed=seeds, limit=st.integers(1, 4))
def test_pairs_are_bounded_and_follow_ids_not_rows(seed, limit):
    b = played(seed)
    part, ctx = GroupPairs(per_group=limit), Ctx(seed=seed)
    found = part(b, ctx)
    everything = GroupPairs(per_group=None)(b, Ctx())
    assert set(named(found)) <= set(named(everything))
    for group in set(b["group_B"].tolist()):
        count = sum(pair[0] == group for pair in named(everything))
        assert sum(pair[0] == group for pair in named(found)) == min(limit, count)
    order = torch.randperm(b.B, generator=torch.Generator().manual_seed(seed))
    assert named(part(b.rows(order).pad(9), ctx)) == named(found)
    assert ctx.metrics["pairs"] == len(named(found))


def test_seats_and_segments_are_not_paired():
    b = played(0, groups=1, size=4, reward_B=torch.tensor([3.0, 2.0, 1.0, 0.0]), seat_B=torch.tensor([0, 1, 0, 1]))
    assert GroupPairs()(b, Ctx()).pairs_P2.tolist() == [[0, 2], [1, 3]]
    b = played(0, groups=1, size=4, reward_B=torch.tensor([3.0, 3.0, 1.0, 1.0]), parent_B=torch.tensor([-1, 0, -1, 2]))
    assert GroupPairs()(b, Ctx()).pairs_P2.tolist() == [[0, 2]]
    none = GroupPairs()(b.over(reward_B=torch.ones(4)), Ctx())
    assert none.pairs_P2.shape == (0, 2)


def test_columns_per_pair_follow_their_pairs():
    b = disjoint(played(0, groups=2, size=2)).put(label_P=torch.tensor([0.25, 0.75]))
    assert b.rows(torch.tensor([3, 2, 0]))["label_P"].tolist() == [0.75]
    silent = b.silence(torch.tensor([True, True, True, False]))
    assert silent.pairs_P2.tolist() == [[0, 1]] and silent["label_P"].tolist() == [0.25]
    assert concat([b, silent])["label_P"].tolist() == [0.25, 0.75, 0.25]
    with pytest.raises(policy_opt.BatchError, match="P=2"):
        b.over(label_P=torch.ones(3))


@quick
@given(seed=seeds)
def test_mismatched_rows_are_of_another_group_and_follow_ids(seed):
    b = played(seed)
    other = b.mismatched(1)
    assert sorted(other.tolist()) == list(range(b.B))
    assert (b["group_B"][other] != b["group_B"]).all()
    order = torch.randperm(b.B, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(order[b.rows(order).mismatched(1)], other[order])


def test_a_trajectory_of_several_rows_is_one_action():
    b = played(1, groups=1, size=4, parent_B=torch.tensor([-1, 0, 1, -1]))
    s = {"logp_BT": live(1, b) * b.mask_BT}
    rows = ((s["logp_BT"] - b["logp_ref_BT"]) * b.mask_BT).sum(1)
    expected = torch.stack([rows[:3].sum()] * 3 + [rows[3]])
    torch.testing.assert_close(log_ratios(s, b), expected)
    lengths = b.mask_BT.sum(1)
    expected = expected / torch.stack([lengths[:3].sum()] * 3 + [lengths[3]])
    torch.testing.assert_close(log_ratios(s, b, length_normalised=True), expected)
    b = b.over(pairs_P2=torch.tensor([[0, 3]]))
    grad = pull(LogisticPairs(), b, s["logp_BT"])[1]
    assert len(set(grad[:3][b.mask_BT[:3]].tolist())) == 1
