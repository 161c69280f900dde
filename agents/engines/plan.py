"""What one forward does: the tokens of rows in the middle of a turn, then those fed to rows that begin one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agents.engines.rows import Decoding, Row


@dataclass(frozen=True)
class Fed:
    """Tokens to feed to one row in one forward."""

    row: Row
    ids: Sequence[int]
    """The tokens; they follow the row's `stored` ones."""
    last: bool
    """Whether nothing remains to be fed, so that the row's turn begins."""


@dataclass(frozen=True)
class FedPlan:
    """The part of a forward that feeds P rows up to C tokens each."""

    slot_P: Tensor
    """Slots of the rows."""
    index_PC: Tensor
    """Tokens of each row, counted after the decoding ones; padded by repeating the row's last."""
    real_N: Tensor
    """Where each of these tokens stands in the padded [P * C] layout."""
    bias_PCL: Tensor
    """0 where a token may attend, else -inf: shared prefix first, then the slot's places."""
    reach: int
    """One more than the highest place that is attended to."""


@dataclass(frozen=True)
class Plan:
    """A forward over N flat tokens: one for each of D decoding rows, then those fed to P rows."""

    ids_N: Tensor
    """Token ids."""
    pos_N: Tensor
    """Positions in the row, shared prefix included; [3, N] rotary ones for a model that reads pictures."""
    slot_N: Tensor
    """Slot of each token."""
    index_N: Tensor
    """Place within the slot: the position, less the length of the shared prefix where the row has it."""
    keep_R: Tensor
    """Flat indices whose logits are wanted."""
    slot_D: Tensor
    """Slots of the decoding rows."""
    decoding: int
    """Their number, D."""
    span: int
    """One more than the highest decoding slot."""
    reach: int
    """One more than the highest place that a decoding row attends to."""
    dense: bool
    """Whether the decoding rows are exactly the slots 0..span-1, in order."""
    fed: FedPlan | None
    """The rows that are fed; None if there are none."""

    @property
    def longest(self) -> int:
        """Places that a slot must have."""
        return max(self.reach, self.fed.reach if self.fed is not None else 0)


def build_plan(
    decoding: Decoding, fed: Sequence[Fed], repeats: Sequence[int], prefix: int, axes: bool = False
) -> Plan:
    """Lay out a forward.

    Args:
        decoding: rows that bring their last sampled token.
        fed: tokens for rows that begin a turn.
        repeats: indices into `fed` whose last logits are wanted once more, for rows that were fed the same.
        prefix: length of the shared prefix.
        axes: whether positions have three axes.
    """
    ids_D, pos_D, index_D = decoding.pending()
    if axes:
        pos_D = pos_D.expand(3, -1)
    device, n_decode = ids_D.device, len(decoding.rows)
    if not fed:
        keep_R = torch.arange(n_decode, device=device)
        return Plan(
            ids_D, pos_D, decoding.slot_D, index_D, keep_R, decoding.slot_D, n_decode,
            decoding.span, decoding.reach, decoding.dense, None,
        )  # fmt: skip
    lengths = np.array([len(f.ids) for f in fed])
    ends, longest = lengths.cumsum(), int(lengths.max())
    start_P = np.array([f.row.stored for f in fed])
    place_P = start_P - np.array([f.row.base for f in fed])
    slot_P = np.array([f.row.slot for f in fed])
    row_N = np.repeat(np.arange(len(fed)), lengths)
    step_N = np.arange(ends[-1]) - (ends - lengths)[row_N]
    said_N = np.concatenate([np.asarray(f.ids, dtype=np.int64) for f in fed])
    table = np.stack([
        said_N, start_P[row_N] + step_N, slot_P[row_N], place_P[row_N] + step_N, row_N * longest + step_N
    ])  # fmt: skip
    ids_N, pos_N, slot_N, index_N, real_N = torch.from_numpy(table).to(device)
    if axes:
        pos_N = torch.cat([_places(f) for f in fed], 1).to(device)
    last_N = ends[[i for i, f in enumerate(fed) if f.last] + list(repeats)] - 1
    index_PC = (ends - lengths)[:, None] + np.minimum(np.arange(longest), lengths[:, None] - 1)
    reach = int((place_P + lengths).max())
    return Plan(
        ids_N=torch.cat([ids_D, ids_N]),
        pos_N=torch.cat([pos_D, pos_N], -1),
        slot_N=torch.cat([decoding.slot_D, slot_N]),
        index_N=torch.cat([index_D, index_N]),
        keep_R=torch.from_numpy(np.concatenate([np.arange(n_decode), n_decode + last_N])).to(device),
        slot_D=decoding.slot_D,
        decoding=n_decode,
        span=decoding.span,
        reach=decoding.reach,
        dense=decoding.dense,
        fed=FedPlan(
            slot_P=torch.from_numpy(slot_P).to(device),
            index_PC=torch.from_numpy(index_PC).to(device),
            real_N=real_N,
            bias_PCL=_causal_bias(place_P, longest, reach, start_P > place_P, prefix).to(device),
            reach=reach,
        ),
    )


def _places(fed: Fed) -> Tensor:
    """Rotary positions [3, C] of what is fed to a row."""
    start, stop = fed.row.stored, fed.row.stored + len(fed.ids)
    if fed.row.place_3T is None:
        return torch.arange(start, stop).expand(3, -1)
    return fed.row.place_3T[:, start:stop]


def _causal_bias(place_P: np.ndarray, longest: int, reach: int, shares_P: np.ndarray, prefix: int) -> Tensor:
    """0 where the c-th token of a row may attend, else -inf: [P, C, prefix + reach]."""
    own_PCL = np.arange(reach) <= (place_P[:, None] + np.arange(longest))[:, :, None]
    shared_PCL = np.broadcast_to(shares_P[:, None, None], (*own_PCL.shape[:2], prefix))
    may_PCL = np.concatenate([shared_PCL, own_PCL], -1)
    return torch.from_numpy(np.where(may_PCL, np.float32(0), np.float32(-np.inf)))
