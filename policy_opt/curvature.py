"""Curvature: how far one token's gradient step would move objective and policy, by a model of the last layer.

Only the rows of the language-model head are considered, and of these only the ids among which the token was
likely. With h the hidden state that predicts the token, pi the distribution over its top-k ids, e the one-hot of
the sampled id among them (zeros if it is outside) and v = e - pi:

    g = A v h^T                               gradient of the head's rows, towards higher objective
    u = g (sgd), or Adam's step on g from the stored moments, per token, without changing them
    w = u h,  s = <v, w>
    q_H = A (s^2 - Var_pi(w)),  q_F = s^2     Hessian and Fisher quadratic forms
    m_H = lr <g, u> + lr^2 q_H / 2            shift of the objective
    m_F = lr^2 q_F / 2                        shift of the policy (approximate KL)

Melo et al. 2025, arXiv 2510.00819. Everything here is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from policy_opt.batch import Batch
from policy_opt.need import Hidden, Need, TopKIds, TopKLogProb
from policy_opt.part import Ctx, Part

LOG2_E = math.log2(math.e)
CACHED, CHUNK = 2**17, 2**26
"""Numbers of a [tokens, ids] or [tokens, ids, hidden] tensor held at once: on a processor with a cache; elsewhere."""


class Tokens(NamedTuple):
    """N policy tokens of a batch."""

    adv_N: Tensor
    pi_NV: Tensor
    """Distribution over the top-k ids, which sums to 1."""
    ids_NV: Tensor
    hidden_ND: Tensor
    v_NV: Tensor
    """One-hot of the sampled id minus pi."""

    @property
    def rows_NV(self) -> Tensor:
        """A v: the gradient of row j of the head is rows_NV[:, j] h."""
        return self.adv_N[:, None] * self.v_NV


class Places(NamedTuple):
    """Where token ids stand in an ascending list of M ids: a table over the vocabulary."""

    table_V: Tensor

    @classmethod
    def of(cls, ids_M: Tensor) -> Places:
        """The last entry, M, is for every id after the list's last."""
        table_V = ids_M.new_full((int(ids_M[-1]) + 2 if len(ids_M) else 1,), len(ids_M))
        table_V[ids_M] = torch.arange(len(ids_M), device=ids_M.device)
        return cls(table_V)

    def __call__(self, ids: Tensor) -> Tensor:
        """Places of some ids, M where one is not in the list: the shape of ids."""
        return self.table_V[ids.clamp(max=len(self.table_V) - 1)]


@dataclass(frozen=True)
class Moments:
    """Adam's moments of the head's rows that have had a gradient, keyed by token id."""

    t: int
    """Steps taken."""
    ids_M: Tensor
    """Ascending token ids, int64."""
    first_MD: Tensor
    second_MD: Tensor

    @classmethod
    def of(cls, state: Mapping[str, Any], hidden_ND: Tensor) -> Moments:
        """From a part's state; without one, no rows."""
        if state:
            return cls(state["t"], state["ids"], state["first"], state["second"])
        none_0D = hidden_ND.new_zeros(0, hidden_ND.shape[1])
        return cls(0, torch.zeros(0, dtype=torch.long, device=hidden_ND.device), none_0D, none_0D)

    def state(self) -> dict[str, Any]:
        """Inverse of `of`."""
        return {"t": self.t, "ids": self.ids_M, "first": self.first_MD, "second": self.second_MD}

    def look(self, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments of some ids, zeros where there are none: [N, D] each."""
        at_N = Places.of(self.ids_M)(ids_N)
        first_ND, second_ND = (_with_zeros(x_MD).index_select(0, at_N) for x_MD in (self.first_MD, self.second_MD))
        return first_ND, second_ND

    def stepped(self, ids_N: Tensor, gradient_ND: Tensor, beta1: float, beta2: float) -> Moments:
        """After a step whose gradient has these rows (ids distinct); other rows stay as they are."""
        ids_M = torch.cat([self.ids_M, ids_N]).unique()
        first_MD, second_MD = self.look(ids_M)
        at_N = Places.of(ids_M)(ids_N)
        first_MD[at_N] = beta1 * first_MD[at_N] + (1 - beta1) * gradient_ND
        second_MD[at_N] = beta2 * second_MD[at_N] + (1 - beta2) * gradient_ND.square()
        return Moments(self.t + 1, ids_M, first_MD, second_MD)


def _with_zeros(x_MD: Tensor) -> Tensor:
    """One more row, of zeros."""
    return torch.cat([x_MD, x_MD.new_zeros(1, x_MD.shape[1])])


def at_once(like: Tensor, numbers: int) -> int:
    """Tokens held at once, with so many numbers each."""
    return max(1, (CACHED if like.device.type == "cpu" else CHUNK) // max(1, numbers))


@dataclass(frozen=True)
class AdamStep:
    """Adam's next step, for the gradient of one token alone."""

    places: Places
    """Of the moments."""
    first_MD: Tensor
    """Moments as they enter the step, a row of zeros after them: beta m / (1 - beta^n)."""
    second_MD: Tensor
    add1: float
    """Factor of the gradient in the first moment: (1 - beta1) / (1 - beta1^n)."""
    add2: float
    """Factor of its square in the second."""
    eps: float

    @classmethod
    def after(cls, moments: Moments, beta1: float, beta2: float, eps: float) -> AdamStep:
        """From the stored moments."""
        late1, late2 = 1 - beta1 ** (moments.t + 1), 1 - beta2 ** (moments.t + 1)
        first_MD, second_MD = _with_zeros(moments.first_MD), _with_zeros(moments.second_MD)
        first_MD, second_MD = first_MD.mul_(beta1 / late1), second_MD.mul_(beta2 / late2)
        return cls(Places.of(moments.ids_M), first_MD, second_MD, (1 - beta1) / late1, (1 - beta2) / late2, eps)

    def __call__(self, n: Tokens) -> Tensor:
        """w = u h: [N, V].

        The root makes u one number per token, id and hidden unit, with no shorter form: so many roots and quotients
        are the cost of the method. A few tokens at a time stay in the cache.
        """
        (V, D), found = (n.ids_NV.shape[1], n.hidden_ND.shape[1]), []
        rows = n.rows_NV, self.places(n.ids_NV), n.hidden_ND
        for rows_CV, at_CV, hidden_CD in zip(*(x.split(at_once(n.v_NV, V * D)) for x in rows), strict=True):
            rows_CV1, hidden_C1D = rows_CV[..., None], hidden_CD[:, None]
            moments = self.first_MD, self.second_MD
            u_CVD, root_CVD = (x_MD.index_select(0, at_CV.flatten()).view(-1, V, D) for x_MD in moments)
            u_CVD.addcmul_(rows_CV1, hidden_C1D, value=self.add1)
            root_CVD.addcmul_(rows_CV1.square(), hidden_C1D.square(), value=self.add2)
            u_CVD /= root_CVD.sqrt_().add_(self.eps)
            found.append((u_CVD @ hidden_CD[..., None]).squeeze(-1))
        return torch.cat(found)


def contractions(n: Tokens, adam: AdamStep | None) -> Tensor:
    """<v, w>, E_pi w and E_pi w^2 of each token with w / scale in place of w; that scale; A: [5, N].

    adam: None for a plain gradient step, w = A |h|^2 v.
    """
    w_NV = adam(n) if adam else n.v_NV
    scale_N = torch.ones_like(n.adv_N) if adam else n.adv_N * n.hidden_ND.square().sum(1)
    s_N, pw_NV = summed(n.v_NV * w_NV), n.pi_NV * w_NV
    mean_N = summed(pw_NV)
    square_N = summed(pw_NV.mul_(w_NV))
    return torch.stack([s_N, mean_N, square_N, scale_N, n.adv_N])


def where_acted(b: Batch) -> Tensor:
    """Where policy tokens stand, of all B T: [N]."""
    return b.mask_BT.flatten().nonzero().squeeze(1)


def summed(x_NV: Tensor) -> Tensor:
    """Sums of short rows: a product with ones takes less time than a reduction."""
    return x_NV @ x_NV.new_ones(x_NV.shape[1])


@dataclass(frozen=True)
class Curvature(Part):
    """Only tokens whose own step moves policy and objective little stay in the loss (numerator and denominators).

    Runs before each optimizer step, with hidden states and probabilities of the weights as they are. What it
    measures stands in columns [B, T], 0 outside the mask: gain_BT (<g, u>), hessian_BT, fisher_BT, and the
    shifts objective_shift_BT (m_H) and policy_shift_BT (m_F).
    """

    stage: ClassVar[str] = "credit"
    when: ClassVar[Literal["rollout", "step"]] = "step"
    k: int = 50
    """Ids considered at a token: the sampler's top-k, or the whole of a small vocabulary."""
    tau_f: float = 1e-4
    """Keep where m_F < tau_f; 0: no such test."""
    tau_h: float = 0.01
    """Keep where -tau_h < m_H < tau_h; 0: no such test."""
    low: float | None = None
    """Keep where low <= m_H < tau_h instead; 0 is the one-sided form."""
    model: Literal["adam", "sgd"] = "adam"
    """The optimizer that is modelled."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    lr: float | None = None
    """None: the run's learning rate."""

    def check(self) -> None:
        if self.k < 1 or self.tau_f < 0 or self.tau_h < 0:
            raise ValueError(f"k >= 1, tau_f >= 0 and tau_h >= 0, not {self.k}, {self.tau_f}, {self.tau_h}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (
            Need("top_logp_now_BTK", TopKLogProb(self.k), when="step"),
            Need("top_ids_now_BTK", TopKIds(self.k), when="step"),
            Need("hidden_now_BTD", Hidden(), when="step"),
        )

    reads = frozenset({"adv", "tokens_BT", "mask_BT", "top_logp_now_BTK", "top_ids_now_BTK", "hidden_now_BTD"})
    writes = frozenset({"gain_BT", "hessian_BT", "fisher_BT", "objective_shift_BT", "policy_shift_BT"})
    overwrites = frozenset({"mask_BT"})

    def tokens(self, b: Batch, here_N: Tensor) -> Iterator[Tokens]:
        """The batch's policy tokens, which stand at `here_N` of all B T, some at a time."""
        names = "top_logp_now_BTK", "top_ids_now_BTK", "hidden_now_BTD"
        columns = [x.flatten(0, 1) for x in (b.tokens_BT, b.per_token("adv"), *(b[name] for name in names))]
        for here_C in here_N.split(at_once(here_N, b[names[0]].shape[2])):
            sampled_N, adv_N, logp_NV, ids_NV, hidden_ND = (x.index_select(0, here_C) for x in columns)
            # Log-probs of the most likely ids: exp cannot overflow, nor underflow for all of them.
            pi_NV = logp_NV.to(hidden_ND.dtype).mul_(LOG2_E).exp2_()  # which is quicker than exp
            pi_NV /= summed(pi_NV)[:, None]
            sampled_N1 = sampled_N.int()[:, None]  # numbers of half the size are compared in half the time
            v_NV = torch.eq(ids_NV.int(), sampled_N1, out=torch.empty_like(pi_NV)).sub_(pi_NV)
            yield Tokens(adv_N.to(pi_NV.dtype), pi_NV, ids_NV, hidden_ND, v_NV)

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        lr = ctx.lr if self.lr is None else self.lr
        moments = Moments.of(ctx.state(self), b["hidden_now_BTD"][0])
        adam = None
        if self.model == "adam" and len(moments.ids_M):
            adam = AdamStep.after(moments, self.beta1, self.beta2, self.eps)
        here_N = where_acted(b)
        found = [contractions(n, adam) for n in self.tokens(b, here_N)]
        s_N, mean_N, square_N, scale_N, adv_N = torch.cat(found, 1)
        s_N, mean_N, square_N = scale_N * s_N, scale_N * mean_N, scale_N.square() * square_N
        # <g, u> = sum_j A v_j <h, u_j>.
        gain_N, fisher_N = adv_N * s_N, s_N.square()
        hessian_N = adv_N * (fisher_N - (square_N - mean_N.square()))
        objective_N = lr * gain_N + 0.5 * lr**2 * hessian_N
        policy_N = 0.5 * lr**2 * fisher_N
        keep_N = torch.ones_like(gain_N, dtype=torch.bool)
        if self.tau_f:
            keep_N &= policy_N < self.tau_f
        if self.tau_h:
            above_N = objective_N > -self.tau_h if self.low is None else objective_N >= self.low
            keep_N &= above_N & (objective_N < self.tau_h)
        ctx.log("rejected_tokens", float((~keep_N).sum()) / max(keep_N.numel(), 1))

        def placed(value_N: Tensor) -> Tensor:
            return value_N.new_zeros(b.B * b.T).scatter_(0, here_N, value_N).view(b.B, b.T)

        return b.put(
            gain_BT=placed(gain_N),
            hessian_BT=placed(hessian_N),
            fisher_BT=placed(fisher_N),
            objective_shift_BT=placed(objective_N),
            policy_shift_BT=placed(policy_N),
        ).over(mask_BT=placed(keep_N))

    def after_step(self, b: Batch, ctx: Ctx) -> None:
        """Move the moments: once per step, by each id's mean gradient over the kept tokens that had it in their
        top-k.
        """
        if self.model == "sgd":
            return
        moments = Moments.of(ctx.state(self), b["hidden_now_BTD"][0])
        ids_M, mean_MD = moments.ids_M[:0], moments.first_MD[:0]
        here_N = where_acted(b)
        if len(here_N):
            n = Tokens(*(torch.cat(x) for x in zip(*self.tokens(b, here_N), strict=True)))
            ids_M, mean_MD = mean_gradient(n)
        ctx.state(self).update(moments.stepped(ids_M, mean_MD, self.beta1, self.beta2).state())


def mean_gradient(n: Tokens) -> tuple[Tensor, Tensor]:
    """(ids in the top-k of any token, mean over the tokens that have it of its gradient): [M], [M, D]."""
    count_V = torch.bincount(n.ids_NV.flatten())
    ids_M = count_V.nonzero().squeeze(1)
    at_NV = Places.of(ids_M)(n.ids_NV)
    token_NV = torch.arange(len(at_NV), device=at_NV.device)[:, None].expand_as(at_NV)
    entries_2I = torch.stack([at_NV.flatten(), token_NV.flatten()])
    size = len(ids_M), len(at_NV)
    sums_MN = torch.sparse_coo_tensor(entries_2I, n.rows_NV.flatten(), size, check_invariants=False)
    return ids_M, torch.sparse.mm(sums_MN, n.hidden_ND) / count_V[ids_M][:, None]
