"""Critics on turns (POAD) and on unfinished episodes (T-PPO): facts of the specifications, on random batches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import policy_opt
from policy_opt import Batch, Ctx, Loop, RecipeError, RunSize
from policy_opt.advantages import GAE, GroupCentre, Whiten, next_action
from policy_opt.aggregate import TokenMean
from policy_opt.recipes.t_ppo import Truncation
from policy_opt.rewards import TokenReward
from policy_opt.surrogates import Clip, ClippedValue, EarlyStop
from policy_opt.table import TableActor, TableLearner, episodes
from policy_opt.terms import Loss, Term
from tests.policy_opt import fixed
from tests.policy_opt.played import CTX, WORLD, close, played, quick, seeds


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


@pytest.mark.parametrize(
    ("slug", "setting"),
    [
        ("poad", "advantage.whiten.eps=0"),
        ("t_ppo", "curriculum.resume=False"),
    ],
)
def test_options_without_sense_are_refused(slug, setting):
    with pytest.raises(RecipeError):
        policy_opt.get(slug).set(setting).check(TableActor.columns)
