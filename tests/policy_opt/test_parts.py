"""Facts of credit, curriculum and controllers; options that no part takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy_opt import Batch, Ctx, Store
from policy_opt.advantages import GroupNorm
from policy_opt.aggregate import ConstantLength, SequenceMean
from policy_opt.controllers import Annealed, Dual
from policy_opt.credits import MIS, TIS, MaskTruncated
from policy_opt.curriculum import Mixed, Shuffled
from policy_opt.rewards import Overlong
from policy_opt.surrogates import Clip, SequenceClip
from tests.policy_opt.drawn import CTX, gradient, quick, random_batch, seeds, stream


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
        lambda: Clip(dual_clip=0.9),
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
