"""Which episodes of a run are stored, and which per-token numbers go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from agents.store import TrajectoryWriter
from agents.trajectory import Trajectory
from policy_opt.batch import Batch, dims

Key = tuple[int, int]
LEFT_OUT = frozenset({"logp_sampler_BT", "picture_BT"})
"""Stored with every episode anyway, one as numbers, the other as spans."""


def store(
    folder: Path,
    played: Sequence[Trajectory],
    columns: Mapping[Key, Mapping[str, list[np.ndarray]]] | None = None,
    **extra: Any,
) -> None:
    """Append episodes with their per-token columns; `extra` (step, label) is kept with each. OSError: disk full."""
    with TrajectoryWriter(folder) as writer:
        for t in played:
            writer.append(t, (columns or {}).get((t.group, t.member)), **extra)


def token_columns(b: Batch, streams: Mapping[str, Tensor]) -> dict[Key, dict[str, list[np.ndarray]]]:
    """Per episode, per column, one array a segment: advantages and whatever else stands per token.

    `streams` are the learner's of the last optimizer step; they count only if that step saw this very batch.
    """
    found = {name.removesuffix("_BT"): c for name, c in b.cols.items() if dims(name) == "BT" and name not in LEFT_OUT}
    for name, value in streams.items():
        if value.shape == b.tokens_BT.shape:
            found.setdefault(name.removesuffix("_BT"), value)
    if "adv" not in found and "adv_B" in b.cols:
        found["adv"] = b.cols["adv_B"][:, None] * b.mask_BT
    length_B = b.real_BT.sum(1).tolist()
    arrays = {name: value.detach().float().cpu().numpy() for name, value in found.items()}
    out: dict[Key, dict[str, list[np.ndarray]]] = {}
    for row, (group, member) in enumerate(zip(b["group_B"].tolist(), b["member_B"].tolist(), strict=True)):
        episode = out.setdefault((group, member), {name: [] for name in arrays})
        for name, array in arrays.items():
            episode[name].append(array[row, : length_B[row]])
    return out
