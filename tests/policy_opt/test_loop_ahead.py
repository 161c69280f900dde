"""Rollouts one iteration ahead, on a fake clock: what overlaps, how old tokens are, and that every episode counts."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import policy_opt
from policy_opt import Batch, Job, Loop, Phase, Recipe, RecipeError, RunSize
from policy_opt.ahead import Ages
from policy_opt.metrics import logp_gap
from policy_opt.table import TableActor, TableLearner, World
from tests.policy_opt import fixed

WORLD = World(tasks=6, turns=2, actions=2)
GRPO, DAPO = policy_opt.get("grpo"), policy_opt.get("dapo")
T_PPO = policy_opt.get("t_ppo").set("curriculum.window=1")
"""Episodes of four tokens in four stretches."""


@dataclass
class Clock:
    """Seconds that pass when somebody says so, and what happened when."""

    now: float = 0.0
    events: list[tuple[str, float, float]] = field(default_factory=list)

    def spend(self, what: str, seconds: float) -> None:
        self.events.append((what, self.now, self.now + seconds))
        self.now += seconds


class TimedActor(TableActor):
    """Its n-th rollout takes the n-th duration; what is sent is played beside whatever else goes on."""

    def __init__(self, world: World, learner: TableLearner, clock: Clock, seconds: list[float]) -> None:
        super().__init__(world, learner)
        self.clock, self.seconds = clock, iter(seconds)
        self.asked: list[list[Job]] = []
        self.handed: list[int] = []
        self.ready = 0.0

    def play(self, jobs):
        self.asked.append(list(jobs))
        self.clock.spend("play", next(self.seconds))
        return self.hand(super().play(jobs))

    def send(self, jobs):
        self.asked.append(list(jobs))
        self.sent = super().play(jobs)
        self.ready = self.clock.now + next(self.seconds)
        self.clock.events.append(("play", self.clock.now, self.ready))

    def collect(self):
        self.clock.now = max(self.clock.now, self.ready)
        return self.hand(super().collect())

    def hand(self, b: Batch) -> Batch:
        self.handed.append(int(b.once().sum()))
        return b


class TimedLearner(TableLearner):
    """Its n-th optimizer step takes the n-th duration."""

    def __init__(self, world: World, clock: Clock, seconds: list[float], **options: Any) -> None:
        super().__init__(world, **options)
        self.clock, self.seconds = clock, iter(seconds)

    def step(self, lr_scale=1.0):
        self.clock.spend("learn", next(self.seconds))
        return super().step(lr_scale)


def start(recipe: Recipe, staleness: int | None, plays=None, learns=None, **options: Any) -> tuple[Loop, Clock]:
    clock = Clock()
    learner = TimedLearner(WORLD, clock, plays_of(learns), **options)
    actor = TimedActor(WORLD, learner, clock, plays_of(plays))
    return Loop(recipe, actor, learner, RunSize(WORLD.tasks, 3, 4, seed=1), staleness), clock


def plays_of(seconds) -> list[float]:
    return [1.0] * 500 if seconds is None else list(seconds)


def iterate(loop: Loop, n: int) -> list[tuple[Batch, dict[str, float]]]:
    """n iterations to the end of a run; the account is exact after each of them."""
    found = []
    for k in range(n):
        found.append(loop.iterate(more=k + 1 < n))
        account, actor = loop.account, loop.actor
        assert account.sent == sum(map(len, actor.asked))
        assert account.arrived.trajectories == sum(actor.handed)
        parts = (account.trained, account.rejected, account.dropped)
        assert tuple(account.arrived) == tuple(map(sum, zip(*parts, strict=True)))
        flying = len(actor.asked[-1]) if loop.sent is not None else 0
        assert account.in_flight == flying
        assert account.sent == sum(part.trajectories for part in parts) + flying
    assert loop.account.in_flight == 0
    return found


SECONDS = st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=7)


@settings(max_examples=15, deadline=None)
@given(SECONDS)
def test_time_is_the_sum_or_the_longer_of_both(seconds):
    """Whatever rollouts and updates take; and what comes of them does not depend on it."""
    plays, learns = ([pair[i] for pair in seconds] for i in range(2))
    n = len(seconds)
    loop, clock = start(GRPO, None, plays, learns)
    batches = iterate(loop, n)
    assert clock.now == pytest.approx(sum(plays) + sum(learns))
    assert [what for what, *_ in clock.events] == ["play", "learn"] * n
    assert [int(b.version_BT.max()) for b, _ in batches] == list(range(n))

    ahead, clock = start(GRPO, 1, plays, learns)
    batches = iterate(ahead, n)
    overlapped = sum(max(learn, play) for learn, play in zip(learns, plays[1:], strict=False))
    assert clock.now == pytest.approx(plays[0] + overlapped + learns[-1])
    # The batch of iteration k is played with the weights with which iteration k - 1 began, and learned after it.
    assert [what for what, *_ in clock.events] == ["play", *["play", "learn"] * (n - 1), "learn"]
    for k, (b, numbers) in enumerate(batches):
        assert b.version_BT[b.mask_BT].unique().tolist() == [max(k - 1, 0)]
        assert numbers["stale_max"] == numbers["stale_mean"] == min(k, 1)
        assert numbers["dropped_stale"] == 0
    begun = [begin for what, begin, _ in clock.events if what == "play"]
    learnt = [begin for what, begin, _ in clock.events if what == "learn"]
    assert begun[1:] == learnt[:-1], "the next rollout begins when the update does"


@pytest.mark.parametrize("recipe", [GRPO, DAPO, T_PPO, GRPO.set("schedule.epochs=2", "schedule.minibatches=2")])
def test_with_weights_that_stand_still_both_modes_are_one(recipe):
    """Same jobs, same batches, same numbers, also where groups are refilled and episodes go on."""
    loops = [start(recipe, staleness, lr=0.0)[0] for staleness in (None, 99)]
    sync, ahead = (iterate(loop, 5) for loop in loops)
    assert loops[0].actor.asked == loops[1].actor.asked
    for (a, mine), (b, theirs) in zip(sync, ahead, strict=True):
        columns = a.columns - {"version_BT", "window_BT"}
        assert columns <= b.columns
        for name in columns - {"logp_old_BT"}:
            assert torch.equal(a[name], b[name]), name
        for name in ("reward", "rows", "tokens", "groups_rejected", "rollout_rounds"):
            assert mine[name] == theirs[name], name
    assert loops[0].account == loops[1].account
    assert loops[0].states == loops[1].states


def test_groups_are_refilled_now_with_the_policy_of_now():
    """Rounds beyond the first cannot have been played ahead; every token says which policy it is of."""
    loop, _ = start(DAPO, 1)
    ages = Counter()
    for k, (b, numbers) in enumerate(iterate(loop, 8)):
        assert b.index()[1] <= 3
        version = numbers["rollout_rounds"] > 1, b.version_BT[b.mask_BT].unique().tolist()
        ages.update(version[1])
        assert all(v in (k, k - 1, 0) for v in version[1])
        if k and numbers["rollout_rounds"] == 1:
            assert max(version[1]) <= k - 1
        index_B, count = b.index()
        for q in range(count):
            group = b.rows((index_B == q).nonzero().squeeze(1))
            assert group.version_BT[group.mask_BT].unique().numel() == 1, "a group has one policy"
    assert loop.account.rejected.groups > 0


@pytest.mark.parametrize("bound", [1, 2, 3, 9])
def test_no_token_is_older_than_the_bound(bound):
    """Episodes that go on get old; those that are too old are dropped whole, are counted, and do not go on."""
    loop, _ = start(T_PPO, bound)
    versions: list[int] = []
    dropped = 0
    for _ in range(10):
        asked = len(loop.actor.asked)
        versions.append(loop.learner.version)
        b, numbers = loop.iterate()
        ages = [len({v for v in versions if v > t}) for t in b.version_BT[b.mask_BT].tolist()]
        assert max(ages) <= bound and numbers["stale_max"] == max(ages)
        assert numbers["stale_mean"] == pytest.approx(sum(ages) / len(ages))
        dropped += int(numbers["dropped_stale"])
        trained = set(zip(b["group_B"].tolist(), b["member_B"].tolist(), strict=True))
        going_on = {(j.group, j.member) for j in loop.actor.asked[-1] if j.resume}
        assert len(loop.actor.asked) > asked and going_on <= trained
        assert loop.account.sent == sum(map(len, loop.actor.asked))
        assert loop.account.in_flight == len(loop.actor.asked[-1])
    # Four stretches: the oldest token of one that was played at once has age 4 when the last one is learned.
    assert (dropped > 0) == (bound < 4)
    assert loop.account.dropped.trajectories == dropped
    assert (loop.account.dropped.tokens > 0) == (dropped > 0)


def test_what_is_too_old_goes_by_the_trajectory_and_groups_keep_the_rest():
    """All segments of a trajectory go with the one that is too old; a group is lost with its last member."""
    version = torch.tensor([[5, 5], [3, 5], [5, 5], [5, 5], [3, 3]])
    b = Batch.build(
        mask_BT=torch.tensor([[1, 1], [1, 1], [1, 1], [1, 1], [1, 0]]), group_B=torch.tensor([0, 0, 0, 0, 1]),
        parent_B=torch.tensor([-1, -1, 1, -1, -1]), version_BT=version, logp_sampler_BT=torch.zeros(5, 2),
    )  # fmt: skip
    ages = Ages(1)
    for v in (3, 4, 4, 5):
        ages.begin(v)
    assert ages.of(b).tolist() == [[0, 0], [2, 0], [0, 0], [0, 0], [2, 0]]
    young = ages.young(b)
    assert young["group_B"].tolist() == [0, 0] and young.version_BT.tolist() == [[5, 5]] * 2
    assert ages.young(young) is young


def test_a_batch_that_is_all_too_old_takes_no_step():
    loop, _ = start(GRPO.set("curriculum.max_rounds=1"), 1)
    loop.iterate()
    for v in (7, 8, 9):
        loop.ages.begin(v)  # as if iterations had passed
    before = loop.learner.version
    b, numbers = loop.iterate()
    assert not b.mask_BT.any() and numbers["optimizer_steps"] == 0 and loop.learner.version == before
    assert numbers["dropped_stale"] == 12 and numbers["dropped_stale_groups"] == 3 and numbers["total_dropped"] == 12


@pytest.mark.parametrize("recipe", [GRPO, DAPO, T_PPO])
def test_state_between_iterations_holds_what_is_in_flight(recipe):
    loop, _ = start(recipe, 3)
    for _ in range(3):
        loop.iterate()
    other = copy.deepcopy(loop)
    again = Loop(recipe, other.actor, other.learner, loop.size, 3)
    again.load_state_dict(copy.deepcopy(loop.state_dict()))
    assert again.sent == loop.sent and again.account == loop.account
    for _ in range(3):
        (a, mine), (b, theirs) = loop.iterate(), again.iterate()
        assert mine == theirs and all(torch.equal(a[name], b[name]) for name in a.columns)
    assert torch.equal(loop.learner.tables["policy"], again.learner.tables["policy"])


def test_the_next_phase_begins_with_its_own_jobs():
    """The rollout of a phase's first iteration is chosen while the phase before is learned."""
    phases = (Phase("cold", GRPO.set("sampler.temperature=0.5"), 2), Phase("warm", GRPO))
    for staleness in (None, 1):
        loop, _ = start(GRPO.replace(phases=phases), staleness)
        iterate(loop, 4)
        assert [jobs[0].sampler.temperature for jobs in loop.actor.asked] == [0.5, 0.5, 1.0, 1.0]
        assert set(loop.states) == {"cold", "warm"}


def test_the_gap_is_that_of_the_weights_that_played():
    """Log-probs of an older policy differ by right; the alarm is what the actor found when weights were sent."""
    loop, _ = start(GRPO.set("credit+=tis()"), 1, lr=1.0)
    loop.actor.gap = 0.0
    numbers = [numbers for _, numbers in iterate(loop, 4)]
    assert max(n["logp_gap"] for n in numbers) < 1e-12 < max(n["stale_kl"] for n in numbers[1:])
    loop.actor.gap = 0.25
    assert loop.iterate()[1]["logp_gap"] == 0.25
    b = fixed.batch([1, 0], [0, 0], [[1], [1]]).over(version_BT=torch.tensor([[3], [4]]))
    assert logp_gap(torch.tensor([[5.0], [0.5]]).double(), b) == 0.5
    assert logp_gap(torch.tensor([[5.0], [0.5]]).double(), b, 4) == 0.5
    assert logp_gap(torch.tensor([[5.0], [0.5]]).double(), b, 5) == 0.0


def test_an_actor_that_cannot_send_is_refused():
    actor = fixed.FixedActor(fixed.batch([1, 0], [0, 0], [[1], [1]]))
    with pytest.raises(RecipeError, match="FixedActor has no send and collect"):
        Loop(GRPO, actor, fixed.FixedLearner({}), RunSize(1), staleness=1)
