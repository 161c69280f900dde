"""Facts of the specifications' Invariants, on random batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_opt import Batch, Ctx, Store
from policy_opt.advantages import GAE, GroupCentre, GroupNorm, LeaveOneOut, RewardToGo, Whiten
from policy_opt.aggregate import ConstantLength, SequenceMean, SequenceSum, TokenMean
from policy_opt.controllers import Annealed, Dual
from policy_opt.credits import MIS, TIS, MaskTruncated
from policy_opt.curriculum import Mixed, Shuffled
from policy_opt.gates import CappedWeight
from policy_opt.rewards import KLPenalty, Overlong, TokenReward
from policy_opt.surrogates import K3, Clip, ClippedValue, SequenceClip, SequenceTokenClip
from policy_opt.terms import Loss, Term
from policy_opt.tool_rewards import FewCalls, LeanCalls

quick = settings(max_examples=25, deadline=None)
CTX = Ctx()
seeds = st.integers(0, 10**6)


def random_batch(seed: int, rows: int = 8, width: int = 6, groups: int = 3, **columns) -> Batch:
    """Interior and trailing holes in the mask, every row with a token; groups with gaps in their ids."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=g) < 0.7
    mask[torch.arange(rows), torch.randint(width, (rows,), generator=g)] = True
    double = {"generator": g, "dtype": torch.float64}
    given_columns = {
        "reward_B": torch.randint(-2, 3, (rows,), generator=g).double(),
        "logp_sampler_BT": -torch.rand(rows, width, **double),
        "logp_old_BT": -torch.rand(rows, width, **double),
        "logp_ref_BT": -torch.rand(rows, width, **double),
        "values_old_BT": torch.randn(rows, width, **double),
        "truncated_B": (torch.rand(rows, generator=g) < 0.3).double(),
    }
    ids = torch.randint(groups, (rows,), generator=g) * 7 + 2
    return Batch.build(mask_BT=mask, group_B=ids, **{**given_columns, **columns})


def stream(seed: int, b: Batch, scale: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + 1)
    return -scale * torch.rand(b.B, b.T, generator=g, dtype=torch.float64)


def gradient(surrogate, b: Batch, logp_BT: torch.Tensor, agg=None) -> torch.Tensor:
    term = Term(surrogate, agg=agg or TokenMean())
    found = Loss.of((term,), b, CTX, torch.float64).cotangents({"logp_BT": logp_BT}, b)[1]
    return found.get("logp_BT", torch.zeros_like(logp_BT))


# -- advantages -----------------------------------------------------------------------------------------


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


# -- surrogates -----------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_clip_gradients(seed):
    b = GroupNorm()(random_batch(seed), CTX)
    logp, count = stream(seed, b, 2.0), b.mask_BT.sum()
    clip = Clip(0.2, 0.3)
    found = gradient(clip, b, logp)
    rho = (logp - b["logp_old_BT"]).exp()
    adv = b.per_token("adv")
    off = ((adv > 0) & (rho > 1.3)) | ((adv < 0) & (rho < 0.8)) | ~b.mask_BT
    torch.testing.assert_close(found, torch.where(off, 0.0, -adv * rho / count))
    assert torch.equal(clip.report({"logp_BT": logp}, b)["clip_frac"] & b.mask_BT, off & b.mask_BT)
    at_start = gradient(clip, b, b["logp_old_BT"], SequenceMean())
    length_B1 = b.mask_BT.sum(1, keepdim=True)
    torch.testing.assert_close(at_start, torch.where(b.mask_BT, -adv / length_B1 / b.B, 0.0))


@quick
@given(seed=seeds, c=st.floats(1.1, 4.0))
def test_dual_clip(seed, c):
    b = GroupNorm()(random_batch(seed), CTX)
    logp = stream(seed, b, 4.0)
    rho, adv = (logp - b["logp_old_BT"]).exp(), b.per_token("adv")
    dual = Clip(0.2, 0.2, dual_clip=c)
    loss = dual({"logp_BT": logp}, b)
    assert bool((loss[(adv < 0) & b.mask_BT] <= -c * adv[(adv < 0) & b.mask_BT] + 1e-12).all())
    found = gradient(dual, b, logp)
    far = (adv < 0) & (rho > c) & b.mask_BT
    assert not found[far].any()
    assert torch.equal(dual.report({"logp_BT": logp}, b)["dual_clip_frac"] & b.mask_BT, far)


@quick
@given(seed=seeds)
def test_sequence_ratio(seed):
    b = GroupNorm()(random_batch(seed), CTX)
    logp = stream(seed, b)
    wide = SequenceClip(10.0, 10.0)
    found = gradient(wide, b, logp, SequenceMean())
    s_B = wide.rho({"logp_BT": logp}, b)
    expected_B = -b["adv_B"] * s_B / b.mask_BT.sum(1) / b.B
    torch.testing.assert_close(found, torch.where(b.mask_BT, expected_B[:, None], 0.0))
    token = gradient(SequenceTokenClip(0.05, 0.08), b, logp, SequenceMean())
    torch.testing.assert_close(token, gradient(SequenceClip(0.05, 0.08), b, logp, SequenceMean()))
    constant = b["logp_old_BT"] + 0.3
    torch.testing.assert_close(wide.rho({"logp_BT": constant}, b), torch.full((8,), math.exp(0.3)).double())


@quick
@given(seed=seeds)
def test_capped_weight_never_cuts_a_token_off(seed):
    b = GroupNorm()(random_batch(seed), CTX)
    logp = stream(seed, b, 3.0)
    found = gradient(CappedWeight(0.5, 0.28), b, logp) * b.mask_BT.sum()
    weight = found / -b.per_token("adv")
    inside = b.mask_BT & (b.per_token("adv") != 0)
    assert bool(((weight[inside] >= 0.5 - 1e-12) & (weight[inside] <= 1.28 + 1e-12)).all())


@quick
@given(seed=seeds)
def test_k3_is_zero_only_at_the_reference(seed):
    b = random_batch(seed)
    logp = stream(seed, b)
    assert bool((K3()({"logp_BT": logp}, b) >= 0).all())
    assert not K3()({"logp_BT": b["logp_ref_BT"]}, b).any()
    assert not gradient(K3(), b, b["logp_ref_BT"]).any()


def test_value_clip_bounds_the_way_back():
    b = random_batch(0, values_old_BT=torch.zeros(8, 6), returns_BT=torch.ones(8, 6))
    inside, beyond = torch.full((8, 6), 0.1), torch.full((8, 6), 0.5)
    loss = ClippedValue(value_clip=0.2)
    assert loss({"values_BT": inside}, b)[0, 0] == pytest.approx(0.5 * 0.9**2)
    assert loss({"values_BT": beyond}, b)[0, 0] == pytest.approx(0.5 * 0.8**2)


# -- aggregation ----------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_aggregations(seed):
    mask = random_batch(seed).mask_BT.double()
    mask[3] = 0
    for agg, total in ((TokenMean(), 1.0), (SequenceMean(), 1.0), (SequenceSum(), mask.sum() / 8)):
        assert float(agg.tokens(mask, mask).sum()) == pytest.approx(float(total))
    torch.testing.assert_close(SequenceMean().tokens(mask, mask).sum(1), SequenceMean().rows(mask, mask))
    torch.testing.assert_close(TokenMean().tokens(mask, mask).sum(1), TokenMean().rows(mask, mask))
    five, ten = (ConstantLength(n).tokens(mask, mask) for n in (5, 10))
    torch.testing.assert_close(five, 2 * ten)
    torch.testing.assert_close(five.sum(1), ConstantLength(5).rows(mask, mask))
    for agg in (TokenMean(), SequenceMean(), SequenceSum(), ConstantLength(4)):
        assert not agg.tokens(mask * 0, mask * 0).any()


# -- rewards --------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, beta=st.floats(0.01, 1.0))
def test_kl_in_the_reward(seed, beta):
    b = random_batch(seed)
    token = TokenReward(kl_beta=beta)(b, CTX)["token_reward_BT"]
    torch.testing.assert_close(token.sum(1), KLPenalty(kl_beta=beta)(b, CTX)["reward_B"])
    assert not token[~b.mask_BT].any()
    assert KLPenalty()(b, CTX) is b and not TokenReward().needs and len(KLPenalty(0.1).needs) == 2


@quick
@given(lengths=st.lists(st.integers(0, 40), min_size=8, max_size=8), cache=st.integers(0, 20))
def test_overlong_penalty(lengths, cache):
    b = random_batch(1, length_B=torch.tensor(lengths), reward_B=torch.zeros(8).double())
    penalty = Overlong(max_len=20, cache_len=cache, factor=0.5)(b, CTX)["overlong_B"]
    for length, found in zip(lengths, penalty.tolist(), strict=True):
        beyond = length - (20 - cache)
        expected = 0 if beyond <= 0 else -0.5 if length > 20 else -0.5 * beyond / cache
        assert found == pytest.approx(expected)


def test_overlong_counts_all_tokens_from_the_first_action():
    mask, real = torch.tensor([[0, 1, 0, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
    b = Batch.build(mask_BT=mask, real_BT=real, group_B=[0], reward_B=[0.0], length_B=[2])
    assert Overlong(4, 4, length_of="all")(b, CTX)["overlong_B"].item() == pytest.approx(-1.0)
    assert Overlong(4, 4)(b, CTX)["overlong_B"].item() == pytest.approx(-0.5)


# -- tool calls -----------------------------------------------------------------------------------------


def played(calls, right, task=0, reward=None) -> Batch:
    right = torch.tensor(right, dtype=torch.float64)
    rows = {"reward_B": right if reward is None else torch.tensor(reward).double(), "correct_B": right}
    tasks = torch.full((len(calls),), task)
    return Batch.build(
        mask_BT=torch.ones(len(calls), 1), group_B=tasks, tool_calls_B=torch.tensor(calls), **rows
    )


@quick
@given(n=st.integers(1, 9), m=st.integers(1, 9))
def test_otc_coefficient(n, m):
    ctx, part = Ctx(), LeanCalls(c=4.0)
    part.store(ctx).put(0, n)

    def r(calls: float) -> float:
        return part(played([calls], [0]), ctx)["r_tool_B"].item()

    assert r(n) == pytest.approx(1.0) and 0 <= r(m) <= 1
    assert r(m) == pytest.approx(math.sin(math.pi * m / (m + n)))
    assert r(2 * n) == pytest.approx(math.sin(2 * math.pi / 3)) and r(3 * n) == pytest.approx(math.sqrt(0.5))
    assert r(n + m) < r(n + m - 1)
    assert r(n * n / m) == pytest.approx(r(m))


def test_otc_without_a_needed_call_is_the_cosine_of_otc_ppo():
    b = played([0, 1, 4, 9], [1, 1, 1, 1])
    grpo, ppo = LeanCalls(c=4.0)(b, Ctx()), FewCalls(c=4.0)(b, Ctx())
    torch.testing.assert_close(grpo["reward_B"], ppo["reward_B"])
    assert grpo["r_tool_B"][2].item() == pytest.approx(0.5)


@quick
@given(data=st.data())
def test_otc_store_never_rises_and_survives_a_round_trip(data):
    from policy_opt.state import decode, encode

    ctx, part = Ctx(), LeanCalls()
    lowest = math.inf
    for _ in range(4):
        calls = data.draw(st.lists(st.integers(0, 6), min_size=3, max_size=3))
        right = data.draw(st.lists(st.integers(0, 1), min_size=3, max_size=3))
        part.observe(part(played(calls, right, task=5), ctx), ctx)
        lowest = min([lowest, *(c for c, ok in zip(calls, right, strict=True) if ok)])
        assert part.store(ctx).get(5) == (None if lowest == math.inf else lowest)
        ctx.states = decode(encode(ctx.states))
    group_only = LeanCalls(persist=False)(played([3, 2], [1, 0], task=5), ctx)
    assert group_only["calls_needed_B"].tolist() == [3.0, 3.0]


def test_otc_never_pays_for_calls_on_failures():
    b = played([0, 4], [0, 0], reward=[-1.0, -1.0])
    for part in (LeanCalls(alpha=2.0), FewCalls(alpha=2.0)):
        assert part(b, Ctx())["reward_B"].tolist() == [-2.0, -2.0]
    ctx = Ctx()
    LeanCalls()(played([0, 0], [1, 1]), ctx)
    assert ctx.metrics == {"mean_tool_calls": 0.0}


# -- credit, curriculum, controllers --------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_importance_weights(seed):
    b, ctx = random_batch(seed), Ctx()
    rho = torch.where(b.mask_BT, b["logp_old_BT"] - b.logp_sampler_BT, 0.0).exp()
    torch.testing.assert_close(TIS(cap=1.1)(b, ctx)["w_BT"], rho.clamp(max=1.1))
    rows = TIS(cap=1.1, level="sequence")(b, ctx)
    torch.testing.assert_close(rows["w_B"], rho.prod(1).clamp(max=1.1))
    kept = MIS(low=0.8, high=1.2)(b, ctx)["w_BT"]
    torch.testing.assert_close(kept, torch.where((rho >= 0.8) & (rho <= 1.2), rho, 0.0))
    twice = TIS(cap=1.1)(MIS(low=0.8, high=1.2)(b, ctx), ctx)["w_BT"]
    torch.testing.assert_close(twice, kept * rho.clamp(max=1.1))
    assert 0 <= ctx.metrics["importance_capped"] <= 1 and 0 <= ctx.metrics["importance_dropped"] <= 1


@quick
@given(seed=seeds)
def test_weights_scale_the_gradient_of_terms_that_take_them(seed):
    b = TIS(cap=1.1)(GroupNorm()(random_batch(seed), CTX), Ctx())
    plain = b.over(w_BT=torch.ones(8, 6).double())
    logp = stream(seed, b)
    torch.testing.assert_close(gradient(Clip(), b, logp), gradient(Clip(), plain, logp) * b["w_BT"])
    b = b.over(w_BT=torch.ones(8, 6).double(), w_B=torch.arange(8).double())
    torch.testing.assert_close(gradient(Clip(), b, logp), gradient(Clip(), plain, logp) * b["w_B"][:, None])
    row = gradient(SequenceClip(), b, logp, SequenceMean())
    torch.testing.assert_close(row, gradient(SequenceClip(), plain, logp, SequenceMean()) * b["w_B"][:, None])


def test_truncated_rows_leave_numerator_and_denominator():
    b = random_batch(3)
    kept = MaskTruncated()(b, CTX).mask_BT
    assert torch.equal(kept, b.mask_BT & (b["truncated_B"] == 0)[:, None])


@quick
@given(right=st.lists(st.integers(0, 1), min_size=6, max_size=6))
def test_mixed_groups_are_kept_whole(right):
    b = Batch.build(mask_BT=torch.ones(6, 1), group_B=[3, 3, 3, 1, 1, 8], correct_B=torch.tensor(right))
    keep = Mixed()(b, CTX).tolist()
    mixed = [0 < sum(right[:3]) < 3] * 3 + [0 < sum(right[3:5]) < 2] * 2 + [False]
    assert keep == mixed


@quick
@given(tasks=st.integers(1, 7), draws=st.lists(st.integers(1, 9), max_size=6), seed=seeds)
def test_every_task_once_per_epoch(tasks, draws, seed):
    ctx, order = Ctx(seed=seed), Shuffled()
    seen = [task for n in draws for task in order(n, tasks, ctx)]
    assert len(seen) == sum(draws)
    for start in range(0, len(seen) - tasks + 1, tasks):
        assert sorted(seen[start : start + tasks]) == list(range(tasks))


def test_controllers():
    annealed = Annealed(1.0, 0.0, 10)
    assert [annealed.value(Ctx(step=s)) for s in (0, 5, 10, 99)] == [1.0, 0.5, 0.0, 0.0]
    ctx, dual = Ctx(), Dual(target=0.1, of="kl", start=0.2, rate=1.0, limit=0.5)
    values = []
    for kl in (0.2, 0.3, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0):
        ctx.step_metrics = {"kl": kl}
        dual.after_step(random_batch(0), ctx)
        values.append(dual.value(ctx))
    assert values == pytest.approx([0.3, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0])
    ctx.step_metrics = {}
    dual.after_step(random_batch(0), ctx)
    assert dual.value(ctx) == 0.0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: GroupNorm(ddof=2),
        lambda: GroupNorm(eps=-1.0),
        lambda: Clip(-0.1, 0.2),
        lambda: Clip(dual_clip=1.0),
        lambda: ConstantLength(0),
        lambda: TIS(cap=0.0),
        lambda: MIS(low=2.0, high=1.0).check(),
        lambda: Overlong(max_len=4, cache_len=5).check(),
        lambda: Annealed(0.0, 1.0, 0),
    ],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match="not"):
        wrong()


def test_store_is_exported():
    assert len(Store({1: 1.0})) == 1
