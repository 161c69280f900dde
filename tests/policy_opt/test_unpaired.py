"""Preference signals without pairs: kto, nft, empo."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import policy_opt
from policy_opt import Batch, Ctx, Loop, RecipeError, RunSize
from policy_opt.advantages import GroupCentre, GroupNorm
from policy_opt.recipes.empo import Agreement, AnswerClusters
from policy_opt.recipes.kto import ProspectValue
from policy_opt.recipes.nft import ImplicitNegative, SuccessRate
from policy_opt.table import TableActor, TableLearner, World, episodes
from tests.policy_opt.paired import CTX, live, played, pull, quick, seeds

# -- KTO ------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, beta=st.floats(0.01, 2), w_d=st.floats(0.1, 2), w_u=st.sampled_from([0.0, 0.5, 1.0]))
def test_kto(seed, beta, w_d, w_u):
    b = played(seed)
    kto = ProspectValue(beta=beta, desirable_weight=w_d, undesirable_weight=w_u)
    good, bad = torch.tensor([w_d, w_u], dtype=torch.float64)
    weight = torch.where(b["correct_B"] > 0.5, good, bad)[:, None]
    sign = torch.where(b["correct_B"] > 0.5, -1.0, 1.0).double()[:, None]
    still = b.over(mismatched_ref_BT=b["mismatched_BT"])
    assert float(kto.z0(still)) == 0
    losses = kto({"logp_BT": b["logp_ref_BT"]}, still)
    torch.testing.assert_close(losses, 0.5 * weight.squeeze(1))
    torch.testing.assert_close(pull(kto, still, b["logp_ref_BT"])[1], sign * 0.25 * beta * weight * b.mask_BT)
    logp = live(seed, b)
    losses, grad = kto({"logp_BT": logp * b.mask_BT}, b), pull(kto, b, logp)[1]
    assert ((losses >= 0) & (losses <= weight.squeeze(1))).all()
    assert (grad.abs() <= 0.25 * beta * weight + 1e-12).all() and not grad[~b.mask_BT].any()
    zero = ProspectValue(beta=beta, desirable_weight=w_d, undesirable_weight=w_u, reference_point="zero")
    z0 = float(kto.z0(b))
    moved = (logp - z0 / b.mask_BT.sum(1)[:, None]) * b.mask_BT
    torch.testing.assert_close(zero({"logp_BT": moved}, b), losses)


def test_kto_saturates_on_both_sides_and_takes_one_kind_of_label():
    b = played(0, correct_B=torch.ones(12).double())
    for shift in (1000.0, -1000.0):
        assert float(pull(ProspectValue(), b, b["logp_ref_BT"] + shift)[1].abs().max()) < 1e-12
    assert math.isfinite(pull(ProspectValue(), b, live(0, b))[0])


# -- NFT ------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, negative=st.floats(0.1, 1))
def test_nft_on_policy_is_a_group_advantage(seed, negative):
    b = played(seed)
    b = SuccessRate(low=0.001, high=0.999)(b, CTX)
    mixed = (b["success_rate_B"] > 0.1) & (b["success_rate_B"] < 0.9)
    truth = b.over(reward_B=b["correct_B"])
    for normalize, part in ((1, GroupCentre()), (2, GroupNorm(eps=0.0, ddof=0))):
        grad = pull(ImplicitNegative(normalize=normalize, clamp_negative=negative), b, b["logp_old_BT"])[1]
        expected = -part(truth, CTX)["adv_B"][:, None] * b.mask_BT
        torch.testing.assert_close(grad[mixed], expected[mixed])


@quick
@given(seed=seeds)
def test_nft_gradients(seed):
    b = SuccessRate()(played(seed), CTX)
    logp, right = live(seed, b), b["correct_B"] > 0.5
    loss = ImplicitNegative()
    _, grad = pull(loss, b, logp)
    q, rho = b["success_rate_B"][:, None], ((logp - b["logp_old_BT"]) * b.mask_BT).exp()
    torch.testing.assert_close(grad[right], (-(1 - q) * b.mask_BT)[right])
    bound = ((1 - q * rho) / (1 - q)).clamp(min=1)
    torch.testing.assert_close(grad[~right], (q * rho / bound * b.mask_BT)[~right])
    assert not pull(ImplicitNegative(neg_weight=0.0), b, logp)[1][~right].any()
    assert (loss({"logp_BT": logp * b.mask_BT}, b)[~right] <= 0).all()
    columns = {k: v for k, v in b.cols.items() if "ref" not in k}
    without = Batch.build(group_B=b["group_B"], mask_BT=b.mask_BT, **columns)
    assert torch.equal(pull(loss, without, logp)[1], grad)


def test_nft_sequences_and_extreme_ratios():
    b = SuccessRate()(played(0), CTX)
    one = b.over(mask_BT=b.mask_BT & (b.mask_BT.cumsum(1) == 1))
    logp = live(0, b)
    token, row = (pull(ImplicitNegative(ratio_type=kind), one, logp) for kind in ("token", "sequence"))
    assert token[0] == pytest.approx(row[0])
    torch.testing.assert_close(token[1], row[1])
    for kind, shift in itertools.product(("token", "sequence"), (1000.0, -1000.0)):
        loss, grad = pull(ImplicitNegative(ratio_type=kind, clamp_negative=0.0), b, b["logp_old_BT"] + shift)
        assert math.isfinite(loss) and torch.isfinite(grad).all()


# -- EMPO -----------------------------------------------------------------------------------------------


def rewarded(b: Batch, **options) -> Batch:
    return Agreement(**options)(AnswerClusters()(b, CTX), Ctx())


@quick
@given(seed=seeds)
def test_empo(seed):
    b = played(seed)
    found = rewarded(b, rule="entropy")
    p, index = found["cluster_prob_B"], b.index()[0]
    torch.testing.assert_close(found["reward_B"], p)
    for q in range(3):
        rows = (index == q).nonzero().squeeze(1).tolist()
        answers = [int(b["answer_B"][i]) if b["answer_B"][i] >= 0 else ("blank", i) for i in rows]
        shares = [answers.count(a) / len(rows) for a in dict.fromkeys(answers)]
        assert float(p[rows].sum()) == pytest.approx(len(rows) * sum(x * x for x in shares))
        entropy = -sum(x * math.log(x) for x in shares)
        assert float(found["cluster_entropy_B"][rows[0]]) == pytest.approx(entropy)
        assert found["cluster_B"][rows].tolist() == [list(dict.fromkeys(answers)).index(a) for a in answers]
    names = torch.tensor([4, 0, 9])
    renamed = b.over(answer_B=torch.where(b["answer_B"] < 0, -1, names[b["answer_B"].clamp(min=0)]))
    order = torch.randperm(b.B, generator=torch.Generator().manual_seed(seed))
    for rule in ("math", "entropy", "thresholded", "vote"):
        expected = rewarded(b, rule=rule)
        assert torch.equal(rewarded(renamed, rule=rule)["reward_B"], expected["reward_B"])
        moved = rewarded(b.rows(order), rule=rule)
        assert torch.equal(moved["reward_B"], expected["reward_B"][order])
        assert torch.equal(moved["cluster_B"], expected["cluster_B"][order])


def test_empo_unanimous_distinct_and_thresholds():
    same = played(0, groups=1, answer_B=torch.full((4,), 7))
    assert rewarded(same)["reward_B"].tolist() == [1.0] * 4
    assert not GroupNorm(eps=1e-4)(rewarded(same), CTX)["adv_B"].any()
    distinct = same.over(answer_B=torch.arange(4))
    assert not rewarded(distinct)["reward_B"].any()
    assert rewarded(distinct, rule="thresholded")["reward_B"].tolist() == [0.25] * 4
    halves = same.over(answer_B=torch.tensor([1, 1, 2, -1]))
    assert rewarded(halves)["reward_B"].tolist() == [0.5, 0.5, 0.25, 0.0]
    assert rewarded(halves, rule="vote")["reward_B"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert not rewarded(halves, entropy_high=1.0)["reward_B"].any()
    assert not rewarded(same, entropy_low=0.1)["reward_B"].any()
    copied = halves.put(copies_question_B=torch.tensor([1, 0, 0, 0]))
    assert rewarded(copied, rule="free_form")["reward_B"].tolist() == [0.0, 0.5, 0.25, -0.5]
    with pytest.raises(RecipeError, match="belong to rule=math"):
        policy_opt.get("empo").set("reward.rule=vote", "reward.entropy_low=0.1").check()


@pytest.mark.parametrize("variant", [None, "verl"])
def test_empo_sharpens_the_majority(variant):
    """From a policy that is right somewhat more often than it gives any other answer, without seeing a label."""
    world = World(tasks=4, turns=1)
    learner = TableLearner(world)
    truth = torch.nn.functional.one_hot(world.truth_BT(torch.arange(4)), world.vocab)
    learner.tables["policy"].data[:4] += 1.2 * truth
    recipe = policy_opt.get("empo").set("variant=verl") if variant else policy_opt.get("empo")
    loop = Loop(recipe, TableActor(world, learner), learner, RunSize(4, groups=8, group_size=16))
    entropy = [loop.iterate()[1]["semantic_entropy"] for _ in range(40)]
    right = torch.cat([b["correct_B"] for b in episodes(world, learner, 32)]).mean()
    assert float(right) >= 0.9 and entropy[-1] < 0.3 * entropy[0]
