"""Drawing tokens: inverse CDF over uniforms that belong to the row, so that no row depends on its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from agents.engines.base import SampleParams, stream
from policy_opt.protocols import Sampler
from policy_opt.sampling import temperatures


def uniforms(seed: Sequence[int], n: int) -> np.ndarray:
    """`n` numbers in [0, 1), a pure function of `seed` = (run seed, group, member, turn): one per token drawn."""
    return np.random.Generator(np.random.Philox(stream(tuple(seed)))).random(n)


def banned_row(banned_ids: Sequence[int], vocab_size: int, device: torch.device) -> Tensor | None:
    """What is added to logits: -inf at ids that may not be drawn, else 0; None if there are none. [V]"""
    inside = [i for i in banned_ids if 0 <= i < vocab_size]
    if not inside:
        return None
    row_V = torch.zeros(vocab_size, device=device)
    row_V[inside] = float("-inf")
    return row_V


def draw(
    logits_NV: Tensor,
    u_N: Tensor,
    params: SampleParams,
    banned_V: Tensor | None,
    samplers: Sequence[Sampler | None] = (),
) -> tuple[Tensor, Tensor]:
    """Draw one id per row.

    Args:
        logits_NV: raw logits; half precisions are raised to float32.
        u_N: float64 uniforms in [0, 1), one per row.
        params: temperature, top-k, top-p.
        banned_V: from `banned_row`.
        samplers: one per row, in place of the temperature of `params`; none at all: that of `params` for all.

    Returns:
        ids [N] (int64) and log-probs [N] (float32, float64 for a float64 model): those of the softmax at the
        plain temperature over all ids that may be drawn, before top-k and top-p, also where a sampler's rule
        draws each token at a temperature of its own: the trainer scores at the plain one.
    """
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    if banned_V is not None:
        logits_NV = logits_NV + banned_V
    if any(sampler is not None for sampler in samplers):
        return _draw_each(logits_NV, u_N, params, samplers)
    if params.temperature not in (0.0, 1.0):
        logits_NV = logits_NV / params.temperature
    logp_NV = torch.log_softmax(logits_NV, -1)
    if params.temperature == 0:
        id_N = logp_NV.argmax(-1)
    else:
        p_NV = _truncate(logp_NV.exp(), params)
        id_N = _invert_cdf(p_NV, u_N)
    return id_N, logp_NV.gather(-1, id_N[:, None])[:, 0]


def _draw_each(
    logits_NV: Tensor, u_N: Tensor, params: SampleParams, samplers: Sequence[Sampler | None]
) -> tuple[Tensor, Tensor]:
    """`draw` for rows with samplers of their own: those of one sampler together."""
    id_N = torch.empty(len(samplers), dtype=torch.long, device=logits_NV.device)
    logp_N = logits_NV.new_empty(len(samplers))
    kinds = {id(sampler): sampler for sampler in samplers}
    for kind, sampler in kinds.items():
        mine = [i for i, other in enumerate(samplers) if id(other) == kind]
        rows_R = slice(None) if len(kinds) == 1 else torch.tensor(mine, device=logits_NV.device)
        some_RV, u_R = logits_NV[rows_R], u_N[rows_R]
        if sampler is None or sampler.hook is None:
            here = params if sampler is None else replace(params, temperature=sampler.temperature)
            id_N[rows_R], logp_N[rows_R] = draw(some_RV, u_R, here, None)
            continue
        logp_RV = torch.log_softmax(some_RV / sampler.temperature, -1)
        warm_RV = some_RV / temperatures(sampler, some_RV)[:, None]
        id_R = _invert_cdf(_truncate(warm_RV.softmax(-1), params), u_R)
        id_N[rows_R], logp_N[rows_R] = id_R, logp_RV.gather(-1, id_R[:, None])[:, 0]
    return id_N, logp_N


def _invert_cdf(p_NV: Tensor, u_N: Tensor) -> Tensor:
    """First id whose cumulative probability exceeds u times the total; ids of probability 0 are never drawn."""
    # float64 keeps the error of a sum over a large vocabulary far below any probability that matters.
    wide = torch.float32 if p_NV.device.type == "mps" else torch.float64
    cdf_NV = p_NV.cumsum(-1, dtype=wide)
    total_N = cdf_NV[:, -1]
    x_N = torch.minimum(u_N.to(wide) * total_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
    id_N = torch.searchsorted(cdf_NV, x_N[:, None], right=True)[:, 0]
    return id_N.clamp_(max=p_NV.shape[-1] - 1)  # NaN sorts beyond the end; the caller sees it in the log-prob


def _truncate(p_NV: Tensor, params: SampleParams) -> Tensor:
    """Zero what top-k and top-p exclude. Ties at the border of top-k are kept, all of them."""
    if params.top_k and params.top_k < p_NV.shape[-1]:
        border_N1 = p_NV.topk(params.top_k, -1).values[:, -1:]
        p_NV = p_NV.masked_fill(p_NV < border_N1, 0.0)
    if params.top_p < 1:
        sorted_NV, order_NV = torch.sort(p_NV, dim=-1, descending=True, stable=True)
        sorted_NV = sorted_NV / sorted_NV.sum(-1, keepdim=True)
        before_NV = sorted_NV.cumsum(-1) - sorted_NV  # the mass of what is likelier
        drop_NV = torch.zeros_like(p_NV, dtype=torch.bool).scatter(-1, order_NV, before_NV >= params.top_p)
        p_NV = p_NV.masked_fill(drop_NV, 0.0)
    return p_NV
