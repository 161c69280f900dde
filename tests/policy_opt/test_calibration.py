"""Advantages calibrated by confidence (CAPO) and shaped by the first call (ASPO): facts of the specifications."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import policy_opt
from policy_opt import Ctx, RecipeError
from policy_opt.advantages import GroupCentre, GroupNorm
from policy_opt.calibration import RankPairs, ReferenceFilter
from policy_opt.recipes.aspo import Earlier
from policy_opt.table import TableActor
from tests.policy_opt.played import CTX, close, played, quick, seeds

# -- confidence (CAPO) ------------------------------------------------------------------------------------


@quick
@given(seed=seeds, tau=st.floats(0.1, 3), shift=st.floats(-1, 1))
def test_pairs_of_right_and_wrong(seed, tau, shift):
    b = played(seed)
    part = RankPairs(tau=tau)
    adv, right = part(b, CTX)["adv_B"], b["correct_B"] > 0.5
    assert bool((adv[right] >= 0).all()) and bool((adv[~right] <= 0).all())
    close(torch.zeros(2).double().index_add_(0, b.index()[0], adv), torch.zeros(2).double())
    for rows in torch.arange(8).split(4):
        opponents = torch.where(right[rows], (~right[rows]).sum(), right[rows].sum())
        assert bool((adv[rows].abs() <= opponents / 4 / tau + 1e-12).all())
    moved = part(b.over(logp_old_BT=b["logp_old_BT"] + shift), CTX)["adv_B"]
    close(moved, adv, atol=1e-8)
    close(3 * RankPairs(tau=3 * tau)(b.over(logp_old_BT=3 * b["logp_old_BT"]), CTX)["adv_B"], adv)
    close(RankPairs(tau=tau, norm="sum")(b, CTX)["adv_B"], 4 * adv)
    plain = GroupCentre()(b.over(reward_B=b["correct_B"]), CTX)["adv_B"]
    close(RankPairs(pairs="linear")(b, CTX)["adv_B"], plain)
    close(1e6 * RankPairs(tau=1e6)(b, CTX)["adv_B"], plain / 2, atol=1e-5)


def test_a_group_of_one_kind_learns_nothing_and_segments_count_once():
    b = played(5, correct_B=torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]))
    assert not RankPairs()(b, CTX)["adv_B"].any()
    b = played(6, correct_B=torch.tensor([1, 0, 0, 0, 1, 0, 1, 1]))
    whole = RankPairs()(b, CTX)
    halves = b.rows(torch.tensor([*range(8), 2]))
    cut = torch.arange(b.T) < 4
    mask = torch.cat([b.mask_BT, b.mask_BT[2:3] & ~cut])
    mask[2] &= cut
    parents = torch.tensor([-1] * 8 + [2])
    found = RankPairs()(halves.over(mask_BT=mask, parent_B=parents), CTX)["adv_B"]
    close(found, whole["adv_B"][[*range(8), 2]])


@quick
@given(seed=seeds, high=st.floats(1, 8), low=st.floats(1, 8))
def test_reference_filter(seed, high, low):
    b = played(seed)
    ctx = Ctx()
    found = ReferenceFilter(high, low)(b, ctx)
    right, ppl = b["correct_B"] > 0.5, found["ref_ppl_B"]
    assert torch.equal(found["w_B"] > 0, torch.where(right, ppl <= high, ppl >= low))
    assert 1 <= ctx.metrics["ref_ppl_q25"] <= ctx.metrics["ref_ppl_q75"]
    masked = ReferenceFilter(high, low)(RankPairs()(b, CTX), Ctx())
    close(masked["adv_B"], RankPairs()(b, CTX)["adv_B"])


# -- place of the first call (ASPO) -----------------------------------------------------------------------


@quick
@given(seed=seeds, delta=st.floats(-3, 3), k=st.floats(0, 0.99), scale=st.integers(2, 9))
def test_shaping_by_the_first_call(seed, delta, k, scale):
    b = played(seed)
    b = GroupNorm()(b.over(reward_B=b["correct_B"]), CTX)
    base, shaped = b["adv_B"], Earlier(delta, k)(b, CTX)
    inside = (b["correct_B"] > 0.5) & (b["first_call_B"] >= 0)
    assert not shaped["bias_B"][~inside].any()
    good = base > 0
    assert bool((shaped["adv_B"][good] >= (1 - k) * base[good] - 1e-12).all())
    assert bool((shaped["adv_B"][good] <= (1 + k) * base[good] + 1e-12).all())
    longer = b.over(first_call_B=torch.where(inside, b["first_call_B"] * scale, -1), length_B=b["length_B"] * scale)
    close(Earlier(delta, k)(longer, CTX)["bias_B"], shaped["bias_B"])
    loose = Earlier(delta / 1e6, 1e9)(b, CTX)["bias_B"]
    close(torch.zeros(2).double().index_add_(0, b.index()[0], loose), torch.zeros(2).double())
    for off in (Earlier(0.0, k), Earlier(delta, 0.0)):
        assert torch.equal(off(b, CTX)["adv_B"], base)


def test_shaping_alone_is_no_signal():
    b = played(7, correct_B=torch.ones(8), first_call_B=torch.arange(8))
    b = GroupNorm()(b.over(reward_B=b["correct_B"]), CTX)
    assert not Earlier()(b, CTX)["adv_B"].any()
    alone = played(8, correct_B=torch.tensor([1, 0, 0, 0] * 2))
    alone = GroupNorm()(alone.over(reward_B=alone["correct_B"]), CTX)
    assert not Earlier()(alone, CTX)["bias_B"].any()


def test_an_earlier_call_is_worth_more_where_delta_is_negative():
    b = played(9, correct_B=torch.tensor([1, 1, 1, 0] * 2), first_call_B=torch.tensor([0, 5, 30, 1] * 2))
    b = GroupNorm()(b.over(reward_B=b["correct_B"]), CTX)
    first, second, third, _ = Earlier()(b, CTX)["adv_B"][:4].tolist()
    assert first > second > third > 0


@pytest.mark.parametrize(
    ("slug", "setting"),
    [
        ("capo_calibration", "advantage.tau=0"),
        ("aspo", "advantage.k=-1"),
    ],
)
def test_options_without_sense_are_refused(slug, setting):
    with pytest.raises(RecipeError):
        policy_opt.get(slug).set(setting).check(TableActor.columns)
