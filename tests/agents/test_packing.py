"""Who computes what: every row once over all processes, within the budget; equal openings once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from agents.critic import trunk_of
from agents.dist import World
from agents.forward import Convention
from agents.learner import LMLearner
from agents.packing import SHORTEST, micro_batches, plan
from agents.prefix import can_share
from policy_opt.bank import CRITIC, REFERENCE
from policy_opt.batch import Batch
from policy_opt.need import VALUES, KLTo, LogProb, Need
from tests.agents.test_learner import ENTROPY, LOGP, learner, loss_of, tiny


def grouped(groups=3, size=4, seed=0) -> Batch:
    """Groups whose members read the same opening, of different lengths from group to group, and then differ."""
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=draw))

    rows = []
    for group in range(groups):
        opening = torch.randint(8, 29, (number(2, 20),), generator=draw).tolist()
        for _ in range(size):
            own = [(number(8, 29), number(0, 3) > 0) for _ in range(number(1, 9))]
            mask = [False] * len(opening) + [True] + [m for _, m in own[1:]]
            rows.append((group, opening + [t for t, _ in own], mask))
    width = max(len(tokens) for _, tokens, _ in rows)
    tokens_BT = torch.tensor([tokens + [0] * (width - len(tokens)) for _, tokens, _ in rows])
    mask_BT = torch.tensor([mask + [False] * (width - len(mask)) for _, _, mask in rows])
    real_BT = torch.arange(width) < torch.tensor([len(tokens) for _, tokens, _ in rows])[:, None]
    group_B = torch.tensor([group for group, _, _ in rows])
    return Batch.build(mask_BT=mask_BT, group_B=group_B, tokens_BT=tokens_BT, real_BT=real_BT)


def world(rank: int, size: int) -> World:
    out = World()
    out.rank, out.size = rank, size
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 120), st.booleans(), st.integers(1, 5))
def test_every_row_is_worked_on_once(seed, size, budget, share, members):
    b = grouped(groups=5, size=members, seed=seed)
    which_B = torch.rand(b.B, generator=torch.Generator().manual_seed(seed)) < 0.8
    length_B = b.real_BT.sum(1)
    seen: list[int] = []
    for rank in range(size):
        for chunk in plan(b, which_B, budget, world(rank, size), share):
            for part in chunk.parts:
                seen += part.rows_R.tolist()
                own = length_B[part.rows_R] - part.offset_R
                assert len(own) == 1 or int(own.max()) * len(own) <= budget
                assert (own >= 1).all()
                for row, g, offset in zip(part.rows_R, part.opening_R, part.offset_R, strict=True):
                    assert offset == chunk.length_G[g]
                    assert torch.equal(b.tokens_BT[row, :offset], b.tokens_BT[chunk.row_G[g], :offset])
                    assert offset == 0 or offset >= SHORTEST
                    assert not b.mask_BT[row, : offset + 1].any(), "the state before the first action is the row's own"
    assert sorted(seen) == which_B.nonzero().flatten().tolist()


def test_work_is_dealt_out_evenly():
    b = grouped(groups=24, size=4)
    length_B = b.real_BT.sum(1)
    loads = []
    for rank in range(2):
        chunks = plan(b, torch.ones(b.B, dtype=torch.bool), 64, world(rank, 2), share=True)
        own = sum(int((length_B[p.rows_R] - p.offset_R).sum()) for c in chunks for p in c.parts)
        loads.append(own + sum(int(c.length_G.sum()) for c in chunks))
    assert max(loads) / min(loads) < 1.1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_micro_batches_pad_little_and_keep_the_budget(lengths, budget):
    parts = micro_batches(torch.tensor(lengths), budget)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= budget
    flat = [lengths[i] for i in torch.cat(parts).tolist()]
    assert flat == sorted(lengths, reverse=True)


def gpt2(seed=0) -> GPT2LMHeadModel:
    """Unlike Qwen3's, its norms are float64 where the weights are."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=29, n_embd=16, n_layer=2, n_head=2, n_positions=64)
        return GPT2LMHeadModel(config).double().eval()


def gradients(model, share: bool, micro_tokens: int):
    one = LMLearner(model(0), convention=Convention(0.8, (0, 7)), micro_tokens=micro_tokens, share=share)
    one.prepare({"critic": CRITIC, "ref": REFERENCE}, [], None)
    one.bank["ref"].model.load_state_dict(model(3).state_dict())
    b = grouped()
    kl = Need("kl_BT", KLTo("ref"), when="loss")
    fed: list[int] = []
    for name in ("policy", "critic"):
        model = one.bank[name].model
        trunk_of(model).register_forward_pre_hook(lambda m, a, k: fed.append(k["input_ids"].numel()), with_kwargs=True)
    scored = one.score(b, [LOGP, ENTROPY, kl, VALUES, Need("ref_BT", LogProb(), model="ref")])
    whole = {k: scored[k].clone().requires_grad_() for k in ("logp_BT", "entropy_BT", "kl_BT", "values_BT")}
    loss = loss_of(whole) + whole["kl_BT"].sum() * 0.1 + (whole["values_BT"] - 1).pow(2).sum()
    pulls = dict(zip(whole, torch.autograd.grad(loss, list(whole.values())), strict=True))
    one.backward(b, [LOGP, ENTROPY, kl, VALUES], lambda rows, live: {k: v[rows] for k, v in pulls.items()})
    grads = {f"{n}/{k}": p.grad for n in ("policy", "critic") for k, p in one.bank[n].model.named_parameters()}
    return scored, grads, sum(fed)


@pytest.mark.parametrize("micro_tokens", [1, 30, 4096])
@pytest.mark.parametrize("model, exact", [(gpt2, 1e-9), (tiny, 1e-4)])
def test_a_shared_opening_changes_nothing_but_the_work(model, exact, micro_tokens):
    plain, shared = gradients(model, False, 4096), gradients(model, True, micro_tokens)
    for want, got in zip(plain[:2], shared[:2], strict=True):
        assert want.keys() == got.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=exact, atol=exact, msg=lambda m, n=name: f"{n}: {m}")
    assert micro_tokens < 30 or shared[2] < 0.75 * plain[2]


def test_idle_rows_share_their_opening_too():
    one, other = learner(), learner()
    other.share = False
    b = grouped()
    still = {"logp_BT": torch.zeros(b.B, b.T)}
    for each in (one, other):
        each.backward(b, [LOGP], lambda rows, live: {k: v[rows] for k, v in still.items()})
        assert all(p.grad is None for p in each.model.parameters())
    torch.testing.assert_close(one.streams["logp_BT"], other.streams["logp_BT"], rtol=1e-10, atol=1e-12)


def test_only_models_that_can_do_it_do_it():
    """Tried on the very model: full attention with a standard cache; learned positions are fine, windows are not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mistral = MistralForCausalLM(MistralConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=4)).eval()  # fmt: skip
    assert can_share(tiny()) and can_share(tiny().float()) and can_share(gpt2())
    assert not can_share(mistral)
    broken = tiny()
    broken.model.forward = lambda input_ids, use_cache=False: None
    assert not can_share(broken)
