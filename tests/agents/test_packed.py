"""Rows end to end give what padded rows give: streams, gradients, whatever they are; and only models that can do it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from agents.critic import trunk_of
from agents.dist import World
from agents.forward import Convention
from agents.learner import LMLearner
from agents.models import load_model
from agents.packed import NAME, Layout, can_pack, hidden_of, same_attention
from agents.packing import plan
from policy_opt.bank import CRITIC, REFERENCE
from policy_opt.batch import Batch
from policy_opt.need import VALUES, Hidden, KLTo, LogProb, Need
from tests.agents.test_distributed import as_arguments
from tests.agents.test_learner import ENTROPY, LOGP, batch, loss_of, tiny
from tests.agents.test_packing import gpt2, grouped, world
from tests.agents.test_resume import final, finish, forked
from tests.agents.test_train import model_folder, own_cache, small  # noqa: F401  (fixtures)

KL = Need("kl_BT", KLTo("ref"), when="loss")
WHOLE = (Need("all_BT", LogProb(), where="all"), Need("prompt_BT", LogProb(), where="prompt"), Need("x_BTD", Hidden()))


def results(model, b: Batch, packing: str, **options):
    """Streams, and the gradients of a loss that mixes rows, of policy and critic."""
    one = LMLearner(model, convention=Convention(0.8, (0, 7)), packing=packing, **options)
    one.prepare({"critic": CRITIC, "ref": REFERENCE}, [], None)
    with torch.no_grad():
        one.bank["critic"].model.head.weight += torch.linspace(-1, 1, 16)
        for p in one.bank["ref"].model.parameters():  # another distribution altogether
            p.mul_(torch.linspace(-2, 2, p.shape[-1]))
    scored = one.score(b, [LOGP, ENTROPY, KL, VALUES, Need("ref_BT", LogProb(), model="ref")])
    whole = {k: scored[k].clone().requires_grad_() for k in ("logp_BT", "entropy_BT", "kl_BT", "values_BT")}
    loss = loss_of(whole) + whole["kl_BT"].sum() * 0.1 + (whole["values_BT"] - 1).pow(2).sum()
    pulls = dict(zip(whole, torch.autograd.grad(loss, list(whole.values())), strict=True))
    one.backward(b, [LOGP, ENTROPY, KL, VALUES], lambda rows, live: {k: v[rows] for k, v in pulls.items()})
    grads = {f"{n}/{k}": p.grad for n in ("policy", "critic") for k, p in one.bank[n].model.named_parameters()}
    return {**scored, **one.score(b, WHOLE), "loss": loss.detach()}, grads


def close(got, want, exact: float) -> None:
    """Equal to a relative error of the largest entry, tensor by tensor."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value is None:
            assert got[name] is None
        else:
            error = (got[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)
            assert error <= exact, f"{name}: {error:.1e}"


@pytest.mark.parametrize("micro_tokens", [1, 60, 4096])
@pytest.mark.parametrize("rows", [grouped, batch])
@pytest.mark.parametrize("model", [tiny, gpt2])
def test_end_to_end_equals_padded(model, rows, micro_tokens):
    b = rows()
    want = results(model(), b, "never", share=False)
    for share in (True, False):
        for got, plain in zip(results(model(), b, "always", share=share, micro_tokens=micro_tokens), want, strict=True):
            close(got, plain, 1e-9 if model is gpt2 or not share else 1e-6)  # Qwen3's norms are float32 in any case


@pytest.mark.parametrize("share", [True, False])
def test_in_float32(share):
    b = grouped()
    want = results(tiny().float(), b, "never", share=False)
    for got, plain in zip(results(tiny().float(), b, "always", share=share, micro_tokens=60), want, strict=True):
        close(got, plain, 1e-5)
    alone = results(tiny().float(), b, "always", share=share, micro_tokens=60)[0]
    assert abs(float(alone["loss"] - want[0]["loss"])) <= 1e-6 * abs(float(want[0]["loss"]))


def fed(model) -> list[int]:
    """Tokens of every pass through the trunk from now on."""
    seen: list[int] = []
    trunk_of(model).register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].numel()), with_kwargs=True)
    return seen


@pytest.mark.parametrize("rows", [grouped, batch])
def test_no_token_goes_through_twice_and_no_padding_at_all(rows):
    b = rows()
    length_B = b.real_BT.sum(1)[b.mask_BT.any(1)]
    for share in (True, False):
        one = LMLearner(tiny(), packing="always", share=share)
        one.score(b, [LOGP])  # tries whether the model can
        seen = fed(one.model)
        one.score(b, [LOGP])
        saved = 0
        if share:
            saved = int(length_B.sum()) - sum(
                chunk.fed(b.real_BT.sum(1).tolist())
                for chunk in plan(b, torch.ones(b.B, dtype=torch.bool), 4096, world(0, 1), True, "always")
            )
        assert sum(seen) == int(length_B.sum()) - saved
        assert (saved > 0) == (share and rows is grouped)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 120), st.booleans(), st.integers(1, 5))
def test_every_row_is_worked_on_once(seed, size, budget, share, members):
    b = grouped(groups=5, size=members, seed=seed)
    which_B = torch.rand(b.B, generator=torch.Generator().manual_seed(seed)) < 0.8
    length_B = b.real_BT.sum(1).tolist()
    rows: list[int] = []
    for rank in range(size):
        for chunk in plan(b, which_B, budget, world(rank, size), share, "always"):
            assert chunk.packed and len(chunk.parts) == 1
            (part,) = chunk.parts
            rows += part.rows_R.tolist()
            assert len(part.rows_R) == 1 or chunk.fed(length_B) <= budget
            counts = part.opening_R.bincount(minlength=len(chunk.length_G))
            assert all(n == 0 or k > 1 for n, k in zip(chunk.length_G, counts, strict=True))
            for row, g, offset in zip(part.rows_R, part.opening_R, part.offset_R, strict=True):
                assert offset == chunk.length_G[g]
                assert torch.equal(b.tokens_BT[row, :offset], b.tokens_BT[chunk.row_G[g], :offset])
                assert not b.mask_BT[row, : offset + 1].any()
    assert sorted(rows) == which_B.nonzero().flatten().tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 120))
def test_auto_feeds_the_fewest_tokens(seed, budget):
    b = grouped(groups=4, size=3, seed=seed)
    which_B, length_B = torch.ones(b.B, dtype=torch.bool), b.real_BT.sum(1).tolist()
    cost = {
        pack: sum(c.fed(length_B) for c in plan(b, which_B, budget, world(0, 1), True, pack))
        for pack in ("never", "always", "auto")
    }
    assert cost["auto"] == min(cost.values())


def test_a_rows_tokens_reach_no_other_row():
    """Changing every other row changes nothing, to the bit."""
    model, layout = tiny(), Layout((4, 3, 2, 5), (-1, 0, 0, -1), torch.device("cpu"))
    tokens_1N = torch.arange(14)[None] + 8
    other_1N = tokens_1N.clone()
    other_1N[0, 4:7] = 20  # the first row's own tokens
    other_1N[0, 9:] = 21
    with torch.no_grad():
        a, b = hidden_of(model, tokens_1N, layout), hidden_of(model, other_1N, layout)
    assert torch.equal(a[:4], b[:4]) and torch.equal(a[7:9], b[7:9])
    assert not torch.equal(a[4:7], b[4:7])
    assert model.config._attn_implementation == "sdpa"
    assert layout.position_1N.tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 3, 4]]


def test_what_variable_length_kernels_are_told():
    layout = Layout((4, 3, 2, 5), (-1, 0, 0, -1), torch.device("cpu"))
    queries, keys, longest, furthest = layout.bounds
    assert queries.tolist() == [0, 4, 7, 9, 14] and keys.tolist() == [0, 4, 11, 17, 22]
    assert (longest, furthest) == (5, 7)
    assert layout.seen_M.tolist() == [*range(4), *range(7), *range(4), 7, 8, *range(9, 14)]
    assert Layout((4, 3), (-1, -1), torch.device("cpu")).seen_M is None


def reference(aligned_to_end: bool):
    """A variable-length kernel in plain torch: segment by segment, from the bounds alone."""

    def varlen(q, k, v, scaling, layout):
        ends_q, ends_k, longest, furthest = layout.bounds
        out, repeat = [], q.shape[1] // k.shape[1]
        for i in range(len(ends_q) - 1):
            a, b = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
            assert a.stop - a.start <= longest and b.stop - b.start <= furthest
            keys, values = (x[b].repeat_interleave(repeat, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[a], keys) * scaling
            shift = keys.shape[0] - (a.stop - a.start) if aligned_to_end else 0
            scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(shift), float("-inf"))
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        return torch.cat(out)

    return varlen


def test_kernels_are_tried_before_they_are_used():
    """One that is aligned to the first keys, as some are, is found out; and so is one that raises."""
    cpu = torch.device("cpu")
    for heads, kv_heads, dtype in ((4, 2, torch.float64), (4, 4, torch.float32), (2, 1, torch.bfloat16)):
        assert same_attention(reference(True), heads, kv_heads, 16, cpu, dtype)
        assert not same_attention(reference(False), heads, kv_heads, 16, cpu, dtype)

    def broken(*args):
        raise RuntimeError("head dimension 16 is not supported")

    assert not same_attention(broken, 4, 2, 16, cpu, torch.float32)
    assert not same_attention(lambda q, k, v, scaling, layout: v[: len(q)], 4, 4, 16, cpu, torch.float32)


def shaped(config, model, **changes):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model(config(**{**sizes, **changes})).eval()


def test_only_models_that_can_do_it_do_it():
    """Tried on the very model: windows, capped scores, distances in place of positions are padded."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bloom = BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2)).eval()
    assert can_pack(tiny()) and can_pack(tiny().float()) and can_pack(gpt2())
    assert can_pack(shaped(LlamaConfig, LlamaForCausalLM))
    assert can_pack(shaped(MistralConfig, MistralForCausalLM, sliding_window=None))
    assert not can_pack(shaped(MistralConfig, MistralForCausalLM, sliding_window=4))
    assert not can_pack(shaped(Gemma2Config, Gemma2ForCausalLM, head_dim=8))
    assert not can_pack(bloom)
    broken = tiny()
    broken.model.forward = lambda input_ids, use_cache=False: None
    assert not can_pack(broken)


def test_a_model_that_cannot_is_padded():
    window = shaped(MistralConfig, MistralForCausalLM, vocab_size=29, sliding_window=4).double()
    one = LMLearner(window, packing="auto")
    seen = []
    one.model.model.register_forward_pre_hook(
        lambda m, a, k: seen.append((k["input_ids"].shape[0], m.config._attn_implementation)), with_kwargs=True)
    one.score(batch(), [LOGP])
    assert one.bank["policy"].packs is False
    assert seen[-1][0] > 1 and seen[-1][1] != NAME


def mixed() -> World:
    """One process that computes in bfloat16."""
    out = World()
    out.precision = torch.bfloat16
    out.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    return out


@pytest.mark.parametrize("recompute", [False, True])
def test_in_bfloat16_gradients_are_those_of_float32_weights(recompute):
    """As coarse as padded rows are; weights, gradients and streams stay float32."""
    b = grouped()
    exact = results(tiny().float(), b, "never", share=False)
    padded = results(tiny().float(), b, "never", share=False, world=mixed(), recompute=recompute)
    packed = results(tiny().float(), b, "always", world=mixed(), recompute=recompute)
    one = LMLearner(tiny().float(), world=mixed())
    assert one.packs(one.bank["policy"])
    for got in (padded, packed):
        for name, grad in got[1].items():
            assert (grad is None) == (exact[1][name] is None)
            assert grad is None or grad.dtype == torch.float32
        assert all(got[0][name].dtype == torch.float32 for name in ("logp_BT", "entropy_BT", "kl_BT", "values_BT"))

    def error(got):
        pairs = [(got[1][n], g) for n, g in exact[1].items() if g is not None]
        return float(sum((a - g).square().sum() for a, g in pairs) / sum(g.square().sum() for _, g in pairs)) ** 0.5

    assert 1e-5 < error(packed) < 0.05 and error(packed) < 2 * error(padded)


def test_a_run_in_bfloat16_keeps_float32(model_folder, tmp_path):  # noqa: F811
    """What samples, what is saved and what is exported; in a process of its own, as accelerate remembers precision."""
    run, log = tmp_path / "run", tmp_path / "log"
    config = small(model_folder, steps=2, dtype="bfloat16", run=str(run), processes=1, packing="always", recompute=True)
    assert finish(forked(as_arguments(config), log), log) == 0, log.read_text()
    policy = final(run)["learner"]["members"]["policy"]
    assert all(v.dtype == torch.float32 for v in policy["model"].values())
    moments = [v for entry in policy["optimizer"].values() for v in entry.values() if isinstance(v, torch.Tensor)]
    assert moments and all(v.dtype == torch.float32 for v in moments)
    exported, _ = load_model(str(run))
    for name, value in exported.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, policy["model"][name])
    stored = load_file(run / "model" / "model.safetensors")
    assert all(v.dtype == torch.float32 for v in stored.values())
    gaps = [json.loads(x)["logp_gap"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert 1e-6 < max(gaps) < 0.3
