"""How a policy improves: pure torch; knows nothing of environments, tools or agents.

    import policy_opt
    recipe = policy_opt.get("grpo").set("terms.clip_high=0.28", "advantage.eps=1e-4")

Everything is imported on first use, so that `import policy_opt` costs little more than `import torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policy_opt.bank import ModelSpec, Optim
    from policy_opt.batch import Batch, concat
    from policy_opt.errors import BatchError, RecipeError
    from policy_opt.loop import Loop, RunSize
    from policy_opt.need import Need
    from policy_opt.part import Ctx, Part
    from policy_opt.protocols import Actor, Ask, Edit, Job, JudgeFailure, Learner, Sampler
    from policy_opt.recipe import Phase, Recipe
    from policy_opt.registry import get, slugs
    from policy_opt.schedule import Schedule, Step
    from policy_opt.state import Store
    from policy_opt.terms import Term

_WHERE = {
    "bank": ("ModelSpec", "Optim"),
    "batch": ("Batch", "concat"),
    "errors": ("BatchError", "RecipeError"),
    "loop": ("Loop", "RunSize"),
    "need": ("Need",),
    "part": ("Ctx", "Part"),
    "protocols": ("Actor", "Ask", "Edit", "Job", "JudgeFailure", "Learner", "Sampler"),
    "recipe": ("Phase", "Recipe"),
    "registry": ("get", "slugs"),
    "schedule": ("Schedule", "Step"),
    "state": ("Store",),
    "terms": ("Term",),
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "Actor",
    "Ask",
    "Batch",
    "BatchError",
    "Ctx",
    "Edit",
    "Job",
    "JudgeFailure",
    "Learner",
    "Loop",
    "ModelSpec",
    "Need",
    "Optim",
    "Part",
    "Phase",
    "Recipe",
    "RecipeError",
    "RunSize",
    "Sampler",
    "Schedule",
    "Step",
    "Store",
    "Term",
    "concat",
    "get",
    "slugs",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module `policy_opt` has no attribute `{name}`")
    return getattr(importlib.import_module(f"policy_opt.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
