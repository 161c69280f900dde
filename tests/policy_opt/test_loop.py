"""The flow: every slot of it in use, on a softmax table."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import logsigmoid

import policy_opt
from policy_opt import (
    Ask,
    Batch,
    BatchError,
    Edit,
    Job,
    JudgeFailure,
    Loop,
    ModelSpec,
    Need,
    Part,
    Phase,
    Recipe,
    RecipeError,
    RunSize,
    Schedule,
    Step,
    Term,
    concat,
)
from policy_opt.aggregate import TokenMean
from policy_opt.controllers import Dual
from policy_opt.curriculum import Curriculum
from policy_opt.need import (
    LOGP,
    LOGP_OLD,
    LOGP_REF,
    Entropy,
    Hidden,
    KLTo,
    LogProb,
    MaskedImage,
    Mismatched,
    OtherPrompt,
    Probe,
    TopKIds,
    TopKLogProb,
)
from policy_opt.sources import Demos, Pool, Previous, Replay
from policy_opt.surrogates import Imitate
from policy_opt.table import TableActor, TableLearner, World, episodes
from tests.policy_opt import fixed

WORLD = World(tasks=4, turns=2, actions=2)
GRPO = policy_opt.get("grpo")


def start(recipe: Recipe, actor=TableActor, groups=4, group_size=4, seed=0, **options) -> Loop:
    learner = TableLearner(WORLD, **options)
    return Loop(recipe, actor(WORLD, learner), learner, RunSize(WORLD.tasks, groups, group_size, seed))


def success(loop: Loop) -> float:
    return float(torch.cat([b["correct_B"] for b in episodes(WORLD, loop.learner, 32)]).mean())


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


# -- sources and phases ---------------------------------------------------------------------------------


def steps(*values: Step) -> Schedule:
    return Schedule(values)


def test_previous_batch_is_stepped_on_with_its_stored_log_probs():
    recipe = GRPO.replace(schedule=steps(Step(Previous()), Step()))
    loop = start(recipe)
    first, metrics = loop.iterate()
    assert metrics["optimizer_steps"] == 1
    state = copy.deepcopy(loop.state_dict())
    resumed = start(recipe)
    resumed.load_state_dict(state)
    (stored,) = (state["batch"] for path, state in resumed.states[""].items() if "Previous" in path)
    assert torch.equal(stored["logp_old_BT"], first["logp_old_BT"])
    _, metrics = loop.iterate()
    assert metrics["optimizer_steps"] == 2 and metrics["ratio_max"] > 1.0


def test_replay_draws_whole_groups_and_forgets_the_oldest():
    recipe = GRPO.replace(schedule=steps(Step(), Step(Replay(groups=3, capacity=6))))
    loop = start(recipe)
    sizes = [loop.iterate()[1]["optimizer_steps"] for _ in range(4)]
    assert sizes == [1, 2, 2, 2]
    (stored,) = (state["groups"] for path, state in loop.states[""].items() if "Replay" in path)
    assert [int(b["group_B"][0]) for b in stored] == list(range(10, 16))
    with pytest.raises(RecipeError, match="groups <= capacity"):
        start(GRPO.replace(schedule=steps(Step(Replay(groups=9, capacity=6)))))


def test_a_pool_gathers_rows_until_there_are_enough():
    recipe = GRPO.replace(
        schedule=steps(Step(), Step(Pool(by="correct_B", rows=6), terms=(Term(Imitate()),)))
    )
    loop = start(recipe)
    taken = []
    for _ in range(8):
        b, metrics = loop.iterate()
        taken.append((int(b["correct_B"].sum()), metrics["optimizer_steps"]))
    gathered = 0
    for right, count in taken:
        gathered += right
        assert count == 1 + (gathered >= 6)
        gathered = 0 if gathered >= 6 else gathered


def imitation(tasks: int = 4) -> Recipe:
    step = Step(Demos(tasks=tasks), terms=(Term(Imitate(), agg=TokenMean()),))
    return GRPO.replace(
        slug="imitation", advantage=(), terms=(), schedule=steps(step), bank={"ref": ModelSpec("copy")}
    )


def test_phases_imitate_first_and_take_the_reference_from_there():
    recipe = GRPO.replace(
        slug="two_phases",
        phases=(Phase("warm", imitation(), 6), Phase("main", GRPO.set("terms.kl.coef=0.1"), sync=("ref",))),
    )
    loop = start(recipe)
    before = success(loop)
    for _ in range(6):
        loop.iterate()
    warm = loop.learner.tables["policy"].detach().clone()
    assert success(loop) > before + 0.3
    assert torch.equal(loop.learner.tables["ref"], torch.zeros_like(warm))
    _, metrics = loop.iterate()
    assert torch.equal(loop.learner.tables["ref"], warm) and metrics["kl_ref"] == pytest.approx(0.0)
    assert set(loop.states) == {"warm", "main"}
    resumed = start(recipe)
    resumed.load_state_dict(loop.state_dict())
    assert resumed.prepare()[1] == "main"


class Lately(Part):
    """How far the policy has moved on an old batch's tokens, as weights of their own step."""

    stage = "credit"
    needs = (Need("logp_now_BT", LogProb(), when="rollout"),)
    overwrites = frozenset({"w_BT"})

    def __call__(self, b, ctx):
        return b.over(w_BT=(b["logp_now_BT"] - b["logp_old_BT"]).abs())


def test_a_step_has_parts_of_its_own_on_its_own_batch():
    """A second pass over the batch before, weighted by its own parts, with its needs scored when it is drawn."""
    recipe = GRPO.replace(schedule=steps(Step(), Step(Previous(), parts=(Lately(),), lr_scale=0.5)))
    recipe.check()
    loop = start(recipe)
    loop.iterate()
    _, metrics = loop.iterate()
    assert metrics["optimizer_steps"] == 2


def test_a_mini_batch_without_tokens_takes_no_step():
    b = fixed.batch([1, 0, 1, 0], [0, 0, 1, 1], [[1], [1], [0], [0]])
    _, metrics, learner = fixed.run(GRPO.set("schedule.minibatches=2"), b, {})
    assert metrics["optimizer_steps"] == 1 and len(learner.cotangents) == 1


def test_the_entropy_term_spreads_the_policy():
    flat, plain = (start(GRPO.set(*spec), group_size=8) for spec in ([ENTROPY_TERM], []))
    for loop in (flat, plain):
        for _ in range(15):
            _, metrics = loop.iterate()
        loop.entropy = metrics["entropy"]
    assert flat.entropy > plain.entropy + 0.1


ENTROPY_TERM = "terms+=term(negative_entropy(), coef=0.3, name=entropy)"


def test_bank_models_follow_the_policy_as_they_say():
    kl = GRPO.set("terms.kl.coef=0.1")
    slow = start(kl.replace(bank={"ref": ModelSpec("copy", ema=0.9)}))
    slow.iterate()
    slow.iterate()
    policy, ref = (slow.learner.tables[name].detach() for name in ("policy", "ref"))
    assert 0 < float((policy - ref).norm()) and float(ref.norm()) > 0
    every = start(kl.set("bank.ref.sync_every=2"))
    every.iterate()
    assert not every.learner.tables["ref"].any()
    every.iterate()
    assert torch.equal(*(every.learner.tables[name].detach() for name in ("policy", "ref")))


def test_a_dual_coefficient_reacts_to_its_metric_and_resumes():
    recipe = GRPO.replace(
        terms=(*GRPO.terms[:1], Term(GRPO.terms[1].loss, coef=Dual(0.01, rate=5.0), name="kl"))
    )
    loop = start(recipe, group_size=8)
    values = []
    for _ in range(6):
        _, metrics = loop.iterate()
        values.append(metrics["dual"])
    assert values[-1] > values[0]
    other = start(recipe, group_size=8)
    other.load_state_dict(loop.state_dict())
    assert next(v for k, v in other.states[""].items() if "Dual" in k)["lambda"] == values[-1]


# -- needs and views ------------------------------------------------------------------------------------

VIEWS = (
    Need("masked_BT", LogProb(), view=MaskedImage()),
    Need("hinted_BT", LogProb(), view=OtherPrompt("hint")),
    Need("mismatched_BT", LogProb(), view=Mismatched(1)),
    Need("kl_BT", KLTo("ref")),
    Need("top_BTK", TopKLogProb(2)),
    Need("top_ids_BTK", TopKIds(2)),
    Need("hidden_BTD", Hidden()),
    Need("first_BT", LogProb()),
    Need("second_BT", LogProb()),
)


@dataclass(frozen=True)
class Depends(Part):
    """How much a token depends on the image, say: a signal made of several views."""

    stage = "signals"
    needs = (*VIEWS, LOGP_REF)
    models = {"ref": ModelSpec("copy")}  # noqa: RUF012
    writes = frozenset({"dependency_BT"})

    def __call__(self, b, ctx):
        return b.put(dependency_BT=b["first_BT"] - b["masked_BT"])


class Weigh(Part):
    stage = "credit"
    reads = frozenset({"dependency_BT"})
    writes = frozenset({"w_BT"})

    def __call__(self, b, ctx):
        return b.put(w_BT=b["dependency_BT"].exp())


def test_needs_of_every_kind_become_columns_once():
    recipe = GRPO.replace(signals=(Depends(),), credit=(Weigh(),))
    assert recipe.privileged and not GRPO.privileged
    asked = []

    class Counting(TableLearner):
        def score(self, b, needs):
            asked.append([n.name for n in needs])
            return super().score(b, needs)

    learner = Counting(WORLD)
    b, _ = Loop(recipe, TableActor(WORLD, learner), learner, RunSize(4, 4, 4)).iterate()
    assert {need.name for need in VIEWS} <= b.columns
    assert len(asked) == 1 and not {"first_BT", "second_BT"} <= set(asked[0])
    assert torch.equal(b["first_BT"], b["second_BT"]) and torch.equal(b["first_BT"], b["logp_old_BT"])
    assert b["top_BTK"].shape == (b.B, b.T, 2) and b["hidden_BTD"].shape == (b.B, b.T, WORLD.vocab)
    assert not b["kl_BT"].any() and not b["kl_BT"][~b.mask_BT].any()


def test_a_need_nobody_serves_is_refused_before_the_rollout():
    class Probing(Depends):
        needs = (Need("probe_BT", LogProb(), view=Probe("Sure?")),)
        models = {}  # noqa: RUF012

        def __call__(self, b, ctx):
            return b.put(dependency_BT=b["probe_BT"])

    loop = start(GRPO.replace(signals=(Probing(),), credit=(Weigh(),)))
    with pytest.raises(RecipeError, match="no text to append a probe to"):
        loop.iterate()
    assert loop.next_group == 0


# -- expand, judge, privileged --------------------------------------------------------------------------


class Hints(Part):
    """Groups in which nobody was right are played once more with a hint, in place of their first row."""

    stage = "expand"
    privileged = True

    def __call__(self, b, ctx):
        index_B, count = b.index()
        jobs, places = [], []
        for q in range(count):
            rows = (index_B == q).nonzero().squeeze(1)
            if not b["correct_B"][rows].any():
                row = int(rows[0])
                hint = ctx.actor.privileged(int(b["task_B"][row]), "hint", 9)
                assert hint is not None and ctx.actor.privileged(0, "solution", 1) is None
                ids = int(b["task_B"][row]), int(b["group_B"][row]), int(b["member_B"][row])
                jobs.append(Job(*ids, hint=hint))
                places.append(row)
        if not jobs:
            return b
        kept = torch.tensor([i for i in range(b.B) if i not in places])
        return concat([b.rows(kept), ctx.actor.play(jobs)])


def test_hinted_rows_are_scored_under_their_own_prompt():
    recipe = GRPO.replace(expand=(Hints(),))
    assert recipe.privileged
    loop = start(recipe, group_size=3)
    b, metrics = loop.iterate()
    hinted = b["hint_B"] > 0
    assert hinted.any() and b["correct_B"][hinted].mean() > 0.9
    assert b.index()[1] == 4 and b.B == 12 and metrics["logp_gap"] < 1e-9


class Repairs(Part):
    """Plays on from before the last turn of every failed row, and has the first row's verdict given anew."""

    stage = "expand"

    def __call__(self, b, ctx):
        failed = (b["correct_B"] == 0).nonzero().squeeze(1).tolist()
        jobs = []
        for row in failed:
            task, group, member = (int(b[name][row]) for name in ("task_B", "group_B", "member_B"))
            jobs.append(Job(task, group, member + 100, edit=Edit(parent=(group, member), turn=1)))
        first = Job(int(b["task_B"][0]), int(b["group_B"][0]), int(b["member_B"][0]), rescore=True)
        again = ctx.actor.play([first])
        assert torch.equal(again.tokens_BT[0], b.tokens_BT[0])
        return concat([b, ctx.actor.play(jobs)])


def test_an_edit_keeps_what_stands_before_it():
    loop = start(GRPO.replace(expand=(Repairs(),)))
    b, _ = loop.iterate()
    edited = (b["member_B"] >= 100).nonzero().squeeze(1)
    assert len(edited) > 0
    before = b["turn_BT"][0] < 1
    for row in edited.tolist():
        (parent,) = (
            (b["group_B"] == b["group_B"][row]) & (b["member_B"] == b["member_B"][row] - 100)
        ).nonzero()
        assert torch.equal(b.tokens_BT[row][before], b.tokens_BT[parent.item()][before])


class Judged(Part):
    """Asks a judge about every row; a failure is counted and is no answer."""

    stage = "reward"
    overwrites = frozenset({"reward_B"})

    def __call__(self, b, ctx):
        answers = ctx.actor.judge([Ask("grade", str(int(c)), row) for row, c in enumerate(b["correct_B"])])
        failed = [isinstance(answer, JudgeFailure) for answer in answers]
        ctx.log("judge_failures", sum(failed))
        return b.over(
            reward_B=torch.tensor([0.0 if f else float(a) for a, f in zip(answers, failed, strict=True)])
        )


def test_a_judge_that_fails_is_counted():
    learner = TableLearner(WORLD)
    actor = TableActor(WORLD, learner, answers={"1": "1.0"})
    b, metrics = Loop(GRPO.replace(reward=(Judged(),)), actor, learner, RunSize(4, 4, 8)).iterate()
    assert metrics["judge_failures"] == float((b["correct_B"] == 0).sum()) > 0
    assert torch.equal(b["reward_B"].double(), b["correct_B"])


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
