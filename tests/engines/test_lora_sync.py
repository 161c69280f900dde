"""Adapters reach vLLM in the run's own engine: alone under ever new names, or merged; and a run learns with them."""

from __future__ import annotations

import json

import pytest

from agents import lora
from agents.config import LoraConfig, OptimConfig, VllmConfig
from agents.engines.base import SampleParams
from agents.engines.reference import log_prob_gap
from agents.engines.vllm import VllmEngine
from agents.learner import LMLearner
from tests.engines.conftest import small_model
from tests.engines.test_server import arguments, run
from tests.engines.test_sync import GAP, learn, sync_of

pytestmark = pytest.mark.engines
ODD = LoraConfig(rank=3, alpha=7.5, targets=("q_proj", "down_proj"))


@pytest.mark.parametrize("config, merge", [(LoraConfig(rank=8), False), (ODD, False), (ODD, True)])
def test_after_every_step_the_engine_samples_with_the_new_adapters(chat, config, merge):
    model = small_model()
    lora.adapt(model, config, seed=0)
    engine = VllmEngine(
        VllmConfig(kv_gib=0.1, merge=merge), stop_ids=chat.stop_ids, banned_ids=chat.banned_ids,
        params=SampleParams(0.8), rows=8, max_context=256,
    )  # fmt: skip
    engine.vocab_size = len(chat.tokenizer)
    learner, sync = LMLearner(model, OptimConfig(lr=3e-2)), sync_of(engine, model)
    try:
        for version in range(4):
            sync(version)
            assert sync.gap <= GAP and log_prob_gap(engine) <= GAP
            engine.reset()
            learn(learner, version)
        moved = max(float(t.abs().max()) for n, t in lora.adapter_state(model).items() if "lora_B" in n)
        assert moved > 0.02, "the adapters changed something"
    finally:
        engine.shutdown()


@pytest.mark.parametrize("how", [(), ("--vllm.merge",)])
def test_training_with_adapters(tmp_path, how):
    assert run(arguments([], tmp_path / "run", "--lora.rank", "8", "--vllm.kv-gib", "0.25", *how)) == 0
    metrics = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(m["logp_gap"] for m in metrics) <= GAP and max(m["sync_gap"] for m in metrics) <= GAP
    assert min(m["grad_norm"] for m in metrics) > 0, "nothing was learnt, so nothing was tested"
