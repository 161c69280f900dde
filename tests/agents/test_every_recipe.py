"""Every recipe trains a language model: two tiny iterations of each form on the bundled model, on tool_qa."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import policy_opt
from agents.actor import LMActor, Player
from agents.cli import UsageError
from agents.config import OptimConfig, RolloutConfig, TrainConfig, WarmConfig
from agents.display import Silent
from agents.dist import World
from agents.learner import LMLearner
from agents.session import Session, build, with_temperature
from agents.trainer import Trainer
from envs import Verdict
from envs.tool_qa import ToolQA
from policy_opt.aggregate import TokenMean
from policy_opt.errors import RecipeError
from policy_opt.loop import Loop, RunSize
from policy_opt.protocols import Job
from policy_opt.registry import shipped
from policy_opt.schedule import Schedule, Step
from policy_opt.sources import Demos
from policy_opt.surrogates import Imitate
from policy_opt.terms import Term
from tests.agents.small import Chatter

FORMS = [(slug, None) for slug in shipped()]
FORMS += [(slug, variant) for slug in shipped() for variant in policy_opt.get(slug).variants]
ELSEWHERE = {"ssl": "proximity_B"}
"""Recipes that need a fact which tool_qa does not deliver."""


class Coin(ToolQA):
    """tool_qa with a verdict that a policy which knows nothing passes half of the time: what it said is tossed."""

    def judge(self, task: Any, final: str | None) -> Verdict:
        verdict = super().judge(task, final)
        said = "".join(str(m["content"]) for m in self.episode.messages if m["role"] == "assistant")
        won = float(sum(map(ord, said)) % 2)
        facts = {**verdict.facts, "answer_key": str(sum(map(ord, said)) % 3)}
        return replace(verdict, reward=won, scores={"correct": won, "format": 1.0}, facts=facts)


@pytest.fixture(scope="module")
def ground() -> tuple[Session, dict[str, torch.Tensor]]:
    """Environment, model, chat format and engine, and the weights that every form starts from."""
    config = TrainConfig(
        env="tests.agents.test_every_recipe:Coin", env_args=("profile=tiny",), steps=2, groups=2, group_size=4,
        train_tasks=6, rollout=RolloutConfig(max_new_tokens=6, max_turns=2), optim=OptimConfig(lr=1e-3),
        warm=WarmConfig(when="never"),
    )  # fmt: skip
    session = build(config, World())
    return session, {name: value.clone() for name, value in session.model.state_dict().items()}


def session_of(ground: tuple[Session, dict[str, torch.Tensor]], recipe: policy_opt.Recipe) -> Session:
    """A session of another recipe on the same ground."""
    base, weights = ground
    base.model.load_state_dict(weights)
    recipe = with_temperature(recipe, base.config.rollout.temperature)
    old = base.player
    player = Player(old.make_env, old.chat, old.engine, old.limits, old.seed)
    learner = LMLearner(base.model, base.config.optim, convention=base.convention, micro_tokens=1024)
    player.version = lambda: learner.version
    actor = LMActor(player, torch.float32, base.actor.sample)
    size = RunSize(base.tasks, base.config.groups, base.config.group_size, base.config.seed)
    loop = Loop(recipe, actor, learner, size)
    return replace(base, recipe=recipe, player=player, actor=actor, learner=learner, loop=loop)


def test_demonstrations_are_a_source(ground: Any) -> None:
    """A step of imitation beside the policy's own: rows in the order of the jobs, demonstrators' tokens as actions."""
    imitation = (Term(Imitate(), agg=TokenMean()),)
    recipe = policy_opt.get("grpo").replace(schedule=Schedule((Step(), Step(source=Demos(tasks=3), terms=imitation))))
    session = session_of(ground, recipe)
    jobs = [Job(i, -1 - i, 0, demo=i % 2 == 0) for i in range(4)]
    b = session.actor.play(jobs)
    assert b["group_B"].tolist() == [-1, -2, -3, -4] and b.mask_BT.any(1).all()
    for row in (0, 2):
        said = [turn.text for turn in session.actor.played[row].turns]
        assert "".join(said) == session.chat.decode(
            [i for i in b.tokens_BT[row][b.mask_BT[row]].tolist() if i not in session.chat.stop_ids]
        )
    trainer = Trainer(session, None, Silent())
    trainer.iterate()
    assert trainer.history[0]["optimizer_steps"] == 2 and math.isfinite(trainer.history[0]["loss"])
    session.player.make_env = lambda: Chatter()
    with pytest.raises(UsageError, match="no demonstrators"):
        session.actor.play(jobs)


def form(slug: str, variant: str | None) -> policy_opt.Recipe:
    recipe = policy_opt.get(slug)
    return recipe.set(f"variant={variant}") if variant else recipe


@pytest.mark.parametrize(("slug", "variant"), FORMS, ids=lambda x: str(x or ""))
def test_two_iterations(ground: Any, slug: str, variant: str | None) -> None:
    if slug in ELSEWHERE:
        with pytest.raises(RecipeError, match=f"reads the fact `{ELSEWHERE[slug]}`, which the environment does not"):
            session_of(ground, form(slug, variant))
        return
    session = session_of(ground, form(slug, variant))
    trainer = Trainer(session, None, Silent())
    for _ in range(2):
        trainer.iterate()
    for record in trainer.history:
        assert all(math.isfinite(v) for v in record.values() if isinstance(v, (int, float))), record
        assert record["skipped"] == 0 and record["failures"] == 0
    rules = {t.facts.get("temperature_rule") for t in session.actor.played} - {None}
    assert rules == session.recipe.hooks, "in the second iteration every sampler has what its rule takes"
    assert max(record["logp_gap"] for record in trainer.history) <= 1e-4
    moved = [name for name, value in session.model.state_dict().items() if not torch.equal(value, ground[1][name])]
    assert moved and all(torch.isfinite(p).all() for p in session.model.parameters())
