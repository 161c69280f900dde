"""Rows whose prompt and answer do not belong together: the `Mismatched` view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from policy_opt.batch import Batch, dims


@dataclass(frozen=True)
class Mixed:
    """Row i is the prompt of row i of some batch, followed by the policy tokens of its partner."""

    batch: Batch
    """The new rows."""
    time_BT: Tensor
    """Where each of the partner's tokens stands in the new row; 0 where the partner has none."""

    def place(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Quantities of the new rows moved to where the tokens stand in the partner's own row; 0 elsewhere."""
        out = {}
        for name, value in values.items():
            index = self.time_BT if value.ndim == 2 else self.time_BT[..., None].expand(-1, -1, value.shape[2])
            there = (self.time_BT > 0) if value.ndim == 2 else (self.time_BT > 0)[..., None]
            out[name] = torch.where(there, value.gather(1, index), value.new_zeros(()))
        return out


def mismatched(b: Batch, shift: int) -> Mixed:
    """Each row's opening (what stands before its first policy token) with the policy tokens of another row.

    The partner is `b.mismatched(shift)`. Its policy tokens stand one after the other: of an episode of several turns
    what the environment said in between belongs to the partner's task and is left out. A row without an opening or
    a partner without policy tokens has nothing to score.
    """
    partner_B = b.mismatched(shift)
    acting_B = b.mask_BT.any(1)
    length_B = b.real_BT.sum(1)
    opening_B = torch.where(acting_B, b.mask_BT.long().argmax(1), length_B)
    theirs_BT = b.mask_BT[partner_B] & (opening_B > 0)[:, None]
    rank_BT = theirs_BT.cumsum(1) - 1
    time_BT = torch.where(theirs_BT, opening_B[:, None] + rank_BT, 0)
    end_B = opening_B + theirs_BT.sum(1)
    width = max(b.T, int(end_B.max()))
    at_T = torch.arange(width, device=b.mask_BT.device)
    opening_BW = at_T < opening_B[:, None]
    real_BW = at_T < end_B[:, None]
    tokens_BW = torch.zeros(b.B, width, dtype=torch.long, device=at_T.device)
    tokens_BW[:, : b.T] = b.tokens_BT
    tokens_BW = torch.where(opening_BW, tokens_BW, 0)
    pictures = {}
    if b.media:  # those of the openings; an assistant shows none
        picture_BW = torch.zeros_like(tokens_BW)
        picture_BW[:, : b.T] = b["picture_BT"]
        pictures = {"picture_BT": torch.where(opening_BW, picture_BW, 0), "media": b.media}
    row_N, from_N = theirs_BT.nonzero(as_tuple=True)
    tokens_BW[row_N, time_BT[row_N, from_N]] = b.tokens_BT[partner_B[row_N], from_N]
    kept = {n: b[n] for n in (*b.units, "temperature_B") if n in b and dims(n) == "B"}
    mask_BW = real_BW & ~opening_BW
    return Mixed(Batch.build(tokens_BT=tokens_BW, real_BT=real_BW, mask_BT=mask_BW, **kept, **pictures), time_BT)
