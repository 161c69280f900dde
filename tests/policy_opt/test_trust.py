"""Facts of the specifications' Invariants for methods that bound the ratio otherwise than by one clip."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import policy_opt
from policy_opt import Batch, Ctx, RecipeError
from policy_opt.advantages import GroupCentre, GroupNorm, Whiten
from policy_opt.aggregate import SequenceMean, TokenMean
from policy_opt.controllers import InverseAnnealed
from policy_opt.gates import CappedWeight, Gated
from policy_opt.recipes.dhpo import HybridClip
from policy_opt.recipes.mdpo import SoftImprovement, SoftTargets, Tsallis
from policy_opt.recipes.minpro import PrefixMin
from policy_opt.recipes.real import RewardLabels
from policy_opt.sources import Replay
from policy_opt.surrogates import Clip, Reinforce, SequenceClip
from policy_opt.terms import Loss, Term
from policy_opt.trust import (
    CapWidths,
    ClipWithin,
    MedianSignal,
    MinMax,
    RatioTarget,
    RatioVariance,
    SampledKL,
    WidenByAdvantage,
    WidenByVariance,
    Widths,
)
from tests.policy_opt.drawn import CTX, gradient, random_batch, seeds

quick = settings(max_examples=15, deadline=None)
scales = st.sampled_from([0.01, 0.1, 1.0])


def drift(seed: int, b: Batch, scale: float) -> torch.Tensor:
    """New log-probs: the old ones moved by normal noise."""
    g = torch.Generator().manual_seed(seed + 2)
    return b["logp_old_BT"] + scale * torch.randn(b.B, b.T, generator=g, dtype=torch.float64)


def with_advantage(seed: int, **columns) -> Batch:
    return GroupNorm()(random_batch(seed, **columns), CTX)


def report(surrogate, b: Batch, logp_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    return surrogate.report({"logp_BT": torch.where(b.mask_BT, logp_BT, 0.0)}, b)


def value(surrogate, b: Batch, logp_BT: torch.Tensor, agg=None) -> float:
    loss = Loss.of((Term(surrogate, agg=agg or TokenMean()),), b, CTX, torch.float64)
    return float(loss.values({"logp_BT": logp_BT}, b)[0])


close = torch.testing.assert_close


# -- DHPO -----------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, scale=scales)
def test_dhpo_between_grpo_and_gspo(seed, scale):
    b = with_advantage(seed)
    logp, agg = drift(seed, b, scale), SequenceMean()
    for form in ("mix_then_min", "min_then_mix"):
        token = HybridClip(weight=1.0, clip_low=0.2, clip_high=0.28, clip_form=form)
        close(gradient(token, b, logp, agg), gradient(Clip(0.2, 0.28), b, logp, agg))
        row = HybridClip(weight=0.0, seq_clip_low=0.1, seq_clip_high=0.2, clip_form=form)
        close(gradient(row, b, logp, agg), gradient(SequenceClip(0.1, 0.2), b, logp, agg))
    found = report(HybridClip(weight=0.3, seq_clip_low=0.1, seq_clip_high=0.2), b, logp)["mixed_clipped_ratio"]
    low, high = 0.3 * 0.8 + 0.7 * 0.9, 0.3 * 1.28 + 0.7 * 1.2
    assert found.min() >= low - 1e-12 and found.max() <= high + 1e-12


@quick
@given(seed=seeds)
def test_dhpo_on_policy_and_the_sequence_gradient(seed):
    b = MinMax(by="entropy_BT", into="share_BT")(
        with_advantage(seed, entropy_BT=torch.rand(8, 6, generator=torch.Generator().manual_seed(seed)).double()), CTX
    )
    old = b["logp_old_BT"]
    full, token = (HybridClip(weight=0.4, seq_grad=grad) for grad in ("full", "token"))
    assert torch.equal(report(full, b, old)["mixed_ratio"], torch.ones(8, 6).double())
    close(gradient(full, b, old, SequenceMean()), gradient(token, b, old, SequenceMean()))
    guided = [HybridClip(weight="share_BT", seq_grad=grad) for grad in ("full", "token")]
    assert value(guided[0], b, old) == value(guided[1], b, old)
    if (b.mask_BT.sum(1) > 1).any() and b["adv_B"].abs().max() > 0.1:
        assert not torch.allclose(*(gradient(g, b, old, SequenceMean()) for g in guided))


@quick
@given(seed=seeds, shift=st.floats(-5, 5), over=st.sampled_from(["row", "batch"]))
def test_min_max_of_a_row(seed, shift, over):
    x = torch.rand(8, 6, generator=torch.Generator().manual_seed(seed)).double()
    b = random_batch(seed, entropy_old_BT=x + shift)
    share = MinMax(eps=0.0, over=over)(b, CTX)["share_BT"]
    assert not share[~b.mask_BT].any() and share.min() >= 0 and share.max() <= 1
    close((MinMax(eps=0.0, over=over, reverse=True)(b, CTX)["share_BT"] + share).amax(), torch.tensor(1.0).double())
    if over == "row":
        close(share.amax(1), (b.mask_BT.sum(1) > 1).double())
    equal = b.over(entropy_old_BT=torch.full((8, 6), shift).double())
    assert not MinMax(over=over)(equal, CTX)["share_BT"].any() and not MinMax(eps=0.0)(equal, CTX)["share_BT"].any()


# -- MinPRO ---------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, scale=scales)
def test_prefix_minimum(seed, scale):
    b, part = with_advantage(seed), CappedWeight(gate=PrefixMin())
    logp = drift(seed, b, scale)
    found, cispo = report(part, b, logp), report(CappedWeight(1.0, 0.28), b, logp)
    for low, w, plain, mask in zip(
        found["prefix_min_ratio"], found["is_weight"], cispo["is_weight"], b.mask_BT, strict=True
    ):
        mine = low[mask]
        assert mine[0] == 1 and w[mask][0] == plain[mask][0] and (mine[1:].diff() <= 0).all()
        assert w[mask].max() <= 1.28 and w[mask].min() >= 0
    other = torch.where(b.mask_BT, logp, logp + 7)
    assert torch.equal(gradient(part, b, other), gradient(part, b, logp))
    close(gradient(part, b, b["logp_old_BT"]), gradient(CappedWeight(1.0, 0.28), b, b["logp_old_BT"]))


@quick
@given(seed=seeds, scale=scales)
def test_the_prefix_may_start_anew_in_every_turn(seed, scale):
    turn = torch.tensor([0, 0, 1, 1, 1, 2]).expand(8, 6)
    b = with_advantage(seed, turn_BT=turn)
    logp = drift(seed, b, scale)
    found = report(CappedWeight(gate=PrefixMin(prefix="turn")), b, logp)["prefix_min_ratio"] * b.mask_BT
    for t in range(3):
        alone = b.over(mask_BT=b.mask_BT & (turn == t))
        anew = report(CappedWeight(gate=PrefixMin()), alone, logp)["prefix_min_ratio"]
        close(anew * alone.mask_BT, found * alone.mask_BT)


# -- ETR ------------------------------------------------------------------------------------------------


def elastic(b: Batch, micro: float, macro: float, most: float = 0.9) -> Batch:
    for part in (Widths(0.2, 0.3), WidenByAdvantage(micro), WidenByVariance(macro), CapWidths(most)):
        b = part(b, CTX)
    return b


@quick
@given(seed=seeds, scale=scales, micro=st.floats(0, 2), macro=st.floats(0, 2), most=st.floats(0.05, 0.9))
def test_elastic_widths(seed, scale, micro, macro, most):
    b = with_advantage(seed, reward_B=torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 1]).double())
    logp = drift(seed, b, scale)
    assert torch.equal(gradient(ClipWithin(), elastic(b, 0.0, 0.0), logp), gradient(Clip(0.2, 0.3), b, logp))
    wide = elastic(b, micro, macro, most)
    for name in ("eps_low_B", "eps_high_B"):
        assert wide[name].max() <= most
        assert (elastic(b, micro + 0.1, macro, most)[name] >= wide[name]).all()
        assert (elastic(b, micro, macro + 0.1, most)[name] >= wide[name]).all()
        free, size = elastic(b, micro, 0.0, 99.0)[name], b["adv_B"].abs()
        assert (free[size.argsort()].diff() >= -1e-12).all()
    equal = elastic(GroupNorm()(random_batch(seed, reward_B=torch.ones(8).double(), groups=1), CTX), micro, macro, most)
    assert not gradient(ClipWithin(), equal, logp).any()


# -- GBPO -----------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, scale=scales)
def test_ratio_target(seed, scale):
    b = MedianSignal(temperature=1e-6)(with_advantage(seed), CTX)
    part, logp = RatioTarget(0.2, 0.3), drift(seed, b, scale)
    target = report(part, b, logp)["target_ratio"]
    index, _ = b.index()
    for q in index.unique():
        mine, rewards = target[index == q], b["reward_B"][index == q]
        middle = rewards.quantile(0.5) if len(rewards) > 1 else 0.0
        expected = torch.where(rewards == middle, 1.05, torch.where(rewards > middle, 1.3, 0.8)).double()
        close(mine, expected)
    flat = MedianSignal(temperature=1e12)(with_advantage(seed), CTX)
    close(report(part, flat, logp)["target_ratio"], torch.full((8,), 1.05).double())
    grad, rho = gradient(part, b, logp), report(part, b, logp)["ratio"]
    assert (grad.abs() <= b["adv_B"].abs()[:, None] * rho / b.mask_BT.sum() + 1e-12).all()
    beyond = (rho > 1.3) & b.mask_BT & (b["adv_B"] != 0)[:, None]
    assert (grad[beyond] > 0).all()
    agree = b["adv_B"].sign() == (target - 1.05).sign()
    first, plain = gradient(part, b, b["logp_old_BT"]), gradient(Reinforce(), b, b["logp_old_BT"])
    close(first[agree], plain[agree])


def test_more_than_half_right_moves_only_the_wrong():
    b = Batch.build(mask_BT=torch.ones(5, 1), group_B=[0] * 5, reward_B=torch.tensor([1.0, 1, 1, 0, 0]).double())
    for rewards, moved in ((b["reward_B"], [0, 0, 0, 1, 1]), (1 - b["reward_B"], [0, 0, 0, 1, 1])):
        signal = MedianSignal()(b.over(reward_B=rewards), CTX)["signal_B"]
        assert (signal != 0).long().tolist() == moved
    even = b.rows(torch.tensor([0, 1, 3, 4]))
    close(
        MedianSignal(ddof=None, temperature=1.0)(even, CTX)["signal_B"], torch.tensor([0.5, 0.5, -0.5, -0.5]).double()
    )


def test_a_group_of_one_and_a_trajectory_in_two_rows():
    b = Batch.build(mask_BT=torch.ones(1, 1), group_B=[0], reward_B=torch.tensor([3.0]).double())
    assert MedianSignal(eps=0.5, temperature=2.0)(b, CTX)["signal_B"].tolist() == [1.0]
    assert GroupCentre(single="reward")(b, CTX)["adv_B"].tolist() == [3.0]
    rows = {"reward_B": torch.tensor([4.0, 4.0, 2.0, 0.0]).double(), "parent_B": torch.tensor([-1, 0, -1, -1])}
    b = Batch.build(mask_BT=torch.ones(4, 1), group_B=[0] * 4, **rows)
    assert MedianSignal(ddof=None, temperature=1.0)(b, CTX)["signal_B"].tolist() == [2.0, 2.0, 0.0, -2.0]


# -- R2VPO ----------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, scale=scales, lam=st.floats(0.01, 5))
def test_ratio_variance(seed, scale, lam):
    b = with_advantage(seed)
    logp, old = drift(seed, b, scale), b["logp_old_BT"]
    assert not gradient(RatioVariance(), b, old).any() and value(RatioVariance(), b, old) == 0
    close(gradient(Gated(), b, logp), gradient(Clip(1e9, 1e9), b, logp))
    whole = gradient(Gated(), b, logp) + lam * gradient(RatioVariance(budget=0.3), b, logp)
    rho, adv = (logp - old).exp(), b["adv_B"][:, None]
    close(whole, -rho * (adv - 2 * lam * (rho - 1)) / b.mask_BT.sum() * b.mask_BT)
    room = 1 + adv / (2 * lam)
    still = old + room.clamp(min=1e-3).log()
    held = gradient(Gated(), b, still) + lam * gradient(RatioVariance(), b, still)
    assert held[(room > 1e-3).expand(8, 6)].abs().max() < 1e-9
    equal = b.over(adv_B=torch.zeros(8).double())
    assert not gradient(Gated(), equal, logp).any() and gradient(RatioVariance(), equal, logp).any()


@quick
@given(variance=st.floats(0, 1), start=st.floats(0, 10))
def test_the_multiplier_rises_iff_the_budget_is_exceeded(variance, start):
    recipe = policy_opt.get("r2vpo").set(f"terms.coef.start={start}")
    ctx, dual = Ctx(), recipe.terms[1].coef
    ctx.step_metrics = {"loss_variance": variance - recipe.terms[1].loss.budget}
    dual.after_step(random_batch(0), ctx)
    moved = dual.value(ctx)
    assert moved == pytest.approx(min(max(start + 0.1 * (variance - 0.01), 0), 10)) and moved >= 0


def test_replay_mixes_stored_groups_with_the_fresh_ones():
    part, ctx = Replay(groups=2, capacity=3, fresh=True), Ctx()
    first = random_batch(0)
    assert part.draw(first, ctx) is first and Replay().draw(first, ctx) is None
    part.observe(first, ctx)
    second = random_batch(1).over(group_B=torch.full((8,), 99))
    drawn = part.draw(second, ctx)
    assert (drawn["group_B"][:8] == 99).all() and len(drawn["group_B"][8:].unique()) == 2
    stored = first["logp_old_BT"][first["group_B"] == drawn["group_B"][-1]]
    assert torch.equal(drawn["logp_old_BT"][drawn["group_B"] == drawn["group_B"][-1]], stored)


# -- MDPO -----------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, scale=scales)
def test_sampled_kl(seed, scale):
    b = with_advantage(seed)
    logp = drift(seed, b, scale)
    kl = SampledKL()({"logp_BT": logp}, b) * b.mask_BT
    assert kl.min() >= 0 and not SampledKL()({"logp_BT": b["logp_old_BT"]}, b).any()
    log = (logp - b["logp_old_BT"]) * b.mask_BT
    close(gradient(SampledKL(), b, logp), log.exp() * log / b.mask_BT.sum())
    near, far = (gradient(Tsallis(q), b, logp) for q in (1 + 1e-7, 2.0))
    close(near, b.mask_BT.double() / b.mask_BT.sum(), rtol=1e-5, atol=1e-7)
    close(far, logp.exp() * b.mask_BT / b.mask_BT.sum())
    moved = b.over(reward_B=b["reward_B"] + 3, adv_B=b["adv_B"] + 3)
    part = Whiten(eps=1e-30, ddof=0)
    close(part(moved, CTX)["adv_B"], part(b, CTX)["adv_B"])


@quick
@given(seed=seeds, kappa=st.floats(0.2, 3), lam=st.floats(0, 2))
def test_soft_improvement_and_its_optimum(seed, kappa, lam):
    g = torch.Generator().manual_seed(seed)
    old, q1, q2 = (torch.randn(3, 1, 5, generator=g, dtype=torch.float64) for _ in range(3))
    old = old.log_softmax(-1)
    ids = torch.arange(5).expand(3, 1, 5)
    columns = {"top_old_BTK": old, "top_old_ids_BTK": ids, "top_ids_BTK": ids, "q1_BTA": q1, "q2_BTA": q2}
    b = Batch.build(mask_BT=torch.ones(3, 1), group_B=torch.arange(3), **columns)
    part = SoftImprovement(kl_coef=kappa, entropy_coef=lam)
    logits = part.optimum(b).log().requires_grad_()
    loss = part({"top_BTK": logits.log_softmax(-1)}, b).sum()
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-9
    if lam == 0:
        close(part.optimum(b), (old + q1 / kappa).softmax(-1))
    free = SoftImprovement(kl_coef=kappa, entropy_coef=kappa)
    other = b.over(top_old_BTK=old.flip(-1))
    assert torch.equal(free({"top_BTK": old}, b), free({"top_BTK": old}, other))
    now = {"top_now_BTK": old, "top_now_ids_BTK": ids}
    facts = {**now, "step_reward_BT": q1[..., 0], "done_BT": torch.tensor([[0], [1], [0]])}
    found = SoftTargets(gamma=0.5, entropy_coef=lam)(b.put(**facts, next_value_BT=q2[..., 0]), CTX)
    close(found["q_target_BT"][1], q1[1, :, 0])
    close(found["v_target_BT"], (old.exp() * (torch.minimum(q1, q2) - lam * old)).sum(-1))


def test_the_weight_of_the_kl_grows_from_one():
    coef = InverseAnnealed(iterations=10, floor=0.05)
    assert [coef.value(Ctx(step=s)) for s in (0, 5, 8, 10, 99)] == pytest.approx([1, 2, 5, 20, 20])
    exact = policy_opt.get("mdpo").set("variant=exact")
    assert exact.models["old"].sync_every == 1 and "old" not in policy_opt.get("mdpo").models


# -- REAL -----------------------------------------------------------------------------------------------


def labelled(seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return random_batch(seed, reward_B=torch.randint(2, (8,), generator=g).double())


def weights(part: RewardLabels, b: Batch, logp: torch.Tensor) -> torch.Tensor:
    """d (Q loss) / d s of each row: the row's token gradients add up to it."""
    return gradient(part, b, logp).sum(1) * b.index()[1]


@quick
@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 500.0]), tau=st.floats(0.1, 2))
def test_labels_as_rewards(seed, scale, tau):
    b, part = labelled(seed), RewardLabels(tau=tau)
    logp, right = drift(seed, b, scale), b["reward_B"] == 1
    found = weights(part, b, logp)
    assert torch.isfinite(found).all() and found.abs().max() <= 1 / tau + 1e-12
    index, count = b.index()
    for q in range(count):
        mine = index == q
        for rows, sign in ((mine & right, -1), (mine & ~right, 1)):
            both = right[mine].any() and not right[mine].all()
            assert (found[rows] * sign >= 0).all() and found[rows].abs().sum() <= (1 / tau if both else 0) + 1e-12
    token = gradient(part, b, logp)
    close(token, (found / count / b.mask_BT.sum(1))[:, None] * b.mask_BT)
    close(token, gradient(part, b.over(reward_B=b["reward_B"] * 40 - (1 - b["reward_B"])), logp))


@quick
@given(seed=seeds, tau=st.floats(0.1, 2))
def test_labels_on_policy_and_their_monotony(seed, tau):
    b, part = labelled(seed), RewardLabels(tau=tau)
    right, (index, count) = b["reward_B"] == 1, b.index()
    found, old = weights(part, b, b["logp_old_BT"]), b["logp_old_BT"]
    total = 0.0
    for q in range(count):
        good, poor = int((right & (index == q)).sum()), int((~right & (index == q)).sum())
        if good and poor:
            total += math.log1p(good) + math.log1p(poor)
            close(found[right & (index == q)], torch.full((good,), -1 / tau / (1 + good)).double())
            close(found[~right & (index == q)], torch.full((poor,), 1 / tau / (1 + poor)).double())
    assert value(part, b, old) == pytest.approx(total / count)
    for form in ("real", "bce", "product"):
        part = RewardLabels(tau=tau, form=form)
        raised = old.clone()
        raised[0] += 0.5
        before, after = weights(part, b, old)[0], weights(part, b, raised)[0]
        assert after >= before
    one = b.over(reward_B=torch.ones(8).double())
    assert not any(gradient(RewardLabels(form=form), one, old).any() for form in ("real", "bce", "product"))


# -- composition ----------------------------------------------------------------------------------------


def test_compositions_and_refusals():
    get = policy_opt.get
    get("grpo").set("credit=(widths(), widen_by_variance())", "terms.policy.loss=clip_within").check()
    with pytest.raises(RecipeError, match=r"one loss per batch, so credit\.0:EqualGroups cannot weight its rows"):
        get("real").set("credit=equal_groups").check()
    with pytest.raises(RecipeError, match="`share_BT`, which nothing before it writes"):
        get("dhpo").set("terms.weight=share_BT").check()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: HybridClip(weight=1.5),
        lambda: HybridClip(seq_clip_low=-1.0),
        lambda: CappedWeight(clip_high=-1.0),
        lambda: Widths(low=-0.1),
        lambda: CapWidths(most=0.0),
        lambda: MedianSignal(temperature=0.0),
        lambda: RatioTarget(clip_low=-0.1),
        lambda: Tsallis(q=1.0),
        lambda: RewardLabels(tau=0.0),
        lambda: InverseAnnealed(iterations=0),
    ],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match="not"):
        wrong()
