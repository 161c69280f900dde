"""Weights reach vLLM, and where they do not the run hears of it: each way of losing them, done for real."""

from __future__ import annotations

import pytest
import torch

from agents import lora
from agents.config import LoraConfig, OptimConfig, VllmConfig
from agents.dist import World
from agents.engines.base import EngineFailure, SampleParams
from agents.engines.reference import log_prob_gap, plain_log_probs
from agents.engines.vllm import VllmEngine
from agents.learner import LMLearner
from agents.sync import COARSE, WeightSync, probe_ids
from policy_opt.batch import Batch
from policy_opt.need import LogProb, Need
from tests.agents.small import qwen3
from tests.engines import damage
from tests.engines.conftest import small_model

pytestmark = pytest.mark.engines
LIMIT, GAP = 1e-3, 1e-4


@pytest.fixture
def engine(chat):
    engine = VllmEngine(
        VllmConfig(kv_gib=0.1), stop_ids=chat.stop_ids, banned_ids=chat.banned_ids,
        params=SampleParams(max_new_tokens=16), rows=8, max_context=256,
    )  # fmt: skip
    engine.vocab_size = len(chat.tokenizer)
    yield engine
    engine.shutdown()


def sync_of(engine, model):
    engine.model = model  # as `log_prob_gap` asks for it
    return WeightSync(engine, model, World(), probe_ids(engine.vocab_size, 48), LIMIT)


def learn(learner, seed=0):
    """One real optimizer step: the likelihood of some text goes up."""
    tokens_BT = torch.randint(40, 300, (4, 24), generator=torch.Generator().manual_seed(seed))
    real_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    b = Batch.build(
        tokens_BT=tokens_BT, real_BT=real_BT, mask_BT=real_BT & (torch.arange(24) > 0),
        logp_sampler_BT=torch.zeros(4, 24), version_BT=torch.zeros_like(tokens_BT), group_B=torch.arange(4),
    )  # fmt: skip
    need = Need("logp_BT", LogProb(), when="loss")
    learner.backward(b, [need], lambda rows_R, live: {"logp_BT": -torch.ones_like(live["logp_BT"]) / 100})
    learner.step()


def shift(model, scale, seed=1):
    """Trained weights move by noise of some size."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=draws))


def test_after_every_optimizer_step_the_engine_samples_from_the_new_weights(engine, chat):
    model = small_model()
    learner, sync = LMLearner(model, OptimConfig(lr=1e-2)), sync_of(engine, model)
    row = [40 + (i * i) % 250 for i in range(100)]
    before = None
    for version in range(4):
        sync(version)
        assert sync.gap <= GAP and engine.version == version
        now = plain_log_probs(model, row)
        assert before is None or (now - before).abs().max() > 0.05, "the step changed something"
        before = now
        assert log_prob_gap(engine) <= GAP
        for number in (0, 1):  # the second turn finds the row's keys and values: of these weights, not of older ones
            engine.turn((number,), row, (0, number, 0), 8)
            (_, turn), = engine.run()
            plain = plain_log_probs(model, [*row, *turn.ids], chat.banned_ids)[len(row) - 1 :]
            assert (plain - torch.tensor(turn.logps)).abs().max() <= GAP
        engine.reset()
        learn(learner, version)
    assert sync.metrics()["sync_seconds"] > 0 and sync.metrics()["sync_seconds"] == 0


def test_dropped_weights_are_found_before_the_next_rollout(engine):
    """What sleep mode does, in vLLM's own process: nothing tells, but that log-probs are no longer the trainer's."""
    model = small_model()
    sync = sync_of(engine, model)
    for version, harm in enumerate((damage.zero, damage.start_anew)):
        sync(version)
        engine.process.call("rpc", "apply_model", harm)
        with pytest.raises(EngineFailure, match=r"weight sync, version \d: .* off the trainer's.*sleep mode"):
            sync(version)
        shift(model, 1e-3, version)  # the next update delivers whole weights, and all is well again


def test_a_tied_model_is_delivered_whole(engine):
    model = small_model(tied=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    sync = sync_of(engine, model)
    for version in range(3):
        sync(version)
        assert sync.gap <= GAP and log_prob_gap(engine) <= GAP
        shift(model, 0.05, version)


def test_a_stale_head_under_tied_embeddings_is_found(engine, monkeypatch):
    """vLLM's own way of reloading a tied model keeps the old head; it says so in its log and goes on."""
    model = small_model(tied=True)
    monkeypatch.setattr("agents.engines.vllm.write_model", lambda model, folder, dtype: model.save_pretrained(folder))
    sync = sync_of(engine, model)
    sync(0)
    assert sync.gap <= GAP
    shift(model, 0.05)
    with pytest.raises(EngineFailure, match=r"weight sync, version 1: .*head tied to the embeddings"):
        sync(1)


def test_half_precision_has_room_for_rounding_and_no_more(chat):
    """bfloat16 weights and computation behind a float32 trainer."""
    engine = VllmEngine(
        VllmConfig(kv_gib=0.1), stop_ids=chat.stop_ids, rows=8, max_context=256, dtype=torch.bfloat16
    )
    model = qwen3(
        len(chat.tokenizer), torch.float32, hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=2
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)  # log-probs as spread as a language model's
    sync = WeightSync(engine, model, World(), probe_ids(len(chat.tokenizer), 48), COARSE)
    try:
        for version in range(3):
            sync(version)
            assert 1e-4 < sync.gap < COARSE
            shift(model, 0.02, version)
        engine.process.call("rpc", "apply_model", damage.zero)
        with pytest.raises(EngineFailure, match="off the trainer's"):
            sync(2)
    finally:
        engine.shutdown()


def test_an_adapter_that_was_not_delivered_is_found(engine, monkeypatch):
    model = small_model()
    lora.adapt(model, LoraConfig(rank=4), seed=0)
    sync = sync_of(engine, model)
    for version in range(3):
        sync(version)
        assert sync.gap <= GAP and log_prob_gap(engine) <= GAP
        shift(model, 0.05, version)
    call = engine.process.call
    monkeypatch.setattr(engine.process, "call", lambda name, *rest: None if name == "adapt" else call(name, *rest))
    with pytest.raises(EngineFailure, match=r"weight sync, version 3: .*an adapter"):
        sync(3)


def test_a_small_step_that_was_not_delivered_is_found(engine, monkeypatch):
    """It moves log-probs less than the limit; that the trainer's moved and the engine's did not is enough."""
    model = small_model()
    sync = sync_of(engine, model)
    sync(0)
    shift(model, 1e-5)
    sync(1)
    call = engine.process.call
    monkeypatch.setattr(engine.process, "call", lambda name, *rest: None if name == "load" else call(name, *rest))
    shift(model, 1e-5, 2)
    with pytest.raises(EngineFailure, match=r"moved by \S+ on average since the last sync"):
        sync(2)
    assert sync.gap < LIMIT


def test_an_engine_that_was_killed_says_so(engine):
    model = small_model()
    sync = sync_of(engine, model)
    sync(0)
    for i in range(8):
        engine.turn((i,), [50 + i, 51, 52], (0, i, 0), 16)
    engine.process.popen.kill()
    with pytest.raises(EngineFailure, match=r"the engine vllm is gone: its process ended \(killed by SIGKILL"):
        while engine.run():
            pass
