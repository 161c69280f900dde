"""Invariants of riskpo: bundles, papers and tracked quantiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy_opt import Ctx
from policy_opt.bundles import Bundle, PaperScore, ShareOut, TailRisk, quantile
from tests.policy_opt.grouped import call, close, quick, seeds, some

edges = st.floats(0, 4)


@quick
@given(low=edges, gap=st.floats(0.01, 3), omega=st.floats(0, 2), scale=st.floats(0.1, 3), shift=st.floats(-2, 2))
def test_risk_advantage_is_a_concave_ramp(low, gap, omega, scale, shift):
    s = torch.linspace(-1, 8, 200).double()
    a, b = (torch.tensor(x).double().expand_as(s) for x in (low, low + gap))
    part = TailRisk(omega=omega)
    adv = part.weigh(s, a, b)
    assert (adv <= 1e-12).all() and (adv[s >= low + gap] > -1e-12).all() and (adv[s < low + gap - 1e-6] < 0).all()
    slope = adv.diff() / s.diff()
    assert (slope >= -1e-9).all()
    close(slope[s[1:] <= low], (1 + omega) + 0 * slope[s[1:] <= low], 1e-6)
    inside = (s[:-1] >= low) & (s[1:] <= low + gap)
    close(slope[inside], torch.ones_like(slope[inside]), 1e-6)
    close(part.weigh(s + shift, a + shift, b + shift), adv, 1e-6, 1e-8)
    close(part.weigh(s * scale, a * scale, b * scale), adv * scale, 1e-6, 1e-8)
    # Mean objective: the edges outside all scores.
    out = TailRisk(omega=0.0).weigh(s, torch.full_like(s, -1.0), torch.full_like(s, 8.0))
    close(out, s - 8)
    plain = TailRisk(form="paper", omega=omega, natural=False).weigh(s, a, b)
    close(plain, adv - (a - b))
    seeking = TailRisk(form="seeking").weigh(s, a, b)
    assert (seeking.diff() >= -1e-9).all()


@quick
@given(seed=seeds, size=st.integers(1, 4))
def test_every_response_is_in_one_paper(seed, size):
    b = some(seed)
    for permute in (True, False):
        found = call(b, Bundle(size), PaperScore(permute))
        paper, bundle, group = (found[x].tolist() for x in ("paper_B", "bundle_B", "group_B"))
        assert len(set(bundle)) == -(-len(set(group)) // size)
        for d in set(bundle):
            questions = {g for g, x in zip(group, bundle, strict=True) if x == d}
            fewest = min(group.count(q) for q in questions)
            inside = {p for p, x in zip(paper, bundle, strict=True) if x == d and p >= 0}
            assert len(inside) == fewest
            for p in inside:
                rows = [i for i in range(b.B) if paper[i] == p]
                assert sorted(group[i] for i in rows) == sorted(questions)
                assert float(found["paper_score_B"][rows[0]]) == pytest.approx(float(b["reward_B"][rows].sum()))
        risk = call(found, TailRisk())
        assert not risk["adv_B"][found["paper_B"] < 0].any() and (risk["adv_B"] <= 1e-12).all()
        shared = call(risk, ShareOut("sum_mean"))
        for p in {p for p in paper if p >= 0}:
            rows = [i for i in range(b.B) if paper[i] == p]
            assert float(shared["adv_B"][rows].sum()) == pytest.approx(float(risk["adv_B"][rows[0]]), abs=1e-6)


def test_papers_are_dealt_by_group_and_run():
    b = call(some(2, sizes=(6, 6, 6)), Bundle(3))
    same = PaperScore()
    assert torch.equal(same(b, Ctx(seed=1))["paper_B"], same(b, Ctx(seed=1))["paper_B"])
    assert not torch.equal(same(b, Ctx(seed=1))["paper_B"], same(b, Ctx(seed=2))["paper_B"])


@quick
@given(seed=seeds, level=st.floats(0, 1))
def test_quantiles(seed, level):
    g = torch.Generator().manual_seed(seed)
    value, unit = torch.rand(12, generator=g).double(), torch.randint(0, 3, (12,), generator=g)
    for u, found in enumerate(quantile(value, unit, 4, level).tolist()):
        own = value[unit == u]
        assert found == pytest.approx(float(own.quantile(level)) if own.numel() else 0.0)


def test_tracked_quantiles():
    """The first batch's quantiles, then steps of at most `rate` towards the level; one tracker per size."""
    b = call(some(4, sizes=(3, 3, 3)), Bundle(2), PaperScore())
    part, ctx = TailRisk(rate=0.1, levels=(0.1, 0.5, 0.9)), Ctx()
    first = part(b, ctx)
    part.observe(first, ctx)
    assert set(ctx.state(part)) == {"1", "2"}
    scores = b["paper_score_B"][b["bundle_B"] == 1].double()
    assert ctx.state(part)["1"][1].tolist() == [0.5, pytest.approx(float(scores.quantile(0.5)))]
    before = ctx.state(part)["2"].clone()
    assert float(first["quantile_low_B"][b["bundle_B"] == 0][0]) == pytest.approx(float(before[0, 1]))
    part.observe(part(b, ctx), ctx)
    moved = ctx.state(part)["2"][:, 1] - before[:, 1]
    assert (moved.abs() <= 0.1).all()
    ctx.state(part)["1"] = torch.tensor([[0.5, 1.0]]).double()
    even = some(0, sizes=(4,)).over(reward_B=torch.tensor([0.0, 0, 2, 2]).double())
    part.observe(part(call(even, Bundle(1), PaperScore()), ctx), ctx)
    assert ctx.state(part)["1"].tolist() == [[0.5, 1.0]]  # half of the scores lie below: the fixed point


def test_a_bundle_without_spread():
    even = some(0, sizes=(4,)).over(reward_B=torch.ones(4).double())
    ctx, part = Ctx(), TailRisk(form="release", normalise=True)
    ctx.state(part)["1"] = torch.tensor([[0.2, 2.0], [0.8, 3.0]]).double()
    b = call(even, Bundle(1), PaperScore())
    assert float(part(b, ctx)["adv_B"].abs().max()) < 10
    bare = replace(part, floor=0.0)
    ctx.state(bare)["1"] = ctx.state(part)["1"]
    assert float(bare(b, ctx)["adv_B"].abs().max()) > 1e5
