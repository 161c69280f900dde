"""Weights for an engine with a copy of its own, the check that they arrived, and what goes with which engine."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from agents.cli import UsageError
from agents.config import LoraConfig, VllmConfig
from agents.dist import World
from agents.engines.base import EngineFailure
from agents.engines.reference import plain_log_probs
from agents.session import build
from agents.sync import Verifier, WeightSync, probe_ids, probe_of, write_model
from tests.agents.seeing import picture_format, seeing_model, seeing_tokenizer
from tests.agents.small import qwen3, spread
from tests.agents.test_train import model_folder, small  # noqa: F401  (fixtures)


class Copy:
    """A second module that gets weights, unless told to lose them."""

    def __init__(self, model):
        self.model, self.version, self.loses = copy.deepcopy(model), -1, ()
        self.deliveries = 0

    def deliver(self, model, version):
        self.deliveries += 1
        state = {n: t for n, t in model.state_dict().items() if not any(n.startswith(lost) for lost in self.loses)}
        self.model.load_state_dict(state, strict=False)

    def log_probs(self, ids, pictures=()):
        return plain_log_probs(self.model, ids, pictures=pictures).tolist()


def shift(model, scale):
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


@pytest.fixture
def pair():
    model = qwen3(300, seed=1)
    copy = Copy(model)
    return model, copy, WeightSync(copy, model, World(), probe_ids(300, 48), 1e-3)


def test_weights_go_out_when_the_version_changes_and_are_checked_always(pair):
    model, copy, sync = pair
    for version in (0, 0, 1, 1, 1, 2):
        shift(model, 0.01 if version > sync.engine.version else 0.0)
        sync(version)
        assert copy.version == version and sync.gap < 1e-9
    assert copy.deliveries == 3
    shift(copy.model, 0.1)
    with pytest.raises(EngineFailure, match=r"version 2: .* off the trainer's; at most 0\.001 is rounding") as failure:
        sync(2)
    assert failure.value.everywhere


@pytest.mark.parametrize("lost", ["model.visual", "model.visual.patch_embed", "model.language_model.layers.1"])
def test_a_vision_tower_that_stays_behind_is_found(lost):
    model = seeing_model("qwen3_vl", seeing_tokenizer())
    probe, pictures = probe_of(model, 64, picture_format(model, "qwen3_vl"))
    assert len(probe) <= 64 and len(pictures) == 1
    engine = Copy(model)
    sync = WeightSync(engine, model, World(), probe, 1e-3, pictures)
    sync(0)
    engine.loses = (lost,)
    shift(model, 0.05)
    with pytest.raises(EngineFailure, match="off the trainer's"):
        sync(1)
    engine.loses = ()
    sync.delivered = None
    sync(1)
    with pytest.raises(UsageError, match="no room for a picture"):
        probe_of(model, 5, picture_format(model, "qwen3_vl"))


@pytest.mark.parametrize("lost, scale, words", [
    ("lm_head", 0.1, "off the trainer's"), ("lm_head", 1e-6, "since the last sync"),
    ("model", 0.1, "off the trainer's"), ("model", 1e-6, "since the last sync"),
    ("model.layers.1.mlp.down_proj", 0.1, "off the trainer's"), ("model.norm", 0.1, "off the trainer's"),
])  # fmt: skip
def test_what_is_lost_is_found_small_parts_when_steps_have_added_up(pair, lost, scale, words):
    model, copy, sync = pair
    sync(0)
    copy.loses = (lost,)
    shift(model, scale)
    with pytest.raises(EngineFailure, match=words):
        sync(1)


def test_steps_too_small_to_be_told_from_rounding_add_up():
    """Half precision: no single step moves the probe beyond rounding, but an engine that never follows is found."""
    draws = torch.Generator().manual_seed(0)
    rounding = lambda: 0.02 * torch.randn(47, generator=draws)  # noqa: E731
    start, direction = -5 * torch.ones(47), torch.randn(47, generator=draws)
    good, stuck, found = Verifier(0.25), Verifier(0.25), None
    for step in range(200):
        ours = start + 0.002 * step * direction
        assert good.check(ours, ours + rounding())[1] == ""
        if found is None and stuck.check(ours, start + rounding())[1]:
            found = step
    assert found is not None and 20 < found < 120


def test_not_a_number_is_wrong():
    assert Verifier(1e9).check(torch.zeros(3), torch.tensor([0.0, float("nan"), 0.0]))[1]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_written_model_is_untied_and_computes_the_same(tmp_path, tied, dtype):
    model = qwen3(300, torch.float32, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for scale in (0.0, 0.1):  # a second time into the same folder
        shift(model, scale)
        write_model(model, tmp_path / "model", dtype)
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
        assert read.lm_head.weight is not read.model.embed_tokens.weight
        assert read.dtype == dtype and not read.config.tie_word_embeddings
        rounded = copy.deepcopy(model).to(dtype).state_dict()
        assert read.state_dict().keys() == rounded.keys()
        assert all(torch.equal(t, rounded[n]) for n, t in read.state_dict().items())
    assert model.config.tie_word_embeddings == tied and model.dtype == torch.float32, "the model itself is left alone"


def test_experts_are_written_as_checkpoints_have_them(tmp_path):
    """transformers keeps experts in one tensor; files, and vLLM, have them one by one."""
    config = Qwen3MoeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = spread(Qwen3MoeForCausalLM, config, torch.float32)
    write_model(model, tmp_path / "ours", torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and any("experts.3." in name for name in ours)
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


def test_a_probe_is_fixed_and_valid():
    assert probe_ids(300, 48) == probe_ids(300, 100) and len(probe_ids(300, 48)) == 48
    assert probe_ids(300, 20) == probe_ids(300, 48)[:20]
    assert not {*range(10)} & {*probe_ids(40, 48, avoid=range(10))} and max(probe_ids(40, 48)) < 40


def refused(model_folder, **changes):  # noqa: F811
    with pytest.raises(UsageError) as error:
        build(small(model_folder, **changes), World())
    return str(error.value)


def test_options_that_do_not_go_together(model_folder):  # noqa: F811
    assert "give --engine vllm, too" in refused(model_folder, vllm=VllmConfig(eager=True))
    assert "leave out --dtype float64" in refused(model_folder, engine="vllm", dtype="float64")
    assert "there are none" in refused(model_folder, engine="vllm", vllm=VllmConfig(merge=True))
    world = World()
    world.size = 2
    config = small(model_folder, engine="vllm", vllm=VllmConfig(tensor_parallel=2), lora=LoraConfig())
    with pytest.raises(UsageError, match="Give --processes 1"):
        build(replace(config), world)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_error_says_what_to_install(model_folder):  # noqa: F811
    assert "pip install 'palaestra[vllm]'" in refused(model_folder, engine="vllm")
