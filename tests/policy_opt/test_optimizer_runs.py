"""Optimizers in runs: state, resume, recipes, options."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import policy_opt
from policy_opt import Loop, Optim, RecipeError, RunSize
from policy_opt.bank import OURS, torch_optimizers
from policy_opt.optimizers import METHODS, Stepper, build
from policy_opt.options import part
from policy_opt.table import TableActor, TableLearner, World, episodes

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
