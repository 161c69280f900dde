"""Optimizers: golden numbers, plain Python beside them, the published facts of Lion and Lion-K."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy_opt import Optim, conformance
from policy_opt.optimizers import METHODS, Stepper
from policy_opt.optimizers.kappa import L1, L2, HalfSq, Huber, L1Threshold, Lp, Topk
from policy_opt.optimizers.stosignsgd import Uniform
from tests.policy_opt.stepping import (
    CONTENT,
    KAPPAS,
    NORMS,
    VECTORS,
    betas,
    decays,
    fast,
    numbers,
    rates,
    runs,
    stepped,
    tensor,
)

# -- golden numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_golden_numbers(method):
    result = conformance.compare(CONTENT[method])
    assert result.misses == []
    assert result.errors.keys() == {name for case in CONTENT[method]["cases"] for name in case["outputs"]}


@pytest.mark.parametrize("method", METHODS)
def test_a_perturbed_direction_is_noticed(method, monkeypatch):
    step = Stepper._step

    def perturbed(self, group, number):
        inner = self.direction
        self.direction = lambda *given: [d * 1.001 for d in inner(*given)]
        step(self, group, number)
        self.direction = inner

    monkeypatch.setattr(Stepper, "_step", perturbed)
    assert conformance.compare(CONTENT[method]).misses


def test_command_and_its_refusals(tmp_path, capsys):
    assert conformance.main([str(VECTORS / f"{name}.json") for name in METHODS]) == 0
    assert "sign_update" in capsys.readouterr().out
    for method, change, said in (
        ("lion", {"beta3": 1}, "unknown param `beta3`; did you mean"),
        ("lion_k", {"kappa": "l3"}, "unknown kappa part `l3`"),
        ("lion_k", {"kappa": "l1", "e": 0.1}, "unexpected keyword argument 'e'"),
        ("lion_k", {"kappa": "lp", "p": 1.0}, "p must be above 1"),
        ("stosignsgd", {"base": "rprop"}, "neither momentum nor adam"),
    ):
        content = copy.deepcopy(CONTENT[method])
        content["cases"][0]["params"].update(change)
        (tmp_path / "x.json").write_text(json.dumps(content))
        assert conformance.main([str(tmp_path / "x.json")]) == 1
        assert said in capsys.readouterr().out


# -- plain Python beside them ---------------------------------------------------------------------------


def sign(x: float) -> float:
    return float((x > 0) - (x < 0))


def plain_gradient(kappa, z: list[float]) -> list[float]:
    if isinstance(kappa, L2 | Lp):
        p = kappa.p if isinstance(kappa, Lp) else 2.0
        norm = sum(abs(x) ** p for x in z) ** (1 / p)
        return [sign(x) * (abs(x) / norm) ** (p - 1) if norm else 0.0 for x in z]
    if isinstance(kappa, L1Threshold):
        return [sign(x) if abs(x) > kappa.e else 0.0 for x in z]
    if isinstance(kappa, Huber):
        return [min(max(x / kappa.e, -1.0), 1.0) for x in z]
    if isinstance(kappa, Topk):
        chosen = sorted(range(len(z)), key=lambda i: (-abs(z[i]), i))[: kappa.k]
        return [sign(x) if i in chosen else 0.0 for i, x in enumerate(z)]
    return z if isinstance(kappa, HalfSq) else [sign(x) for x in z]


@fast
@given(run=runs(), lr=rates, decay=decays, beta=betas, kappa=st.sampled_from(KAPPAS[:-1]))
def test_lion_k_is_its_equations(run, lr, decay, beta, kappa):
    theta, grads = run
    found, _ = stepped(Optim("lion_k", betas=beta, weight_decay=decay, kappa=kappa), theta, grads, lr)
    memory = [0.0] * len(theta)
    for row, grad in zip(found.tolist(), grads, strict=True):
        z = [beta[0] * m + (1 - beta[0]) * g for m, g in zip(memory, grad, strict=True)]
        d = plain_gradient(kappa, z)
        theta = [(1 - lr * decay) * t - lr * x for t, x in zip(theta, d, strict=True)]
        memory = [beta[1] * m + (1 - beta[1]) * g for m, g in zip(memory, grad, strict=True)]
        assert row == pytest.approx(theta, rel=1e-9, abs=1e-12)


@fast
@given(run=runs(), lr=rates, decay=decays, beta=betas, adam=st.booleans(), seed=st.integers(0, 9))
def test_stosignsgd_is_its_equations(run, lr, decay, beta, adam, seed):
    """With its own noise; adam as in the paper of Adam, momentum as a moving average."""
    theta, grads = run
    inner = Optim("adam", betas=beta, eps=1e-8) if adam else Optim("momentum", betas=beta)
    found, _ = stepped(Optim("stosignsgd", weight_decay=decay, direction=inner), theta, grads, lr, seed)
    m, v, largest = ([0.0] * len(theta) for _ in range(3))
    for k, (row, grad) in enumerate(zip(found.tolist(), grads, strict=True)):
        noise = Uniform(seed)("w", k, tensor(grad)).tolist()
        m = [beta[0] * a + (1 - beta[0]) * g for a, g in zip(m, grad, strict=True)]
        v = [beta[1] * a + (1 - beta[1]) * g * g for a, g in zip(v, grad, strict=True)]
        c, d = 1 - beta[0] ** (k + 1), 1 - beta[1] ** (k + 1)
        u = [a / c / (math.sqrt(b / d) + 1e-8) for a, b in zip(m, v, strict=True)] if adam else m
        largest = [max(a, abs(b)) for a, b in zip(largest, u, strict=True)]
        s = [sign(a + b * n) for a, b, n in zip(u, largest, noise, strict=True)]
        theta = [t - lr * x - lr * decay * t for t, x in zip(theta, s, strict=True)]
        assert row == pytest.approx(theta, rel=1e-9, abs=1e-12)


def test_decoupled_decay_follows_the_schedule_not_the_base_rate():
    outputs = {}
    for lr in (0.1, 0.01):
        params = {"lr": lr, "weight_decay": 0.2, "decoupled": True, "lr_schedule": [lr, lr / 2, 0.0]}
        path = METHODS["lion"].golden({"theta0": [2.0], "grads": [[0.0]] * 3}, params)["theta"]
        outputs[lr] = [row[0] for row in path]
    assert outputs[0.1] == pytest.approx(outputs[0.01])
    assert outputs[0.1] == pytest.approx([2 * 0.8, 2 * 0.8 * 0.9, 2 * 0.8 * 0.9])


# -- the facts of Lion ----------------------------------------------------------------------------------


@fast
@given(run=runs(), decay=decays, beta=betas)
def test_lion_moves_every_coordinate_by_the_rate(run, decay, beta):
    theta, grads = run
    lr = 0.01
    found, stepper = stepped(Optim("lion", betas=beta, weight_decay=decay), theta, grads, lr)
    before = torch.cat([tensor([theta]), found[:-1]])
    moved = (found - (1 - lr * decay) * before).abs()
    assert ((moved - lr).abs().minimum(moved) <= 1e-12).all()
    first = -lr * tensor(grads[0]).sign() + (1 - lr * decay) * tensor(theta)
    torch.testing.assert_close(found[0], first, rtol=1e-12, atol=1e-12)
    same, other = stepped(Optim("lion_k", betas=beta, weight_decay=decay, kappa=L1()), theta, grads, lr)
    assert torch.equal(found, same)
    for a, b in zip(stepper.state.values(), other.state.values(), strict=True):
        assert torch.equal(a["exp_avg"], b["exp_avg"])


@fast
@given(run=runs(), power=st.sampled_from((-40, -3, 3, 40)), kappa=st.sampled_from(NORMS))
def test_norms_do_not_see_the_scale_of_gradients(run, power, kappa):
    """Also far outside the range in which squares are representable; powers of two, so that no bit is lost."""
    theta, grads = run
    optim = Optim("lion_k", betas=(0.5, 0.75), kappa=kappa)
    big = [[g * 2.0 ** (10 * power) for g in row] for row in grads]
    a, b = stepped(optim, theta, grads, 0.1)[0], stepped(optim, theta, big, 0.1)[0]
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_lion_without_rate_or_gradient():
    theta, state = stepped(Optim("lion", weight_decay=1.0), [1.0, -2.0], [[1.0, 0.0]], 0.0)
    assert theta.tolist() == [[1.0, -2.0]]
    (entry,) = state.state.values()
    assert entry["exp_avg"].tolist() == pytest.approx([0.01, 0.0])
    loose, tied = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    stepper = Optim("lion", weight_decay=1.0).build([loose, tied], 0.1)
    tied.grad = torch.zeros(2)
    stepper.step()
    assert torch.equal(loose, torch.ones(2)) and torch.allclose(tied, torch.full((2,), 0.9))
    assert loose not in stepper.state


# -- the facts of Lion-K --------------------------------------------------------------------------------


@fast
@given(data=st.data(), kappa=st.sampled_from(KAPPAS))
def test_gradients_are_sub_gradients_with_dual_norm_one(data, kappa):
    shape = data.draw(st.sampled_from(((3,), (2, 3), (2, 2, 2), (1,))))
    size = math.prod(shape)
    z, y = (tensor(data.draw(st.lists(numbers, min_size=size, max_size=size))).view(shape) for _ in range(2))
    (gradient,) = kappa.gradient([z])
    assert gradient.shape == z.shape
    slack = kappa.value(y) - kappa.value(z) - (gradient * (y - z)).sum()
    assert slack >= -1e-9 * (1 + kappa.value(y).abs() + kappa.value(z).abs())
    if kappa in NORMS:
        dual = float(kappa.dual(gradient))
        assert dual == pytest.approx(1.0 if z.abs().max() > 0 else 0.0, abs=1e-9)
        assert float((gradient * z).sum()) == pytest.approx(float(kappa.value(z)), rel=1e-9, abs=1e-9)
    zero = kappa.gradient([torch.zeros(shape, dtype=torch.float64)])[0]
    assert not zero.any()


@fast
@given(run=runs(), share=st.sampled_from((0.05, 0.5, 1.0)), kappa=st.sampled_from(KAPPAS))
def test_the_distance_to_the_bound_shrinks(run, share, kappa):
    """max(dual(theta) - 1/lambda, 0) falls by (1 - lr lambda) per step at least, whatever the gradients."""
    if kappa == HalfSq():
        return
    theta, grads = run
    decay = 2.0
    path, _ = stepped(
        Optim("lion_k", weight_decay=decay, kappa=kappa), [5 * t for t in theta], grads, share / decay
    )
    outside = [
        max(float(kappa.dual(row)) - 1 / decay, 0.0) for row in (tensor([5 * t for t in theta]), *path)
    ]
    for before, after in itertools.pairwise(outside):
        assert after <= (1 - share) * before + 1e-9


@fast
@given(run=runs())
def test_huber_tends_to_l1(run):
    theta, grads = run
    grads = [[g if abs(g) > 0.01 else 0.0 for g in row] for row in grads]
    huber, l1 = (
        stepped(Optim("lion_k", betas=(0.0, 0.5), kappa=k), theta, grads, 0.1)[0] for k in (Huber(1e-9), L1())
    )
    torch.testing.assert_close(huber, l1)


def test_topk_takes_the_first_of_equals_in_a_large_tensor():
    z = torch.ones(1000)
    z[500] = 2.0
    (gradient,) = Topk(3).gradient([-z])
    assert gradient.nonzero().flatten().tolist() == [0, 1, 500] and gradient.sum() == -3
