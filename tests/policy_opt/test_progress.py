"""Invariants of pipo: progress between iterations and the step back."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import policy_opt
from policy_opt import Ctx, Loop, RunSize
from policy_opt.advantages import GroupCentre, GroupNorm, groups
from policy_opt.progress import Progress, ProgressGate, Retrospect, progress
from policy_opt.table import TableActor, TableLearner
from tests.policy_opt.grouped import EARLY, call, close, per_group, quick, seeds, some
from tests.policy_opt.test_recipes import WORLD, gradients

means = st.lists(st.floats(0, 1), min_size=2, max_size=8)


@quick
@given(history=means, now=st.floats(0, 1), scale=st.floats(0.5, 2), shift=st.floats(-2, 2))
def test_progress(history, now, scale, shift):
    found = progress(history, now)
    if found.std > 1e-3 and found.std != 1.0:
        moved = progress([scale * x + shift for x in history], scale * now + shift)
        assert moved.xi == pytest.approx(found.xi, rel=1e-6, abs=1e-6)
    assert progress(history[:1], now).xi == pytest.approx(now - history[0])
    assert progress([now] * 5, now).xi == 0 and progress([now] * 5, now).std == 1
    assert progress([0.0], 9.0).xi == 5.0
    count = len(history)
    if found.std > 1e-3 and found.std != 1.0:
        sample = progress(history, now, "sample")
        assert sample.std == pytest.approx(found.std * (count / (count - 1)) ** 0.5)


@quick
@given(seed=seeds, xi=st.floats(-30, 30))
def test_attribution_and_coefficient(seed, xi):
    b = call(some(seed), GroupNorm())
    part = Retrospect()
    share_B = part.attribution(b)
    total = per_group(b, share_B.abs())
    varied = per_group(b, b["adv_B"].abs()) > 1e-3
    close(total[varied], groups(b).size_Q[varied], 1e-4)
    assert not total[~varied].any()
    centred = part.attribution(call(some(seed), GroupCentre()))
    close(centred, share_B, 1e-4, 1e-4)
    judged = part.judged(b, Progress(0.0, 1.0, xi))
    adv = judged["adv_B"]
    assert float(adv.abs().max()) <= 10
    assert torch.equal(adv.sign(), b["adv_B"].sign() * ((xi > 0) - (xi < 0)))
    assert judged["w_retrospect_B"].tolist() == [0.1 if xi < 0 else 1.0] * b.B
    gated = ProgressGate()
    assert -2 <= gated.gate(Progress(0.0, 1.0, xi)) <= 2


def test_retrospect_draws_only_what_it_may():
    b = call(some(1), GroupNorm())
    part, ctx = Retrospect(window=2, warmup=1, negative=0.0), Ctx()
    assert part.draw(b, ctx) is None
    part.observe(b, ctx)
    better, worse = (b.over(reward_B=b["reward_B"] + step) for step in (0.5, -0.5))
    assert part.draw(worse, ctx) is None
    drawn = part.draw(better, ctx)
    assert drawn is not None and ctx.metrics["progress"] == pytest.approx(0.5)
    assert ctx.state(part)["batch"] is b
    for _ in range(3):
        part.observe(b, ctx)
    assert len(ctx.state(part)["history"]) == 2


def test_the_retrospective_step_is_free_of_padding_split_and_order():
    recipe = policy_opt.get("pipo").set(EARLY)
    expected, metrics = gradients(recipe)
    assert [m["optimizer_steps"] for m in metrics] == [1, 2] and "progress" in metrics[1]
    found, again = gradients(recipe, pad=2, micro_rows=5, order=True)
    for a, b in zip(found, expected, strict=True):
        close(a["policy"], b["policy"], 1e-9, 1e-13)
    assert again[1] == pytest.approx(metrics[1], rel=1e-9, abs=1e-12)


def test_the_retrospective_step_resumes_exactly():
    recipe = policy_opt.get("pipo").set(EARLY)
    learner = TableLearner(WORLD)
    loop = Loop(recipe, TableActor(WORLD, learner), learner, RunSize(4, groups=3, group_size=4))
    for _ in range(3):
        loop.iterate()
    state, other = loop.state_dict(), copy.deepcopy(learner)
    again = Loop(recipe, TableActor(WORLD, other), other, RunSize(4, groups=3, group_size=4))
    again.load_state_dict(state)
    assert again.iterate()[1] == loop.iterate()[1]
    assert torch.equal(learner.tables["policy"], other.tables["policy"])


def test_pipo_before_its_window_is_full_is_its_base():
    """No retrospective step yet: GRPO's, as a token mean."""
    pipo, grpo = policy_opt.get("pipo"), policy_opt.get("grpo").set("terms.policy.agg=token_mean")
    for a, b in zip(gradients(pipo)[0], gradients(grpo)[0], strict=True):
        close(a["policy"], b["policy"], 1e-9, 1e-13)
