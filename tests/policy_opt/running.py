"""Runs on a small softmax table."""

from __future__ import annotations

import torch

import policy_opt
from policy_opt import Loop, Recipe, RunSize
from policy_opt.table import TableActor, TableLearner, World, episodes

WORLD = World(tasks=4, turns=2, actions=2)
GRPO = policy_opt.get("grpo")


def start(recipe: Recipe, actor=TableActor, groups=4, group_size=4, seed=0, **options) -> Loop:
    learner = TableLearner(WORLD, **options)
    return Loop(recipe, actor(WORLD, learner), learner, RunSize(WORLD.tasks, groups, group_size, seed))


def success(loop: Loop) -> float:
    return float(torch.cat([b["correct_B"] for b in episodes(WORLD, loop.learner, 32)]).mean())
