"""What a session refuses before anything is sampled."""

from __future__ import annotations

import pytest

from agents.config import TrainConfig
from agents.dist import World
from agents.session import build
from policy_opt.errors import RecipeError


def test_a_recipes_own_sampler_is_refused_not_ignored():
    with pytest.raises(RecipeError, match=r"own sampler .* --rollout\.temperature"):
        build(TrainConfig(set=("sampler.temperature=0.5",)), World())
