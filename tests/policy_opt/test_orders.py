"""Orders of tasks with a memory (FG-ExPO, VAS): facts of the specifications, on random batches."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import policy_opt
from policy_opt import Batch, Ctx, Loop, RecipeError, RunSize
from policy_opt.diversity import Said, distinct, edit_distance, self_bleu
from policy_opt.orders import Frontier, VarianceAware, alternate, min_max, proportional, walk
from policy_opt.recipes.fg_expo import ByAccuracy
from policy_opt.table import TableActor, TableLearner, World
from tests.policy_opt import fixed
from tests.policy_opt.played import WORLD, close, played, quick, seeds

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


@pytest.mark.parametrize(
    ("slug", "setting"),
    [
        ("fg_expo", "curriculum.order.sigma=0"),
        ("vas", "curriculum.order.mix=1.5"),
        ("vas", "curriculum.order.rollouts=0"),
    ],
)
def test_options_without_sense_are_refused(slug, setting):
    with pytest.raises(RecipeError):
        policy_opt.get(slug).set(setting).check(TableActor.columns)
