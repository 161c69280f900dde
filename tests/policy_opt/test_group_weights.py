"""Invariants of dgpo, bnpo and adora: scales and weights of whole questions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import policy_opt
from policy_opt import Ctx, RecipeError
from policy_opt.advantages import GroupCentre, GroupNorm, groups
from policy_opt.baselines import Balanced, PerScore
from policy_opt.group_weights import AdvantageousWeight, BetaWeight, DifficultyWeight, SignalMask
from policy_opt.terms import Loss
from tests.policy_opt.grouped import call, close, per_group, quick, seeds, some

# -- dgpo -----------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, scale=st.floats(0.5, 4), shift=st.floats(-3, 3))
def test_balanced(seed, scale, shift):
    b = some(seed)
    g, adv = groups(b), call(b, Balanced(eps=1e-12))["adv_B"]
    varied = per_group(b, g.centred_B.abs()) > 0
    close(per_group(b, adv.abs())[varied], g.size_Q[varied], 1e-6)
    close(per_group(b, adv), torch.zeros_like(g.size_Q), atol=1e-8)
    moved = b.over(reward_B=b["reward_B"] * scale + shift)
    close(call(moved, Balanced(eps=1e-12))["adv_B"], adv, 1e-6, 1e-6)
    binary = some(seed, "binary")
    p_B = (per_group(binary, binary["reward_B"]) / groups(binary).size_Q)[binary.index()[0]]
    expected = torch.where(binary["reward_B"] > 0, 0.5 / p_B, -0.5 / (1 - p_B))
    inside = (p_B > 0) & (p_B < 1)
    close(call(binary, Balanced(eps=1e-12))["adv_B"][inside], expected[inside], 1e-6)


@quick
@given(seed=seeds)
def test_question_weights_of_difficulty(seed):
    b = some(seed)
    g = groups(b)
    valid = SignalMask().valid(b)
    found = call(b, Balanced(), DifficultyWeight(temperature=2.0))
    weight = found["group_weight_B"]
    w_Q = torch.zeros_like(g.size_Q).index_copy_(0, g.index_B, weight)
    valid_Q = torch.zeros_like(g.size_Q).index_copy_(0, g.index_B, valid.double()) > 0
    assert (weight[~valid] == 1).all()
    if valid_Q.any():
        assert float(w_Q[valid_Q].sum()) == pytest.approx(int(valid_Q.sum()))
        assert float(w_Q[valid_Q].max() / w_Q[valid_Q].min()) <= math.exp(0.5) + 1e-9
        mean_Q = per_group(b, b["correct_B"]) / g.size_Q
        seen = torch.where(mean_Q == 0, 1, mean_Q)[valid_Q]
        order = seen.argsort()
        assert (w_Q[valid_Q][order].diff() <= 1e-12).all()
    close(call(b, Balanced(), DifficultyWeight(temperature=1e9))["adv_B"], call(b, Balanced())["adv_B"], 1e-6)
    hard = call(b, Balanced(), DifficultyWeight(unsolved="hardest"))["group_weight_B"]
    unsolved = valid & (per_group(b, b["correct_B"]) == 0)[g.index_B]
    assert (hard[unsolved] >= weight[unsolved]).all()


@quick
@given(seed=seeds)
def test_a_question_without_contrast_changes_nothing(seed):
    b = some(seed)
    recipe = policy_opt.get("dgpo")
    mixed = SignalMask().valid(b).nonzero().squeeze(1)
    if not mixed.numel():
        return
    found = []
    for rows in (torch.arange(b.B), mixed):
        now = call(b.rows(rows), *recipe.advantage, *recipe.credit)
        logp = (now["logp_old_BT"] + 0.3 * now["reward_B"][:, None] - 0.1).double()
        loss = Loss.of(recipe.terms, now, Ctx(), torch.float64).cotangents({"logp_BT": logp}, now)
        found.append((loss[0], loss[1]["logp_BT"][mixed] if rows.numel() == b.B else loss[1]["logp_BT"]))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])


# -- bnpo -----------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, scale=st.floats(0.5, 4), shift=st.floats(-3, 3))
def test_beta_normalisation(seed, scale, shift):
    b = some(seed)
    centred, adv = (call(b, GroupCentre(), *more)["adv_B"] for more in ((), (BetaWeight(),)))
    close(per_group(b, adv), torch.zeros(b.index()[1]).double(), atol=1e-8)
    assert torch.equal(adv.sign(), centred.sign())
    moved = b.over(reward_B=b["reward_B"] * scale + shift)
    close(call(moved, GroupCentre(), BetaWeight(low=shift, high=scale + shift))["adv_B"], adv, 1e-6, 1e-8)
    other = b.over(reward_B=1 - b["reward_B"])
    close(call(other, GroupCentre(), BetaWeight())["adv_B"], -adv, 1e-6, 1e-8)
    fit, swapped = BetaWeight().fit(b, b["reward_B"]), BetaWeight().fit(other, other["reward_B"])
    close(fit.alpha, swapped.beta, 1e-6)
    assert float(fit.alpha) >= 1 and float(fit.beta) >= 1
    same = b.over(scores_BK=b["reward_B"][:, None].expand(-1, 3))
    close(call(same, PerScore((GroupCentre(), BetaWeight())))["adv_B"], adv)


def test_beta_weight_at_its_named_points():
    one = some(3, sizes=(6,))
    assert torch.equal(call(one, GroupCentre(), BetaWeight())["adv_B"], call(one, GroupCentre())["adv_B"])
    reward = torch.tensor([1, 0, 1, 0, 1, 1, 0, 0.0]).double()
    same = some(0, sizes=(4, 4)).over(reward_B=reward, group_B=torch.tensor([0] * 4 + [1] * 4))
    assert call(same, GroupCentre(), BetaWeight())["group_weight_B"].tolist() == [1.0] * 8
    part = BetaWeight()
    p = torch.linspace(0.1, 0.9, 5).double()
    fit = part.fit(same, reward)._replace(
        rate_Q=p, fitted_Q=p > 0, alpha=torch.tensor(1.5).double(), beta=torch.tensor(1.5).double()
    )
    close(part.weights(fit), math.pi / 8 / (p * (1 - p)).sqrt())
    with pytest.raises(RecipeError, match="low < high"):
        policy_opt.get("bnpo").set("advantage.low=2").check()


def test_a_prompt_of_one_trajectory():
    b = some(5, "graded", (1, 3, 4))
    alone = groups(b).size_Q[b.index()[0]] == 1
    rest = b.rows((~alone).nonzero().squeeze(1))
    left = call(b, GroupCentre(), BetaWeight())
    assert left["group_weight_B"][alone].tolist() == [1.0] and left["adv_B"][alone].tolist() == [0.0]
    close(left["adv_B"][~alone], call(rest, GroupCentre(), BetaWeight())["adv_B"])
    zero = BetaWeight(singles="zero").fit(b, b["reward_B"])
    assert float(zero.rate_Q.min()) == 0 and bool(zero.fitted_Q.all())


# -- adora ----------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_advantageous_groups(seed):
    b = some(seed)
    base = call(b, GroupNorm())["adv_B"]
    for empty in ("minus", "plus"):
        for criterion in ("length", "difficulty", "both", "either"):
            part = AdvantageousWeight(criterion, empty=empty)
            found = call(b, GroupNorm(), part)
            assert set(found["group_weight_B"].tolist()) <= {1.0, 2.0}
            assert torch.equal(found["adv_B"].sign(), base.sign())
            close(per_group(b, found["adv_B"]), torch.zeros(b.index()[1]).double(), atol=1e-8)
            even = replace(part, advantageous=1.0)
            assert torch.equal(call(b, GroupNorm(), even)["adv_B"], base)
    rate_B = (per_group(b, b["correct_B"]) / groups(b).size_Q)[b.index()[0]]
    weight = call(b, GroupNorm(), AdvantageousWeight("difficulty"))["group_weight_B"]
    assert torch.equal(weight == 2, rate_B <= 0.5)


def test_length_criterion_by_hand():
    """Longest success 3 against failures 2 and 6 (mean 4), of which 6 is at the limit in the second case."""
    b = some(0, sizes=(4,)).over(
        reward_B=torch.tensor([1.0, 0, 0, 1]).double(),
        correct_B=torch.tensor([1.0, 0, 0, 1]).double(),
        length_B=torch.tensor([3, 2, 6, 1]),
        truncated_B=torch.tensor([0.0, 0, 1, 0]),
    )
    length = AdvantageousWeight("length", max_length=7)
    assert call(b, GroupNorm(), length)["group_weight_B"].tolist() == [1.0] * 4
    assert call(b, GroupNorm(), replace(length, max_length=6))["group_weight_B"].tolist() == [2.0] * 4
    assert call(b, GroupNorm(), replace(length, max_length=None))["group_weight_B"].tolist() == [2.0] * 4
    swapped = b.over(reward_B=b["reward_B"][[3, 1, 2, 0]], length_B=torch.tensor([3, 2, 6, 3]))
    assert call(swapped, GroupNorm(), length)["group_weight_B"].tolist() == [1.0] * 4
    wrong = b.over(correct_B=torch.zeros(4).double())
    for empty, weight in (("minus", 0.5), ("plus", 1.0)):
        part = AdvantageousWeight("length", advantageous=2.0, other=0.5, empty=empty)
        assert call(wrong, GroupNorm(), part)["group_weight_B"].tolist() == [weight] * 4
    right = b.over(correct_B=torch.ones(4).double())
    for empty, weight in (("minus", 2.0), ("plus", 0.5)):
        part = AdvantageousWeight("length", advantageous=2.0, other=0.5, empty=empty)
        assert call(right, GroupNorm(), part)["group_weight_B"].tolist() == [weight] * 4


@quick
@given(seed=seeds)
def test_question_weights_multiply(seed):
    b = some(seed)
    rules = (AdvantageousWeight(), DifficultyWeight(), BetaWeight())
    alone = [call(b, GroupCentre(), rule)["group_weight_B"].double() for rule in rules]
    together = call(b, GroupCentre(), *rules)
    close(together["group_weight_B"].double(), alone[0] * alone[1] * alone[2], 1e-6)
    close(together["adv_B"], call(b, GroupCentre())["adv_B"] * together["group_weight_B"], 1e-6)
