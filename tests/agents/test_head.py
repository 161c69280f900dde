"""The chunked head against materialised softmaxes: values, gradients, and the largest tensor ever made."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agents import head as H
from agents.head import ExactKL, FullEntropy, Head, TargetLogProb, evaluate, top_k

N, WIDTH, VOCAB = 23, 8, 31
FLOOR = 0.01


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(H.CHUNK_LOGITS, "cpu", 4 * VOCAB)
    monkeypatch.setattr(H, "CHUNK_ROWS", 1)


def heads(kind: str) -> Head:
    banned = torch.tensor([0, 3, 30]) if "ban" in kind else None
    return Head(
        draw(VOCAB, WIDTH, seed=1).requires_grad_(),
        draw(VOCAB, seed=2).requires_grad_() if "bias" in kind else None,
        temperature=0.7 if "temp" in kind else 1.0,
        banned_K=banned,
        softcap=2.0 if "cap" in kind else None,
    )


def materialised(head: Head, hidden_NH, target_N, other_NH, other: Head):
    def full(h, x):
        z = x @ h.weight_VH.T + (h.bias_V if h.bias_V is not None else 0)
        z = torch.tanh(z / h.softcap) * h.softcap if h.softcap else z
        z = z / h.temperature
        if h.banned_K is not None:
            keep = torch.ones(VOCAB, dtype=torch.bool)
            keep[h.banned_K] = False
            return z[:, keep].log_softmax(1), keep
        return z.log_softmax(1), torch.ones(VOCAB, dtype=torch.bool)

    logp, keep = full(head, hidden_NH)
    logq, _ = full(other, other_NH)
    position = torch.cumsum(keep, 0) - 1
    p = logp.exp()
    return torch.stack([
        logp[torch.arange(N), position[target_N]],
        -(p * logp).sum(1),
        (p * (logp - logq.detach())).sum(1),
        -(p * p.clamp(min=FLOOR).log()).sum(1),
    ])


@pytest.mark.parametrize("kind", ["plain", "bias", "temp", "ban", "cap", "bias temp ban cap"])
def test_values_and_gradients_equal_the_materialised_ones(kind):
    head, other = heads(kind), heads(kind)
    hidden, other_hidden = draw(N, WIDTH, seed=3).requires_grad_(), draw(N, WIDTH, seed=4)
    target = torch.arange(N) % 25 + 4
    asked = [TargetLogProb(target), FullEntropy(), ExactKL(other_hidden, other), FullEntropy(FLOOR)]
    got = evaluate(head, hidden, asked)
    assert not torch.allclose(got[1], got[3])
    want = materialised(head, hidden, target, other_hidden, other)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    inputs = [hidden, head.weight_VH] + ([head.bias_V] if head.bias_V is not None else [])
    cotangent = draw(4, N, seed=5)
    for a, b in zip(torch.autograd.grad((got * cotangent).sum(), inputs, retain_graph=True),
                    torch.autograd.grad((want * cotangent).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_gradcheck():
    target = torch.arange(6) % VOCAB

    def f(hidden, weight, bias):
        head = Head(weight, bias, temperature=1.3, banned_K=torch.tensor([30]))
        return evaluate(head, hidden, [TargetLogProb(target), FullEntropy()])

    inputs = (draw(6, WIDTH, seed=1), draw(VOCAB, WIDTH, seed=2), draw(VOCAB, seed=3))
    assert torch.autograd.gradcheck(f, tuple(x.requires_grad_() for x in inputs))


def test_a_banned_target_is_impossible_and_top_k_never_names_one():
    head = heads("ban temp")
    hidden = draw(N, WIDTH, seed=3)
    logp = evaluate(head, hidden, [TargetLogProb(torch.full((N,), 3))])
    assert torch.isneginf(logp).all()
    values, ids = top_k(head, hidden, 5)
    assert not torch.isin(ids, head.banned_K).any()
    assert (values.diff(dim=1) <= 0).all()
    torch.testing.assert_close(values[:, 0], head.logp_CV(hidden).max(1).values)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_larger_than_a_chunk_or_the_weights(monkeypatch):
    rows, vocab = 4096, 500
    monkeypatch.setitem(H.CHUNK_LOGITS, "cpu", 64 * vocab)
    head = Head(draw(vocab, WIDTH).float().requires_grad_(), banned_K=torch.tensor([0]))
    hidden = draw(rows, WIDTH).float().requires_grad_()
    with Largest() as largest:
        out = evaluate(head, hidden, [TargetLogProb(torch.ones(rows, dtype=torch.long)), FullEntropy()])
        out.sum().backward()
    assert largest.elements <= max(64 * vocab, rows * WIDTH)
    assert hidden.grad is not None and head.weight_VH.grad is not None
