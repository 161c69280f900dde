"""The learner against whole-batch autograd in float64: streams, gradients, invariance, the bank."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from agents.config import OptimConfig
from agents.forward import Convention
from agents.learner import LMLearner
from policy_opt.bank import CRITIC, REFERENCE, ModelSpec
from policy_opt.batch import Batch
from policy_opt.errors import RecipeError
from policy_opt.need import Entropy, Hidden, KLTo, LogProb, MaskedImage, Mismatched, Need, TopKIds, TopKLogProb, Value

VOCAB, BANNED = 29, (0, 7)
LOGP = Need("logp_BT", LogProb(), when="loss")
ENTROPY = Need("entropy_BT", Entropy(), when="loss")


def tiny(seed=0) -> Qwen3ForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=64, tie_word_embeddings=False,
        )
        return Qwen3ForCausalLM(config).double().eval()


def batch(rows=7, width=19, seed=0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    length = torch.randint(4, width + 1, (rows,), generator=draw)
    real = torch.arange(width) < length[:, None]
    tokens = torch.randint(8, VOCAB, (rows, width), generator=draw) * real
    mask = real & (torch.rand(rows, width, generator=draw) < 0.5) & (torch.arange(width) > 1)
    units = {"group_B": torch.arange(rows) // 2, "member_B": torch.arange(rows) % 2}
    return Batch.build(mask_BT=mask, tokens_BT=tokens, real_BT=real, **units)


def learner(micro_tokens=4096, bank=None) -> LMLearner:
    one = LMLearner(tiny(), OptimConfig(name="sgd", lr=0.1, beta1=0.0, clip=0.0),
                    convention=Convention(0.8, BANNED), micro_tokens=micro_tokens)
    one.prepare(bank or {}, [], None)
    return one


def full_logp(model, b: Batch):
    """Materialised `[B, T, V]` log-probs; entry t speaks of token t."""
    z = model(input_ids=b.tokens_BT, attention_mask=b.real_BT.long()).logits / 0.8
    z[..., list(BANNED)] = -1e4
    return torch.cat([torch.zeros_like(z[:, :1]), z.log_softmax(-1)[:, :-1]], 1)


def test_scores_equal_the_materialised_ones():
    other = tiny(1)
    one = learner(micro_tokens=40, bank={"ref": REFERENCE})
    one.bank.members["ref"].model.load_state_dict(other.state_dict())
    b = batch()
    needs = [
        LOGP, ENTROPY, Need("kl_BT", KLTo("ref")), Need("logp_ref_BT", LogProb(), model="ref"),
        Need("all_BT", LogProb(), where="all"), Need("prompt_BT", LogProb(), where="prompt"),
        Need("top_BTK", TopKLogProb(3)), Need("ids_BTK", TopKIds(3)), Need("hidden_BTD", Hidden()),
    ]
    got = one.score(b, needs)
    lp, lq = full_logp(one.model, b), full_logp(other, b)
    p = lp.exp()
    picked = lp.gather(2, b.tokens_BT[..., None])[..., 0]
    first = torch.arange(b.T) > 0
    opening = b.real_BT & (b.mask_BT.cumsum(1) == 0) & first
    mask = b.mask_BT
    expected = {
        "logp_BT": picked * mask,
        "entropy_BT": -(p * lp).sum(-1) * mask,
        "kl_BT": (p * (lp - lq)).sum(-1) * mask,
        "logp_ref_BT": lq.gather(2, b.tokens_BT[..., None])[..., 0] * mask,
        "all_BT": torch.where(b.real_BT & first, picked, 0),
        "prompt_BT": torch.where(opening, picked, 0),
        "top_BTK": lp.topk(3, -1).values * mask[..., None],
    }
    for name, want in expected.items():
        torch.testing.assert_close(got[name], want, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(got["ids_BTK"], lp.topk(3, -1).indices * mask[..., None])
    assert got["hidden_BTD"].shape == (b.B, b.T, 16)


@pytest.mark.parametrize("micro_tokens", [1, 4096])
@pytest.mark.parametrize("shift", [1, 3])
def test_mismatched_pairs_are_a_prompt_and_anothers_answer(shift, micro_tokens):
    """Row by row against a forward of the two put together; values stand where the tokens stand in their own row."""
    other = tiny(1)
    one = learner(micro_tokens, bank={"ref": REFERENCE})
    one.bank.members["ref"].model.load_state_dict(other.state_dict())
    b = batch(rows=9)
    b = b.over(mask_BT=b.mask_BT & (torch.arange(9) != 4)[:, None])
    view = Mismatched(shift)
    got = one.score(b, [
        LOGP, Need("kl_logp_BT", LogProb(), view=view), Need("kl_ref_BT", LogProb(), model="ref", view=view),
        Need("kl_entropy_BT", Entropy(), view=view),
    ])
    torch.testing.assert_close(got["logp_BT"], one.score(b, [LOGP])["logp_BT"])
    partner = b.mismatched(shift).tolist()
    assert all(b["group_B"][i] != b["group_B"][j] for i, j in enumerate(partner) if b["member_B"][i] == 0)
    for i, j in enumerate(partner):
        acting = b.mask_BT[i].any()
        opening = b.tokens_BT[i, : int(b.mask_BT[i].long().argmax()) if acting else int(b.real_BT[i].sum())]
        answer = b.tokens_BT[j][b.mask_BT[j]]
        row = torch.cat([opening, answer])[None]
        alone = Batch.build(tokens_BT=row, mask_BT=torch.ones_like(row), group_B=torch.zeros(1).long())
        for name, model in (("kl_logp_BT", one.model), ("kl_ref_BT", other)):
            want = full_logp(model, alone)[0].gather(1, row[0][:, None])[:, 0][len(opening) :]
            torch.testing.assert_close(got[name][i][b.mask_BT[j]], want, rtol=1e-9, atol=1e-10)
            assert not got[name][i][~b.mask_BT[j]].any()


def loss_of(streams):
    """A loss that mixes rows: its gradient needs the whole batch."""
    row = streams["logp_BT"].sum(1)
    return (row - row.mean()).pow(2).mean() + 0.3 * (streams["entropy_BT"].sum() / 5).tanh()


def gradients(one: LMLearner, b: Batch):
    scored = {k: v.requires_grad_() for k, v in one.score(b, [LOGP, ENTROPY]).items()}
    cotangents = dict(zip(scored, torch.autograd.grad(loss_of(scored), list(scored.values())), strict=True))
    one.backward(b, [LOGP, ENTROPY], lambda rows, live: {k: cotangents[k][rows] for k in live})
    return {n: p.grad for n, p in one.model.named_parameters()}


def test_cotangents_give_the_gradient_of_the_whole_batch_loss():
    one, b = learner(), batch()
    got = gradients(one, b)
    model = tiny()
    lp = full_logp(model, b)
    streams = {
        "logp_BT": lp.gather(2, b.tokens_BT[..., None])[..., 0] * b.mask_BT,
        "entropy_BT": -(lp.exp() * lp).sum(-1) * b.mask_BT,
    }
    loss_of(streams).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("change", ["split", "pad", "order"])
def test_gradient_does_not_depend_on_layout(change):
    b = batch()
    want = gradients(learner(), b)
    if change == "split":
        got = gradients(learner(micro_tokens=1), b)
    elif change == "pad":
        got = gradients(learner(), b.pad(b.T + 9))
    else:
        got = gradients(learner(), b.rows(torch.randperm(b.B, generator=torch.Generator().manual_seed(1))))
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-9, atol=1e-12)


def test_pull_sees_the_live_streams_of_its_rows():
    one, b = learner(micro_tokens=40), batch()
    scored = one.score(b, [LOGP])["logp_BT"]
    last = torch.zeros(b.B, b.T, dtype=torch.float64)

    def pull(rows, live):
        assert not live["logp_BT"].requires_grad
        last[rows] = live["logp_BT"]
        return {}

    torch.testing.assert_close(one.backward(b, [LOGP], pull)["logp_BT"], scored)
    torch.testing.assert_close(last, scored)
    assert all(p.grad is None for p in one.model.parameters())


def test_rows_without_gradient_are_only_looked_at():
    """Guessed from the sampler's log-probs; a wrong guess costs a second forward, never the gradient."""
    b = batch()
    idle = torch.arange(b.B) % 2 == 0
    weight = torch.where(idle, 0.0, 1.0).double()[:, None] * b.mask_BT
    forwards = []
    one = learner(micro_tokens=40)
    one.model.model.register_forward_hook(lambda m, i, out: forwards.append(out[0].requires_grad))
    streams = one.backward(b, [LOGP], lambda rows, live: {"logp_BT": weight[rows]})
    torch.testing.assert_close(streams, one.score(b, [LOGP]))
    assert True in forwards and False in forwards
    other = learner()
    lp = full_logp(other.model, b).gather(2, b.tokens_BT[..., None])[..., 0]
    (lp * weight).sum().backward()
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-11)

    surprised = learner(micro_tokens=40)
    same = b.over(logp_sampler_BT=torch.zeros(b.B, b.T, dtype=torch.float64))
    surprised.backward(same, [LOGP], lambda rows, live: {"logp_BT": (live["logp_BT"] != 0).double() * weight[rows]})
    for p, q in zip(surprised.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-11)


def test_the_critic_learns_with_its_own_optimizer_and_the_reference_stays():
    one = learner(bank={"critic": CRITIC, "ref": REFERENCE})
    b = batch()
    before = {k: v.clone() for k, v in one.bank.members["ref"].model.state_dict().items()}
    values = Need("values_BT", Value(), model="critic", when="loss")
    errors = []
    for _ in range(30):
        errors.append(float((one.score(b, [values])["values_BT"][b.mask_BT] - 1).pow(2).mean()))
        one.backward(b, [values], lambda rows, live: {
            "values_BT": 2 * (live["values_BT"] - 1) * b.mask_BT[rows] / b.mask_BT.sum()})
        metrics = one.step()
    assert errors[0] == 1.0 and errors[-1] < 0.5
    assert metrics["grad_norm"] == 0 and metrics["grad_norm_critic"] > 0
    assert one.version == 30
    assert all(torch.equal(v, before[k]) for k, v in one.bank.members["ref"].model.state_dict().items())


def test_a_gradient_that_is_zero_everywhere_moves_nothing():
    """Nor does momentum: AdamW after a real step would go on in its direction."""
    one, b = learner(), batch()
    one.backward(b, [LOGP], lambda rows, live: {"logp_BT": b.mask_BT[rows].double()})
    assert one.step()["grad_norm"] > 0
    before = {k: v.clone() for k, v in one.model.state_dict().items()}
    one.backward(b, [LOGP], lambda rows, live: {"logp_BT": torch.zeros_like(live["logp_BT"])})
    assert one.step()["grad_norm"] == 0
    assert all(torch.equal(v, before[k]) for k, v in one.model.state_dict().items())


def test_a_model_of_the_bank_follows_the_policy():
    one, b = learner(bank={"ema": ModelSpec("copy", ema=0.75)}), batch()
    start = one.model.lm_head.weight.detach().clone()
    one.backward(b, [LOGP], lambda rows, live: {"logp_BT": -b.mask_BT[rows].double()})
    one.step()
    one.sync("ema", decay=0.75)
    torch.testing.assert_close(one.bank.members["ema"].model.lm_head.weight,
                               0.75 * start + 0.25 * one.model.lm_head.weight)
    one.sync("ema")
    assert torch.equal(one.bank.members["ema"].model.lm_head.weight, one.model.lm_head.weight)


def test_clipping_bounds_the_step_and_a_broken_gradient_is_skipped():
    b = batch()
    one = learner()
    one.bank.members["policy"].config = OptimConfig(name="sgd", lr=1.0, beta1=0.0, clip=0.5)
    before = torch.cat([p.detach().flatten() for p in one.model.parameters()])
    one.backward(b, [LOGP], lambda rows, live: {"logp_BT": 100.0 * b.mask_BT[rows]})
    metrics = one.step()
    after = torch.cat([p.detach().flatten() for p in one.model.parameters()])
    assert metrics["grad_norm"] > 0.5
    assert float((after - before).norm()) == pytest.approx(0.5, rel=1e-6)
    one.backward(b, [LOGP], lambda rows, live: {"logp_BT": float("nan") * b.mask_BT[rows]})
    assert one.step()["skipped"] == 1
    assert torch.equal(after, torch.cat([p.detach().flatten() for p in one.model.parameters()]))


def test_state_round_trips_to_the_same_next_step():
    b = batch()

    def train(one, n):
        for _ in range(n):
            one.backward(b, [LOGP], lambda rows, live: {"logp_BT": -b.mask_BT[rows].double()})
            one.step()

    config = OptimConfig(lr=0.01, warmup=3)
    one = LMLearner(tiny(), config)
    train(one, 2)
    two = LMLearner(tiny(5), config)
    two.load_state_dict(one.state_dict())
    train(one, 2)
    train(two, 2)
    assert one.version == two.version == 4
    assert all(torch.equal(a, c) for a, c in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_what_it_cannot_do_is_said():
    one, b = learner(bank={"critic": CRITIC}), batch()
    for need, words in [
        (Need("x_BT", LogProb(), model="refs"), "unknown model of the bank `refs`"),
        (Need("x_BT", LogProb(), model="critic"), "has values, no log-probs"),
        (Need("x_BT", Value()), "no value head"),
        (Need("x_BT", LogProb(), view=MaskedImage()), "no view"),
        (Need("x_BT", LogProb(), view=Mismatched(), when="loss"), "without gradient"),
        (Need("x_BT", LogProb(), view=Mismatched(), where="all"), "policy tokens only"),
        (Need("x_BTD", Hidden(0)), "last layer"),
    ]:
        with pytest.raises(RecipeError, match=words):
            one.score(b, [need])
        with pytest.raises(RecipeError, match=words):
            one.prepare({}, [need], None)
    with pytest.raises(RecipeError, match="no gradient stream"):
        one.backward(b, [Need("x_BTK", TopKIds(2), when="loss")], lambda rows, live: {})
