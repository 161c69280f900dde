"""What parts ask of learner and actor: quantities under views, edits, hints, judges."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from policy_opt import Ask, Edit, Job, JudgeFailure, Loop, ModelSpec, Need, Part, RecipeError, RunSize, concat
from policy_opt.need import (
    LOGP_REF,
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
from policy_opt.table import TableActor, TableLearner
from tests.policy_opt.running import GRPO, WORLD, start

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
