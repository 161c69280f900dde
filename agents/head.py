"""Functionals of the next-token distribution, evaluated in chunks: no `[B, T, V]` tensor ever exists.

The language-model head maps a hidden state to logits over V tokens. Log-probabilities, entropies and divergences
need the logits only to reduce them at once, so they are computed for a few rows at a time and thrown away; the
backward pass computes them again, chunk by chunk, and applies each functional's gradient in closed form.

The distribution is the sampler's: logits divided by the temperature, banned ids removed before the softmax.
Notation: N positions that are asked for, H hidden width, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Logits held at once, by the device: on a CPU 4 MiB in float32, which stays in the cache; on a GPU 512 MiB, because
every chunk reads and writes the gradient of the whole head once. A chunk is as many rows as fit."""
CHUNK_ROWS = 128
"""But at least so many: with fewer, reading the weights costs more than multiplying with them."""


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
        logits = CHUNK_LOGITS.get(self.weight_VH.device.type, CHUNK_LOGITS["cpu"])
        return max(CHUNK_ROWS, logits // self.weight_VH.shape[0])

    def split(self, n: int) -> Iterator[slice]:
        """The chunks of n rows."""
        for start in range(0, n, self.rows()):
            yield slice(start, min(n, start + self.rows()))

    def scaled_CV(self, hidden_CH: Tensor, out: Tensor) -> Tensor:
        """Scaled logits, into a buffer of at least float32; banned ids hold the lowest number."""
        z_CV = out
        if self.bias_V is None and hidden_CH.dtype == out.dtype:
            torch.mm(hidden_CH, self.weight_VH.T, out=out)
        else:
            z_CV.copy_(nn.functional.linear(hidden_CH, self.weight_VH, self.bias_V))
        if self.softcap:
            z_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1.0:
            z_CV /= self.temperature
        if self.banned_K is not None:
            z_CV.index_fill_(1, self.banned_K, lowest(z_CV.dtype))
        return z_CV

    def finite_CV(self, hidden_CH: Tensor) -> Tensor:
        """Log-probabilities of a chunk, a tensor of its own; banned ids hold a finite number."""
        dtype = torch.float64 if hidden_CH.dtype == torch.float64 else torch.float32
        z_CV = self.scaled_CV(hidden_CH, hidden_CH.new_empty(len(hidden_CH), self.weight_VH.shape[0], dtype=dtype))
        return z_CV.sub_(z_CV.logsumexp(1, keepdim=True))

    def logp_CV(self, hidden_CH: Tensor) -> Tensor:
        """Log-probabilities of a chunk; banned ids hold -inf."""
        with torch.no_grad():
            found_CV = self.finite_CV(hidden_CH)
        return found_CV if self.banned_K is None else found_CV.index_fill_(1, self.banned_K, float("-inf"))


@dataclass(frozen=True)
class Chunk:
    """The distributions of some rows, for as long as the functionals look at them: C rows, two buffers."""

    head: Head
    logp_CV: Tensor
    """Log-probabilities; banned ids hold LOWEST of the dtype, so that p log p is 0 there and not NaN."""
    p_CV: Tensor
    """Probabilities."""
    rows: slice
    """The chunk's positions among all N."""

    def expect_C(self, x_CV: Tensor) -> Tensor:
        """Mean of x under p, without a product that is as large as the chunk."""
        return torch.bmm(self.p_CV[:, None, :], x_CV[:, :, None]).reshape(-1)


@dataclass
class Pull:
    """Gradient of a sum of values with respect to the scaled logits:  p (constant + slope log p + extra) + onehots.

    Functionals whose gradient has this form are added up as a few numbers per row, and applied to the chunk at once.
    """

    constant_C: Tensor
    slope_C: Tensor | None = None
    extra_CV: Tensor | None = None
    """What is not a straight line in log p."""
    onehots: tuple[Tensor, Tensor] | None = None
    """(ids [C], amounts [C]) that are added at these tokens."""


class Functional(Protocol):
    """A number per position, computed from the chunk's distributions."""

    def value_C(self, c: Chunk) -> Tensor:
        """`[C]`."""
        ...

    def pull(self, c: Chunk, value_C: Tensor, g_C: Tensor) -> Pull:
        """Gradient of `sum(g_C * value_C)`."""
        ...


@dataclass(frozen=True)
class TargetLogProb:
    """log p of one token per position; -inf where the token is banned."""

    target_N: Tensor

    def value_C(self, c):
        found_C = c.logp_CV.gather(1, self.target_N[c.rows, None]).squeeze(1)
        return found_C.masked_fill(found_C < lowest(found_C.dtype) / 2, float("-inf"))

    def pull(self, c, value_C, g_C):
        # d log p_t / d z = onehot_t − p
        return Pull(-g_C, onehots=(self.target_N[c.rows], g_C))


@dataclass(frozen=True)
class FullEntropy:
    """Entropy in nats of the sampler's distribution, −Σ p log max(p, floor)."""

    floor: float = 0.0
    """0: the entropy itself."""

    def value_C(self, c):
        return -c.expect_C(c.logp_CV.clamp(min=math.log(self.floor)) if self.floor else c.logp_CV)

    def pull(self, c, value_C, g_C):
        # d H / d z_j = −p_j (log max(p_j, floor) + a_j + H − Σ_k p_k a_k), a = 1 above the floor, else 0
        if not self.floor:
            return Pull(-g_C * value_C, slope_C=-g_C)
        above_CV = (c.p_CV > self.floor).to(c.p_CV)
        log_CV = c.logp_CV.clamp(min=math.log(self.floor)).add_(above_CV)
        return Pull(-g_C * (value_C - c.expect_C(above_CV)), extra_CV=log_CV.mul_(-g_C[:, None]))


@dataclass(frozen=True)
class ExactKL:
    """KL(p ‖ q) to the distribution of another head over the same vocabulary, summed over all tokens."""

    hidden_NH: Tensor
    """The other model's hidden states at the same positions; no gradient flows into them."""
    head: Head

    def _logq_CV(self, rows: slice) -> Tensor:
        """Finite: what this head bans has no probability under p either."""
        with torch.no_grad():
            return self.head.to(self.hidden_NH.dtype).finite_CV(self.hidden_NH[rows])

    def value_C(self, c):
        return c.expect_C(self._logq_CV(c.rows).neg_().add_(c.logp_CV))

    def pull(self, c, value_C, g_C):
        # d KL / d z_j = p_j (log p_j − log q_j − KL)
        return Pull(-g_C * value_C, slope_C=g_C, extra_CV=self._logq_CV(c.rows).mul_(-g_C[:, None]))


def lowest(dtype: torch.dtype) -> float:
    """Stands for log 0: exp of it is 0, and sums and products with probabilities stay finite."""
    return torch.finfo(dtype).min / 8


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, head: Head, functionals: tuple[Functional, ...]):
        n = hidden_NH.shape[0]
        room = _Room(head, hidden_NH)
        values_FN = hidden_NH.new_zeros((len(functionals), n), dtype=room.dtype)
        total_N = hidden_NH.new_zeros(n, dtype=room.dtype)
        for rows in head.split(n):
            c, total_N[rows] = room.fill(hidden_NH[rows], rows)
            for i, f in enumerate(functionals):
                values_FN[i, rows] = f.value_C(c)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, values_FN, total_N)
        ctx.head, ctx.functionals = head, functionals
        return values_FN

    @staticmethod
    @once_differentiable
    def backward(ctx, g_FN):
        hidden_NH, weight_VH, bias_V, values_FN, total_N = ctx.saved_tensors
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        head: Head = ctx.head
        room = _Room(head, hidden_NH)
        d_hidden_NH = torch.zeros_like(hidden_NH) if need_h else None
        d_weight_VH = torch.zeros_like(weight_VH, dtype=room.dtype) if need_w else None
        d_bias_V = torch.zeros_like(bias_V, dtype=room.dtype) if need_b else None
        for rows in head.split(hidden_NH.shape[0]):
            g_FC = g_FN[:, rows]
            live = [i for i in range(len(g_FN)) if g_FC[i].any()]  # a stream that is only looked at costs nothing
            if not live:
                continue
            c, _ = room.fill(hidden_NH[rows], rows, total_N[rows])
            pulls = [ctx.functionals[i].pull(c, values_FN[i, rows], g_FC[i]) for i in live]
            d_CV = _to_linear(c, total_N[rows], pulls)
            low_CV = d_CV.to(hidden_NH.dtype)
            if d_hidden_NH is not None:
                torch.mm(low_CV, weight_VH, out=d_hidden_NH[rows])
            if d_weight_VH is not None and low_CV.dtype == d_weight_VH.dtype:
                d_weight_VH.addmm_(low_CV.T, hidden_NH[rows])
            elif d_weight_VH is not None:
                d_weight_VH += low_CV.T @ hidden_NH[rows]
            if d_bias_V is not None:
                d_bias_V += d_CV.sum(0)
        d_weight_VH = d_weight_VH.to(weight_VH.dtype) if d_weight_VH is not None else None
        d_bias_V = d_bias_V.to(bias_V.dtype) if d_bias_V is not None else None
        return d_hidden_NH, d_weight_VH, d_bias_V, None, None


class _Room:
    """Two buffers of a chunk's size, used again for every chunk: fresh ones would cost a page fault per 4 KiB."""

    def __init__(self, head: Head, hidden_NH: Tensor):
        self.head = head
        self.dtype = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        shape = min(head.rows(), max(1, hidden_NH.shape[0])), head.weight_VH.shape[0]
        self.logp_CV = hidden_NH.new_empty(shape, dtype=self.dtype)
        self.p_CV = torch.empty_like(self.logp_CV)

    def fill(self, hidden_CH: Tensor, rows: slice, total_C: Tensor | None = None) -> tuple[Chunk, Tensor]:
        """The distributions of a chunk, and log Σ exp of its logits, which may be given."""
        logp_CV, p_CV = self.logp_CV[: len(hidden_CH)], self.p_CV[: len(hidden_CH)]
        self.head.scaled_CV(hidden_CH, out=logp_CV)
        if total_C is None:
            most_C = logp_CV.amax(1)
            torch.sub(logp_CV, most_C[:, None], out=p_CV).exp_()
            sum_C = p_CV.sum(1)
            p_CV /= sum_C[:, None]
            total_C = most_C + sum_C.log()
            logp_CV -= total_C[:, None]
        else:
            logp_CV -= total_C[:, None]
            torch.exp(logp_CV, out=p_CV)
        return Chunk(self.head, logp_CV, p_CV, rows), total_C


def _to_linear(c: Chunk, total_C: Tensor, pulls: Sequence[Pull]) -> Tensor:
    """Gradient with respect to the head's raw linear output, `[C, V]`; it takes the place of the log-probabilities."""
    head, d_CV = c.head, c.logp_CV
    bend_CV = None
    if head.softcap:
        share_CV = (c.logp_CV + total_C[:, None]).mul_(head.temperature / head.softcap)
        bend_CV = 1 - share_CV.square_()
    slopes = [p.slope_C for p in pulls if p.slope_C is not None]
    constant_C1 = torch.stack([p.constant_C for p in pulls]).sum(0)[:, None]
    if slopes:
        torch.addcmul(constant_C1, d_CV, torch.stack(slopes).sum(0)[:, None], out=d_CV)
    else:
        d_CV.copy_(constant_C1.expand_as(d_CV))
    for p in pulls:
        if p.extra_CV is not None:
            d_CV += p.extra_CV
    d_CV *= c.p_CV
    for p in pulls:
        if p.onehots is not None:
            d_CV.scatter_add_(1, p.onehots[0][:, None], p.onehots[1][:, None])
    if bend_CV is not None:
        d_CV *= bend_CV
    if head.banned_K is not None:
        d_CV.index_fill_(1, head.banned_K, 0.0)
    return d_CV.div_(head.temperature) if head.temperature != 1.0 else d_CV


def evaluate(head: Head, hidden_NH: Tensor, functionals: Sequence[Functional]) -> Tensor:
    """`[F, N]`: each functional at each position, differentiable in the hidden states and the head's weights.

    One chunk's logits (times a small constant) live at once. Second derivatives are not defined.
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
