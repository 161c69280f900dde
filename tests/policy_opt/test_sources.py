"""Where optimizer steps take their rows from, phases, and models that follow the policy."""

from __future__ import annotations

import copy

import pytest
import torch

from policy_opt import ModelSpec, Need, Part, Phase, Recipe, RecipeError, Schedule, Step, Term
from policy_opt.aggregate import TokenMean
from policy_opt.controllers import Dual
from policy_opt.need import LogProb
from policy_opt.sources import Demos, Pool, Previous, Replay
from policy_opt.surrogates import Imitate
from tests.policy_opt import fixed
from tests.policy_opt.running import GRPO, start, success


def steps(*values: Step) -> Schedule:
    return Schedule(values)


def test_previous_batch_is_stepped_on_with_its_stored_log_probs():
    recipe = GRPO.replace(schedule=steps(Step(Previous()), Step()))
    loop = start(recipe)
    first, metrics = loop.iterate()
    assert metrics["optimizer_steps"] == 1
    state = copy.deepcopy(loop.state_dict())
    resumed = start(recipe)
    resumed.load_state_dict(state)
    (stored,) = (state["batch"] for path, state in resumed.states[""].items() if "Previous" in path)
    assert torch.equal(stored["logp_old_BT"], first["logp_old_BT"])
    _, metrics = loop.iterate()
    assert metrics["optimizer_steps"] == 2 and metrics["ratio_max"] > 1.0


def test_replay_draws_whole_groups_and_forgets_the_oldest():
    recipe = GRPO.replace(schedule=steps(Step(), Step(Replay(groups=3, capacity=6))))
    loop = start(recipe)
    sizes = [loop.iterate()[1]["optimizer_steps"] for _ in range(4)]
    assert sizes == [1, 2, 2, 2]
    (stored,) = (state["groups"] for path, state in loop.states[""].items() if "Replay" in path)
    assert [int(b["group_B"][0]) for b in stored] == list(range(10, 16))
    with pytest.raises(RecipeError, match="groups <= capacity"):
        start(GRPO.replace(schedule=steps(Step(Replay(groups=9, capacity=6)))))


def test_a_pool_gathers_rows_until_there_are_enough():
    recipe = GRPO.replace(
        schedule=steps(Step(), Step(Pool(by="correct_B", rows=6), terms=(Term(Imitate()),)))
    )
    loop = start(recipe)
    taken = []
    for _ in range(8):
        b, metrics = loop.iterate()
        taken.append((int(b["correct_B"].sum()), metrics["optimizer_steps"]))
    gathered = 0
    for right, count in taken:
        gathered += right
        assert count == 1 + (gathered >= 6)
        gathered = 0 if gathered >= 6 else gathered


def imitation(tasks: int = 4) -> Recipe:
    step = Step(Demos(tasks=tasks), terms=(Term(Imitate(), agg=TokenMean()),))
    return GRPO.replace(
        slug="imitation", advantage=(), terms=(), schedule=steps(step), bank={"ref": ModelSpec("copy")}
    )


def test_phases_imitate_first_and_take_the_reference_from_there():
    recipe = GRPO.replace(
        slug="two_phases",
        phases=(Phase("warm", imitation(), 6), Phase("main", GRPO.set("terms.kl.coef=0.1"), sync=("ref",))),
    )
    loop = start(recipe)
    before = success(loop)
    for _ in range(6):
        loop.iterate()
    warm = loop.learner.tables["policy"].detach().clone()
    assert success(loop) > before + 0.3
    assert torch.equal(loop.learner.tables["ref"], torch.zeros_like(warm))
    _, metrics = loop.iterate()
    assert torch.equal(loop.learner.tables["ref"], warm) and metrics["kl_ref"] == pytest.approx(0.0)
    assert set(loop.states) == {"warm", "main"}
    resumed = start(recipe)
    resumed.load_state_dict(loop.state_dict())
    assert resumed.prepare()[1] == "main"


class Lately(Part):
    """How far the policy has moved on an old batch's tokens, as weights of their own step."""

    stage = "credit"
    needs = (Need("logp_now_BT", LogProb(), when="rollout"),)
    overwrites = frozenset({"w_BT"})

    def __call__(self, b, ctx):
        return b.over(w_BT=(b["logp_now_BT"] - b["logp_old_BT"]).abs())


def test_a_step_has_parts_of_its_own_on_its_own_batch():
    """A second pass over the batch before, weighted by its own parts, with its needs scored when it is drawn."""
    recipe = GRPO.replace(schedule=steps(Step(), Step(Previous(), parts=(Lately(),), lr_scale=0.5)))
    recipe.check()
    loop = start(recipe)
    loop.iterate()
    _, metrics = loop.iterate()
    assert metrics["optimizer_steps"] == 2


def test_a_mini_batch_without_tokens_takes_no_step():
    b = fixed.batch([1, 0, 1, 0], [0, 0, 1, 1], [[1], [1], [0], [0]])
    _, metrics, learner = fixed.run(GRPO.set("schedule.minibatches=2"), b, {})
    assert metrics["optimizer_steps"] == 1 and len(learner.cotangents) == 1


def test_the_entropy_term_spreads_the_policy():
    flat, plain = (start(GRPO.set(*spec), group_size=8) for spec in ([ENTROPY_TERM], []))
    for loop in (flat, plain):
        for _ in range(15):
            _, metrics = loop.iterate()
        loop.entropy = metrics["entropy"]
    assert flat.entropy > plain.entropy + 0.1


ENTROPY_TERM = "terms+=term(negative_entropy(), coef=0.3, name=entropy)"


def test_bank_models_follow_the_policy_as_they_say():
    kl = GRPO.set("terms.kl.coef=0.1")
    slow = start(kl.replace(bank={"ref": ModelSpec("copy", ema=0.9)}))
    slow.iterate()
    slow.iterate()
    policy, ref = (slow.learner.tables[name].detach() for name in ("policy", "ref"))
    assert 0 < float((policy - ref).norm()) and float(ref.norm()) > 0
    every = start(kl.set("bank.ref.sync_every=2"))
    every.iterate()
    assert not every.learner.tables["ref"].any()
    every.iterate()
    assert torch.equal(*(every.learner.tables[name].detach() for name in ("policy", "ref")))


def test_a_dual_coefficient_reacts_to_its_metric_and_resumes():
    recipe = GRPO.replace(
        terms=(*GRPO.terms[:1], Term(GRPO.terms[1].loss, coef=Dual(0.01, rate=5.0), name="kl"))
    )
    loop = start(recipe, group_size=8)
    values = []
    for _ in range(6):
        _, metrics = loop.iterate()
        values.append(metrics["dual"])
    assert values[-1] > values[0]
    other = start(recipe, group_size=8)
    other.load_state_dict(loop.state_dict())
    assert next(v for k, v in other.states[""].items() if "Dual" in k)["lambda"] == values[-1]
