"""Optimizers of the language-model trainer: names on the command line, wishes of recipes, state."""

from __future__ import annotations

import pytest
import torch

from agents import optim
from agents.bank import Bank
from agents.cli import UsageError
from agents.config import OptimConfig
from agents.learner import LMLearner
from policy_opt.bank import CRITIC, ModelSpec, Optim
from policy_opt.optimizers import Stepper
from policy_opt.optimizers.kappa import Huber
from tests.agents.test_learner import LOGP, batch, tiny


def test_names_and_their_options():
    lion = OptimConfig(name="Lion", beta1=0.95, beta2=0.98)
    assert optim.described(lion) == Optim("lion", betas=(0.95, 0.98))
    huber = optim.described(OptimConfig(name="lion_k(kappa=huber(e=0.05))"))
    assert (huber.kappa, huber.betas) == (Huber(0.05), (0.9, 0.99))
    converted = optim.described(OptimConfig(name="stosignsgd(direction=adam, forget=0.1)", beta1=0.8))
    assert converted == Optim("stosignsgd", direction=Optim("adam", betas=(0.8, 0.99)), forget=0.1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lino", "unknown optimizer `lino`; did you mean `lion`?"),
        ("lion(lr=0.1)", "said with --optim.lr"),
        ("stosignsgd(direction=adam(betas=(0.9, 0.9)))", "--optim.beta1"),
        ("lion(kapa=l2)", "did you mean `kappa`"),
        ("lion(", "cannot read the optimizer 'lion('"),
    ],
)
def test_what_is_wrong_with_a_name(name, said):
    with pytest.raises(UsageError) as error:
        optim.build(tiny(), OptimConfig(name=name))
    assert said in str(error.value)


def test_vectors_are_not_decayed_and_noise_goes_by_name():
    model = tiny()
    stepper = optim.build(model, OptimConfig(name="stosignsgd", lr=0.1, weight_decay=0.2, seed=3))
    matrices, vectors = stepper.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.2, 0.0)
    assert all(p.ndim >= 2 for p in matrices["params"]) and all(p.ndim < 2 for p in vectors["params"])
    names = {*matrices["param_names"], *vectors["param_names"]}
    assert names == {name for name, _ in model.named_parameters()}
    assert stepper.direction.noise.seed == 3


def test_a_recipe_s_optimizer_stands_in_for_the_run_s():
    bank = Bank(tiny(), OptimConfig(lr=0.1, warmup=3, clip=0.5, seed=1))
    before = bank.policy.optimizer
    bank.prepare({}, None)
    assert bank.policy.optimizer is before
    wish = Optim("lion_k", lr_scale=0.5, kappa=Huber(0.1), weight_decay=0.3)
    bank.prepare({"critic": CRITIC, "probe": ModelSpec("copy", optimizer=Optim("lion", lr=0.7))}, wish)
    policy = bank.policy
    assert isinstance(policy.optimizer, Stepper) and policy.optimizer.direction.kappa == Huber(0.1)
    assert (policy.config.lr, policy.config.warmup, policy.config.clip) == (0.05, 3, 0.5)
    assert policy.optimizer.param_groups[0]["weight_decay"] == 0.3
    again = policy.optimizer
    bank.prepare({"critic": CRITIC}, wish)
    assert bank.policy.optimizer is again
    assert isinstance(bank["critic"].optimizer, torch.optim.AdamW)
    assert bank["probe"].optimizer.param_groups[0]["lr"] == 0.7


@pytest.mark.parametrize("name", ["lion", "lion_k(kappa=l2)", "stosignsgd", "stosignsgd(direction=adam)"])
def test_state_round_trips_to_the_same_next_step(name):
    b = batch()
    config = OptimConfig(name=name, lr=0.01, warmup=3, weight_decay=0.1, seed=4)

    def train(one: LMLearner, n: int) -> None:
        for _ in range(n):
            one.backward(b, [LOGP], lambda rows, live: {"logp_BT": -b.mask_BT[rows].double()})
            one.step()

    one, two = LMLearner(tiny(), config), LMLearner(tiny(5), config)
    train(one, 2)
    two.load_state_dict(one.state_dict())
    train(one, 2)
    train(two, 2)
    for a, c in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, c)
