"""The published facts of StoSignSGD and of the sign conversion of any optimizer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy_opt import Optim
from policy_opt.optimizers.stosignsgd import Uniform, direction_of
from tests.policy_opt.stepping import fast, runs, stepped, tensor


@fast
@given(run=runs(), seed=st.integers(0, 99), name=st.sampled_from(("momentum", "adam", "rmsprop", "lion")))
def test_stosignsgd_steps_and_buffers(run, seed, name):
    theta, grads = run
    lr = 0.01
    optim = Optim("stosignsgd", direction=Optim(name))
    path, _ = stepped(optim, theta, grads, lr, seed)
    before = torch.cat([tensor([theta]), path[:-1]])
    moved = (path - before).abs()
    assert ((moved - lr).abs().minimum(moved) <= 1e-12).all()
    if name == "momentum":
        torch.testing.assert_close(path[0], tensor(theta) - lr * tensor(grads[0]).sign(), rtol=0, atol=1e-12)
    again = stepped(optim, theta, grads, lr, seed)[0]
    assert torch.equal(path, again)
    if name in ("momentum", "lion"):
        scaled = stepped(optim, theta, [[g * 2.0**20 for g in row] for row in grads], lr, seed)[0]
        assert torch.equal(path, scaled)
    still = [i for i in range(len(theta)) if not any(row[i] for row in grads)]
    assert (path[:, still] == tensor(theta)[still]).all()


def test_the_largest_direction_never_shrinks_unless_told_to():
    grads = [[1.0], [0.0], [0.0], [0.0]]
    for forget, expected in ((0.0, [1.0, 1.0, 1.0, 1.0]), (0.5, [1.0, 0.5, 0.25, 0.125])):
        found, seen = torch.nn.Parameter(tensor([0.0])), []
        stepper = Optim("stosignsgd", direction=Optim("momentum", betas=(0.0, 0.0)), forget=forget).build([found], 1.0)
        for grad in grads:
            found.grad = tensor(grad)
            stepper.step()
            seen.append(float(stepper.state[found]["max_buffer"]))
        assert seen == expected


def test_the_mean_sign_is_the_direction_over_its_largest():
    theta = torch.nn.Parameter(torch.zeros(20_000))
    stepper = Optim("stosignsgd", betas=(0.5, 0.0)).build([theta], 1.0, seed=3)
    theta.grad = torch.ones(20_000)
    stepper.step()
    before = theta.detach().clone()
    theta.grad = torch.full((20_000,), -0.2)  # m = 0.15, G = 0.5
    stepper.step()
    assert float((before - theta.detach()).mean()) == pytest.approx(0.3, abs=0.03)


def test_noise_is_a_function_of_seed_name_and_step():
    like = torch.zeros(4000)
    drawn = Uniform(1)("a", 0, like)
    assert torch.equal(drawn, Uniform(1)("a", 0, like))
    for other in (Uniform(2)("a", 0, like), Uniform(1)("b", 0, like), Uniform(1)("a", 1, like)):
        assert abs(float(torch.corrcoef(torch.stack([drawn, other]))[0, 1])) < 0.1
    assert drawn.min() >= -1 and drawn.max() <= 1 and abs(float(drawn.mean())) < 0.05
    state = torch.get_rng_state()
    Uniform(1)("a", 0, like)
    assert torch.equal(torch.get_rng_state(), state)


def test_replicas_agree_for_any_order_and_grouping():
    def replica(order, groups: bool):
        weights = {name: torch.nn.Parameter(torch.ones(3, 2)) for name in "abc"}
        named = [(name, weights[name]) for name in order]
        params = [{"params": named[:1]}, {"params": named[1:]}] if groups else named
        stepper = Optim("stosignsgd", direction=Optim("adam")).build(params, 0.1, seed=5)
        draw = torch.Generator().manual_seed(0)
        for _ in range(4):
            for weight in weights.values():
                weight.grad = torch.randn(3, 2, generator=draw)
            stepper.step()
        return weights

    first, second = replica("abc", False), replica("cab", True)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["a"], first["b"])


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "rmsprop", "nadam", "momentum", "lion"])
def test_the_converted_direction_is_the_inner_optimizer_s(name):
    """At rate 1 and from 0, over several steps: also for a state that goes through the conversion's."""
    inner = Optim(name)
    own, states = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)), [{}]
    optimizer = inner.build([own], 1.0)
    draw = torch.Generator().manual_seed(0)
    for _ in range(4):
        grad = torch.randn(4, generator=draw, dtype=torch.float64)
        before = own.detach().clone()
        own.grad = grad.clone()
        optimizer.step()
        (u,) = direction_of(inner, [grad], states, ["w"])
        torch.testing.assert_close(u, before - own.detach(), rtol=1e-9, atol=1e-12)
