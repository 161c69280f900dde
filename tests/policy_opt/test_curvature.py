"""The last-layer probe of capo_curvature: facts of its specification on random batches, moments against Adam's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy_opt import Batch, Ctx, curvature
from policy_opt.advantages import GroupNorm
from policy_opt.curvature import Curvature, Moments, where_acted
from tests.policy_opt.test_token_credit import B, D, T, V, assert_same_step, get, quick, random_batch, seeds, stream


def probed(b: Batch, ctx: Ctx | None = None, **options) -> Batch:
    part = Curvature(**{"model": "sgd", "tau_f": 0.0, "tau_h": 0.0, "lr": 0.1, **options})
    return part(b if "adv_B" in b else GroupNorm(1e-4)(b, Ctx()), ctx or Ctx())


@quick
@given(seed=seeds, lr=st.floats(1e-3, 1.0))
def test_curvature(seed, lr):
    b, logp_BT = random_batch(seed), stream(seed)
    base = get("grpo", "advantage.eps=1e-4")
    wide = get("capo_curvature", "credit.tau_f=1e300", "credit.tau_h=1e300")
    assert_same_step(wide, base, b, logp_BT)
    found = probed(b, lr=lr)
    pi_BTV = b["top_logp_now_BTK"].softmax(-1)
    v_BTV = (b["top_ids_now_BTK"] == b.tokens_BT[..., None]).double() - pi_BTV
    v2_BT, h2_BT = v_BTV.square().sum(-1), b["hidden_now_BTD"].square().sum(-1)
    a2_B1 = found["adv_B"].square()[:, None]
    torch.testing.assert_close(found["gain_BT"], a2_B1 * v2_BT * h2_BT * b.mask_BT)
    torch.testing.assert_close(found["fisher_BT"], a2_B1 * (h2_BT * v2_BT).square() * b.mask_BT)
    assert (found["policy_shift_BT"] >= 0).all() and torch.equal(found.mask_BT, b.mask_BT)
    kept, fewer = (probed(b, lr=rate, tau_f=0.01).mask_BT for rate in (lr, 2 * lr))
    assert not (fewer & ~kept).any()


@quick
@given(seed=seeds)
def test_tokens_without_advantage_or_doubt_have_no_shift(seed):
    b = random_batch(seed)
    none = probed(b.over(reward_B=torch.ones(B)), tau_f=1e-9, tau_h=1e-9, low=0.0)
    assert not none["objective_shift_BT"].any() and torch.equal(none.mask_BT, b.mask_BT)
    sure = torch.full((B, T, V), -torch.inf, dtype=torch.float64)
    sure[..., 0] = 0.0
    found = probed(b.over(top_logp_now_BTK=sure, tokens_BT=b["top_ids_now_BTK"][..., 0].contiguous()))
    for name in ("gain_BT", "fisher_BT", "hessian_BT"):
        assert not found[name].any()


def test_the_moments_are_those_of_adam_on_the_head():
    """Every id in every top-k and one token: Adam's own moments after three steps, row by row."""
    weight = torch.nn.Parameter(torch.zeros(V, D, dtype=torch.float64))
    adam = torch.optim.Adam([weight], lr=0.1)
    part, ctx = Curvature(lr=0.1, tau_f=0.0, tau_h=0.0), Ctx()
    for seed in range(3):
        b = random_batch(seed, adv_B=torch.ones(B, dtype=torch.float64)).rows(torch.tensor([0]))
        b = b.over(mask_BT=torch.arange(T)[None] == 3)
        state = Moments.of(ctx.state(part), b["hidden_now_BTD"][0])
        found = part(b, ctx)
        if seed:
            # u is what Adam would do: <g, u> from its own formula.
            (n,) = part.tokens(b, where_acted(b))
            g_VD = n.rows_NV[0][:, None] * n.hidden_ND[0]
            m_VD, s_VD = state.look(n.ids_NV[0])
            m_VD, s_VD = (0.9 * m_VD + 0.1 * g_VD) / (1 - 0.9 ** (seed + 1)), 0.999 * s_VD + 0.001 * g_VD.square()
            u_VD = m_VD / ((s_VD / (1 - 0.999 ** (seed + 1))).sqrt() + 1e-8)
            assert float(found["gain_BT"].sum()) == pytest.approx(float((g_VD * u_VD).sum()))
        part.after_step(found, ctx)
        (n,) = part.tokens(b, where_acted(b))
        weight.grad = torch.zeros_like(weight).index_copy_(0, n.ids_NV[0], n.rows_NV[0][:, None] * n.hidden_ND[0])
        adam.step()
    state, theirs = ctx.state(part), adam.state[weight]
    assert state["t"] == 3 and state["ids"].tolist() == [0, 1, 2]
    torch.testing.assert_close(state["first"], theirs["exp_avg"])
    torch.testing.assert_close(state["second"], theirs["exp_avg_sq"])


def test_rows_of_the_head_without_a_gradient_keep_their_moments():
    ids = torch.tensor([3, 9])
    one = torch.ones(2, D)
    after = Moments(4, ids, one, one).stepped(torch.tensor([9, 5]), 2 * one, 0.9, 0.999)
    assert after.t == 5 and after.ids_M.tolist() == [3, 5, 9]
    assert after.first_MD[:, 0].tolist() == pytest.approx([1, 0.2, 1.1])
    assert after.second_MD[:, 0].tolist() == pytest.approx([1, 0.004, 1.003])
    empty = after.stepped(torch.zeros(0, dtype=torch.long), torch.zeros(0, D), 0.9, 0.999)
    assert empty.t == 6 and torch.equal(empty.first_MD, after.first_MD)


@quick
@given(seed=seeds, model=st.sampled_from(["sgd", "adam"]))
def test_how_many_tokens_are_held_at_once_changes_nothing(seed, model):
    found = []
    for held in (1, 7, curvature.CACHED):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(curvature, "CACHED", held)
            part, ctx = Curvature(model=model, lr=0.1, tau_f=0.01, tau_h=0.0), Ctx()
            for _ in range(2):
                b = GroupNorm(1e-4)(random_batch(seed), Ctx())
                part.after_step(part(b, ctx), ctx)
            found.append((part(b, ctx), ctx.state(part)))
    (one, moved), *others = found
    for b, state in others:
        for name in part.writes | {"mask_BT"}:
            torch.testing.assert_close(b[name], one[name])
        for name in moved:
            torch.testing.assert_close(state[name], moved[name])
