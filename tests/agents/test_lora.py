"""Adapters: nothing changes at first, only they are trained, and what is exported computes what was trained."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from agents import lora, optim
from agents.cli import UsageError
from agents.config import LoraConfig, OptimConfig, SaveConfig
from agents.critic import trunk_of
from agents.display import Silent
from agents.dist import World
from agents.engines.hf import HFEngine
from agents.engines.reference import log_prob_gap
from agents.forward import Convention
from agents.learner import LMLearner
from agents.models import export, load_model
from agents.prefix import can_share
from agents.session import build
from agents.trainer import Trainer
from policy_opt.bank import CRITIC, REFERENCE, ModelSpec
from policy_opt.need import VALUES, KLTo, Need
from tests.agents.small import qwen3
from tests.agents.test_distributed import as_arguments
from tests.agents.test_learner import BANNED, LOGP, VOCAB, batch, tiny
from tests.agents.test_resume import assert_same_run, final, finish, forked, interrupt, resume
from tests.agents.test_train import WARM, model_folder, own_cache, small, start  # noqa: F401  (fixtures)

RANK = LoraConfig(rank=4)
LINEAR = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
targets = st.lists(st.sampled_from(LINEAR), unique=True).map(tuple)
configs = st.builds(LoraConfig, st.integers(1, 12), st.none() | st.floats(0.1, 64), targets)


def adapted(config: LoraConfig = RANK, seed: int = 0, model=None):
    model = model if model is not None else tiny()
    lora.adapt(model, config, seed)
    return model


def stirred(model, size: float = 0.3):
    """Adapters as they might be after training."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in lora.layers(model).values():
            weight = layer.lora_B["default"].weight
            weight.copy_(size / layer.scaling["default"] * torch.randn(weight.shape, generator=draw))
    return model


def logits(model, b=None):
    return model(input_ids=(b or batch()).tokens_BT, use_cache=False).logits.detach()


def learner(model, **options) -> LMLearner:
    config = OptimConfig(name="sgd", lr=0.1, beta1=0.0, clip=0.0)
    return LMLearner(model, config, convention=Convention(0.8, BANNED), **options)


def train(one: LMLearner, steps: int = 1, needs=(LOGP,)) -> None:
    b = batch()
    for _ in range(steps):
        one.backward(b, list(needs), lambda rows, live: {n: -b.mask_BT[rows].double() for n in live})
        one.step()


# ---------------------------------------------------------------------- what adapters are


@settings(max_examples=20, deadline=None)
@given(config=configs, seed=st.integers(0, 5))
def test_at_first_nothing_changes_to_the_last_bit(config, seed):
    before = torch.get_rng_state()
    model = adapted(config, seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(model), logits(tiny()))
    assert {name.rpartition(".")[2] for name in lora.layers(model)} == set(config.targets or LINEAR)
    for layer in lora.layers(model).values():
        assert layer.lora_A["default"].weight.shape[0] == config.rank
        assert layer.scaling["default"] == pytest.approx((config.alpha or 2 * config.rank) / config.rank)


def test_the_start_is_a_function_of_seed_and_layer():
    a, b, c = (lora.adapter_state(adapted(seed=seed)) for seed in (1, 1, 2))
    some = lora.adapter_state(adapted(LoraConfig(rank=4, targets=("q_proj",)), seed=1))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(a[name], c[name])
    assert torch.equal(a[name], some[name])


def test_only_adapters_are_trained():
    model, plain = adapted(), tiny().state_dict()
    one = learner(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {id(p) for g in one.bank.policy.optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad}
    b = batch()
    one.backward(b, [LOGP], lambda rows, live: {"logp_BT": -b.mask_BT[rows].double()})
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    one.step()
    train(one, 2)
    now = model.state_dict()
    for name, tensor in plain.items():
        path, _, leaf = name.rpartition(".")
        assert torch.equal(now.get(f"{path}.base_layer.{leaf}", now.get(name)), tensor), name
    assert not torch.equal(logits(model), logits(tiny()))


def test_adapters_have_a_rate_of_their_own():
    assert optim.resolved(OptimConfig(), tiny()).lr == 5e-4 and optim.resolved(OptimConfig(), adapted()).lr == 5e-3
    assert optim.resolved(OptimConfig(lr=3e-4), adapted()).lr == 3e-4


def test_trunk_head_packing_and_checkpointing_work_on_adapted_models():
    model = stirred(adapted())
    assert type(model) is type(tiny()) and type(trunk_of(model)) is type(trunk_of(tiny()))
    assert model.get_output_embeddings() is model.lm_head and can_share(model)
    b = batch()
    ways = ({"share": True}, {"share": False}, {"packing": "always"}, {"packing": "never"}, {"recompute": True})
    found = []
    for way in ways:
        one = learner(stirred(adapted()), **way)
        streams = one.backward(b, [LOGP], lambda rows, live: {"logp_BT": -b.mask_BT[rows].double()})
        grads = [p.grad for p in one.model.parameters() if p.requires_grad]
        found.append([streams["logp_BT"], *grads])
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wanted, words", [
    (("q_prj",), "no linear layer is called `q_prj`; did you mean `q_proj`?"),
    (("embed_tokens",), "no linear layer is called `embed_tokens`"),
    (("lm_head",), "the language-model head gets no adapter"),
])  # fmt: skip
def test_a_target_that_is_none_is_named(wanted, words):
    with pytest.raises(UsageError) as said:
        adapted(LoraConfig(rank=2, targets=wanted))
    assert words in str(said.value)


def test_options_without_a_rank_are_refused(model_folder):  # noqa: F811
    for lost in (LoraConfig(alpha=3.0), LoraConfig(targets=("q_proj",))):
        with pytest.raises(UsageError, match="give --lora"):
            build(small(model_folder, lora=lost), World())


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'palaestra\[lora\]'"):
        adapted()


# ---------------------------------------------------------------------- models beside the policy


def test_reference_average_and_critic_share_the_base_weights():
    model = stirred(adapted())
    one = learner(model)
    one.prepare({"ref": REFERENCE, "ema": ModelSpec("copy", ema=0.9), "critic": CRITIC}, [], None)
    for name in ("ref", "ema", "critic"):
        own = one.bank[name].own_state()
        assert {n for n in own if "lora_" not in n} == ({"head.weight", "head.bias"} if name == "critic" else set())
        theirs = {id(p) for p in one.bank[name].model.parameters()}
        assert not theirs & {id(p) for p in model.parameters() if p.requires_grad}
    assert all(not p.requires_grad for p in one.bank["ref"].model.parameters())
    at_first = logits(model)
    kl = Need("kl_BT", KLTo("ref"))
    b = batch()
    assert float(one.score(b, [kl])["kl_BT"].abs().max()) < 1e-12
    train(one, 2, (LOGP, VALUES))
    assert torch.equal(logits(one.bank["ref"].model), at_first)
    assert float(one.score(b, [kl])["kl_BT"].max()) > 1e-6
    assert float(one.bank["critic"].model.head.weight.detach().abs().max()) > 0
    adapters = {n: p for n, p in one.bank["critic"].model.named_parameters() if "lora_B" in n}
    policys = dict(trunk_of(model).named_parameters())
    assert any(not torch.equal(p, policys[n.removeprefix("trunk.")]) for n, p in adapters.items())


def test_moving_average_moves_adapters_only():
    model = stirred(adapted())
    one = learner(model)
    one.prepare({"ema": ModelSpec("copy", ema=0.9)}, [], None)
    old = lora.adapter_state(copy.deepcopy(one.bank["ema"].model))
    train(one)
    one.sync("ema", 0.75)
    new, policy = lora.adapter_state(one.bank["ema"].model), lora.adapter_state(model)
    for name in old:
        torch.testing.assert_close(new[name], 0.75 * old[name] + 0.25 * policy[name])
    for path, layer in lora.layers(model).items():
        assert torch.equal(layer.base_layer.weight, tiny().get_submodule(path).weight)
    one.sync("ema", 0.0)
    assert torch.equal(logits(one.bank["ema"].model), logits(model))


# ---------------------------------------------------------------------- the sampler sees them


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_the_engine_samples_from_the_adapted_model(dtype, limit):
    """Also after they changed, and by the fast forward where there is one."""
    model = adapted(model=qwen3(VOCAB, dtype))
    engine = HFEngine(model, stop_ids=[3], banned_ids=BANNED, rows=4, max_context=64)
    assert engine.reuse and (engine._dense is not None) == (dtype == torch.float32)
    for size in (0.1, 0.3):
        stirred(model, size)
        engine.reset()
        assert log_prob_gap(engine) <= limit
    assert float((logits(model) - logits(lora.merged(adapted(model=qwen3(VOCAB, dtype))))).abs().max()) > 0.1


# ---------------------------------------------------------------------- what is kept


@settings(max_examples=10, deadline=None)
@given(config=configs)
def test_merged_equals_adapted(config):
    model = stirred(adapted(config, model=qwen3(VOCAB, torch.float32)))
    want, before = logits(model), {n: t.detach().clone() for n, t in model.state_dict().items()}
    plain = lora.merged(model)
    assert not lora.layers(plain) and not hasattr(plain, "peft_config")
    torch.testing.assert_close(logits(plain), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()), "the model itself is as before"
    bare = lora.without(model)
    assert not lora.layers(bare) and torch.equal(logits(bare), logits(qwen3(VOCAB, torch.float32)))
    assert not {id(p) for p in bare.parameters()} - {id(p) for p in model.parameters()}
    assert plain.state_dict().keys() == qwen3(VOCAB, torch.float32).state_dict().keys()


def test_a_run_leaves_a_merged_model_and_an_adapter_folder(model_folder, tmp_path):  # noqa: F811
    config = small(model_folder, lora=RANK, optim=OptimConfig(lr=5e-2))
    trainer = start(config, tmp_path / "run")
    trainer.run()
    assert max(m["logp_gap"] for m in trainer.history) <= 1e-4 and max(m["grad_norm"] for m in trainer.history) > 0
    b = batch()
    want = logits(trainer.session.model, b)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(logits(plain, b), want, rtol=0, atol=1e-5)
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "run" / "adapter")
    torch.testing.assert_close(logits(beside, b), want, rtol=0, atol=1e-6)
    assert not torch.equal(logits(AutoModelForCausalLM.from_pretrained(model_folder), b), want)
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert logits(load_model(str(tmp_path / "run"))[0], b).shape == want.shape


def test_checkpoints_hold_adapters_and_the_name_of_the_base(model_folder, tmp_path):  # noqa: F811
    trainer = start(small(model_folder, algo="ppo", steps=1, lora=RANK), tmp_path / "run")
    trainer.run()
    members = final(tmp_path / "run")["learner"]["members"]
    assert all("lora_" in name for name in members["policy"]["model"])
    assert {n for n in members["critic"]["model"] if "lora_" not in n} == {"head.weight", "head.bias"}
    assert members["policy"]["base"] == lora.fingerprint(trainer.session.model)
    assert all("lora_" in name for name in members["policy"]["optimizer"])


def test_another_base_is_refused(model_folder, tmp_path):  # noqa: F811
    one, other = learner(adapted(), share=False), learner(adapted(model=tiny(1)))
    with pytest.raises(ValueError, match="belong to another base model"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="belong to another base model"):
        learner(tiny()).load_state_dict(one.state_dict())


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_resume_equals_going_on(model_folder, tmp_path, algo):  # noqa: F811
    """k + k = 2k with adapters, a warm start through them, a reference or a critic beside them."""
    config = small(
        model_folder, algo=algo, steps=4, warm=replace(WARM, epochs=4), lora=RANK, optim=OptimConfig(lr=2e-2),
        save=SaveConfig(every=2, keep=9),
    )  # fmt: skip
    start(config, tmp_path / "whole").run()
    begun = start(config, tmp_path / "halved")
    interrupt(begun)
    resume(config, tmp_path / "halved").run()
    assert_same_run(tmp_path / "whole", tmp_path / "halved")
    assert max(m["grad_norm"] for m in begun.history) > 0, "nothing was learnt, so nothing was tested"


def test_it_learns(model_folder, tmp_path):  # noqa: F811
    """A head that can tell letters apart stays as it is; the adapters learn to say letters, which is paid."""
    model, tokenizer = load_model(model_folder)
    with torch.no_grad():
        model.lm_head.weight *= 20
    export(model, tokenizer, tmp_path / "sharp")
    config = small(
        str(tmp_path / "sharp"), steps=15, group_size=16, lora=LoraConfig(rank=8), optim=OptimConfig(lr=2e-2),
        save=SaveConfig(every=100, trajectories=0),
    )  # fmt: skip
    trainer = start(config, tmp_path / "run")
    trainer.run()
    reward = [m["reward"] for m in trainer.history]
    assert sum(reward[-3:]) > 1.5 * sum(reward[:3]), reward


def test_the_warm_start_is_that_of_full_weights(model_folder, tmp_path):  # noqa: F811
    """It trains what the adapters stand on, so that a run with adapters begins where one without would."""
    config = small(model_folder, lora=RANK, warm=replace(WARM, epochs=3), steps=1, optim=OptimConfig(lr=2e-2))
    plain = Trainer(build(replace(config, lora=LoraConfig()), World()), None, Silent())
    plain.warm_start()
    notes = []
    trainer = start(config, tmp_path / "run")
    trainer.display.note = notes.append
    trainer.run()
    assert any("cached" in note for note in notes), "one cache for both"
    bare = lora.without(trainer.session.model).state_dict()
    for name, tensor in plain.session.model.state_dict().items():
        assert torch.equal(bare[name], tensor)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "base").state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in bare.items())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "base")
    adapted_one = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    torch.testing.assert_close(logits(adapted_one), logits(trainer.session.model), rtol=0, atol=1e-6)
    assert adapted_one.peft_config["default"].base_model_name_or_path == str(tmp_path / "run" / "base")


@pytest.mark.full
def test_two_processes_equal_one(model_folder, tmp_path):  # noqa: F811
    """With a critic beside the policy."""
    config = small(
        model_folder, algo="ppo", steps=3, dtype="float64", lora=RANK, optim=OptimConfig(lr=2e-2),
        save=SaveConfig(every=1, keep=9),
    )  # fmt: skip
    start(config, tmp_path / "one").run()
    log = tmp_path / "log"
    argv = as_arguments(replace(config, processes=2, run=str(tmp_path / "two")))
    assert finish(forked(argv, log), log, 300) == 0, log.read_text()
    one, two = (final(tmp_path / name)["learner"]["members"] for name in ("one", "two"))
    for member in ("policy", "critic"):
        for name, tensor in one[member]["model"].items():
            torch.testing.assert_close(two[member]["model"][name], tensor, rtol=1e-6, atol=1e-9)
