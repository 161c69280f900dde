"""Gradient checkpointing: the same gradient to the bit, less memory, and only while the learner is at work."""

from __future__ import annotations

from dataclasses import replace
from weakref import finalize

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM

from agents.activations import can_recompute, recomputed
from agents.cli import UsageError
from agents.forward import Convention
from agents.learner import LMLearner
from policy_opt.bank import CRITIC
from policy_opt.batch import Batch
from policy_opt.need import VALUES
from tests.agents.test_learner import ENTROPY, LOGP, batch, loss_of, tiny
from tests.agents.test_packed import fed
from tests.agents.test_packing import gpt2, grouped
from tests.agents.test_train import model_folder, own_cache, small, start  # noqa: F401  (fixtures)


class Peak(TorchDispatchMode):
    """Bytes of tensors that come into being inside, alive at the same time."""

    def __init__(self):
        super().__init__()
        self.alive = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in old | self.known:
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                self.most = max(self.most, self.alive)
                finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def learner(model, **options) -> LMLearner:
    one = LMLearner(model, convention=Convention(0.8, (0, 7)), **options)
    one.prepare({"critic": CRITIC}, [], None)
    return one


def gradients(one: LMLearner, b: Batch):
    scored = {k: v.requires_grad_() for k, v in one.score(b, [LOGP, ENTROPY]).items()}
    pulls = dict(zip(scored, torch.autograd.grad(loss_of(scored), list(scored.values())), strict=True))
    one.backward(b, [LOGP, ENTROPY, VALUES], lambda rows, live: {
        **{k: v[rows] for k, v in pulls.items()}, "values_BT": (live["values_BT"] - 1) * b.mask_BT[rows]})  # fmt: skip
    return {f"{n}/{k}": p.grad for n in ("policy", "critic") for k, p in one.bank[n].model.named_parameters()}


@pytest.mark.parametrize("packing", ["always", "never"])
@pytest.mark.parametrize("model, rows", [(tiny, batch), (tiny, grouped), (gpt2, batch)])
def test_gradients_are_the_same_to_the_bit(model, rows, packing):
    """Packed rows share openings; padded ones do not, because a cache cannot be filled twice."""
    b = rows()
    plain = learner(model(), packing=packing, share=packing == "always", micro_tokens=60)
    again = learner(model(), packing=packing, micro_tokens=60, recompute=True)
    want, got = gradients(plain, b), gradients(again, b)
    assert got.keys() == want.keys() and any(bool(g.any()) for g in got.values())
    assert all(torch.equal(got[name], grad) for name, grad in want.items())


def deep(layers: int = 12) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=29, hidden_size=32, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize("packing", ["always", "never"])
def test_it_takes_less_memory(packing):
    """Peak of what a backward pass allocates, gradients included: less than half."""
    b = batch(rows=64, width=48)
    peaks = []
    for recompute in (False, True):
        one = LMLearner(deep(), packing=packing, recompute=recompute, micro_tokens=4096)
        one.score(b, [LOGP])  # tries what the model can
        with Peak() as memory:
            one.backward(b, [LOGP], lambda rows, live: {"logp_BT": b.mask_BT[rows].float()})
        peaks.append(memory.most)
    assert peaks[1] < 0.5 * peaks[0]


def test_what_is_kept_does_not_grow_with_what_a_layer_does():
    """Bytes saved for the backward pass between layers: a few hidden states a layer, not dozens."""
    model = deep()
    tokens_RT = torch.arange(8 * 48).reshape(8, 48) % 29
    kept = []
    for models in ((), (model,)):
        held: dict[int, int] = {}

        def note(x, held=held):
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), recomputed(models):
            out = model.model(input_ids=tokens_RT, use_cache=False).last_hidden_state
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(size for at, size in held.items() if at not in weights) / (4 * out.numel() * 12))
    assert kept[1] < 3 < 20 < kept[0]


def test_the_engine_never_sees_it(model_folder, tmp_path):  # noqa: F811
    """A run with it samples and learns what a run without it does; outside the learner nothing is switched on."""
    rewards, weights = [], []
    for recompute in (False, True):
        config = replace(small(model_folder, steps=2, dtype="float64"), recompute=recompute, packing="always")
        trainer = start(config, tmp_path / str(recompute))
        flags = []
        trunk = trainer.session.model.model
        trunk.layers[0].register_forward_pre_hook(
            lambda m, a, k, flags=flags: flags.append((m.gradient_checkpointing, k.get("past_key_values") is not None)),
            with_kwargs=True)
        trainer.run()
        assert (True, True) not in flags and (False, True) in flags
        assert ((True, False) in flags) == recompute
        rewards.append([x["reward"] for x in trainer.history])
        weights.append(trainer.session.model.state_dict())
    assert rewards[0] == rewards[1]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_dropout_stays_asleep_and_a_model_that_cannot_is_refused():
    sleepy = tiny()
    for layer in sleepy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert can_recompute(sleepy) and can_recompute(tiny())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drops = OPTForCausalLM(OPTConfig(
            vocab_size=29, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
            word_embed_proj_dim=16, dropout=0.5, max_position_embeddings=64)).eval()  # fmt: skip
        assert not can_recompute(drops)  # its layers drop out themselves
        with pytest.raises(UsageError, match="--recompute: the layers of OPTForCausalLM"):
            LMLearner(drops, recompute=True).settle()
    assert not any(layer.training or layer.gradient_checkpointing for layer in drops.model.decoder.layers)


def test_padded_rows_then_share_nothing_and_it_is_said():
    one = LMLearner(tiny(), packing="never", recompute=True)
    assert one.settle() == ("--recompute: the openings of padded rows are computed with every row",)
    assert LMLearner(tiny(), recompute=True).settle() == ()
    seen = fed(one.model)
    b = grouped()
    one.score(b, [LOGP])
    assert sum(seen) >= int(b.real_BT.sum())
