"""Invariants of the advantage and baseline recipes: mc_grpo, dgpo, bnpo, copo, adora, pipo, riskpo."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import policy_opt
from policy_opt import Batch, Ctx, Loop, RecipeError, RunSize
from policy_opt.advantages import GroupCentre, GroupNorm, groups
from policy_opt.baselines import AnswerEntropy, Balanced, MedianCentre, PerScore, PromptNorm
from policy_opt.bundles import Bundle, PaperScore, ShareOut, TailRisk, quantile
from policy_opt.group_weights import AdvantageousWeight, BetaWeight, DifficultyWeight, SignalMask
from policy_opt.progress import Progress, ProgressGate, Retrospect, progress
from policy_opt.recipes.copo import Blend
from policy_opt.recipes.mc_grpo import DropPivot
from policy_opt.rewards import WeightedScores
from policy_opt.table import TableActor, TableLearner
from policy_opt.terms import Loss
from tests.policy_opt.test_recipes import WORLD, gradients

quick = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 10**6)
pytestmark = pytest.mark.filterwarnings("ignore:.*groups of even size")


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


# -- pipo -----------------------------------------------------------------------------------------------

means = st.lists(st.floats(0, 1), min_size=2, max_size=8)


@quick
@given(history=means, now=st.floats(0, 1), scale=st.floats(0.5, 2), shift=st.floats(-2, 2))
def test_progress(history, now, scale, shift):
    found = progress(history, now)
    if found.std > 1e-3 and found.std != 1.0:
        moved = progress([scale * x + shift for x in history], scale * now + shift)
        assert moved.xi == pytest.approx(found.xi, rel=1e-6, abs=1e-6)
    assert progress(history[:1], now).xi == pytest.approx(now - history[0])
    assert progress([now] * 5, now).xi == 0 and progress([now] * 5, now).std == 1
    assert progress([0.0], 9.0).xi == 5.0
    count = len(history)
    if found.std > 1e-3 and found.std != 1.0:
        sample = progress(history, now, "sample")
        assert sample.std == pytest.approx(found.std * (count / (count - 1)) ** 0.5)


@quick
@given(seed=seeds, xi=st.floats(-30, 30))
def test_attribution_and_coefficient(seed, xi):
    b = call(some(seed), GroupNorm())
    part = Retrospect()
    share_B = part.attribution(b)
    total = per_group(b, share_B.abs())
    varied = per_group(b, b["adv_B"].abs()) > 1e-3
    close(total[varied], groups(b).size_Q[varied], 1e-4)
    assert not total[~varied].any()
    centred = part.attribution(call(some(seed), GroupCentre()))
    close(centred, share_B, 1e-4, 1e-4)
    judged = part.judged(b, Progress(0.0, 1.0, xi))
    adv = judged["adv_B"]
    assert float(adv.abs().max()) <= 10
    assert torch.equal(adv.sign(), b["adv_B"].sign() * ((xi > 0) - (xi < 0)))
    assert judged["w_retrospect_B"].tolist() == [0.1 if xi < 0 else 1.0] * b.B
    gated = ProgressGate()
    assert -2 <= gated.gate(Progress(0.0, 1.0, xi)) <= 2


def test_retrospect_draws_only_what_it_may():
    b = call(some(1), GroupNorm())
    part, ctx = Retrospect(window=2, warmup=1, negative=0.0), Ctx()
    assert part.draw(b, ctx) is None
    part.observe(b, ctx)
    better, worse = (b.over(reward_B=b["reward_B"] + step) for step in (0.5, -0.5))
    assert part.draw(worse, ctx) is None
    drawn = part.draw(better, ctx)
    assert drawn is not None and ctx.metrics["progress"] == pytest.approx(0.5)
    assert ctx.state(part)["batch"] is b
    for _ in range(3):
        part.observe(b, ctx)
    assert len(ctx.state(part)["history"]) == 2


BEFORE = "step(source=retrospect(window=1, warmup=1), terms=term(clip(), weights=('w_retrospect',)))"
EARLY = f"schedule.steps=({BEFORE}, step())"


def test_the_retrospective_step_is_free_of_padding_split_and_order():
    recipe = policy_opt.get("pipo").set(EARLY)
    expected, metrics = gradients(recipe)
    assert [m["optimizer_steps"] for m in metrics] == [1, 2] and "progress" in metrics[1]
    found, again = gradients(recipe, pad=2, micro_rows=5, order=True)
    for a, b in zip(found, expected, strict=True):
        close(a["policy"], b["policy"], 1e-9, 1e-13)
    assert again[1] == pytest.approx(metrics[1], rel=1e-9, abs=1e-12)


def test_the_retrospective_step_resumes_exactly():
    recipe = policy_opt.get("pipo").set(EARLY)
    learner = TableLearner(WORLD)
    loop = Loop(recipe, TableActor(WORLD, learner), learner, RunSize(4, groups=3, group_size=4))
    for _ in range(3):
        loop.iterate()
    state, other = loop.state_dict(), copy.deepcopy(learner)
    again = Loop(recipe, TableActor(WORLD, other), other, RunSize(4, groups=3, group_size=4))
    again.load_state_dict(state)
    assert again.iterate()[1] == loop.iterate()[1]
    assert torch.equal(learner.tables["policy"], other.tables["policy"])


def test_pipo_before_its_window_is_full_is_its_base():
    """No retrospective step yet: GRPO's, as a token mean."""
    pipo, grpo = policy_opt.get("pipo"), policy_opt.get("grpo").set("terms.policy.agg=token_mean")
    for a, b in zip(gradients(pipo)[0], gradients(grpo)[0], strict=True):
        close(a["policy"], b["policy"], 1e-9, 1e-13)


# -- riskpo ---------------------------------------------------------------------------------------------

edges = st.floats(0, 4)


@quick
@given(low=edges, gap=st.floats(0.01, 3), omega=st.floats(0, 2), scale=st.floats(0.1, 3), shift=st.floats(-2, 2))
def test_risk_advantage_is_a_concave_ramp(low, gap, omega, scale, shift):
    s = torch.linspace(-1, 8, 200).double()
    a, b = (torch.tensor(x).double().expand_as(s) for x in (low, low + gap))
    part = TailRisk(omega=omega)
    adv = part.weigh(s, a, b)
    assert (adv <= 1e-12).all() and (adv[s >= low + gap] > -1e-12).all() and (adv[s < low + gap - 1e-6] < 0).all()
    slope = adv.diff() / s.diff()
    assert (slope >= -1e-9).all()
    close(slope[s[1:] <= low], (1 + omega) + 0 * slope[s[1:] <= low], 1e-6)
    inside = (s[:-1] >= low) & (s[1:] <= low + gap)
    close(slope[inside], torch.ones_like(slope[inside]), 1e-6)
    close(part.weigh(s + shift, a + shift, b + shift), adv, 1e-6, 1e-8)
    close(part.weigh(s * scale, a * scale, b * scale), adv * scale, 1e-6, 1e-8)
    # Mean objective: the edges outside all scores.
    out = TailRisk(omega=0.0).weigh(s, torch.full_like(s, -1.0), torch.full_like(s, 8.0))
    close(out, s - 8)
    plain = TailRisk(form="paper", omega=omega, natural=False).weigh(s, a, b)
    close(plain, adv - (a - b))
    seeking = TailRisk(form="seeking").weigh(s, a, b)
    assert (seeking.diff() >= -1e-9).all()


@quick
@given(seed=seeds, size=st.integers(1, 4))
def test_every_response_is_in_one_paper(seed, size):
    b = some(seed)
    for permute in (True, False):
        found = call(b, Bundle(size), PaperScore(permute))
        paper, bundle, group = (found[x].tolist() for x in ("paper_B", "bundle_B", "group_B"))
        assert len(set(bundle)) == -(-len(set(group)) // size)
        for d in set(bundle):
            questions = {g for g, x in zip(group, bundle, strict=True) if x == d}
            fewest = min(group.count(q) for q in questions)
            inside = {p for p, x in zip(paper, bundle, strict=True) if x == d and p >= 0}
            assert len(inside) == fewest
            for p in inside:
                rows = [i for i in range(b.B) if paper[i] == p]
                assert sorted(group[i] for i in rows) == sorted(questions)
                assert float(found["paper_score_B"][rows[0]]) == pytest.approx(float(b["reward_B"][rows].sum()))
        risk = call(found, TailRisk())
        assert not risk["adv_B"][found["paper_B"] < 0].any() and (risk["adv_B"] <= 1e-12).all()
        shared = call(risk, ShareOut("sum_mean"))
        for p in {p for p in paper if p >= 0}:
            rows = [i for i in range(b.B) if paper[i] == p]
            assert float(shared["adv_B"][rows].sum()) == pytest.approx(float(risk["adv_B"][rows[0]]), abs=1e-6)


def test_papers_are_dealt_by_group_and_run():
    b = call(some(2, sizes=(6, 6, 6)), Bundle(3))
    same = PaperScore()
    assert torch.equal(same(b, Ctx(seed=1))["paper_B"], same(b, Ctx(seed=1))["paper_B"])
    assert not torch.equal(same(b, Ctx(seed=1))["paper_B"], same(b, Ctx(seed=2))["paper_B"])


@quick
@given(seed=seeds, level=st.floats(0, 1))
def test_quantiles(seed, level):
    g = torch.Generator().manual_seed(seed)
    value, unit = torch.rand(12, generator=g).double(), torch.randint(0, 3, (12,), generator=g)
    for u, found in enumerate(quantile(value, unit, 4, level).tolist()):
        own = value[unit == u]
        assert found == pytest.approx(float(own.quantile(level)) if own.numel() else 0.0)


def test_tracked_quantiles():
    """The first batch's quantiles, then steps of at most `rate` towards the level; one tracker per size."""
    b = call(some(4, sizes=(3, 3, 3)), Bundle(2), PaperScore())
    part, ctx = TailRisk(rate=0.1, levels=(0.1, 0.5, 0.9)), Ctx()
    first = part(b, ctx)
    part.observe(first, ctx)
    assert set(ctx.state(part)) == {"1", "2"}
    scores = b["paper_score_B"][b["bundle_B"] == 1].double()
    assert ctx.state(part)["1"][1].tolist() == [0.5, pytest.approx(float(scores.quantile(0.5)))]
    before = ctx.state(part)["2"].clone()
    assert float(first["quantile_low_B"][b["bundle_B"] == 0][0]) == pytest.approx(float(before[0, 1]))
    part.observe(part(b, ctx), ctx)
    moved = ctx.state(part)["2"][:, 1] - before[:, 1]
    assert (moved.abs() <= 0.1).all()
    ctx.state(part)["1"] = torch.tensor([[0.5, 1.0]]).double()
    even = some(0, sizes=(4,)).over(reward_B=torch.tensor([0.0, 0, 2, 2]).double())
    part.observe(part(call(even, Bundle(1), PaperScore()), ctx), ctx)
    assert ctx.state(part)["1"].tolist() == [[0.5, 1.0]]  # half of the scores lie below: the fixed point


def test_a_bundle_without_spread():
    even = some(0, sizes=(4,)).over(reward_B=torch.ones(4).double())
    ctx, part = Ctx(), TailRisk(form="release", normalise=True)
    ctx.state(part)["1"] = torch.tensor([[0.2, 2.0], [0.8, 3.0]]).double()
    b = call(even, Bundle(1), PaperScore())
    assert float(part(b, ctx)["adv_B"].abs().max()) < 10
    bare = replace(part, floor=0.0)
    ctx.state(bare)["1"] = ctx.state(part)["1"]
    assert float(bare(b, ctx)["adv_B"].abs().max()) > 1e5


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
