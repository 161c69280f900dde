"""The transformers engine: log-probs, independence of rows, stops, reuse, sampling distribution."""

from __future__ import annotations

import threading
import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from agents.engines import hf
from agents.engines.base import Engine, Key, Sampled, SampleParams
from agents.engines.dense import DenseForward
from agents.engines.hf import HFEngine
from agents.engines.reference import log_prob_gap, plain_log_probs
from agents.engines.sampling import banned_row, draw, uniforms
from agents.engines.slots import ATTENTION, attention_of
from tests.agents.small import qwen3, spread

V, STOP, BANNED = 60, 1, (0, 2, 7)


def engine_of(model: Any, **options: Any) -> HFEngine:
    options = {"rows": 6, "max_context": 200, **options}
    return HFEngine(model, stop_ids=[STOP], banned_ids=BANNED, **options)


def conversation(engine: Engine, rows: int, turns: int, budget: int = 12, seed: int = 1) -> dict[Key, list]:
    """Rows of unequal lengths and openings (most with a common prefix); what each was fed and sampled."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(8, V, 20).tolist()
    record: dict[Key, list] = {}
    for row in range(rows):
        group = row // 2
        own = np.random.default_rng([seed, group]).integers(8, V, 2 + 3 * group).tolist()
        record[group, row % 2] = [(prefix if row % 5 != 4 else []) + own]
    for key, parts in record.items():
        engine.turn(key, parts[0], (9, *key, 0), budget)
    while finished := engine.run():
        assert [key for key, _ in finished] == sorted(key for key, _ in finished)
        for key, turn in finished:
            record[key].append(turn)
            if len(record[key]) < 2 * turns:
                more = np.random.default_rng([seed, *key, len(record[key])]).integers(8, V, 1 + 7 * key[1]).tolist()
                record[key].append(more)
                engine.turn(key, more, (9, *key, len(record[key]) // 2), budget)
            else:
                engine.close(key)
    return record


def flat(parts: list) -> tuple[list[int], dict[int, float]]:
    """A row's ids, and the sampler's log-probs by position."""
    ids: list[int] = []
    logps: dict[int, float] = {}
    for part in parts:
        if isinstance(part, Sampled):
            logps |= {len(ids) + i: logp for i, logp in enumerate(part.logps)}
            ids += part.ids
        else:
            ids += part
    return ids, logps


def largest_gap(model: Any, record: dict[Key, list], temperature: float = 1.0) -> float:
    gap = 0.0
    for parts in record.values():
        ids, logps = flat(parts)
        plain = plain_log_probs(model, ids, BANNED, temperature).tolist()
        gap = max([gap, *(abs(plain[t - 1] - logp) for t, logp in logps.items())])
    return gap


# ---------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("dtype", "dense", "limit"),
    [(torch.float64, False, 1e-9), (torch.float32, False, 1e-4), (torch.float32, True, 1e-4)],
)
def test_log_probs_are_the_trainer_s(dtype: torch.dtype, dense: bool, limit: float, temperature: float) -> None:
    model = qwen3(V, dtype)
    engine = engine_of(model, params=SampleParams(temperature=temperature))
    assert engine.reuse and (engine._dense is not None) == (dtype == torch.float32)
    if not dense:
        engine._dense = None
    record = conversation(engine, 10, 4)
    assert all(len(parts) == 8 for parts in record.values())
    assert largest_gap(model, record, temperature) <= limit


def test_self_check_catches_a_wrong_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A written-out forward that is off by one position must not be used; the model's own is."""
    right = DenseForward.__call__

    def wrong(self: DenseForward, plan: Any, slots: Any) -> Any:
        plan.pos_N = plan.pos_N // 2
        return right(self, plan, slots)

    monkeypatch.setattr(DenseForward, "__call__", wrong)
    engine = engine_of(qwen3(V, torch.float32))
    assert engine._dense is None and engine.reuse
    assert log_prob_gap(engine) <= 1e-4


def small(kind: str, dtype: torch.dtype) -> Any:
    """Random models of other architectures."""
    common = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256,
    }  # fmt: skip
    kv = {**common, "num_key_value_heads": 2}
    configs = {
        "Llama": kv,
        "Qwen2": kv,
        "Mistral": {**kv, "sliding_window": None},
        "GPTNeoX": common,
        "Phi3": {**kv, "pad_token_id": 0},
        "Gemma2": {**kv, "head_dim": 8, "sliding_window": 4},
        "GPT2": {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        "Mamba": {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    }
    class_name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(**configs[kind])
    return spread(getattr(transformers, class_name), config, dtype)


@pytest.mark.parametrize(
    ("kind", "dense", "reuse"),
    [
        ("Llama", True, True), ("Qwen2", True, True), ("Mistral", True, True), ("Phi3", False, True),
        ("GPTNeoX", False, True), ("GPT2", False, True), ("Gemma2", False, False), ("Mamba", False, False),
    ],
)  # fmt: skip
def test_architectures(kind: str, dense: bool, reuse: bool) -> None:
    """Models with a standard cache keep it; others compute every turn anew and say so. All are exact."""
    model = small(kind, torch.float32 if dense else torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = engine_of(model)
    assert (engine._dense is not None, engine.reuse) == (dense, reuse), [str(w.message) for w in caught]
    assert any("computed anew" in str(w.message) for w in caught) == (not reuse)
    record = conversation(engine, 5, 2, budget=4)
    # The models' own caches carry float32 parts also where their weights are float64.
    assert largest_gap(model, record) <= (1e-4 if dense else 1e-9 if reuse else 1e-5)


def test_training_mode_and_attention_are_left_as_they_were() -> None:
    model = qwen3(V).train()
    before = model.config._attn_implementation
    conversation(engine_of(model), 2, 1)
    assert model.training and model.config._attn_implementation == before
    assert not any(p.grad is not None for p in model.parameters())


def test_weights_are_the_model_s_own_after_a_reset() -> None:
    model = qwen3(V)
    engine = engine_of(model)
    conversation(engine, 3, 1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    engine.reset()
    assert largest_gap(model, conversation(engine, 3, 1)) <= 1e-9


# ---------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
@pytest.mark.parametrize(("gather", "part"), [(0, 5), (8, 64), (1000, 7), (8, 4096)])
def test_a_row_does_not_depend_on_its_neighbours(
    rows: int, gather: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Number of slots, when rows are fed and in what parts change nothing: each samples what it samples alone."""
    monkeypatch.setattr(hf, "_GATHER", gather)
    monkeypatch.setattr(hf, "_FED_TOKENS", part)
    record = conversation(shared_engine(rows), 9, 3, budget=6)
    for key, (ids, logps) in alone().items():
        got_ids, got_logps = flat(record[key])
        assert got_ids == ids
        assert max(abs(got_logps[t] - logps[t]) for t in logps) <= 1e-9


@cache
def built(rows: int) -> HFEngine:
    return engine_of(qwen3(V), rows=rows)


def shared_engine(rows: int) -> HFEngine:
    """An engine that tests may share, with no row open."""
    built(rows).reset()
    return built(rows)


@cache
def alone() -> dict[Key, tuple[list[int], dict[int, float]]]:
    """What each row of the conversation samples when every turn is computed alone, by plain forwards."""
    engine = engine_of(qwen3(V), rows=1)
    engine.reuse = False
    return {key: flat(parts) for key, parts in conversation(engine, 9, 3, budget=6).items()}


def test_the_stream_of_a_turn_is_named_by_its_seed_alone() -> None:
    assert np.array_equal(uniforms((1, 2, 3, 4), 5), uniforms((1, 2, 3, 4), 9)[:5])
    assert not np.array_equal(uniforms((1, 2, 3, 4), 5), uniforms((1, 2, 3, 5), 5))
    state = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    conversation(shared_engine(5), 3, 1)
    assert np.array_equal(state[0], np.random.get_state()[1])
    assert torch.equal(state[1], torch.random.get_rng_state())


def test_closing_rows_in_the_middle_of_a_turn_disturbs_nobody() -> None:
    engine = shared_engine(5)
    for row in range(5):
        engine.turn((row,), [10 + row] * (4 + row), (0, row, 0), 40)
    with attention_of(engine.model, ATTENTION), torch.inference_mode():
        for _ in range(3):
            engine._step()
    for row in (0, 2, 3):
        engine.close((row,))
    engine.turn((7,), [30, 31], (0, 7, 0), 40)
    record: dict[Key, list] = {(1,): [[11] * 5], (4,): [[14] * 8], (7,): [[30, 31]]}
    while finished := engine.run():
        for key, turn in finished:
            record[key].append(turn)
    engine.close((99,))  # unknown: ignored
    assert all(len(parts) == 2 for parts in record.values())
    assert largest_gap(engine.model, record) <= 1e-9


def test_two_engines_in_threads_share_a_model() -> None:
    """Without the written-out forward both switch the model's attention; whoever is last restores it."""
    model = qwen3(V)
    engines = [engine_of(model) for _ in range(2)]
    results: dict[int, dict] = {}
    for engine in engines:
        engine._dense = None
    threads = [
        threading.Thread(target=lambda i=i: results.__setitem__(i, conversation(engines[i], 6, 3, seed=i)))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.config._attn_implementation == "sdpa"
    for i in range(2):
        assert largest_gap(model, results[i]) <= 1e-9


# ---------------------------------------------------------------------------------------- stops and errors


def test_stops() -> None:
    engine = shared_engine(3)
    record = conversation(engine, 6, 3, budget=30)
    turns = [part for parts in record.values() for part in parts if isinstance(part, Sampled)]
    assert {turn.stop for turn in turns} >= {"stop", "length"}
    for turn in turns:
        assert STOP not in turn.ids[:-1] and (turn.ids[-1] == STOP) == (turn.stop == "stop")
        assert len(turn.ids) == 30 if turn.stop == "length" else len(turn.ids) <= 30
        assert set(BANNED).isdisjoint(turn.ids)


@pytest.mark.parametrize("reuse", [True, False])
def test_a_full_context_is_a_stop(reuse: bool) -> None:
    engine = engine_of(qwen3(V), max_context=24)
    engine.reuse = reuse
    engine.turn((0,), [9] * 20, (0,), 100)
    engine.turn((1,), [9] * 24, (0,), 100)
    engine.turn((2,), [9] * 30, (0,), 100)
    done: dict[Key, Sampled] = {}
    while finished := engine.run():
        done |= dict(finished)
    assert done[1,] == done[2,] == Sampled((), (), "context")
    assert (len(done[0,].ids) == 4 and done[0,].stop == "context") or done[0,].stop == "stop"
    engine.turn((0,), [9] * 10, (0, 1), 5)
    assert engine.run() == [((0,), Sampled((), (), "context"))]


def test_idle_rows_hold_their_slots() -> None:
    """Two slots, three rows: the third is admitted once a row is closed, and run() says when nothing can go on."""
    engine = shared_engine(2)
    for row in range(3):
        engine.turn((row,), [9 + row], (0, row), 2)
    finished = [key for done in iter(engine.run, []) for key, _ in done]
    assert sorted(finished) == [(0,), (1,)]
    engine.close((0,))
    assert [key for key, _ in engine.run()] == [(2,)]
    assert engine.run() == []


def test_misuse_is_named() -> None:
    engine = shared_engine(2)
    with pytest.raises(ValueError, match="fed no tokens"):
        engine.turn((5,), [], (0,), 4)
    engine.turn((0,), [9], (0,), 4)
    with pytest.raises(ValueError, match="not finished"):
        engine.turn((0,), [9], (0,), 4)
    model = engine.model
    with pytest.raises(ValueError, match="stop id"):
        HFEngine(model, stop_ids=[])
    with pytest.raises(ValueError, match="1024 positions"):
        HFEngine(model, stop_ids=[1], max_context=5000)
    with pytest.raises(ValueError, match="rows"):
        HFEngine(model, stop_ids=[1], rows=0)
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SampleParams(**wrong)


def test_weights_that_are_not_finite_are_an_error() -> None:
    model = qwen3(V)
    engine = engine_of(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    engine.reset()
    engine.turn((0,), [9], (0,), 4)
    with pytest.raises(FloatingPointError, match="not finite"):
        while engine.run():
            pass


# ---------------------------------------------------------------------------------------- drawing


def frequencies(params: SampleParams, logits_V: torch.Tensor, n: int = 40_000) -> torch.Tensor:
    u_N = torch.from_numpy((np.arange(n) + 0.5) / n)
    ids, logps = draw(logits_V.expand(n, -1), u_N, params, banned_row([0], len(logits_V), logits_V.device))
    masked = logits_V.clone()
    masked[0] = -float("inf")
    full = (masked / (params.temperature or 1)).log_softmax(-1)
    assert torch.allclose(logps.double(), full[ids].double(), atol=1e-6)
    return torch.bincount(ids, minlength=len(logits_V)) / n


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7), (4, 0.6)])
def test_draws_follow_the_truncated_softmax(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.tensor([5.0, 1.0, 2.0, 0.3, -1.0, 2.5, 0.0], dtype=torch.float64)
    p = logits.clone()
    p[0] = -float("inf")
    p = (p / temperature).softmax(-1)
    keep = torch.ones(7, dtype=torch.bool)
    order = p.argsort(descending=True)
    if top_k:
        keep[order[top_k:]] = False
    q = p * keep / (p * keep).sum()
    if top_p < 1:
        before = q[order].cumsum(0) - q[order]
        keep[order[before >= top_p]] = False
    want = p * keep / (p * keep).sum()
    got = frequencies(SampleParams(temperature=temperature, top_k=top_k, top_p=top_p), logits)
    assert torch.allclose(got.double(), want, atol=2e-4)


def test_greedy_takes_the_likeliest_and_reports_temperature_one() -> None:
    logits = torch.tensor([9.0, 1.0, 3.0, 2.0])
    got = frequencies(SampleParams(temperature=0), logits, n=10)
    assert got.tolist() == [0, 0, 1, 0]


@given(st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=20), st.floats(0, 1, exclude_max=True))
def test_never_an_id_of_probability_zero(values: list[float], u: float) -> None:
    logits = torch.tensor([values, [v * 20 for v in values]])
    banned = banned_row([0], len(values), logits.device)
    ids, logps = draw(logits, torch.tensor([u, np.nextafter(1.0, 0)]), SampleParams(), banned)
    assert (ids > 0).all() and torch.isfinite(logps).all()
