"""The numbers of an iteration, by their usual names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from policy_opt.batch import Batch
from policy_opt.surrogates import ratio
from policy_opt.terms import Loss, masked, reports


def over_mask(value: Tensor, b: Batch) -> float:
    """Mean of a [B, T] quantity over the mask, or of a [B] quantity over rows that have any; 0 where there is none."""
    if value.ndim == 1:
        some_B = b.mask_BT.any(1)
        return float((value * some_B).sum() / some_B.sum().clamp(min=1))
    return float(torch.where(b.mask_BT, value.double(), 0.0).sum() / b.mask_BT.sum().clamp(min=1))


def of_step(loss: Loss, streams: Mapping[str, Tensor], b: Batch) -> dict[str, float]:
    """Numbers of one optimizer step: loss, terms, entropy, kl, clip_frac, ratio_max, kl_ref."""
    with torch.no_grad():
        values = loss.values({k: v for k, v in streams.items()}, b)
        found = {"loss": float(sum(f * v for f, v in zip(loss.factors, values, strict=True)))}
        if len(values) > 1:
            found |= {f"loss_{t.name}": float(v) for t, v in zip(loss.terms, values, strict=True)}
        found["entropy"] = over_mask(streams["entropy_BT"], b)
        if "logp_BT" in streams and "logp_old_BT" in b:
            gap_BT = masked(streams["logp_BT"] - b["logp_old_BT"], b)
            rho_BT = ratio(gap_BT)
            found["kl"] = over_mask(rho_BT - 1 - gap_BT, b)
            found["ratio_max"] = float(rho_BT.max()) if b.mask_BT.any() else 1.0
        if "logp_BT" in streams and "logp_ref_BT" in b:
            x_BT = masked(b["logp_ref_BT"] - streams["logp_BT"], b)
            found["kl_ref"] = over_mask(ratio(x_BT) - 1 - x_BT, b)
        for name, value in reports(loss.terms, streams, b).items():
            if name != "ratio":
                found[name] = over_mask(value, b)
    return found


def over_steps(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over an iteration's optimizer steps; the largest of `ratio_max` and `grad_norm_max`."""
    names = dict.fromkeys(name for step in steps for name in step)
    found = {}
    for name in names:
        values = [step[name] for step in steps if name in step]
        found[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return found


def logp_gap(b: Batch) -> float:
    """max |logp_old - logp_sampler| on the mask: the alarm for a sampler that is not the policy."""
    if "logp_old_BT" not in b or not b.mask_BT.any():
        return 0.0
    gap_BT = (b["logp_old_BT"] - b.logp_sampler_BT).abs()
    return float(torch.where(b.mask_BT, gap_BT, gap_BT.new_zeros(())).max())


def of_rollout(b: Batch) -> dict[str, float]:
    """Numbers of everything that was played, rejected groups included: reward, correct, length, zero variance, ..."""
    found = {"rows": float(b.B), "tokens": float(b.mask_BT.sum())}
    for name, column in (("reward", "reward_B"), ("correct", "correct_B"), ("length", "length_B"), ("truncated", "truncated_B")):
        if column in b:
            found[name] = float(b[column].double().mean())
    index_B, count = b.index()
    reward_B = b["reward_B"].double()
    low_Q = torch.full((count,), torch.inf, dtype=torch.double).scatter_reduce_(0, index_B.cpu(), reward_B.cpu(), "amin")
    high_Q = torch.full((count,), -torch.inf, dtype=torch.double).scatter_reduce_(0, index_B.cpu(), reward_B.cpu(), "amax")
    found["zero_variance_groups"] = float((low_Q == high_Q).double().mean())
    return found
