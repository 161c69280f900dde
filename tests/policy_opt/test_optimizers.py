"""Optimizers of policy_opt: golden numbers, plain Python beside them, the published facts, resume, training."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import policy_opt
from policy_opt import Loop, Optim, RecipeError, RunSize, conformance
from policy_opt.bank import OURS, torch_optimizers
from policy_opt.optimizers import METHODS, Stepper, build
from policy_opt.optimizers.kappa import L1, L2, HalfSq, Huber, L1Threshold, Lp, Nuclear, Topk
from policy_opt.optimizers.stosignsgd import Uniform, direction_of
from policy_opt.options import part
from policy_opt.table import TableActor, TableLearner, World, episodes

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
CONTENT = {name: json.loads((VECTORS / f"{name}.json").read_text()) for name in METHODS}
KAPPAS = (L1(), L2(), Lp(1.5), Lp(4.0), L1Threshold(0.1), L1Threshold(0.0), Huber(0.2), Topk(2), HalfSq(), Nuclear())
NORMS = (L1(), L2(), Lp(1.5), Lp(4.0), Topk(2), Nuclear())

numbers = st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3))
rates = st.sampled_from((0.0, 1e-3, 0.1))
decays = st.sampled_from((0.0, 0.1, 5.0))
betas = st.tuples(st.sampled_from((0.0, 0.5, 0.9)), st.sampled_from((0.0, 0.6, 0.99)))


def runs(least: int = 1):
    """(theta0 [D], grads [S, D]), with exact zeros and ties among them."""
    return st.tuples(st.integers(least, 5), st.integers(1, 5)).flatmap(
        lambda size: st.tuples(
            st.lists(numbers, min_size=size[0], max_size=size[0]),
            st.lists(st.lists(numbers, min_size=size[0], max_size=size[0]), min_size=size[1], max_size=size[1]),
        )
    )


fast = settings(max_examples=40, deadline=None)


def tensor(values, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def stepped(optim: Optim, theta0, grads, lr: float, seed: int = 0) -> tuple[torch.Tensor, Stepper]:
    """(theta after every step [S, D], the stepper)."""
    theta = torch.nn.Parameter(tensor(theta0))
    stepper = optim.build([("w", theta)], lr, seed)
    path = []
    for grad in grads:
        theta.grad = tensor(grad)
        stepper.step()
        path.append(theta.detach().clone())
    return torch.stack(path), stepper


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


# -- the facts of StoSignSGD ----------------------------------------------------------------------------


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


# -- state ----------------------------------------------------------------------------------------------

RULES = (
    "lion(weight_decay=0.1)",
    "lion(decoupled=True, weight_decay=0.01)",
    "lion_k(kappa=huber(e=0.001))",
    "lion_k(kappa=nuclear)",
    "stosignsgd",
    "stosignsgd(direction=adam(eps=1e-6), forget=0.1)",
    "stosignsgd(direction=lion_k(kappa=l2))",
    "momentum(lr_scale=3)",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_state_goes_through_a_file(rule, dtype):
    def fresh():
        weights = [torch.nn.Parameter(torch.ones(3, 2, dtype=dtype)), torch.nn.Parameter(torch.ones(4, dtype=dtype))]
        return weights, part("optimizer", rule).build(list(zip("ab", weights, strict=True)), 0.1, seed=2)

    def steps(weights, stepper, first, count):
        for k in range(first, first + count):
            draw = torch.Generator().manual_seed(k)
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=draw).to(dtype)
            stepper.step()

    weights, stepper = fresh()
    steps(weights, stepper, 0, 3)
    buffer = io.BytesIO()
    torch.save((list(map(torch.clone, weights)), stepper.state_dict()), buffer)
    steps(weights, stepper, 3, 3)
    buffer.seek(0)
    saved, state = torch.load(buffer, weights_only=True)
    others, resumed = fresh()
    with torch.no_grad():
        for other, value in zip(others, saved, strict=True):
            other.copy_(value)
    resumed.load_state_dict(state)
    steps(others, resumed, 3, 3)
    for a, b in zip(weights, others, strict=True):
        assert torch.equal(a, b)
        for name, value in stepper.state[a].items():
            assert torch.equal(value, resumed.state[b][name]) and value.dtype == resumed.state[b][name].dtype
            assert value.dtype != torch.bfloat16


# -- with recipes ---------------------------------------------------------------------------------------

WORLD = World(tasks=4, turns=2, actions=2)


def training(spec: str):
    learner = TableLearner(WORLD)
    recipe = policy_opt.get("grpo").set(f"optimizer={spec}")
    return learner, Loop(recipe, TableActor(WORLD, learner), learner, RunSize(4, groups=4, group_size=8, seed=1))


@pytest.mark.parametrize(
    "spec",
    [
        "lion(lr=0.1)",
        "lion_k(kappa=l2, lr=1.0)",
        "lion_k(kappa=topk(k=40), lr=0.2)",
        "lion_k(kappa=nuclear, lr=1.0)",
        "stosignsgd(lr=0.1)",
        "stosignsgd(direction=adam, lr=0.1)",
    ],
)
def test_a_recipe_learns_with_it(spec):
    learner, loop = training(spec)
    for _ in range(50):
        _, metrics = loop.iterate()
        if metrics["correct"] > 0.97:
            break
    assert float(torch.cat([b["correct_B"] for b in episodes(WORLD, learner, 32)]).mean()) >= 0.9


@pytest.mark.parametrize("spec", RULES)
def test_resume_of_a_run_is_exact(spec):
    learner, loop = training(spec)
    for _ in range(2):
        loop.iterate()
    saved = copy.deepcopy((loop.state_dict(), learner.tables["policy"].data, learner.version))
    state = copy.deepcopy(learner.optimizers["policy"].state_dict())
    other, resumed = training(spec)
    resumed.load_state_dict(saved[0])
    resumed.prepare()
    other.tables["policy"].data.copy_(saved[1])
    other.version = saved[2]
    other.optimizers["policy"].load_state_dict(state)
    for _ in range(2):
        assert loop.iterate()[1] == resumed.iterate()[1]
    assert torch.equal(learner.tables["policy"], other.tables["policy"])


@pytest.mark.parametrize("slug", ["ppo", "gspo"])
def test_models_of_the_bank_have_optimizers_of_their_own(slug):
    recipe = policy_opt.get(slug).set("optimizer=lion(lr=0.1)")
    learner = TableLearner(WORLD)
    loop = Loop(recipe, TableActor(WORLD, learner), learner, RunSize(4, groups=2, group_size=4))
    loop.iterate()
    assert isinstance(learner.optimizers["policy"], Stepper)
    assert not any(isinstance(o, Stepper) for name, o in learner.optimizers.items() if name != "policy")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lino()", "did you mean `lion`"),
        ("lion(kappa=l2)", "`kappa` is an option of lion_k; lion has none"),
        ("lion(eps=1e-8)", "lion has no option `eps`"),
        ("sgd(eps=1e-8)", "sgd has no option `eps`"),
        ("adam(forget=0.1)", "`forget` is an option of stosignsgd"),
        ("lion(betas=(0.9, 1.0))", "betas are at least 0 and below 1"),
        ("stosignsgd(forget=1.0)", "forget is at least 0 and below 1"),
        ("stosignsgd(direction=adam(lr=0.1))", "rate and weight decay are its own"),
        ("stosignsgd(direction=adam, betas=(0.9, 0.9))", "betas are the direction's"),
        ("stosignsgd(direction=stosignsgd)", "is no sign already"),
        ("lion_k(kappa=huber(e=0))", "e must be positive"),
        ("lion_k(kappa=topk(k=0))", "k must be at least 1"),
        ("lion_k(kappa=group_norm())", "`group_norm` stands at `advantage`, not at `kappa`"),
    ],
)
def test_wrong_options_say_what_is_wrong(spec, said):
    with pytest.raises(RecipeError) as error:
        policy_opt.get("grpo").set(f"optimizer={spec}")
    assert said in str(error.value)


def test_by_name():
    assert isinstance(Optim("lion").build([torch.nn.Parameter(torch.ones(1))], 0.1), Stepper)
    assert isinstance(build(Optim("momentum"), [torch.nn.Parameter(torch.ones(1))], 0.1), Stepper)
    assert set(METHODS) <= set(OURS) and not set(OURS) & set(torch_optimizers())
    for name in torch_optimizers():
        theta = torch.nn.Parameter(torch.ones(2, 3, 2))
        stepper = Optim(name).build([theta], 0.1)
        theta.grad = torch.ones(2, 3, 2)
        stepper.step()
        assert (theta != 1).all(), name
    with pytest.raises(ValueError, match="relative to the first learning rate"):
        Optim("lion", decoupled=True).build([torch.nn.Parameter(torch.ones(1))], 0.0)
    with pytest.raises(ValueError, match="must be >= 0"):
        Optim("lion", weight_decay=-1.0).build([torch.nn.Parameter(torch.ones(1))], 0.1)


def test_a_closure_is_evaluated_with_gradients():
    theta = torch.nn.Parameter(torch.ones(2))
    stepper = Optim("lion").build([theta], 0.1)

    def closure():
        loss = theta.square().sum()
        loss.backward()
        return loss

    assert stepper.step(closure).item() == 2.0 and theta.tolist() == pytest.approx([0.9, 0.9])
