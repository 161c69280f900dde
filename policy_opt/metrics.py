"""The numbers of an iteration, by their usual names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from policy_opt.batch import Batch, floating
from policy_opt.surrogates import ratio
from policy_opt.terms import Loss, masked


def over_mask(value: Tensor, b: Batch) -> float:
    """Mean of a [B, T] quantity over the mask, or of a [B] quantity over rows that have any; 0 if there is
    none.
    """
    if value.ndim == 1:
        some_B = b.mask_BT.any(1)
        return float((value * some_B).sum() / some_B.sum().clamp(min=1))
    return float(torch.where(b.mask_BT, floating(value), 0.0).sum() / b.mask_BT.sum().clamp(min=1))


def over_pairs(value_P: Tensor) -> float:
    """Mean over the pairs; 0 if there are none."""
    return float(floating(value_P).sum() / max(value_P.numel(), 1))


@torch.no_grad()
def of_step(
    loss: Loss, streams: Mapping[str, Tensor], b: Batch, said: Mapping[str, Tensor]
) -> dict[str, float]:
    """Numbers of one optimizer step: loss, terms, entropy, kl (old to new, k3), ratio_max, kl_ref, ...

    said: the surrogates' reports; a name that ends in _P is per pair, and its mean loses the suffix.
    """
    values = loss.values(streams, b)
    found = {"loss": float(sum(f * v for f, v in zip(loss.factors, values, strict=True)))}
    if len(values) > 1:
        found |= {f"loss_{t.name}": float(v) for t, v in zip(loss.terms, values, strict=True)}
    found["entropy"] = over_mask(streams["entropy_BT"], b)
    if "logp_BT" in streams and "logp_old_BT" in b:
        gap_BT = masked(streams["logp_BT"] - b["logp_old_BT"], b)
        rho_BT = ratio(gap_BT)
        found["kl"] = over_mask(rho_BT - 1 - gap_BT, b)
        found["ratio_max"] = float(rho_BT.max())
    if "logp_BT" in streams and "logp_ref_BT" in b:
        gap_BT = masked(b["logp_ref_BT"] - streams["logp_BT"], b)
        found["kl_ref"] = over_mask(ratio(gap_BT) - 1 - gap_BT, b)
    found |= {n.removesuffix("_P"): over_pairs(v) for n, v in said.items() if n.endswith("_P")}
    return found | {n: over_mask(v, b) for n, v in said.items() if n != "ratio" and not n.endswith("_P")}


def over_steps(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over an iteration's optimizer steps; of names that end in _max, the largest."""
    found = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        values = [step[name] for step in steps if name in step]
        found[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return found


def logp_gap(logp_BT: Tensor, b: Batch, version: int | None = None) -> float:
    """max |logp - logp_sampler| on the mask: the alarm for a sampler that is not the policy.

    Tokens that an unfinished episode brought along from an older version of the policy are left out.

    version: the policy's; where nothing was sampled by it, because the batch was played ahead, the gap is 0 and the
        actor must have compared the weights that it played with. None: that of the newest tokens.
    """
    if not b.mask_BT.any():
        return 0.0
    newest_BT = b.version_BT == (b.version_BT[b.mask_BT].max() if version is None else version)
    return float((masked((logp_BT - b.logp_sampler_BT).abs(), b) * newest_BT).max())


def of_rollout(b: Batch) -> dict[str, float]:
    """Numbers of everything that was played, rejected groups included, unfinished episodes left out of the means."""
    found = {"rows": float(b.B), "tokens": float(b.mask_BT.sum())}
    once_B = b.once()
    if "finished_B" in b and (ended_B := once_B & (b["finished_B"] != 0)).any():
        once_B = ended_B
    for name in ("reward", "correct", "length", "truncated"):
        if f"{name}_B" in b:
            found[name] = float(floating(b[f"{name}_B"][once_B]).mean())
    index_B, count = b.index()
    first_Q = b["reward_B"].new_empty(count).index_copy_(0, index_B, b["reward_B"])
    differs_B = (b["reward_B"] != first_Q[index_B]).long()
    differs_Q = torch.zeros(count, dtype=torch.long, device=differs_B.device).index_add_(
        0, index_B, differs_B
    )
    found["zero_variance_groups"] = float((differs_Q == 0).sum()) / count
    return found
