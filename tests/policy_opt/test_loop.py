"""The loop: curriculum, step and its messages, on a softmax table."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch.nn.functional import logsigmoid

import policy_opt
from policy_opt import Batch, BatchError, Loop, Need, Part, RecipeError, RunSize, Step, Term
from policy_opt.curriculum import Curriculum
from policy_opt.need import LOGP, LOGP_OLD, Entropy
from policy_opt.surrogates import Imitate
from policy_opt.table import TableActor
from tests.policy_opt import fixed
from tests.policy_opt.running import GRPO, start, success

# -- curriculum -----------------------------------------------------------------------------------------


def test_refill_fills_the_batch_with_groups_that_differ():
    loop = start(policy_opt.get("dapo"), groups=4, group_size=8)
    for _ in range(5):
        b, metrics = loop.iterate()
        index_B, count = b.index()
        assert count == 4 and b.B == 32
        good_Q = torch.zeros(count, dtype=torch.double).index_add_(0, index_B, b["correct_B"])
        assert bool(((good_Q > 0) & (good_Q < 8)).all())
        assert metrics["rows"] == 8 * (4 + metrics["groups_rejected"])


def test_refill_is_bounded_counted_and_takes_no_step_on_nothing():
    loop = start(policy_opt.get("dapo").set("curriculum.max_rounds=3"), groups=2, group_size=1)
    before = loop.learner.tables["policy"].clone()
    b, metrics = loop.iterate()
    assert metrics["rollout_rounds"] == 3 and metrics["groups_rejected"] == 6
    assert metrics["optimizer_steps"] == 0 and not b.mask_BT.any()
    assert torch.equal(before, loop.learner.tables["policy"])


def test_extra_members_and_sampler_reach_the_actor():
    b = fixed.batch([1, 0], [0, 0], [[1], [1]])
    actor = fixed.FixedActor(b)
    recipe = GRPO.set("curriculum.extra=1", "sampler.temperature=0.5")
    Loop(recipe, actor, fixed.FixedLearner({}), RunSize(5, groups=2, group_size=3)).iterate()
    jobs = actor.jobs[0]
    assert [(job.group, job.member) for job in jobs] == [(g, m) for g in range(2) for m in range(4)]
    assert {job.sampler.temperature for job in jobs} == {0.5} and len({job.task_index for job in jobs}) == 2


def test_unfinished_episodes_go_on_in_place_of_new_ones():
    b = fixed.batch([1, 0, 1, 0], [0, 0, 1, 1], [[1]] * 4, finished_B=torch.tensor([1, 0, 0, 1]))
    b = b.over(member_B=torch.tensor([0, 1, 0, 1]))
    actor = fixed.FixedActor(b)
    loop = Loop(
        GRPO.set("curriculum.resume=True"), actor, fixed.FixedLearner({}), RunSize(9, groups=2, group_size=2)
    )
    loop.iterate()
    again = copy.deepcopy(loop)
    again.load_state_dict(copy.deepcopy(loop.state_dict()))
    for one in (loop, again):
        one.iterate()
        first, second = one.actor.jobs[0], one.actor.jobs[1]
        assert not any(job.resume for job in first)
        assert [(j.group, j.member) for j in second if j.resume] == [(0, 1), (1, 0)]
        assert [j.group for j in second if not j.resume] == [2, 2]


# -- the step -------------------------------------------------------------------------------------------


def test_one_step_needs_no_forward_beside_the_one_with_gradient():
    loop = start(GRPO)
    _, metrics = loop.iterate()
    assert loop.learner.forwards == 0 and metrics["logp_gap"] == 0.0
    for spec in ("schedule.epochs=2", "schedule.minibatches=2", "credit+=tis()"):
        loop = start(GRPO.set(spec))
        loop.iterate()
        assert loop.learner.forwards == 1


def test_logp_gap_is_logged_also_where_no_part_needs_logp_old():
    class Off(TableActor):
        def play(self, jobs):
            b = super().play(jobs)
            return b.over(logp_sampler_BT=b.logp_sampler_BT - 0.25 * b.mask_BT)

    for recipe in (GRPO, policy_opt.get("rloo"), policy_opt.get("rloo").set("schedule.minibatches=2")):
        loop = start(recipe, actor=Off)
        _, metrics = loop.iterate()
        assert metrics["logp_gap"] == pytest.approx(0.25)


def test_deferred_and_scored_logp_old_give_the_same_gradient():
    found = []
    for spec in ((), ("credit+=mis(low=0, high=1e9)",)):
        loop = start(GRPO.set(*spec), lr=0.1)
        loop.iterate()
        found.append(loop.learner.tables["policy"].detach().clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-15)


class Pairs(Part):
    """Pairs of every group's best and worst row."""

    stage = "credit"
    reads = frozenset({"reward_B", "group_B"})
    overwrites = frozenset({"pairs_P2"})

    def __call__(self, b, ctx):
        index_B, count = b.index()
        pairs = []
        for q in range(count):
            rows = (index_B == q).nonzero().squeeze(1)
            reward = b["reward_B"][rows]
            if reward.max() > reward.min():
                pairs.append([int(rows[reward.argmax()]), int(rows[reward.argmin()])])
        return b.over(pairs_P2=torch.tensor(pairs, dtype=torch.long).reshape(-1, 2))


class PairLoss(Part):
    """-log sigmoid of the difference of log-ratios: sees two rows at once."""

    stage, scope, gives = "surrogate", "batch", ""
    needs = LOGP, LOGP_OLD
    reads = frozenset({"pairs_P2"})

    def __call__(self, s, b):
        ratio_B = (s["logp_BT"] - b["logp_old_BT"]).sum(1)
        gap_P = ratio_B[b.pairs_P2[:, 0]] - ratio_B[b.pairs_P2[:, 1]]
        return -logsigmoid(gap_P).sum() / max(len(gap_P), 1)


PREFERENCE = GRPO.replace(
    slug="pairs", advantage=(), credit=(Pairs(),), terms=(Term(PairLoss()),), learns="pairs"
)


def test_a_loss_over_pairs_learns_and_needs_no_splitter():
    loop = start(PREFERENCE, group_size=8)
    for _ in range(40):
        loop.iterate()
    assert success(loop) > 0.9
    tables = []
    for micro_rows in (None, 1, 5):
        loop = start(PREFERENCE, group_size=8, micro_rows=micro_rows)
        for _ in range(3):
            loop.iterate()
        tables.append(loop.learner.tables["policy"].detach())
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0], rtol=1e-9, atol=1e-12)


def test_a_batch_loss_reuses_the_rollout_forward_while_weights_stand():
    loop = start(PREFERENCE)
    loop.iterate()
    assert loop.learner.forwards == 1
    loop = start(PREFERENCE.set("schedule.epochs=3"))
    loop.iterate()
    assert loop.learner.forwards == 1 + 2


class Tempered(Part):
    """Weights a mini-batch's tokens by the entropy under the weights as they are now."""

    stage, when = "credit", "step"
    needs = (Need("entropy_now_BT", Entropy(), when="step"),)
    reads = frozenset({"entropy_now_BT"})
    overwrites = frozenset({"w_BT"})

    def __call__(self, b, ctx):
        return b.over(w_BT=b["entropy_now_BT"] / 2)


def test_step_time_parts_see_the_weights_of_their_step():
    seen = []

    class Watching(Tempered):
        def after_step(self, b, ctx):
            seen.append((b.B, float(b["entropy_now_BT"].sum()), ctx.step_metrics["loss"]))

    loop = start(
        GRPO.replace(credit=(Watching(),)).set("schedule.epochs=2", "schedule.minibatches=2"), group_size=8
    )
    _, metrics = loop.iterate()
    assert metrics["optimizer_steps"] == 4 and len(seen) == 4
    assert [rows for rows, _, _ in seen] == [16] * 4
    assert len({entropy for _, entropy, _ in seen}) > 1


# -- errors ---------------------------------------------------------------------------------------------


def rollout(**changes):
    return fixed.batch([1, 0], [0, 0], [[1, 0], [1, 1]]).over(**changes)


def without(b: Batch, name: str) -> Batch:
    return Batch(**{**b.state_dict(), "cols": {k: v for k, v in b.cols.items() if k != name}})


@pytest.mark.parametrize(
    ("b", "said"),
    [
        (rollout().rows(torch.tensor([], dtype=torch.long)), "no rows: tokens_BT has shape (0, 2)"),
        (without(rollout(), "reward_B"), "no column `reward_B`"),
        (rollout(reward_B=torch.tensor([1.0, torch.nan])), "`reward_B` of shape (2,) holds NaN"),
        (
            rollout(real_BT=torch.tensor([[1, 0], [1, 0]]).bool()),
            "mask_BT of shape (2, 2) is set where real_BT",
        ),
        (
            rollout(logp_sampler_BT=torch.tensor([[0, 0], [0, -torch.inf]])),
            "`logp_sampler_BT` of shape (2, 2) is -inf",
        ),
    ],
)
def test_a_bad_rollout_is_named(b, said):
    with pytest.raises(BatchError, match=f"grpo: .*{re.escape(said)}"):
        fixed.run(GRPO, b, {})


def test_a_learner_that_leaves_out_a_need_is_named():
    class Silent(fixed.FixedLearner):
        def score(self, b, needs):
            return {}

    loop = Loop(GRPO.set("credit+=tis()"), fixed.FixedActor(rollout()), Silent({}), RunSize(2, 1, 2))
    with pytest.raises(BatchError, match="grpo: the learner was asked for `logp_old_BT` and returned"):
        loop.iterate()


def test_a_part_that_misbehaves_is_named():
    class Careless(Part):
        stage = "advantage"
        writes = frozenset({"adv_B"})

        def __call__(self, b, ctx):
            return b.put(adv_B=b["reward_B"], more_B=b["reward_B"])

    with pytest.raises(BatchError, match=r"grpo: advantage.0 wrote \['more_B'\], which it does not declare"):
        fixed.run(GRPO.replace(advantage=(Careless(),)), rollout(), {})

    class Lost(Careless):
        def __call__(self, b, ctx):
            return b.put(adv_B=b["nothing_B"])

    with pytest.raises(BatchError, match=r"grpo: advantage\.0: unknown column `nothing_B`"):
        fixed.run(GRPO.replace(advantage=(Lost(),)), rollout(), {})


def test_a_surrogate_of_the_wrong_shape_is_named():
    class Broad(Imitate):
        def __call__(self, s, b):
            return s["logp_BT"].sum(1)

    recipe = GRPO.replace(advantage=(), terms=(Term(Broad()),))
    with pytest.raises(
        BatchError, match=r"surrogate Broad of term `policy` returned shape \(2,\), expected \(2, 2\)"
    ):
        fixed.run(recipe, rollout(), {})


def test_foreign_state_is_refused():
    with pytest.raises(RecipeError, match="not the state of a loop"):
        start(GRPO).load_state_dict({"step": 1})


def test_impossible_sizes_are_refused():
    for wrong in (lambda: Step(epochs=0), lambda: Curriculum(max_rounds=0), lambda: Curriculum(extra=-1)):
        with pytest.raises(ValueError, match="not"):
            wrong()


def test_metrics_have_their_usual_names():
    _, metrics = start(GRPO.set("terms.kl.coef=0.1")).iterate()
    names = (
        "reward correct loss entropy kl kl_ref clip_frac ratio_max grad_norm logp_gap zero_variance_groups"
    )
    names += " groups_rejected rows tokens truncated length optimizer_steps loss_policy loss_kl"
    assert set(names.split()) <= metrics.keys()
    assert all(isinstance(value, float) for value in metrics.values())
