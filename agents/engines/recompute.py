"""Turns for models whose keys and values cannot be kept between turns: the whole row is computed each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.engines.base import SampleParams
from agents.engines.rows import Row
from agents.engines.sampling import draw, uniforms

_CACHES = ("past_key_values", "cache_params")  # the names under which models hand out their own caches


def recompute_turns(
    model: Any, rows: Sequence[Row], stop_ids: Sequence[int], params: SampleParams, banned_V: Tensor | None
) -> list[tuple[Row, list[int], list[float]]]:
    """Sample one turn for rows of equal length, with the model's own cache within the turn if it has one.

    Rows whose turn is over are computed on until the last one is done, and their surplus is thrown away.
    """
    device = model.get_output_embeddings().weight.device
    longest = max(row.budget for row in rows)
    u_RM = torch.from_numpy(np.stack([np.pad(uniforms(r.seed, r.budget), (0, longest - r.budget)) for r in rows]))
    u_RM = u_RM.to(device)
    everything = torch.tensor([row.ids for row in rows], device=device)
    tokens, cache = everything, dict[str, Any]()
    ids: list[list[int]] = [[] for _ in rows]
    logps: list[list[float]] = [[] for _ in rows]
    live = set(range(len(rows)))
    samplers = [row.sampler for row in rows]
    for step in range(longest):
        out = model(input_ids=tokens, use_cache=True, **cache)
        id_R, logp_R = draw(out.logits[:, -1], u_RM[:, step], params, banned_V, samplers)
        drawn = zip(id_R.tolist(), logp_R.tolist(), strict=True)
        for i, (token, logp) in enumerate(drawn):
            if i in live:
                ids[i].append(token)
                logps[i].append(logp)
                if token in stop_ids or len(ids[i]) >= rows[i].budget:
                    live.discard(i)
        if not live:
            break
        everything = torch.cat([everything, id_R[:, None]], 1)
        cache = {name: value for name in _CACHES if (value := getattr(out, name, None)) is not None}
        tokens = id_R[:, None] if cache else everything
    return list(zip(rows, ids, logps, strict=True))
