"""Functionals of the next-token distribution, evaluated in chunks: no `[B, T, V]` tensor ever exists.

The language-model head maps a hidden state to logits over V tokens. Log-probabilities, entropies and divergences
need the logits only to reduce them at once, so they are computed for a few rows at a time and thrown away; the
backward pass computes them again, chunk by chunk, and applies each functional's gradient in closed form.

The distribution is the sampler's: logits divided by the temperature, banned ids removed before the softmax.
Notation: N positions that are asked for, H hidden width, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 1 << 20
"""Logits held at once (4 MiB in float32); a chunk is as many rows as fit, at least one."""


@dataclass(frozen=True)
class Head:
    """A linear language-model head together with the sampler's convention."""

    weight_VH: Tensor
    """The output embedding."""
    bias_V: Tensor | None = None
    """Most models have none."""
    temperature: float = 1.0
    """Logits are divided by it; must be positive."""
    banned_K: Tensor | None = None
    """Ids that the sampler may never draw; they have probability zero here too."""
    softcap: float | None = None
    """Logits z become softcap·tanh(z / softcap) before the temperature, where a model does so (Gemma 2)."""

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"a head needs a temperature above 0, got {self.temperature}")

    @classmethod
    def of(cls, model: Any, temperature: float = 1.0, banned: Sequence[int] = ()) -> Head:
        """The head of a transformers causal LM. Raises ValueError where the output layer is not linear."""
        layer = model.get_output_embeddings()
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{type(model).__name__} has no linear output layer (found {type(layer).__name__})")
        ids = torch.tensor(sorted(banned), dtype=torch.long, device=layer.weight.device) if banned else None
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        return cls(layer.weight, layer.bias, temperature, ids, cap)

    def to(self, dtype: torch.dtype) -> Head:
        """The same head computing in another precision; gradients still reach the weights."""
        if self.weight_VH.dtype == dtype:
            return self
        bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
        return replace(self, weight_VH=self.weight_VH.to(dtype), bias_V=bias_V)

    def rows(self) -> int:
        """Rows of one chunk."""
        return max(1, CHUNK_LOGITS // self.weight_VH.shape[0])

    def raw_CV(self, hidden_CH: Tensor) -> Tensor:
        """Scaled logits before the ban, at least float32."""
        z_CV = nn.functional.linear(hidden_CH, self.weight_VH, self.bias_V)
        z_CV = z_CV if z_CV.dtype == torch.float64 else z_CV.float()
        if self.softcap:
            z_CV = torch.tanh(z_CV / self.softcap) * self.softcap
        return z_CV / self.temperature if self.temperature != 1.0 else z_CV

    def logp_CV(self, hidden_CH: Tensor) -> Tensor:
        """Log-probabilities of a chunk; banned ids hold -inf."""
        z_CV = self.raw_CV(hidden_CH)
        if self.banned_K is not None:
            z_CV = z_CV.index_fill(1, self.banned_K, float("-inf"))
        return z_CV.log_softmax(1)


class Functional(Protocol):
    """A number per position, computed from the chunk's log-probabilities."""

    def value_C(self, logp_CV: Tensor, rows: slice) -> Tensor:
        """`[C]`; `rows` are the chunk's positions among all N."""
        ...

    def pull_CV(self, logp_CV: Tensor, p_CV: Tensor, value_C: Tensor, g_C: Tensor, rows: slice) -> Tensor:
        """Gradient of `sum(g_C * value_C)` with respect to the scaled logits, `[C, V]`."""
        ...


@dataclass(frozen=True)
class TargetLogProb:
    """log p of one token per position; -inf where the token is banned."""

    target_N: Tensor

    def value_C(self, logp_CV, rows):
        return logp_CV.gather(1, self.target_N[rows, None]).squeeze(1)

    def pull_CV(self, logp_CV, p_CV, value_C, g_C, rows):
        # d log p_t / d z = onehot_t − p
        d_CV = -p_CV * g_C[:, None]
        return d_CV.scatter_add_(1, self.target_N[rows, None], g_C[:, None])


@dataclass(frozen=True)
class FullEntropy:
    """Entropy in nats of the sampler's distribution, −Σ p log max(p, floor)."""

    floor: float = 0.0
    """0: the entropy itself."""

    def _log_CV(self, logp_CV: Tensor) -> Tensor:
        return logp_CV.clamp(min=math.log(self.floor)) if self.floor else logp_CV

    def value_C(self, logp_CV, rows):
        return -_expect_C(logp_CV.exp(), self._log_CV(logp_CV))

    def pull_CV(self, logp_CV, p_CV, value_C, g_C, rows):
        # d H / d z_j = −p_j (log max(p_j, floor) + a_j + H − Σ_k p_k a_k), a = 1 above the floor, else 0
        log_CV = _finite(self._log_CV(logp_CV))
        if self.floor:
            above_CV = (p_CV > self.floor).to(p_CV)
            log_CV = log_CV + above_CV - (p_CV * above_CV).sum(1, keepdim=True)
        return p_CV * (log_CV + value_C[:, None]).mul_(-g_C[:, None])


@dataclass(frozen=True)
class ExactKL:
    """KL(p ‖ q) to the distribution of another head over the same vocabulary, summed over all tokens."""

    hidden_NH: Tensor
    """The other model's hidden states at the same positions; no gradient flows into them."""
    head: Head

    def _logq_CV(self, rows: slice) -> Tensor:
        with torch.no_grad():
            return self.head.logp_CV(self.hidden_NH[rows])

    def value_C(self, logp_CV, rows):
        return _expect_C(logp_CV.exp(), logp_CV - self._logq_CV(rows))

    def pull_CV(self, logp_CV, p_CV, value_C, g_C, rows):
        # d KL / d z_j = p_j (log p_j − log q_j − KL)
        return p_CV * (_finite(logp_CV - self._logq_CV(rows)) - value_C[:, None]).mul_(g_C[:, None])


def _finite(x_CV: Tensor) -> Tensor:
    """Banned ids hold -inf (or inf − inf); they carry no probability, so any finite number will do."""
    return torch.nan_to_num(x_CV, nan=0.0, posinf=0.0, neginf=0.0)


def _expect_C(p_CV: Tensor, x_CV: Tensor) -> Tensor:
    return (p_CV * _finite(x_CV)).sum(1)


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, head: Head, functionals: tuple[Functional, ...]):
        n = hidden_NH.shape[0]
        kept = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        values_FN = hidden_NH.new_zeros((len(functionals), n), dtype=kept)
        for start in range(0, n, head.rows()):
            rows = slice(start, min(n, start + head.rows()))
            logp_CV = head.logp_CV(hidden_NH[rows])
            for i, f in enumerate(functionals):
                values_FN[i, rows] = f.value_C(logp_CV, rows)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, values_FN)
        ctx.head, ctx.functionals = head, functionals
        return values_FN

    @staticmethod
    @once_differentiable
    def backward(ctx, g_FN):
        hidden_NH, weight_VH, bias_V, values_FN = ctx.saved_tensors
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        head: Head = ctx.head
        d_hidden_NH = torch.zeros_like(hidden_NH) if need_h else None
        d_weight_VH = torch.zeros_like(weight_VH, dtype=values_FN.dtype) if need_w else None
        d_bias_V = torch.zeros_like(bias_V, dtype=values_FN.dtype) if need_b else None
        for start in range(0, hidden_NH.shape[0], head.rows()):
            rows = slice(start, min(hidden_NH.shape[0], start + head.rows()))
            d_CV = _pull_chunk(ctx.functionals, head, hidden_NH[rows], values_FN[:, rows], g_FN[:, rows], rows)
            d_low_CV = d_CV.to(hidden_NH.dtype)
            if d_hidden_NH is not None:
                d_hidden_NH[rows] = d_low_CV @ weight_VH
            if d_weight_VH is not None:
                d_weight_VH += (d_low_CV.T @ hidden_NH[rows]).to(d_weight_VH.dtype)
            if d_bias_V is not None:
                d_bias_V += d_CV.sum(0)
        d_weight_VH = d_weight_VH.to(weight_VH.dtype) if d_weight_VH is not None else None
        d_bias_V = d_bias_V.to(bias_V.dtype) if d_bias_V is not None else None
        return d_hidden_NH, d_weight_VH, d_bias_V, None, None


def _pull_chunk(functionals, head: Head, hidden_CH, values_FC, g_FC, rows: slice) -> Tensor:
    """Gradient with respect to the head's raw linear output of one chunk, `[C, V]`."""
    logp_CV = head.logp_CV(hidden_CH)
    p_CV = logp_CV.exp()
    d_CV: Tensor | None = None
    for f, value_C, g_C in zip(functionals, values_FC, g_FC, strict=True):
        if g_C.any():  # a stream that is only looked at costs no gradient
            part_CV = f.pull_CV(logp_CV, p_CV, value_C, g_C, rows)
            d_CV = part_CV if d_CV is None else d_CV.add_(part_CV)
    if d_CV is None:
        return torch.zeros_like(logp_CV)
    if head.banned_K is not None:
        d_CV.index_fill_(1, head.banned_K, 0.0)
    if head.softcap:
        d_CV *= 1 - (head.raw_CV(hidden_CH) * head.temperature / head.softcap) ** 2
    return d_CV / head.temperature if head.temperature != 1.0 else d_CV


def evaluate(head: Head, hidden_NH: Tensor, functionals: Sequence[Functional]) -> Tensor:
    """`[F, N]`: each functional at each position, differentiable in the hidden states and the head's weights.

    At most `CHUNK_LOGITS` logits (times a small constant) live at once. Second derivatives are not defined.
    """
    if not functionals:
        raise ValueError("no functional was asked for")
    head = head.to(hidden_NH.dtype)
    return _Evaluate.apply(hidden_NH, head.weight_VH, head.bias_V, head, tuple(functionals))


@torch.no_grad()
def top_k(head: Head, hidden_NH: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens per position: log-probabilities `[N, k]` in falling order and their ids `[N, k]`."""
    k, head = min(k, head.weight_VH.shape[0]), head.to(hidden_NH.dtype)
    parts = [head.logp_CV(chunk).topk(k, dim=1) for chunk in hidden_NH.split(head.rows())]
    if not parts:
        return hidden_NH.new_zeros((0, k)), torch.zeros((0, k), dtype=torch.long, device=hidden_NH.device)
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])
