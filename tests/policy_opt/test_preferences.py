"""Pairs of trajectories and the losses on them: facts of the specifications' Invariants, on random batches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import policy_opt
from policy_opt import Batch, Ctx, Loop, RecipeError, RunSize, concat
from policy_opt.advantages import GroupCentre, GroupNorm, LeaveOneOut
from policy_opt.pairs import GroupPairs
from policy_opt.preferences import DynamicLabels, LogisticPairs, SquaredPairs, log_ratios
from policy_opt.recipes.copg import RewardContrast
from policy_opt.recipes.empo import Agreement, AnswerClusters
from policy_opt.recipes.kto import ProspectValue
from policy_opt.recipes.nft import ImplicitNegative, SuccessRate
from policy_opt.recipes.power_dl import RobustPairs
from policy_opt.recipes.trpa import LevelPairs, RuleLevels, TrustRegion
from policy_opt.table import TableActor, TableLearner, World, episodes
from policy_opt.terms import Loss, Term

quick = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 10**6)
CTX = Ctx()


def played(seed: int, groups: int = 3, size: int = 4, width: int = 6, **columns) -> Batch:
    """Whole groups with ids of their own, interior holes in the mask, a token in every row."""
    g = torch.Generator().manual_seed(seed)
    rows = groups * size
    mask = torch.rand(rows, width, generator=g) < 0.7
    mask[torch.arange(rows), torch.randint(width, (rows,), generator=g)] = True
    double = {"generator": g, "dtype": torch.float64}
    correct = torch.randint(2, (rows,), generator=g).double()
    given_columns = {
        "member_B": torch.arange(rows) % size,
        "reward_B": torch.randint(-2, 3, (rows,), generator=g).double(),
        "correct_B": correct,
        "logp_sampler_BT": -torch.rand(rows, width, **double),
        "logp_old_BT": -torch.rand(rows, width, **double),
        "logp_ref_BT": -torch.rand(rows, width, **double),
        "mismatched_BT": -torch.rand(rows, width, **double),
        "mismatched_ref_BT": -torch.rand(rows, width, **double),
        "rank_B": torch.randint(1, 5, (rows,), generator=g),
        "answer_B": torch.randint(-1, 3, (rows,), generator=g),
        "scores_BK": torch.rand(rows, 2, **double),
    }
    ids = torch.arange(groups).repeat_interleave(size) * 7 + 2
    return Batch.build(mask_BT=mask, group_B=ids, **{**given_columns, **columns})


def live(seed: int, b: Batch) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + 1)
    return -2 * torch.rand(b.B, b.T, generator=g, dtype=torch.float64)


def pull(surrogate, b: Batch, logp_BT: torch.Tensor, agg=None) -> tuple[float, torch.Tensor]:
    """(loss, d loss / d logp); a surrogate per token or row is summed unless there is an aggregation."""
    from policy_opt.aggregate import ConstantSum

    loss = Loss.of((Term(surrogate, agg=agg or ConstantSum(1.0)),), b, CTX, torch.float64)
    value, found = loss.cotangents({"logp_BT": logp_BT}, b)
    return float(value), found.get("logp_BT", torch.zeros_like(logp_BT))


def disjoint(b: Batch) -> Batch:
    """Every row in one pair: (0, 1), (2, 3), ..."""
    return b.over(pairs_P2=torch.arange(b.B).reshape(-1, 2))


def signs(b: Batch) -> torch.Tensor:
    """+1 on preferred rows, -1 on the others, for disjoint pairs: [B, 1]."""
    return torch.tensor([1.0, -1.0]).double().repeat(b.B // 2)[:, None]


# -- pairs out of groups --------------------------------------------------------------------------------


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
