"""The engine against plain forwards of its model: what the start-up check and the tests compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from agents.engines.base import Engine, Key
from agents.pictures import Picture

_PREFIX, _FEED, _DRAW = 20, 5, 3  # tokens: enough to exercise shared prefix, feeding and decoding


@torch.no_grad()
def plain_log_probs(
    model: Any,
    ids: Sequence[int],
    banned_ids: Sequence[int] = (),
    temperature: float = 1.0,
    pictures: Sequence[Picture] = (),
) -> Tensor:
    """Log-prob of each token of a row given those before it, by one ordinary forward. [T - 1]"""
    device = model.get_output_embeddings().weight.device
    row = torch.tensor([list(ids)], device=device)
    training = model.training
    model.eval()
    more: dict[str, Any] = {}
    if pictures:
        more["pixel_values"] = torch.cat([picture.patches_PD for picture in pictures]).to(device)
        more["image_grid_thw"] = torch.tensor([picture.grid for picture in pictures], device=device)
        more["mm_token_type_ids"] = (row == model.config.image_token_id).int()
    logits_TV = model(input_ids=row, use_cache=False, **more).logits[0, :-1]
    model.train(training)
    logits_TV = (logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()) / (temperature or 1.0)
    logits_TV[:, [i for i in banned_ids if i < logits_TV.shape[-1]]] = float("-inf")
    return logits_TV.log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]


def log_prob_gap(engine: Any) -> float:
    """Largest difference between sampled and plain log-probs over two short turns on four rows.

    Three rows share a prefix, two of them everything; the rows are of unequal lengths.
    """
    usable = [i for i in range(engine.vocab_size) if i not in set(engine.banned_ids) | set(engine.stop_ids)]
    n = min(_PREFIX, engine.max_context // 4)
    text = [usable[(7 * i + i * i) % len(usable)] for i in range(4 * (n + _FEED))]
    prefix = text[:n]
    openings = [
        prefix + text[n : n + 2],
        prefix + text[n : n + 2],
        prefix + text[n : n + _FEED],
        text[n + 3 :][:n],
    ]
    sampled = _two_turns(engine, openings, text[-_FEED:])
    gap = 0.0
    for ids, logps in sampled:
        plain = plain_log_probs(engine.model, ids, engine.banned_ids, engine.params.temperature).tolist()
        gap = max([gap, *(abs(plain[t - 1] - logp) for t, logp in logps.items())])
    return gap


def _two_turns(engine: Engine, openings: list[list[int]], more: list[int]) -> list[tuple[list[int], dict[int, float]]]:
    """Play two turns per row; each row's ids and the log-probs of its sampled tokens by position."""
    ids: dict[Key, list[int]] = {(i,): list(opening) for i, opening in enumerate(openings)}
    logps: dict[Key, dict[int, float]] = {key: {} for key in ids}
    turns = dict.fromkeys(ids, 0)
    for key, row in ids.items():
        engine.turn(key, row, (0, *key, 0), _DRAW)
    while finished := engine.run():
        for key, turn in finished:
            logps[key] |= {len(ids[key]) + i: logp for i, logp in enumerate(turn.logps)}
            ids[key] += turn.ids
            turns[key] += 1
            if turns[key] < 2:
                engine.turn(key, more[key[0] :], (0, *key, 1), _DRAW)
                ids[key] += more[key[0] :]
            else:
                engine.close(key)
    return [(ids[key], logps[key]) for key in ids]
