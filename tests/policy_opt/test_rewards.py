"""Facts of rewards: KL, length, tool calls."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy_opt import Batch, Ctx
from policy_opt.rewards import KLPenalty, Overlong, TokenReward
from policy_opt.tool_rewards import FewCalls, LeanCalls
from tests.policy_opt.drawn import CTX, quick, random_batch, seeds

# -- rewards --------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, beta=st.floats(0.01, 1.0))
def test_kl_in_the_reward(seed, beta):
    b = random_batch(seed)
    token = TokenReward(kl_beta=beta)(b, CTX)["token_reward_BT"]
    torch.testing.assert_close(token.sum(1), KLPenalty(kl_beta=beta)(b, CTX)["reward_B"])
    assert not token[~b.mask_BT].any()
    assert KLPenalty()(b, CTX) is b and not TokenReward().needs and len(KLPenalty(0.1).needs) == 2


@quick
@given(lengths=st.lists(st.integers(0, 40), min_size=8, max_size=8), cache=st.integers(0, 20))
def test_overlong_penalty(lengths, cache):
    b = random_batch(1, length_B=torch.tensor(lengths), reward_B=torch.zeros(8).double())
    penalty = Overlong(max_len=20, cache_len=cache, factor=0.5)(b, CTX)["overlong_B"]
    for length, found in zip(lengths, penalty.tolist(), strict=True):
        beyond = length - (20 - cache)
        expected = 0 if beyond <= 0 else -0.5 if length > 20 else -0.5 * beyond / cache
        assert found == pytest.approx(expected)


def test_overlong_counts_all_tokens_from_the_first_action():
    mask, real = torch.tensor([[0, 1, 0, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
    b = Batch.build(mask_BT=mask, real_BT=real, group_B=[0], reward_B=[0.0], length_B=[2])
    assert Overlong(4, 4, length_of="all")(b, CTX)["overlong_B"].item() == pytest.approx(-1.0)
    assert Overlong(4, 4)(b, CTX)["overlong_B"].item() == pytest.approx(-0.5)


# -- tool calls -----------------------------------------------------------------------------------------


def played(calls, right, task=0, reward=None) -> Batch:
    right = torch.tensor(right, dtype=torch.float64)
    rows = {"reward_B": right if reward is None else torch.tensor(reward).double(), "correct_B": right}
    tasks = torch.full((len(calls),), task)
    return Batch.build(
        mask_BT=torch.ones(len(calls), 1), group_B=tasks, tool_calls_B=torch.tensor(calls), **rows
    )


@quick
@given(n=st.integers(1, 9), m=st.integers(1, 9))
def test_otc_coefficient(n, m):
    ctx, part = Ctx(), LeanCalls(c=4.0)
    part.store(ctx).put(0, n)

    def r(calls: float) -> float:
        return part(played([calls], [0]), ctx)["r_tool_B"].item()

    assert r(n) == pytest.approx(1.0) and 0 <= r(m) <= 1
    assert r(m) == pytest.approx(math.sin(math.pi * m / (m + n)))
    assert r(2 * n) == pytest.approx(math.sin(2 * math.pi / 3)) and r(3 * n) == pytest.approx(math.sqrt(0.5))
    assert r(n + m) < r(n + m - 1)
    assert r(n * n / m) == pytest.approx(r(m))


def test_otc_without_a_needed_call_is_the_cosine_of_otc_ppo():
    b = played([0, 1, 4, 9], [1, 1, 1, 1])
    grpo, ppo = LeanCalls(c=4.0)(b, Ctx()), FewCalls(c=4.0)(b, Ctx())
    torch.testing.assert_close(grpo["reward_B"], ppo["reward_B"])
    assert grpo["r_tool_B"][2].item() == pytest.approx(0.5)


@quick
@given(data=st.data())
def test_otc_store_never_rises_and_survives_a_round_trip(data):
    from policy_opt.state import decode, encode

    ctx, part = Ctx(), LeanCalls()
    lowest = math.inf
    for _ in range(4):
        calls = data.draw(st.lists(st.integers(0, 6), min_size=3, max_size=3))
        right = data.draw(st.lists(st.integers(0, 1), min_size=3, max_size=3))
        part.observe(part(played(calls, right, task=5), ctx), ctx)
        lowest = min([lowest, *(c for c, ok in zip(calls, right, strict=True) if ok)])
        assert part.store(ctx).get(5) == (None if lowest == math.inf else lowest)
        ctx.states = decode(encode(ctx.states))
    group_only = LeanCalls(persist=False)(played([3, 2], [1, 0], task=5), ctx)
    assert group_only["calls_needed_B"].tolist() == [3.0, 3.0]


def test_otc_never_pays_for_calls_on_failures():
    b = played([0, 4], [0, 0], reward=[-1.0, -1.0])
    for part in (LeanCalls(alpha=2.0), FewCalls(alpha=2.0)):
        assert part(b, Ctx())["reward_B"].tolist() == [-2.0, -2.0]
    ctx = Ctx()
    LeanCalls()(played([0, 0], [1, 1]), ctx)
    assert ctx.metrics == {"mean_tool_calls": 0.0}
