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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from policy_opt.batch import Batch
from policy_opt.need import Hidden, Need, TopKIds, TopKLogProb
from policy_opt.part import Ctx, Part

CHUNK = 2**22
"""Numbers of a [tokens, ids, hidden] tensor held at once."""


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

    def look(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments of some ids, zeros where there are none: [..., D] each."""
        at = torch.searchsorted(self.ids_M, ids).clamp(max=len(self.ids_M) - 1)
        known = (self.ids_M[at] == ids)[..., None]
        return torch.where(known, self.first_MD[at], 0), torch.where(known, self.second_MD[at], 0)

    def stepped(self, ids_N: Tensor, gradient_ND: Tensor, beta1: float, beta2: float) -> Moments:
        """After a step whose gradient has these rows (ids distinct); other rows stay as they are."""
        ids_M = torch.cat([self.ids_M, ids_N]).unique()
        first_MD, second_MD = self.look(ids_M) if len(self.ids_M) else (gradient_ND.new_zeros(len(ids_M), 1),) * 2
        first_MD, second_MD = (x.expand(-1, gradient_ND.shape[1]).clone() for x in (first_MD, second_MD))
        at_N = torch.searchsorted(ids_M, ids_N)
        first_MD[at_N] = beta1 * first_MD[at_N] + (1 - beta1) * gradient_ND
        second_MD[at_N] = beta2 * second_MD[at_N] + (1 - beta2) * gradient_ND.square()
        return Moments(self.t + 1, ids_M, first_MD, second_MD)


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

    def tokens(self, b: Batch) -> Tokens:
        """The batch's policy tokens."""
        here_N = b.mask_BT.flatten().nonzero().squeeze(1)

        def picked(value: Tensor) -> Tensor:
            return value.flatten(0, 1).index_select(0, here_N)

        ids_NV, hidden_ND, adv_N = (picked(x) for x in (b["top_ids_now_BTK"], b["hidden_now_BTD"], b.per_token("adv")))
        logp_NV = picked(b["top_logp_now_BTK"]).to(hidden_ND.dtype)
        pi_NV = (logp_NV - logp_NV.logsumexp(1, keepdim=True)).exp()
        v_NV = (ids_NV == picked(b.tokens_BT)[:, None]).to(pi_NV.dtype) - pi_NV
        return Tokens(adv_N.to(pi_NV.dtype), pi_NV, ids_NV, hidden_ND, v_NV)

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        lr = ctx.lr if self.lr is None else self.lr
        n = self.tokens(b)
        gain_N, w_NV = self.step_of(n, Moments.of(ctx.state(self), n.hidden_ND))
        s_N = (n.v_NV * w_NV).sum(1)
        mean_N = (n.pi_NV * w_NV).sum(1)
        hessian_N = n.adv_N * (s_N.square() - ((n.pi_NV * w_NV.square()).sum(1) - mean_N.square()))
        fisher_N = s_N.square()
        objective_N = lr * gain_N + 0.5 * lr**2 * hessian_N
        policy_N = 0.5 * lr**2 * fisher_N
        keep_N = torch.ones_like(s_N, dtype=torch.bool)
        if self.tau_f:
            keep_N &= policy_N < self.tau_f
        if self.tau_h:
            above_N = objective_N > -self.tau_h if self.low is None else objective_N >= self.low
            keep_N &= above_N & (objective_N < self.tau_h)
        ctx.log("rejected_tokens", float((~keep_N).sum()) / max(keep_N.numel(), 1))

        def placed(value_N: Tensor) -> Tensor:
            return value_N.new_zeros(b.B, b.T).masked_scatter(b.mask_BT, value_N)

        return b.put(
            gain_BT=placed(gain_N),
            hessian_BT=placed(hessian_N),
            fisher_BT=placed(fisher_N),
            objective_shift_BT=placed(objective_N),
            policy_shift_BT=placed(policy_N),
        ).over(mask_BT=placed(keep_N))

    def step_of(self, n: Tokens, moments: Moments) -> tuple[Tensor, Tensor]:
        """(<g, u>, w = u h) of each token: [N], [N, V]."""
        norm_N = n.hidden_ND.square().sum(1)
        if self.model == "sgd" or not len(moments.ids_M):
            return n.rows_NV.square().sum(1) * norm_N, n.rows_NV * norm_N[:, None]
        steps = moments.t + 1
        gains, ws = [], []
        size = max(1, CHUNK // max(1, n.ids_NV.shape[1] * n.hidden_ND.shape[1]))
        for rows_CV, ids_CV, hidden_CD in zip(
            *(x.split(size) for x in (n.rows_NV, n.ids_NV, n.hidden_ND)), strict=True
        ):
            g_CVD = rows_CV[..., None] * hidden_CD[:, None, :]
            first_CVD, second_CVD = moments.look(ids_CV)
            first_CVD = (self.beta1 * first_CVD + (1 - self.beta1) * g_CVD) / (1 - self.beta1**steps)
            second_CVD = (self.beta2 * second_CVD + (1 - self.beta2) * g_CVD.square()) / (1 - self.beta2**steps)
            u_CVD = first_CVD / (second_CVD.sqrt() + self.eps)
            gains.append((g_CVD * u_CVD).sum((1, 2)))
            ws.append((u_CVD * hidden_CD[:, None, :]).sum(2))
        return torch.cat(gains), torch.cat(ws)

    def after_step(self, b: Batch, ctx: Ctx) -> None:
        """Move the moments: once per step, by each id's mean gradient over the kept tokens that had it in their
        top-k.
        """
        if self.model == "sgd":
            return
        n = self.tokens(b)
        ids_M, at_NV = n.ids_NV.unique(return_inverse=True)
        token_NV = torch.arange(len(n.adv_N), device=at_NV.device)[:, None].expand_as(at_NV)
        places = torch.stack([at_NV.flatten(), token_NV.flatten()])
        sums = torch.sparse_coo_tensor(places, n.rows_NV.flatten(), (len(ids_M), len(n.adv_N)), check_invariants=False)
        count_M = torch.bincount(at_NV.flatten(), minlength=len(ids_M))
        mean_MD = torch.sparse.mm(sums, n.hidden_ND) / count_M[:, None]
        moments = Moments.of(ctx.state(self), n.hidden_ND).stepped(ids_M, mean_MD, self.beta1, self.beta2)
        ctx.state(self).update(moments.state())
