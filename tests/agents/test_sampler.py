"""A recipe's own sampler: temperature per job, temperature per token, and log-probs that the trainer finds again."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from agents.batching import batch_of
from agents.chat import ChatFormat
from agents.config import TrainConfig
from agents.engines.base import SampleParams
from agents.engines.hf import HFEngine
from agents.engines.sampling import banned_row, draw
from agents.forward import Convention
from agents.learner import LMLearner
from agents.rollout import Limits, play
from agents.session import with_temperature
from policy_opt import get
from policy_opt.errors import RecipeError
from policy_opt.need import LOGP, Entropy, Need
from policy_opt.protocols import Job, Sampler
from policy_opt.recipe import Phase
from policy_opt.sampling import temperatures
from tests.agents.small import Chatter, engine_for, qwen3
from tests.agents.tokenizers import CHATML, byte_bpe

HAPO = Sampler(
    0.7, "entropy_temperature", {"median": 0.2, "std": 0.5, "scale_pos": 0.6, "scale_neg": 0.9, "tau": 0.5}
)
SCRIPT = [[{"role": "tool", "content": f"result {i}"}] for i in range(2)]


@cache
def setup() -> tuple[ChatFormat, HFEngine]:
    chat = ChatFormat(byte_bpe(CHATML))
    return chat, engine_for(chat, qwen3(len(chat.tokenizer)), rows=5)


@pytest.mark.parametrize("reuse", [True, False])
def test_log_probs_are_the_trainers_whatever_the_temperature(reuse: bool) -> None:
    """Rows of several samplers in one batch: each is scored at its own plain temperature."""
    chat, engine = setup()
    if not reuse:
        engine = engine_for(chat, engine.model, rows=5)
        engine.reuse = False
    kinds = [None, Sampler(1.0), Sampler(0.6), HAPO, Sampler(1.3)]
    jobs = [Job(i, i, 0, sampler=kinds[i % 5]) for i in range(10)]
    played = play(jobs, lambda: Chatter(script=SCRIPT), chat, engine, Limits(max_new_tokens=9, max_context=300), 3)
    b = batch_of(played, dtype=torch.float64)
    assert b["temperature_B"].tolist() == [1.0, 1.0, 0.6, 0.7, 1.3] * 2
    learner = LMLearner(engine.model, convention=Convention(1.0, chat.banned_ids), micro_tokens=150)
    got = learner.score(b, [LOGP, Need("entropy_BT", Entropy())])
    assert float(((got["logp_BT"] - b.logp_sampler_BT) * b.mask_BT).abs().max()) <= 1e-9
    seen = learner.backward(b, [LOGP], lambda rows, live: {"logp_BT": -live["logp_BT"].exp()})
    torch.testing.assert_close(seen["logp_BT"], got["logp_BT"])


def test_tokens_are_drawn_at_the_rules_temperature() -> None:
    """Frequencies are those of softmax(logits / T); log-probs those at the plain temperature."""
    logits_V = torch.tensor([0.3, 2.0, -1.0, 0.0, 1.1], dtype=torch.float64)
    banned_V = banned_row([3], 5, logits_V.device)
    n = 20_000
    u_N = torch.from_numpy(np.random.default_rng(0).random(n))
    id_N, logp_N = draw(logits_V.expand(n, -1), u_N, SampleParams(), banned_V, [HAPO] * n)
    legal_V = logits_V + banned_V
    warm = float(temperatures(HAPO, legal_V))
    assert abs(warm - 0.7) > 0.05
    share_V = torch.bincount(id_N, minlength=5) / n
    assert float((share_V - (legal_V / warm).softmax(0)).abs().max()) < 0.02
    torch.testing.assert_close(logp_N, (legal_V / 0.7).log_softmax(0)[id_N])


def test_one_rows_sampler_is_no_other_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    u_N = torch.rand(6, generator=generator, dtype=torch.float64)
    kinds = [None, HAPO, Sampler(0.5), HAPO, None, Sampler(0.5)]
    together = draw(logits_NV, u_N, SampleParams(), None, kinds)
    for i, kind in enumerate(kinds):
        alone = draw(logits_NV[i : i + 1], u_N[i : i + 1], SampleParams(), None, [kind])
        assert together[0][i] == alone[0] and together[1][i] == alone[1]


def test_without_statistics_the_rule_is_the_plain_temperature() -> None:
    """The first iteration, which has no batch before it."""
    generator = torch.Generator().manual_seed(0)
    logits_NV, u_N = torch.randn(4, 9, generator=generator).double(), torch.rand(4, generator=generator).double()
    plain = draw(logits_NV, u_N, SampleParams(), None, [Sampler(0.7)] * 4)
    ruled = draw(logits_NV, u_N, SampleParams(), None, [replace(HAPO, options={})] * 4)
    assert torch.equal(plain[0], ruled[0]) and torch.equal(plain[1], ruled[1])


def recipes(**changes: Any) -> Any:
    return get("grpo").replace(sampler=Sampler(**changes))


def test_the_runs_temperature_stands_in_for_the_recipes_or_is_refused() -> None:
    assert with_temperature(recipes(), 0.6).sampler.temperature == 0.6
    assert with_temperature(recipes(temperature=0.6), 1.0).sampler.temperature == 0.6
    assert with_temperature(recipes(temperature=0.6), 0.6).sampler.temperature == 0.6
    staged = get("grpo").replace(phases=(Phase("a", recipes(), 1), Phase("b", recipes(temperature=0.6))))
    assert [p.recipe.sampler.temperature for p in with_temperature(staged, 0.6).phases] == [0.6, 0.6]
    for recipe in (recipes(temperature=0.6), staged):
        with pytest.raises(RecipeError, match=r"temperature 0\.6, --rollout\.temperature says 0\.8"):
            with_temperature(recipe, 0.8)


def test_a_session_takes_the_recipes_temperature() -> None:
    """Sampler, trainer and evaluation alike."""
    from agents.dist import World
    from agents.session import build

    session = build(TrainConfig(set=("sampler.temperature=0.5",), env_args=("profile=tiny",)), World())
    assert session.convention.temperature == session.player.engine.params.temperature == 0.5
    with pytest.raises(RecipeError, match="temperature above 0"):
        build(TrainConfig(set=("sampler.temperature=0.0",)), World())
