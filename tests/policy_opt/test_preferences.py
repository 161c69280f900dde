"""Losses on pairs: facts of the specifications' Invariants, on random batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import policy_opt
from policy_opt import Batch, Ctx, Loop, RecipeError, RunSize
from policy_opt.advantages import LeaveOneOut
from policy_opt.pairs import GroupPairs
from policy_opt.preferences import DynamicLabels, LogisticPairs, SquaredPairs, log_ratios
from policy_opt.recipes.copg import RewardContrast
from policy_opt.recipes.kto import ProspectValue
from policy_opt.recipes.nft import ImplicitNegative, SuccessRate
from policy_opt.recipes.power_dl import RobustPairs
from policy_opt.recipes.trpa import LevelPairs, RuleLevels, TrustRegion
from policy_opt.table import TableActor, TableLearner, World
from tests.policy_opt.paired import CTX, disjoint, live, played, pull, quick, seeds, signs

# -- DPO, IPO -------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, beta=st.floats(0.01, 2))
def test_dpo(seed, beta):
    b = disjoint(played(seed))
    dpo, pairs = LogisticPairs(beta=beta), b.pairs_P2.shape[0]
    loss, grad = pull(dpo, b, b["logp_ref_BT"])
    assert loss == pytest.approx(math.log(2))
    torch.testing.assert_close(grad, -signs(b) * beta / 2 / pairs * b.mask_BT)
    logp = live(seed, b)
    loss, grad = pull(dpo, b, logp)
    weight = torch.sigmoid(-beta * dpo.delta({"logp_BT": logp}, b)).repeat_interleave(2)[:, None]
    torch.testing.assert_close(grad, -signs(b) * beta * weight / pairs * b.mask_BT)
    swapped = b.over(pairs_P2=b.pairs_P2.flip(1))
    torch.testing.assert_close(dpo.delta({"logp_BT": logp}, swapped), -dpo.delta({"logp_BT": logp}, b))
    shift = 0.5 * b.mask_BT / b.mask_BT.sum(1)[:, None]
    assert pull(dpo, b, logp + shift)[0] == pytest.approx(loss)


@quick
@given(seed=seeds)
def test_dpo_common_prefix_cancels(seed):
    mask = torch.ones(2, 6)
    b = disjoint(played(seed, groups=1, size=2)).over(mask_BT=mask.bool())
    grad = pull(LogisticPairs(), b, live(seed, b))[1]
    torch.testing.assert_close(grad[0], -grad[1])


@quick
@given(seed=seeds, smooth=st.floats(0, 0.5))
def test_dpo_label_smoothing_is_a_soft_label(seed, smooth):
    b = disjoint(played(seed))
    b = b.put(label_P=torch.full((b.B // 2,), 1 - smooth, dtype=torch.float64))
    logp = live(seed, b)
    a, c = (pull(x, b, logp) for x in (LogisticPairs(label_smoothing=smooth), LogisticPairs(soft_labels=True)))
    assert a[0] == pytest.approx(c[0])
    torch.testing.assert_close(a[1], c[1])


@quick
@given(seed=seeds, tau=st.floats(0.05, 2))
def test_ipo(seed, tau):
    b = disjoint(played(seed))
    ipo, pairs, length = SquaredPairs(tau=tau), b.B // 2, b.mask_BT.sum(1)[:, None]
    loss, grad = pull(ipo, b, b["logp_ref_BT"])
    assert loss == pytest.approx(1 / (4 * tau**2))
    torch.testing.assert_close(grad, -signs(b) / tau / length / pairs * b.mask_BT)
    target = b["logp_ref_BT"] + 1 / (2 * tau) * (signs(b) > 0).double()
    loss, grad = pull(ipo, b, target)
    assert loss == pytest.approx(0, abs=1e-20) and float(grad.abs().max()) < 1e-9
    beyond = pull(ipo, b, target + 0.1 * (signs(b) > 0).double())[1]
    assert (beyond * signs(b))[b.mask_BT].min() > 0
    logp, twice = live(seed, b), {"logp_ref_BT": b["logp_ref_BT"].repeat(1, 2), "mask_BT": b.mask_BT.repeat(1, 2)}
    wide = Batch.build(group_B=b["group_B"], pairs_P2=b.pairs_P2, **twice)
    torch.testing.assert_close(ipo.delta({"logp_BT": logp.repeat(1, 2)}, wide), ipo.delta({"logp_BT": logp}, b))
    plain = SquaredPairs(tau=tau, length_normalised=False)
    torch.testing.assert_close(plain.delta({"logp_BT": logp}, b), LogisticPairs().delta({"logp_BT": logp}, b))


# -- CoPG -----------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, beta=st.floats(0.05, 1), shift=st.floats(-5, 5))
def test_copg(seed, beta, shift):
    b = played(seed)
    copg, logp, groups = RewardContrast(beta=beta), live(seed, b), 3
    rloo = LeaveOneOut()(b, CTX)["adv_B"][:, None] * b.mask_BT
    torch.testing.assert_close(pull(copg, b, b["logp_ref_BT"])[1], -2 * beta / groups * rloo)
    unit = pull(RewardContrast(beta=beta, scale="unit"), b, b["logp_ref_BT"])[1]
    torch.testing.assert_close(unit, -rloo / groups)
    loss, grad = pull(copg, b, logp)
    moved = pull(copg, b.over(reward_B=b["reward_B"] + shift * b["group_B"]), logp)
    assert moved[0] == pytest.approx(loss)
    torch.testing.assert_close(moved[1], grad)
    best = b.over(reward_B=beta * log_ratios({"logp_BT": logp}, b) + b["group_B"])
    loss, grad = pull(copg, best, logp)
    assert loss == pytest.approx(0, abs=1e-20) and float(grad.abs().max()) < 1e-9
    assert pull(copg, b.over(reward_B=torch.ones(b.B).double()), logp)[1].any()


@quick
@given(seed=seeds, beta=st.floats(0.05, 1))
def test_copg_of_two_is_ipo(seed, beta):
    b = disjoint(played(seed, size=2)).over(reward_B=torch.tensor([0.5, -0.5]).double().repeat(3))
    a, c = (pull(x, b, live(seed, b)) for x in (RewardContrast(beta), SquaredPairs(beta / 2, length_normalised=False)))
    assert a[0] == pytest.approx(beta**2 * c[0])
    torch.testing.assert_close(a[1], beta**2 * c[1])


# -- TRPA -----------------------------------------------------------------------------------------------

LEVELS = GroupPairs(by="rank_B", best="low", per_group=None)


@quick
@given(seed=seeds, beta=st.floats(0.05, 1))
def test_trpa(seed, beta):
    b = LEVELS(played(seed), Ctx())
    logp, trpa = live(seed, b), LevelPairs(beta=beta)
    if b.pairs_P2.shape[0]:
        loss, grad = pull(trpa, b, logp)
        shift = b["group_B"][:, None] * 0.1
        assert pull(trpa, b, logp + shift)[0] == pytest.approx(loss)
        in_pairs = torch.bincount(b.pairs_P2.flatten(), minlength=b.B)[:, None] / b.pairs_P2.shape[0]
        assert (grad.abs().sum(1, keepdim=True) <= 2.5 * beta * in_pairs + 1e-12).all()
        plain, dpo = (pull(x, b, logp) for x in (LevelPairs(beta, 1.0), LogisticPairs(beta, length_normalised=True)))
        assert plain[0] == pytest.approx(dpo[0])
        torch.testing.assert_close(plain[1], dpo[1])
        each = LevelPairs(beta, 1.0, scale_mode="per_response")
        torch.testing.assert_close(pull(each, b, logp)[1], plain[1])


@pytest.mark.parametrize(("level", "sign"), [(1, -1), (3, 1)])
def test_trpa_without_pairs_moves_all_rows_one_way(level, sign):
    b = LEVELS(played(0, rank_B=torch.full((12,), level)), Ctx())
    grad = pull(LevelPairs(), b, live(0, b))[1]
    assert (sign * grad[b.mask_BT] > 0).all()


def test_trpa_trust_region_and_levels():
    b = played(0)
    for sqrt, value in ((False, 0.0), (True, 0.5)):
        loss, grad = pull(TrustRegion(sqrt=sqrt), b, b["logp_old_BT"])
        assert loss == pytest.approx(value) and not grad.any()
    assert pull(TrustRegion(), b, b["logp_old_BT"] - 1000)[0] == 10
    b = played(0, correct_B=torch.tensor([1, 0, 0, 1] * 3), answer_B=torch.tensor([5, 2, -1, 5] * 3))
    ranked = Batch.build(
        mask_BT=b.mask_BT,
        group_B=b["group_B"],
        correct_B=b["correct_B"],
        answer_B=b["answer_B"],
        scores_BK=torch.tensor([[0, 1.0], [0, 1.0], [0, 1.0], [0, 0.0]] * 3),
        names={"scores_BK": ("x", "format")},
    )
    assert RuleLevels()(ranked, CTX)["rank_B"].tolist() == [1, 2, 3, 4] * 3


# -- POWER-DL -------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, beta=st.floats(0.1, 5))
def test_power_dl(seed, beta):
    b = disjoint(played(seed))
    label = torch.rand(b.B // 2, generator=torch.Generator().manual_seed(seed)).double()
    b, logp = b.put(label_P=label), live(seed, b)
    loss, s = RobustPairs(beta, eta=0.0), {"logp_BT": live(seed, b) * b.mask_BT}
    swapped = b.over(pairs_P2=b.pairs_P2.flip(1), label_P=1 - label)
    torch.testing.assert_close(loss.preference(s, swapped), loss.preference(s, b))
    stationary = b.over(label_P=loss.margins(s, b).sigmoid())
    assert float(pull(loss, stationary, logp)[1].abs().max()) < 1e-12
    per_token = (beta * loss.weights(s, b) / (b.B // 2))[:, None]
    assert (pull(loss, b, logp)[1].abs() <= per_token + 1e-12).all()
    sure = b.over(label_P=torch.ones_like(label))
    uniform = sure.over(logp_ref_BT=torch.zeros_like(logp))
    one, dpo = (pull(x, uniform, logp) for x in (RobustPairs(beta, 0.0, "one"), LogisticPairs(beta)))
    assert one[0] == pytest.approx(dpo[0])
    simpo = pull(RobustPairs(beta, 0.0, length_margin=False), uniform, logp)
    mean = pull(LogisticPairs(beta, length_normalised=True), uniform, logp)
    torch.testing.assert_close(simpo[1], mean[1])


@quick
@given(margin=st.floats(-3, 3), gamma=st.floats(0, 1))
def test_labels_converge_geometrically_to_what_is_believed(margin, gamma):
    b = disjoint(played(0, groups=1, size=2))
    part, ctx = DynamicLabels(gamma=gamma), Ctx()
    ctx.step_reports = {"margin_P": torch.tensor([margin]).double()}
    believed = 1 / (1 + math.exp(-margin))
    for visit in range(4):
        now = part(b, ctx)
        label = float(now["label_P"])
        assert label == pytest.approx(believed + (1 - believed) * (1 - gamma) ** visit) and 0 <= label <= 1
        part.after_step(now, ctx)
    ctx.step_reports = {}
    part.after_step(part(b, ctx), ctx)


def test_labels_live_across_epochs_and_are_bounded():
    recipe = policy_opt.get("power_dl").set("credit.gamma=0.5", "schedule.epochs=3", "credit.capacity=20")
    world = World(tasks=4)
    learner = TableLearner(world)
    loop = Loop(recipe, TableActor(world, learner), learner, RunSize(4, groups=4, group_size=6))
    trusted = [loop.iterate()[1]["trusted"] for _ in range(2)]
    (state,) = (state for path, state in loop.states[""].items() if "DynamicLabels" in path)
    assert len(state["labels"]) <= 20 and min(state["labels"].values) > 0
    assert all(0 < t < 1 for t in trusted)


def test_dynamic_labels_fit_dpo_and_nothing_that_ignores_them():
    dpo = policy_opt.get("dpo").set("credit=dynamic_labels(gamma=0.2)")
    with pytest.raises(RecipeError, match="nothing after it reads"):
        dpo.check(TableActor.columns)
    dpo.set("terms.soft_labels=True").check(TableActor.columns)
    with pytest.raises(RecipeError, match="reads `pairs_P2`, which nothing before it writes"):
        policy_opt.get("dpo").set("advantage=none").check(TableActor.columns)
    with pytest.raises(RecipeError, match="cannot weight its rows"):
        policy_opt.get("dpo").set("credit=tis(level=sequence)").check(TableActor.columns)


# -- options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: GroupPairs(margin=-1.0),
        lambda: GroupPairs(per_group=0),
        lambda: LogisticPairs(beta=0.0),
        lambda: LogisticPairs(label_smoothing=0.6),
        lambda: LogisticPairs(soft_labels=True, label_smoothing=0.1).check(),
        lambda: SquaredPairs(tau=0.0),
        lambda: DynamicLabels(gamma=2.0),
        lambda: ProspectValue(desirable_weight=-1.0),
        lambda: SuccessRate(low=0.0),
        lambda: ImplicitNegative(neg_weight=-1.0),
        lambda: RewardContrast(beta=0.0),
        lambda: LevelPairs(anisotropy=0.0),
        lambda: RobustPairs(eta=-1.0),
    ],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match="not"):
        wrong()
