"""What one forward does: the tokens of rows in the middle of a turn, then those fed to rows that begin
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from agents.engines.rows import Decoding, Row
from agents.engines.slots import Plan, Slots


@dataclass(frozen=True)
class Fed:
    """Tokens to feed to one row in one forward."""

    row: Row
    ids: Sequence[int]
    """The tokens; they follow the row's `stored` ones."""
    last: bool
    """Whether nothing remains to be fed, so that the row's turn begins."""


def build_plan(decoding: Decoding, fed: Sequence[Fed], repeats: Sequence[int], slots: Slots) -> Plan:
    """Lay out a forward.

    Args:
        decoding: rows that bring their last sampled token.
        fed: tokens for rows that begin a turn.
        repeats: indices into `fed` whose last logits are wanted once more, for rows that were fed the same.
        slots: where the rows live; grown if need be.
    """
    ids_D, pos_D, index_D = decoding.pending()
    n_decode, n_prefix = len(ids_D), len(slots.prefix_ids)
    if not fed:
        slots.reserve(decoding.reach)
        return Plan(
            ids_N=ids_D, pos_N=pos_D, slot_N=decoding.slot_D, index_N=index_D,
            keep_R=torch.arange(n_decode, device=slots.device), n_decode=n_decode,
            span=decoding.span, reach=decoding.reach, dense=decoding.dense,
        )  # fmt: skip
    lengths = np.array([len(f.ids) for f in fed])
    starts = np.array([f.row.stored for f in fed])
    bases = np.array([f.row.base for f in fed])
    ends = lengths.cumsum()
    longest, reach = int(lengths.max()), int((starts - bases + lengths).max())
    slots.reserve(max(reach, decoding.reach))
    row_N = np.repeat(np.arange(len(fed)), lengths)
    step_N = np.arange(ends[-1]) - (ends - lengths)[row_N]
    table = np.stack([
        np.concatenate([np.asarray(f.ids, dtype=np.int64) for f in fed]),
        starts[row_N] + step_N,
        np.array([f.row.slot for f in fed])[row_N],
        (starts - bases)[row_N] + step_N,
        row_N * longest + step_N,
    ])  # fmt: skip
    ids_N, pos_N, slot_N, index_N, real_N = torch.from_numpy(table).to(slots.device)
    pad_PC = (ends - lengths)[:, None] + np.minimum(np.arange(longest), lengths[:, None] - 1)
    wanted = [int(ends[i]) - 1 for i, f in enumerate(fed) if f.last] + [int(ends[i]) - 1 for i in repeats]
    last_PC = (starts - bases)[:, None] + np.arange(longest)
    mask_PCL = np.concatenate([
        np.broadcast_to((bases > 0)[:, None, None], (*last_PC.shape, n_prefix)),
        np.arange(reach) <= last_PC[:, :, None],
    ], -1)  # fmt: skip
    return Plan(
        ids_N=torch.cat([ids_D, ids_N]),
        pos_N=torch.cat([pos_D, pos_N]),
        slot_N=torch.cat([decoding.slot_D, slot_N]),
        index_N=torch.cat([index_D, index_N]),
        keep_R=torch.tensor(
            [*range(n_decode), *(n_decode + w for w in wanted)], dtype=torch.long, device=slots.device
        ),
        n_decode=n_decode,
        span=decoding.span,
        reach=decoding.reach,
        dense=decoding.dense,
        fed_slot_P=torch.tensor([f.row.slot for f in fed], device=slots.device),
        fed_index_PC=torch.from_numpy(pad_PC).to(slots.device),
        fed_real_N=real_N,
        fed_bias_PCL=torch.from_numpy(np.where(mask_PCL, 0.0, -np.inf).astype(np.float32)).to(slots.device),
        fed_reach=reach,
    )
