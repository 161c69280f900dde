"""Facts of surrogates and aggregations, on random batches."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy_opt.advantages import GroupNorm
from policy_opt.aggregate import ConstantLength, SequenceMean, SequenceSum, TokenMean
from policy_opt.gates import CappedWeight
from policy_opt.surrogates import K3, Clip, ClippedValue, SequenceClip, SequenceTokenClip
from tests.policy_opt.drawn import CTX, gradient, quick, random_batch, seeds, stream

# -- surrogates -----------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_clip_gradients(seed):
    b = GroupNorm()(random_batch(seed), CTX)
    logp, count = stream(seed, b, 2.0), b.mask_BT.sum()
    clip = Clip(0.2, 0.3)
    found = gradient(clip, b, logp)
    rho = (logp - b["logp_old_BT"]).exp()
    adv = b.per_token("adv")
    off = ((adv > 0) & (rho > 1.3)) | ((adv < 0) & (rho < 0.8)) | ~b.mask_BT
    torch.testing.assert_close(found, torch.where(off, 0.0, -adv * rho / count))
    assert torch.equal(clip.report({"logp_BT": logp}, b)["clip_frac"] & b.mask_BT, off & b.mask_BT)
    at_start = gradient(clip, b, b["logp_old_BT"], SequenceMean())
    length_B1 = b.mask_BT.sum(1, keepdim=True)
    torch.testing.assert_close(at_start, torch.where(b.mask_BT, -adv / length_B1 / b.B, 0.0))


@quick
@given(seed=seeds, c=st.floats(1.1, 4.0))
def test_dual_clip(seed, c):
    b = GroupNorm()(random_batch(seed), CTX)
    logp = stream(seed, b, 4.0)
    rho, adv = (logp - b["logp_old_BT"]).exp(), b.per_token("adv")
    dual = Clip(0.2, 0.2, dual_clip=c)
    loss = dual({"logp_BT": logp}, b)
    assert bool((loss[(adv < 0) & b.mask_BT] <= -c * adv[(adv < 0) & b.mask_BT] + 1e-12).all())
    found = gradient(dual, b, logp)
    far = (adv < 0) & (rho > c) & b.mask_BT
    assert not found[far].any()
    assert torch.equal(dual.report({"logp_BT": logp}, b)["dual_clip_frac"] & b.mask_BT, far)


@quick
@given(seed=seeds)
def test_sequence_ratio(seed):
    b = GroupNorm()(random_batch(seed), CTX)
    logp = stream(seed, b)
    wide = SequenceClip(10.0, 10.0)
    found = gradient(wide, b, logp, SequenceMean())
    s_B = wide.rho({"logp_BT": logp}, b)
    expected_B = -b["adv_B"] * s_B / b.mask_BT.sum(1) / b.B
    torch.testing.assert_close(found, torch.where(b.mask_BT, expected_B[:, None], 0.0))
    token = gradient(SequenceTokenClip(0.05, 0.08), b, logp, SequenceMean())
    torch.testing.assert_close(token, gradient(SequenceClip(0.05, 0.08), b, logp, SequenceMean()))
    constant = b["logp_old_BT"] + 0.3
    torch.testing.assert_close(wide.rho({"logp_BT": constant}, b), torch.full((8,), math.exp(0.3)).double())


@quick
@given(seed=seeds)
def test_capped_weight_never_cuts_a_token_off(seed):
    b = GroupNorm()(random_batch(seed), CTX)
    logp = stream(seed, b, 3.0)
    found = gradient(CappedWeight(0.5, 0.28), b, logp) * b.mask_BT.sum()
    weight = found / -b.per_token("adv")
    inside = b.mask_BT & (b.per_token("adv") != 0)
    assert bool(((weight[inside] >= 0.5 - 1e-12) & (weight[inside] <= 1.28 + 1e-12)).all())


@quick
@given(seed=seeds)
def test_k3_is_zero_only_at_the_reference(seed):
    b = random_batch(seed)
    logp = stream(seed, b)
    assert bool((K3()({"logp_BT": logp}, b) >= 0).all())
    assert not K3()({"logp_BT": b["logp_ref_BT"]}, b).any()
    assert not gradient(K3(), b, b["logp_ref_BT"]).any()


def test_value_clip_bounds_the_way_back():
    b = random_batch(0, values_old_BT=torch.zeros(8, 6), returns_BT=torch.ones(8, 6))
    inside, beyond = torch.full((8, 6), 0.1), torch.full((8, 6), 0.5)
    loss = ClippedValue(value_clip=0.2)
    assert loss({"values_BT": inside}, b)[0, 0] == pytest.approx(0.5 * 0.9**2)
    assert loss({"values_BT": beyond}, b)[0, 0] == pytest.approx(0.5 * 0.8**2)


# -- aggregation ----------------------------------------------------------------------------------------


@quick
@given(seed=seeds)
def test_aggregations(seed):
    mask = random_batch(seed).mask_BT.double()
    mask[3] = 0
    for agg, total in ((TokenMean(), 1.0), (SequenceMean(), 1.0), (SequenceSum(), mask.sum() / 8)):
        assert float(agg.tokens(mask, mask).sum()) == pytest.approx(float(total))
    torch.testing.assert_close(SequenceMean().tokens(mask, mask).sum(1), SequenceMean().rows(mask, mask))
    torch.testing.assert_close(TokenMean().tokens(mask, mask).sum(1), TokenMean().rows(mask, mask))
    five, ten = (ConstantLength(n).tokens(mask, mask) for n in (5, 10))
    torch.testing.assert_close(five, 2 * ten)
    torch.testing.assert_close(five.sum(1), ConstantLength(5).rows(mask, mask))
    for agg in (TokenMean(), SequenceMean(), SequenceSum(), ConstantLength(4)):
        assert not agg.tokens(mask * 0, mask * 0).any()
