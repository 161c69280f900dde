"""Invariants of baselines and scales (mc_grpo, copo), and what all recipes of groups share."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import policy_opt
from policy_opt import Batch, Ctx, Loop, RecipeError, RunSize
from policy_opt.advantages import GroupNorm, groups
from policy_opt.baselines import AnswerEntropy, MedianCentre, PromptNorm
from policy_opt.recipes.copo import Blend
from policy_opt.recipes.mc_grpo import DropPivot
from policy_opt.rewards import WeightedScores
from policy_opt.table import TableActor, TableLearner
from policy_opt.terms import Loss
from tests.policy_opt.grouped import EARLY, call, close, flow, per_group, quick, seeds, some
from tests.policy_opt.test_recipes import WORLD

pytestmark = pytest.mark.filterwarnings("ignore:.*groups of even size")


# -- what all of them share -----------------------------------------------------------------------------

FLOWS = [
    ("mc_grpo",), ("mc_grpo", "advantage.pivot=torch"), ("mc_grpo", "variant=gsm"), ("dgpo",), ("bnpo",), ("copo",),
    ("bnpo", "variant=several"), ("copo", "advantage.by_consistency=True"), ("adora",), ("adora", "variant=vl_release"),
    ("adora", "variant=llm_release"), ("riskpo",), ("riskpo", "variant=release"), ("riskpo", "signals.size=2"),
    ("riskpo", "variant=release", "advantage.rule=std"), ("riskpo", "variant=release", "advantage.rule=score"),
]  # fmt: skip


@pytest.mark.parametrize("form", FLOWS, ids=" ".join)
@settings(max_examples=3, deadline=None)
@given(seed=seeds)
def test_rows_may_stand_in_any_order_and_padding_changes_nothing(form, seed):
    b = some(seed)
    order = torch.randperm(b.B, generator=torch.Generator().manual_seed(seed))
    plain = call(b, *flow(*form))
    moved = call(b.pad(b.T + 2).rows(order), *flow(*form))
    for name in plain.cols.keys() - b.cols.keys():
        if name.endswith("_BT"):
            assert torch.equal(moved[name][:, : b.T], plain[name][order])
        else:
            close(moved[name].double(), plain[name][order].double(), 1e-9, 1e-12)
    assert torch.equal(moved.mask_BT[:, : b.T], plain.mask_BT[order])


@pytest.mark.parametrize("form", FLOWS, ids=" ".join)
@settings(max_examples=3, deadline=None)
@given(seed=seeds)
def test_a_trajectory_of_several_rows_counts_once(form, seed):
    """Its further rows have what its first one has, and change nothing elsewhere."""
    b = some(seed)
    twice = torch.cat([torch.arange(b.B), torch.tensor([0, 0, 2])])
    parent = torch.full((b.B + 3,), -1)
    parent[b.B :] = torch.tensor([0, b.B, 2])
    plain = call(b, *flow(*form))
    longer = call(b.rows(twice).over(parent_B=parent), *flow(*form))
    for name in plain.cols.keys() - b.cols.keys():
        close(longer[name].double(), plain[name].double()[twice], 1e-9, 1e-12)
    assert torch.equal(longer.mask_BT, plain.mask_BT[twice])


# -- mc_grpo --------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, shift=st.integers(-4, 4))
def test_median_and_pivot(seed, shift):
    b = some(seed)
    for pivot in ("first", "torch"):
        found = call(b, MedianCentre(pivot=pivot))
        adv, chosen = found["adv_B"], found["pivot_B"]
        assert per_group(b, chosen.double()).tolist() == [1.0] * b.index()[1]
        assert not adv[chosen].any()
        size = groups(b).size_Q
        assert (2 * per_group(b, (adv <= 0).double()) >= size).all()
        assert (2 * per_group(b, (adv >= 0).double()) >= size).all()
        close(call(b.over(reward_B=b["reward_B"] + shift), MedianCentre())["adv_B"], adv, atol=1e-6)
        kept = call(found, DropPivot())
        assert torch.equal(kept.mask_BT.any(1), ~chosen)
    firsts = [
        min(
            (int(b["member_B"][i]), i)
            for i in range(b.B)
            if b.index()[0][i] == q and call(b, MedianCentre(scale="none"))["adv_B"][i] == 0
        )[1]
        for q in range(b.index()[1])
    ]
    assert call(b, MedianCentre())["pivot_B"].nonzero().squeeze(1).tolist() == sorted(firsts)


@quick
@given(seed=seeds)
def test_binary_rewards_have_no_median_deviation(seed):
    b = some(seed, "binary")
    for size in (3, 5):
        odd = some(seed, "binary", (size, size))
        adv = call(odd, MedianCentre())["adv_B"]
        assert set(adv.abs().tolist()) <= {0.0, 1000.0}
        centred = odd["reward_B"] - MedianCentre().statistics(odd)[0][odd.index()[0]]
        close(adv, 1000 * centred, atol=1e-6)
    plain, gsm = (call(b, MedianCentre(rescale=x))["adv_B"] for x in (False, True))
    some_Q = per_group(b, (plain.abs() > 1e-6).double())
    close(per_group(b, gsm.abs()) * some_Q, per_group(b, plain.abs()) * groups(b).size_Q, 1e-9)


def test_equal_rewards_and_even_groups():
    b = some(0, sizes=(3, 3)).over(reward_B=torch.full((6,), 0.3).double())
    assert not call(b, MedianCentre())["adv_B"].any()
    with pytest.warns(UserWarning, match="1 groups of even size"):
        call(some(0, sizes=(4, 3)), MedianCentre())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(b, MedianCentre())
    spread = call(some(1, sizes=(5, 5)), MedianCentre(scale="std", eps=1e-12))
    norm = call(some(1, sizes=(5, 5)), GroupNorm(eps=1e-12))
    gap = (spread["adv_B"] - norm["adv_B"])[spread.index()[0] == 0]
    close(gap, gap[:1].expand_as(gap), 1e-6, 1e-6)  # the centre differs, the scale does not


# -- copo -----------------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_answer_entropy_and_prompt_norm(seed):
    b = some(seed)
    entropy = call(b, AnswerEntropy(eps=0.0))
    h_B, n_B = entropy["answer_entropy_B"], groups(b).size_Q[b.index()[0]]
    assert (h_B >= -1e-12).all() and (h_B <= n_B.log2() + 1e-9).all()
    for answers, share in ((torch.zeros(b.B).long(), torch.ones_like(n_B)), (torch.arange(b.B), 1 / n_B)):
        scaled = call(b.over(answer_B=answers), AnswerEntropy(eps=0.0), PromptNorm(by_consistency=True))
        plain = call(b, PromptNorm())
        close(scaled["prompt_reward_B"], plain["prompt_reward_B"] * share, 1e-9)
    once_Q = torch.zeros(b.index()[1]).double().index_copy_(0, b.index()[0], plain["adv_prompt_B"])
    assert float(once_Q.sum()) == pytest.approx(0, abs=1e-6)
    one = some(seed, sizes=(4,))
    assert not call(one, PromptNorm())["adv_prompt_B"].any()


@quick
@given(seed=seeds)
def test_blend(seed):
    b = call(some(seed), AnswerEntropy(), GroupNorm(), PromptNorm())
    h_B = b["answer_entropy_B"]
    soft = call(b, Blend(mode="only_soft", gamma=20.0, rho=1.0))["w_local_B"]
    assert ((soft >= 0.5) == (h_B >= 1.0)).all()
    both = call(b, Blend())
    close(both["w_local_B"] + both["w_global_B"], torch.ones(b.B).double())
    assert not both["w_local_B"][b["correct_B"] < 0.5].any()
    forced = call(b, Blend(mode="only_forced"))["w_local_B"]
    assert torch.equal(forced, (b["adv_B"] != 0).double())
    recipe = policy_opt.get("copo")
    logp = (b["logp_old_BT"] + 0.2 * b["reward_B"][:, None]).double()

    def gradient(now: Batch, terms=recipe.terms) -> torch.Tensor:
        return Loss.of(terms, now, Ctx(), torch.float64).cotangents({"logp_BT": logp}, now)[1]["logp_BT"]

    local, whole = (gradient(call(b, Blend(mode=mode))) for mode in ("no_global", "only_global"))
    grpo = policy_opt.get("grpo").set("terms.dual_clip=3.0")
    close(local, gradient(b, grpo.terms))
    w_B1 = soft[:, None]
    close(gradient(call(b, Blend(mode="only_soft", gamma=20.0, rho=1.0))), w_B1 * local + (1 - w_B1) * whole)


# -- composition ----------------------------------------------------------------------------------------


def test_they_compose_from_the_command_line():
    get, columns = policy_opt.get, TableActor.columns
    for slug, *changes in (
        ("dapo", "advantage+=advantageous_weight()", "advantage+=difficulty_weight(temperature=1.0)"),
        ("gspo", "advantage=median_centre()", "credit+=mc_grpo.drop_pivot()"),
        ("grpo", "advantage=per_score(each=(group_norm(), beta_weight()))"),
        ("grpo", "reward=weighted_scores(weights=(1.0, 0.5))"),
        ("cispo", "credit+=signal_mask()", "terms.policy.den=contrast"),
        ("grpo", "signals=bundle(2)", "reward=paper_score()", "advantage=(tail_risk(), share_out(rule=score))"),
        ("gspo", EARLY),
        ("rloo", "advantage+=progress_gate(warmup=1)"),
    ):
        recipe = get(slug).set(*changes)
        recipe.check(columns)
        learner = TableLearner(WORLD)
        loop = Loop(recipe, TableActor(WORLD, learner), learner, RunSize(4, groups=4, group_size=5))
        for _ in range(2):
            numbers = loop.iterate()[1]
            assert all(math.isfinite(x) for x in numbers.values())
        assert learner.version > 0


def test_what_does_not_fit_is_refused_with_the_reason():
    get = policy_opt.get
    with pytest.raises(RecipeError, match="fact `answer_B`, which the environment does not deliver"):
        get("copo").check({"tool_calls_B"})
    with pytest.raises(RecipeError, match="none of its parts writes adv_B"):
        get("bnpo").set("advantage=per_score(each=beta_weight())").check()
    with pytest.raises(RecipeError, match="nothing after it reads that"):
        get("grpo").set("credit+=signal_mask()").check()
    with pytest.raises(RecipeError, match="reads `pivot_B`, which nothing before it writes"):
        get("mc_grpo").set("advantage=group_norm()").check()
    with pytest.raises(RecipeError, match="reads `bundle_B`"):
        get("riskpo").set("signals=none").check()
    with pytest.raises(RecipeError, match="1 <= warmup <= window"):
        get("pipo").set("schedule.window=4").check()
    with pytest.raises(policy_opt.BatchError, match="there are 3 weights"):
        WeightedScores((1.0, 1.0, 1.0))(some(0), Ctx())
