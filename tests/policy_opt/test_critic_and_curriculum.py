"""Critics on turns and on unfinished episodes, calibrated and shaped advantages, orders with a memory, rewards in
zones: facts of the specifications' Invariants, on random batches."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import policy_opt
from policy_opt import Batch, Ctx, Loop, RecipeError, RunSize
from policy_opt.advantages import GAE, GroupCentre, GroupNorm, Whiten, next_action
from policy_opt.aggregate import TokenMean
from policy_opt.calibration import RankPairs, ReferenceFilter
from policy_opt.diversity import Said, distinct, edit_distance, self_bleu
from policy_opt.orders import Frontier, VarianceAware, alternate, min_max, proportional, walk
from policy_opt.proximity import BlockProximity, ClickProximity, SweetSpot
from policy_opt.recipes.aspo import Earlier
from policy_opt.recipes.fg_expo import ByAccuracy
from policy_opt.recipes.t_ppo import Truncation
from policy_opt.rewards import TokenReward
from policy_opt.surrogates import Clip, ClippedValue, EarlyStop
from policy_opt.table import TableActor, TableLearner, World, episodes
from policy_opt.terms import Loss, Term
from tests.policy_opt import fixed

quick = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 10**6)
CTX = Ctx()
WORLD = World(tasks=4, turns=2, actions=2)


def played(seed: int, rows: int = 8, width: int = 9, turns: int = 3, **columns) -> Batch:
    """Groups of four with ids of their own, turns of several tokens, holes in the mask, a token in every row."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=g) < 0.7
    mask[torch.arange(rows), torch.randint(width, (rows,), generator=g)] = True
    double = {"generator": g, "dtype": torch.float64}
    columns_given = {
        "turn_BT": (torch.arange(width) * turns // width).expand(rows, -1),
        "member_B": torch.arange(rows) % 4,
        "reward_B": torch.randint(2, (rows,), generator=g).double(),
        "correct_B": torch.randint(2, (rows,), generator=g).double(),
        "length_B": torch.randint(1, 50, (rows,), generator=g),
        "first_call_B": torch.randint(-1, 40, (rows,), generator=g),
        "finished_B": torch.randint(2, (rows,), generator=g).double(),
        "token_reward_BT": torch.randn(rows, width, **double),
        "values_old_BT": torch.randn(rows, width, **double),
        "logp_old_BT": -torch.rand(rows, width, **double),
        "logp_ref_BT": -2 * torch.rand(rows, width, **double),
        "logp_sampler_BT": torch.zeros(rows, width, dtype=torch.float64),
    }
    ids = torch.arange(rows) // 4 * 7 + 2
    return Batch.build(mask_BT=mask, group_B=ids, **{**columns_given, **columns})


def close(found, expected, **options) -> None:
    torch.testing.assert_close(found, expected, **{"rtol": 1e-9, "atol": 1e-9, **options})


def steps(*turns: list[float], rewards: list[float], **columns) -> Batch:
    """One row of turns: token values of each, its reward at its last token, observations between them."""
    values, paid, turn, mask = [], [], [], []
    for i, (tokens, reward) in enumerate(zip(turns, rewards, strict=True)):
        values += [*tokens, 9.0]
        paid += [0.0] * (len(tokens) - 1) + [reward, 9.0]
        turn += [i] * (len(tokens) + 1)
        mask += [1] * len(tokens) + [0]
    row = {"values_old_BT": values, "token_reward_BT": paid, "turn_BT": turn}
    for name in ("values_old_BT", "token_reward_BT"):
        row[name] = torch.tensor(row[name], dtype=torch.float64)
    row = {name: torch.as_tensor(value)[None] for name, value in row.items()}
    return Batch.build(mask_BT=[mask], group_B=[0], **row, **columns)


def on_actions(b: Batch, name: str) -> torch.Tensor:
    return b[name][b.mask_BT]


numbers = st.lists(st.floats(-2, 2), min_size=1, max_size=4)


# -- turns (POAD) -----------------------------------------------------------------------------------------


@quick
@given(turns=st.lists(st.floats(-2, 2), min_size=1, max_size=5), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_one_token_per_turn_is_plain_gae(turns, gamma, lam):
    b = steps(*([v] for v in turns), rewards=[0.5] * len(turns))
    ours, plain = GAE(1.0, lam, turn_gamma=gamma)(b, CTX), GAE(gamma, lam)(b, CTX)
    close(on_actions(ours, "adv_BT"), on_actions(plain, "adv_BT"))


@quick
@given(turns=st.lists(numbers, min_size=1, max_size=4), gamma=st.floats(0.1, 1), data=st.data())
def test_lambda_one_discounts_per_turn_whatever_its_length(turns, gamma, data):
    rewards = [data.draw(st.floats(-1, 1)) for _ in turns]
    gae = GAE(1.0, 1.0, turn_gamma=gamma)
    b = gae(steps(*turns, rewards=rewards), CTX)
    to_go = [sum(gamma**k * r for k, r in enumerate(rewards[i:])) for i in range(len(turns))]
    expected = [goal for goal, turn in zip(to_go, turns, strict=True) for _ in turn]
    close(on_actions(b, "returns_BT"), torch.tensor(expected, dtype=torch.float64))
    split = gae(steps(*[[v for v in turn for _ in range(2)] for turn in turns], rewards=rewards), CTX)
    close(split["returns_BT"][0, 0], b["returns_BT"][0, 0])


@quick
@given(turns=st.lists(numbers, min_size=2, max_size=4), lam=st.floats(0, 1))
def test_without_discount_turns_mean_nothing(turns, lam):
    b = steps(*turns, rewards=[1.0] * len(turns))
    close(GAE(1.0, lam, turn_gamma=1.0, turn_lam=lam)(b, CTX)["adv_BT"], GAE(1.0, lam)(b, CTX)["adv_BT"])


@quick
@given(turns=st.lists(numbers, min_size=1, max_size=4), gamma=st.floats(0, 1))
def test_errors_inside_a_turn_telescope_to_that_of_the_turn(turns, gamma):
    b = GAE(1.0, 1.0, turn_gamma=gamma, turn_lam=0.0)(steps(*turns, rewards=[0.3] * len(turns)), CTX)
    first = [0, *torch.tensor([len(t) for t in turns]).cumsum(0).tolist()]
    for i, turn in enumerate(turns):
        later = turns[i + 1][0] if i + 1 < len(turns) else 0.0
        assert on_actions(b, "adv_BT")[first[i]].item() == pytest.approx(0.3 + gamma * later - turn[0])


def test_a_constant_value_inside_a_turn_has_no_error_there():
    b = GAE(1.0, 0.0, turn_gamma=0.9, turn_lam=0.0)(steps([2.0, 2.0, 2.0], [5.0, 5.0], rewards=[0.0, 1.0]), CTX)
    assert on_actions(b, "adv_BT").tolist() == pytest.approx([0, 0, 0.9 * 5 - 2, 0, 1 - 5])


@quick
@given(seed=seeds)
def test_value_after_the_end(seed):
    """A finished episode has none; an unfinished one has its own last, or what is given."""
    b = played(seed)
    b = b.put(bootstrap_B=torch.randn(b.B, dtype=torch.float64))
    zero, value = (GAE(0.9, 0.8, after=kind)(b, CTX)["adv_BT"] for kind in ("zero", "value"))
    done = b["finished_B"] != 0
    close(value[done], zero[done])
    last_value = torch.where(next_action(b.mask_BT) == b.T, b["values_old_BT"], 0) * b.mask_BT
    again = GAE(0.9, 0.8, after="value")(b.over(bootstrap_B=last_value.sum(1)), CTX)
    close(GAE(0.9, 0.8, after="repeat")(b, CTX)["adv_BT"], again["adv_BT"])


def test_the_value_after_a_window_is_asked_of_the_actor_before_anything_is_played():
    recipe = policy_opt.get("poad").set("advantage.after=value")
    with pytest.raises(RecipeError, match=r"reads the fact `bootstrap_B`, which the environment does not deliver"):
        recipe.check(TableActor.columns)
    recipe.check(TableActor.columns | {"bootstrap_B"})
    policy_opt.get("poad").set("advantage.after=repeat", "curriculum.resume=True").check(TableActor.columns)


@quick
@given(seed=seeds)
def test_next_action(seed):
    b = played(seed)
    for row, mask in zip(next_action(b.mask_BT).tolist(), b.mask_BT.tolist(), strict=True):
        assert row == [next((k for k in range(t + 1, b.T) if mask[k]), b.T) for t in range(b.T)]


@quick
@given(seed=seeds, ddof=st.sampled_from([0, 1]))
def test_whitening_forms(seed, ddof):
    b = played(seed)
    b = b.put(adv_BT=b["token_reward_BT"] * b.mask_BT)
    x = on_actions(b, "adv_BT")
    part = Whiten(eps=1e-8, ddof=ddof, eps_on="deviation", per="step")
    assert part.when == "step" and Whiten().when == "rollout"
    ctx = Ctx()
    found = part(b, ctx)
    close(on_actions(found, "adv_BT"), (x - x.mean()) / (x.std(correction=ddof) + 1e-8))
    assert ctx.metrics["adv_mean"] == pytest.approx(float(x.mean()))
    some = b.over(adv_BT=b["adv_BT"] * (b["adv_BT"] > 0))
    kept = x[x > 0]
    if kept.numel() > 1:
        whole = Whiten(ddof=ddof, over="nonzero")(some, Ctx())["adv_BT"]
        close(whole[some["adv_BT"] > 0].mean(), torch.zeros(()).double(), atol=1e-7)
        rest = whole[b.mask_BT & (b["adv_BT"] <= 0)]
        close(rest, torch.full_like(rest, -float(kept.mean() / (kept.var(correction=ddof) + 1e-8).sqrt())))


def cotangents(terms, b: Batch, **streams) -> dict[str, torch.Tensor]:
    return Loss.of(terms, b, CTX, torch.float64).cotangents(streams, b)[1]


@quick
@given(seed=seeds, kl_max=st.floats(1e-4, 0.5))
def test_early_stop_takes_the_gradient_away_and_nothing_else(seed, kl_max):
    b = GroupCentre()(played(seed), CTX)
    g = torch.Generator().manual_seed(seed)
    logp = b["logp_old_BT"] + 0.5 * torch.randn(b.B, b.T, generator=g, dtype=torch.float64)
    gap = ((logp - b["logp_old_BT"]).exp() - 1 - (logp - b["logp_old_BT"]))[b.mask_BT].mean()
    stop, plain = Term(EarlyStop(Clip(), kl_max), agg=TokenMean()), Term(Clip(), agg=TokenMean())
    s = {"logp_BT": logp * b.mask_BT}
    close(stop.loss(s, b), plain.loss(s, b))
    found = cotangents((stop,), b, logp_BT=logp)
    assert ("logp_BT" in found) == (float(gap) <= kl_max)
    if found:
        close(found["logp_BT"], cotangents((plain,), b, logp_BT=logp)["logp_BT"])


# -- unfinished episodes (T-PPO) --------------------------------------------------------------------------


@quick
@given(seed=seeds, gamma=st.floats(0.5, 1), lam=st.floats(0, 1))
def test_finished_episodes_are_plain_ppo(seed, gamma, lam):
    b = played(seed)
    b = b.over(finished_B=torch.ones(b.B))
    egae = GAE(gamma, lam, after="repeat", returns="monte_carlo")(b, CTX)
    plain, monte_carlo = GAE(gamma, lam)(b, CTX), GAE(gamma, 1.0)(b, CTX)
    close(egae["adv_BT"], plain["adv_BT"])
    close(egae["returns_BT"], monte_carlo["returns_BT"])
    masks = Truncation()(egae, CTX)
    assert torch.equal(masks["window_BT"], b.mask_BT) and torch.equal(masks["done_BT"], b.mask_BT)


@quick
@given(seed=seeds, lam=st.floats(0, 1))
def test_a_truncated_episode_speaks_through_value_differences_only(seed, lam):
    b = played(seed, finished_B=torch.zeros(8), token_reward_BT=torch.zeros(8, 9).double())
    last = next_action(b.mask_BT) == b.T
    at_last = last & b.mask_BT
    adv = GAE(1.0, lam, after="repeat")(b, CTX)["adv_BT"]
    assert not adv[at_last].any()
    flat = GAE(1.0, lam, after="repeat")(b.over(values_old_BT=torch.full((8, 9), 0.7)), CTX)["adv_BT"]
    assert float(flat.abs().max()) < 1e-6
    end = (b["values_old_BT"] * at_last).sum(1, keepdim=True)
    close(GAE(1.0, 1.0, after="repeat")(b, CTX)["adv_BT"], (end - b["values_old_BT"]) * b.mask_BT)


def test_no_finished_episode_gives_the_critic_no_gradient_at_all():
    b = played(3, finished_B=torch.zeros(8))
    b = Truncation()(GAE(after="repeat")(b, CTX), CTX)
    value = Term(ClippedValue(), num="done", den="done", agg=TokenMean(), name="value", weights=())
    terms = (Term(Clip(), agg=TokenMean()), value)
    found = cotangents(terms, b, logp_BT=b["logp_old_BT"] + 0.1, values_BT=b["values_old_BT"] + 0.1)
    assert "logp_BT" in found and "values_BT" not in found


def test_an_unfinished_episode_has_no_reward_yet():
    b = fixed.batch([1, 0, 1, 1], [0, 0, 1, 1], [[1, 0, 1]] * 4, finished_B=torch.tensor([1, 1, 0, 1]))
    assert TokenReward()(b, CTX)["token_reward_BT"].sum(1).tolist() == [1, 0, 1, 1]
    assert TokenReward(finished_only=True)(b, CTX)["token_reward_BT"].sum(1).tolist() == [1, 0, 0, 1]


def test_the_pool_trains_every_token_once_and_learns():
    """Windows of 2 tokens on episodes of 4: each token is in the policy's mask once, in the critic's at most once."""
    learner = TableLearner(WORLD)
    recipe = policy_opt.get("t_ppo").set("curriculum.window=2")
    loop = Loop(recipe, TableActor(WORLD, learner), learner, RunSize(4, groups=4, group_size=8))
    trained, valued, finished = Counter(), Counter(), set()
    for i in range(40):
        b, _ = loop.iterate()
        ids = list(zip(b["group_B"].tolist(), b["member_B"].tolist(), strict=True))
        for name, count in (("window_BT", trained), ("done_BT", valued)):
            count.update((ids[r], t) for r, t in b[name].nonzero().tolist())
        finished |= {ids[r] for r in (b["finished_B"] != 0).nonzero().squeeze(1).tolist()}
        assert b.B == 32 and (i % 2 == 1) == bool((b["finished_B"] != 0).all())
        assert bool((b["window_BT"].sum(1) == 2).all())
    assert set(trained.values()) == {1} and set(valued.values()) == {1}
    assert {key for key, _ in valued} == finished and all((key, 4) in trained for key in finished)
    assert float(torch.cat([b["correct_B"] for b in episodes(WORLD, learner, 32)]).mean()) >= 0.9


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


# -- tasks near the frontier (FG-ExPO) --------------------------------------------------------------------


@quick
@given(rates=st.lists(st.floats(0, 1), min_size=2, max_size=9), sigma=st.floats(0.05, 5))
def test_frontier_weights(rates, sigma):
    rate = torch.tensor(rates, dtype=torch.float64)
    part = Frontier(sigma=sigma)
    p = part.probabilities(rate)
    assert float(p.sum()) == pytest.approx(1)
    close(part.probabilities(1 - rate), p)
    nearest = (rate - 0.5).abs().argmin()
    assert float(p[nearest]) == pytest.approx(float(p.max()))
    close(Frontier(sigma=math.inf).probabilities(rate), torch.full_like(rate, 1 / len(rates)))


@quick
@given(seed=seeds, n=st.integers(1, 12))
def test_frontier_draws_without_replacement_and_moves_what_was_played(seed, n):
    ctx, part = Ctx(seed=seed, tasks=5), Frontier(ema=0.75)
    assert part.probabilities(part.table(ctx).column(torch.arange(5), 0.5)).tolist() == pytest.approx([0.2] * 5)
    drawn = [*part(n, 5, ctx), *part(2, 5, ctx)]
    assert max(Counter(drawn).values()) - min(Counter({t: drawn.count(t) for t in range(5)}).values() or [0]) <= 1
    b = played(seed, finished_B=torch.ones(8), task_B=torch.tensor([3] * 4 + [1] * 4))
    part.played(b, ctx)
    expected = {3: b["correct_B"][:4].mean(), 1: b["correct_B"][4:].mean()}
    for task in range(5):
        before = 0.5
        after = 0.75 * before + 0.25 * float(expected[task]) if task in expected else None
        assert part.table(ctx).get(task) == (pytest.approx(after) if after is not None else None)


def test_frontier_prefers_the_frontier():
    ctx, part = Ctx(tasks=3), Frontier(sigma=0.1)
    for task, rate in enumerate((0.0, 0.5, 0.95)):
        part.table(ctx).put(task, rate)
    counts = Counter()
    for step in range(200):
        ctx.step = step
        counts.update(part(1, 3, ctx))
    assert counts[1] >= 199


def test_rejected_groups_move_the_table_too():
    recipe = policy_opt.get("fg_expo").set("curriculum.accept=mixed()", "curriculum.max_rounds=1")
    b = fixed.batch([1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2], [[1, 1]] * 6).over(finished_B=torch.ones(6))
    loop = Loop(recipe, fixed.FixedActor(b), fixed.FixedLearner({}), RunSize(3, 3, 2))
    found, _ = loop.iterate()
    (table,) = (state["pass_rate"] for path, state in loop.states[""].items() if "Frontier" in path)
    assert found.B == 2
    assert [table.get(t) for t in range(3)] == pytest.approx([0.55, 0.45, 0.5])


@quick
@given(low=st.floats(0, 1), high=st.floats(0, 1))
def test_the_kl_coefficient_grows_with_success(low, high):
    value = [ByAccuracy(0.02).value(Ctx(metrics={"correct": x})) for x in sorted((low, high))]
    assert 0.01 <= value[0] <= value[1] <= 0.02 * 0.8808


def test_fg_expo_with_a_constant_coefficient_is_grpo():
    mask = [[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0]]
    given_numbers = {"logp_ref": -torch.rand(4, 4, generator=torch.Generator().manual_seed(1))}
    plain = policy_opt.get("grpo").set("terms.policy.agg=token_mean", "terms.kl.agg=token_mean", "terms.kl.coef=0.02")
    plain = plain.set("advantage.ddof=0")
    ours = policy_opt.get("fg_expo").set("terms.kl.coef=0.02")
    for rewards in ([1, 0, 0, 1], [1, 1, 1, 1]):
        b = fixed.batch(rewards, [0, 0, 1, 1], mask)
        found, expected = (
            fixed.run(fixed.whole(r), b, given_numbers)[2].cotangents[0]["logp_BT"] for r in (ours, plain)
        )
        close(found, expected)
    alone = fixed.whole(ours.set("terms.policy.coef=0", "advantage=none"))
    close(fixed.run(alone, b, given_numbers)[2].cotangents[0]["logp_BT"], expected)


# -- promised variance (VAS) ------------------------------------------------------------------------------


def responses(*groups: list[list[int]], correct: list[float] | None = None) -> Batch:
    """Groups of responses, padded."""
    said = [tokens for group in groups for tokens in group]
    width = max(len(tokens) for tokens in said) + 1
    ids = [q for q, group in enumerate(groups) for _ in group]
    right = correct or [0.0] * len(said)
    return Batch.build(
        mask_BT=[[1] * len(t) + [0] * (width - len(t)) for t in said],
        tokens_BT=[t + [7] * (width - len(t)) for t in said],
        group_B=ids,
        member_B=torch.arange(len(said)),
        correct_B=torch.tensor(right),
        reward_B=torch.tensor(right),
    )


texts = st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=4)


@quick
@given(groups=st.lists(texts, min_size=1, max_size=3), n=st.integers(1, 3))
def test_diversity_measures(groups, n):
    b = responses(*groups)
    said = Said.of(b)
    for q, group in enumerate(groups):
        every = [tuple(t[i : i + n]) for t in group for i in range(len(t) - n + 1)]
        assert distinct(said, n)[q].item() == pytest.approx(len(set(every)) / max(len(every), 1))
    bleu, distance, share = self_bleu(said), edit_distance(said), edit_distance(said, relative=True)
    assert bool(((bleu >= 0) & (bleu <= 1 + 1e-9)).all()) and bool(((share >= 0) & (share <= 1)).all())
    single = torch.tensor([len(group) < 2 for group in groups])
    assert not bleu[single].any() and not distance[single].any()
    turned = Said.of(b.rows(torch.arange(b.B).flip(0)))
    close(edit_distance(turned), distance)
    close(self_bleu(turned), bleu)


@quick
@given(a=st.lists(st.integers(0, 3), max_size=6), c=st.lists(st.integers(0, 3), max_size=6))
def test_edit_distance_is_a_distance(a, c):
    (same,), (d,), (back,) = (edit_distance(Said.of(responses(pair))).tolist() for pair in ([a, a], [a, c], [c, a]))
    assert same == 0 and d == back and abs(len(a) - len(c)) <= d <= max(len(a), len(c))
    assert (d == 0) == (a == c)


def test_equal_responses_are_not_diverse_and_segments_belong_together():
    said = Said.of(responses([[1, 2, 3, 4]] * 3, [[1, 2, 3, 4], [0, 0, 1, 1], [3, 1, 0, 2]]))
    assert distinct(said, 3)[0].item() == pytest.approx(1 / 3) and self_bleu(said)[0].item() == pytest.approx(1)
    assert float(self_bleu(said)[1]) < 0.4 and float(distinct(said, 3)[1]) == 1
    cut = responses([[1, 2], [3, 4], [1, 2, 3, 4]])
    cut = cut.over(parent_B=torch.tensor([-1, 0, -1]), segment_BT=torch.tensor([[0], [1], [0]]).expand(3, cut.T))
    assert edit_distance(Said.of(cut)).item() == 0


@quick
@given(right=st.lists(st.booleans(), min_size=4, max_size=4), alpha=st.floats(0, 1))
def test_scores(right, alpha):
    part = VarianceAware(alpha=alpha, beta=1 - alpha, n=1)
    b = responses([[1, 2], [3], [1], [2, 2]], correct=[float(r) for r in right])
    rating = part.rate(b)
    other = part.rate(b.over(correct_B=1 - b["correct_B"]))
    close(other.ovs_Q, rating.ovs_Q)
    p = sum(right) / 4
    assert rating.ovs_Q.item() == pytest.approx(p * (1 - p)) and p * (1 - p) <= 0.25
    assert rating.vps_Q.item() == pytest.approx(alpha * p * (1 - p) + (1 - alpha) * 0.5)


@quick
@given(scores=st.lists(st.floats(0, 1), min_size=2, max_size=8), momentum=st.floats(0, 1))
def test_weights(scores, momentum):
    score = torch.tensor(scores, dtype=torch.float64)
    scaled = min_max(score, 1e-8)
    assert bool(((scaled >= 0) & (scaled <= 1)).all()) and not scaled[score.argmin()]
    assert float(proportional(score).sum()) == pytest.approx(1)
    assert proportional(score * 0).tolist() == pytest.approx([1 / len(scores)] * len(scores))
    old = torch.rand(len(scores), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    close(VarianceAware(momentum=1.0).weigh(score, old), old)
    close(VarianceAware(momentum=momentum).weigh(score, None), score)
    mixed = VarianceAware(momentum=momentum, weights="minmax").weigh(score, old)
    close(mixed, momentum * old + (1 - momentum) * scaled)


@quick
@given(n=st.integers(1, 9), mix=st.sampled_from([0.0, 0.3, 0.5, 1.0]), tasks=st.integers(1, 7))
def test_a_batch_is_always_full(n, mix, tasks):
    learner = TableLearner(World(tasks=tasks))
    learner.prepare({}, (), None)
    ctx = Ctx(actor=TableActor(World(tasks=tasks), learner))
    part = VarianceAware(mix=mix, rollouts=2, diversity="inverse_self_bleu")
    for step in range(3):
        ctx.step = step
        found = part(n, tasks, ctx)
        assert len(found) == n and set(found) <= set(range(tasks))
    rated = ctx.metrics.get("rating_episodes", 0)
    assert rated == (0 if mix == 0 else 2 * tasks)


def test_walk_and_alternation():
    pool = list(range(10, 16))
    assert walk(pool, 0, 4) == ([10, 11, 12, 13], 4)
    assert walk(pool, 4, 4) == ([10, 11, 12, 13], 4)
    assert walk(pool, 2, 4) == ([12, 13, 14, 15], 6) and walk(pool, 6, 2) == ([10, 11], 2)
    assert alternate([1, 2], [7, 8, 9]) == [1, 7, 2, 8, 9] and alternate([1, 2, 3], []) == [1, 2, 3]
    ctx = Ctx(tasks=6)
    assert sorted(VarianceAware(mix=0.0)(6, 6, ctx)) == list(range(6))


def test_a_task_that_promises_nothing_is_never_drawn_by_weight():
    ctx, part = Ctx(), VarianceAware(mix=1.0, weights="minmax")
    ctx.state(part)["due"] = 10**9
    for task, weight in enumerate((0.0, 0.5, 1.0)):
        part.store(ctx, "weight").put(task, weight)
    drawn = Counter(task for _ in range(50) for task in part(6, 3, ctx))
    assert drawn[0] == 0 and drawn[2] > drawn[1] > 0


class Counting(TableActor):
    """Counts the episodes that only rate a task."""

    rating: tuple[int, ...] = ()

    def play(self, jobs):
        self.rating = (*self.rating, sum(job.group < -(1 << 39) for job in jobs))
        return super().play(jobs)


@pytest.mark.parametrize("refresh", ["rescore", "online"])
def test_ratings_come_at_intervals(refresh):
    learner = TableLearner(WORLD)
    actor = Counting(WORLD, learner)
    order = f"curriculum.order=variance_aware(rollouts=3, every=2, mix=0.5, refresh='{refresh}')"
    loop = Loop(policy_opt.get("vas").set(order), actor, learner, RunSize(4, groups=4, group_size=4))
    for _ in range(4):
        loop.iterate()
    played_to_rate = [n for n in actor.rating if n]
    assert played_to_rate[0] == 12
    if refresh == "rescore":
        assert played_to_rate == [12, 12]
    else:
        assert sum(played_to_rate) < 24


# -- zones (SSL) ------------------------------------------------------------------------------------------

RULES = st.sampled_from(["upper", "lower"])


def near(found: list[float], right: list[int], **options) -> Batch:
    b = Batch.build(
        mask_BT=torch.ones(len(found), 1),
        group_B=torch.zeros(len(found)),
        logp_sampler_BT=torch.zeros(len(found), 1).double(),
        proximity_B=torch.tensor(found, dtype=torch.float64),
        correct_B=torch.tensor(right),
        reward_B=torch.tensor(right),
    )
    return SweetSpot(**options)(b, CTX)


@quick
@given(s=st.lists(st.floats(0, 1), min_size=2, max_size=6), k=st.integers(1, 9), alpha=st.floats(0, 0.99), rule=RULES)
def test_zones(s, k, alpha, rule):
    options = {"zones": k, "alpha": alpha, "rule": rule}
    wrong, right = near(sorted(s), [0] * len(s), **options), near(sorted(s), [1] * len(s), **options)
    assert bool((wrong["reward_B"].diff() >= 0).all()) and bool((right["reward_B"].diff() >= 0).all())
    assert float(right["reward_B"].min()) > float(wrong["reward_B"].max())
    assert 0 <= float(wrong["reward_B"].min()) and float(right["reward_B"].max()) <= 1 + alpha
    steps_of_k = wrong["zone_B"] * k
    close(steps_of_k, steps_of_k.round())
    assert bool(((wrong["zone_B"] - wrong["nearness_B"]).abs() < 1 / k + 1e-8).all())
    binary = near(s, [1] + [0] * (len(s) - 1), zones=k, alpha=0.0, rule=rule)
    assert torch.equal(binary["reward_B"], binary["correct_B"].double())
    paid = near(s, [1] + [0] * (len(s) - 1), **options, failures=False)["reward_B"]
    assert not paid[1:].any()
    amplified = near([0.0, 0.5, 1.0], [0, 0, 0], zones=2, alpha=1.0, values="amplified")["reward_B"]
    assert amplified.tolist() == pytest.approx([0, 1 / 3, 1])


def test_zone_borders_hold_in_both_precisions():
    for k in range(1, 13):
        for exact in range(k + 1):
            for kind in (torch.float32, torch.float64):
                s = torch.tensor([exact / k], dtype=kind)
                assert SweetSpot(zones=k, rule="lower").zone(s).item() == exact / k
                assert SweetSpot(zones=k, rule="upper").zone(s).item() == exact / k


def test_failures_that_differ_teach():
    b = near([0.1, 0.4, 0.6, 0.9], [0, 0, 0, 0])
    assert b["reward_B"].unique().numel() == 4 and GroupNorm()(b, CTX)["adv_B"].any()
    assert GroupNorm()(near([0.1, 0.4, 0.6, 0.9], [1, 1, 1, 1]), CTX)["adv_B"].any()


def clicked(x: float, y: float, box: tuple[float, float, float, float]) -> Batch:
    names = ("click_x_B", "click_y_B", "box_left_B", "box_top_B", "box_right_B", "box_bottom_B")
    values = torch.tensor([[x, y, *box]], dtype=torch.float64).unbind(1)
    columns = dict(zip(names, values, strict=True))
    return ClickProximity()(Batch.build(mask_BT=[[1]], group_B=[0], **columns), CTX)


@quick
@given(x=st.floats(-5, 15), y=st.floats(-5, 15), move=st.floats(-50, 50), scale=st.floats(0.1, 9))
def test_a_click_is_seen_from_its_box(x, y, move, scale):
    here = clicked(x, y, (2.0, 3.0, 8.0, 9.0))["click_proximity_B"]
    there = clicked(scale * (x + move), y, (scale * (2 + move), 3.0, scale * (8 + move), 9.0))["click_proximity_B"]
    close(here, there, rtol=1e-6)
    assert clicked(5.0, 6.0, (2.0, 3.0, 8.0, 9.0))["click_proximity_B"].item() == 1
    assert clicked(2.0, 6.0, (2.0, 3.0, 8.0, 9.0))["click_proximity_B"].item() == pytest.approx(math.exp(-0.5))
    corner = clicked(8.0, 9.0, (2.0, 3.0, 8.0, 9.0))
    assert corner["click_proximity_B"].item() == pytest.approx(math.exp(-1)) and corner["click_inside_B"].item() == 1


def test_blocks_and_steps():
    grid = Batch.build(
        mask_BT=[[1]] * 2, group_B=[0, 0],
        cells_BN=torch.tensor([[1] * 16, [1] * 15 + [0]]), solution_BN=torch.ones(2, 16),
    )  # fmt: skip
    b = SweetSpot(by="blocks_BS", outcome="solved_B", several="zones")(BlockProximity(2)(grid, CTX), CTX)
    assert b["solved_B"].tolist() == [1, 0] and b["zone_B"].tolist() == pytest.approx([1, (3 + 0.75) / 4])
    nan = math.nan
    walked = Batch.build(
        mask_BT=[[1]] * 3, group_B=[0] * 3, correct_B=torch.zeros(3), steps_BS=[[1, 0.5], [0.5, nan], [nan, nan]],
    )  # fmt: skip
    last = SweetSpot(by="steps_BS", several="last")(walked, CTX)
    assert last["nearness_B"].tolist() == [0.5, 0.5, 0]
    assert SweetSpot(by="steps_BS")(walked, CTX)["nearness_B"].tolist() == [0.75, 0.5, 0]
    with pytest.raises(policy_opt.BatchError, match="no square grid"):
        BlockProximity(2)(grid.over(cells_BN=torch.ones(2, 12), solution_BN=torch.ones(2, 12)), CTX)


def test_proximity_of_clicks_composes_from_the_command_line():
    facts = {"click_x_B", "click_y_B", "box_left_B", "box_top_B", "box_right_B", "box_bottom_B"}
    recipe = policy_opt.get("ssl").set("signals=click_proximity", "reward.by=click_proximity_B", "reward.rule=upper")
    recipe.check(facts)
    with pytest.raises(RecipeError, match="click_proximity_B"):
        recipe.set("signals=none").check(facts)
    with pytest.raises(RecipeError, match="box_"):
        recipe.check(facts - {"box_left_B"})


@pytest.mark.parametrize(
    ("slug", "setting"),
    [
        ("capo_calibration", "advantage.tau=0"),
        ("aspo", "advantage.k=-1"),
        ("fg_expo", "curriculum.order.sigma=0"),
        ("vas", "curriculum.order.mix=1.5"),
        ("vas", "curriculum.order.rollouts=0"),
        ("ssl", "reward.alpha=2"),
        ("poad", "advantage.whiten.eps=0"),
        ("t_ppo", "curriculum.resume=False"),
    ],
)
def test_options_without_sense_are_refused(slug, setting):
    with pytest.raises(RecipeError):
        policy_opt.get(slug).set(setting).check(TableActor.columns)
