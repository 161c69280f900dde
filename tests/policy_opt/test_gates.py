"""Facts of FiberPO's Invariants, and the gates' part in recipes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import policy_opt
from policy_opt import Batch, RecipeError
from policy_opt.aggregate import SequenceMean
from policy_opt.credits import EqualGroups
from policy_opt.gates import Fiber, FiberDomain, Gated, PrefixState, StateBudget
from policy_opt.surrogates import Reinforce
from tests.policy_opt.drawn import CTX, gradient, seeds
from tests.policy_opt.test_trust import close, drift, quick, report, scales, value, with_advantage

GATES = (Fiber(), FiberDomain(domain="level_B"), StateBudget())


def fibred(seed: int) -> Batch:
    b = with_advantage(seed)
    return PrefixState()(b.put(level_B=(b["group_B"] > 2).long()), CTX)


@quick
@given(seed=seeds)
def test_gates_are_the_identity_on_policy(seed):
    b = fibred(seed)
    for gate in GATES:
        assert torch.equal(report(Gated(gate), b, b["logp_old_BT"])["gated_ratio"], torch.ones(8, 6).double())
        close(gradient(Gated(gate), b, b["logp_old_BT"]), gradient(Reinforce(), b, b["logp_old_BT"]))


@quick
@given(seed=seeds, scale=scales)
def test_fiber_bounds_and_pass_through(seed, scale):
    b = fibred(seed)
    logp = drift(seed, b, scale)
    gate = Fiber(eps=0.04, c_plus=0.12, c_minus=0.05)
    found = report(Gated(gate), b, logp)
    assert found["log_fiber_residual"].abs().max() <= 0.08 + 1e-12
    assert found["log_base_weight"].max() <= 0.12 + 1e-12 and found["log_base_weight"].min() >= -0.05 - 1e-12
    mean_B = ((logp - b["logp_old_BT"]) * b.mask_BT).sum(1) / b.mask_BT.sum(1)
    close(found["log_s_plus"] - found["log_s_minus"], mean_B)
    wide = report(Gated(Fiber(eps=50.0, c_plus=50.0, c_minus=50.0)), b, logp)
    close(wide["gated_ratio"] * b.mask_BT, wide["ratio"] * b.mask_BT)


@quick
@given(seed=seeds, scale=scales)
def test_fiber_jacobian_is_the_papers(seed, scale):
    """Eq. 20, which also says that trajectories do not meet."""
    b, gate = fibred(seed), Fiber(eps=0.1, c_plus=0.12, c_minus=0.05)
    log = ((drift(seed, b, scale) - b["logp_old_BT"]) * b.mask_BT).requires_grad_()
    gated = gate(log, b)
    i, t = (int(x) for x in b.mask_BT.nonzero()[seed % int(b.mask_BT.sum())])
    (found,) = torch.autograd.grad(gated[i, t], log)
    plus, minus, length = log[i].clamp(min=0).sum(), (-log[i]).relu().sum(), int(b.mask_BT[i].sum())
    s = {1: float(plus.detach()) / length, -1: float(minus.detach()) / length}
    slope = {}
    for sign, budget in ((1, 0.12), (-1, 0.05)):
        inside = s[sign] <= budget
        slope[sign] = 1 if inside else -length if s[sign] < (1 + 1 / length) * budget else 0
    side = [1 if float(x) >= 0 else -1 for x in log[i].detach()]
    u = side[t] * float(log[i, t].detach()) - s[side[t]]
    near_u, near_v = abs(u) <= 0.1, s[-side[t]] <= 0.1
    expected = torch.zeros_like(found)
    for j in b.mask_BT[i].nonzero().flatten().tolist():
        same = side[j] == side[t]
        shared = slope[side[j]] - (near_u if same else near_v)
        expected[i, j] = float(gated[i, t].detach()) * (near_u * (j == t) + shared / length)
    close(found * b.mask_BT, expected)


@quick
@given(seed=seeds, scale=scales)
def test_one_trajectory_is_its_own_group_and_domain(seed, scale):
    b = fibred(seed).over(group_B=torch.arange(8), level_B=torch.arange(8))
    logp = drift(seed, b, scale)
    close(gradient(Gated(FiberDomain()), b, logp), gradient(Gated(Fiber()), b, logp))


@quick
@given(seed=seeds, scale=scales)
def test_domains_do_not_meet_and_empty_rows_do_not_count(seed, scale):
    b, logp = fibred(seed), drift(seed, fibred(seed), scale)
    gate, other = FiberDomain(), b["level_B"] == 1
    log = (logp - b["logp_old_BT"]) * b.mask_BT
    moved = torch.where(other[:, None], log * 2, log)
    close(gate(log, b)[~other], gate(moved, b)[~other])
    keep = torch.arange(8) != seed % 8
    some = b.rows(keep.nonzero().squeeze(1))
    close(gate(log, b.silence(keep))[keep], gate(log[keep], some))
    assert gate.facts == {"level_B"} and FiberDomain(domain="task_B").facts == {"task_B"}


@quick
@given(seed=seeds, scale=scales, delta=st.floats(0.01, 0.5))
def test_a_state_visited_once_is_clipped_alone(seed, scale, delta):
    b = fibred(seed).over(state_BT=torch.arange(48).reshape(8, 6))
    logp, part = drift(seed, b, scale), Gated(StateBudget(delta=delta))
    found = report(part, b, logp)
    close(found["gated_ratio"] * b.mask_BT, found["ratio"].clamp(1 - delta, 1 + delta) * b.mask_BT)
    shared = report(part, b.over(state_BT=torch.zeros(8, 6).long()), logp)
    away, count = ((found["ratio"] - 1).abs() * b.mask_BT), int(b.mask_BT.sum())
    close(shared["budget"] * b.mask_BT, (count * delta - away.sum() + away) * b.mask_BT)


def test_a_state_is_task_and_prefix():
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4], [2, 1, 3], [1, 2, 3]])
    b = Batch.build(mask_BT=torch.ones(4, 3), group_B=[0, 0, 0, 1], tokens_BT=tokens)
    state = PrefixState()(b, CTX)["state_BT"]
    same = (state[:, None] == state[None]).all(2)
    assert same[0].tolist() == [True, True, False, False]
    assert state[0, 0] == state[2, 0] and state[0, 2] != state[2, 2] and len(state.unique()) == 8


@quick
@given(seed=seeds)
def test_equal_groups_gives_the_mean_of_group_means(seed):
    b = EqualGroups()(with_advantage(seed), CTX)
    loss = value(Gated(), b, drift(seed, b, 0.1), SequenceMean())
    rows = (Gated()({"logp_BT": drift(seed, b, 0.1)}, b) * b.mask_BT).sum(1) / b.mask_BT.sum(1)
    means = [rows[b["group_B"] == g].mean() for g in b["group_B"].unique()]
    assert loss == pytest.approx(float(torch.stack(means).mean()))


def test_gates_in_recipes():
    get = policy_opt.get
    get("grpo").set("terms.policy.loss=gated(gate=fiber(eps=0.1))").check()
    with pytest.raises(RecipeError, match="reads the fact `level_B`, which the environment does not deliver"):
        get("fiberpo").set("variant=domain").check(())
    get("fiberpo").set("variant=domain").check()
    with pytest.raises(RecipeError, match="`state_BT`, which nothing before it writes"):
        get("fiberpo").set("terms.gate=state_budget()").check()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Fiber(eps=-0.1),
        lambda: FiberDomain(group_budgets=(0.1, -0.1)),
        lambda: StateBudget(delta=-1.0),
    ],
)
def test_impossible_budgets_are_refused(wrong):
    with pytest.raises(ValueError, match="widths >= 0"):
        wrong()
