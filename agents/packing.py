"""Who computes what: rows are dealt out to processes, packed by length, and put beside those they begin alike.

The members of a group read the same opening. Where the model can, an opening is computed once for all rows that
begin with it; a chunk holds some openings and, as micro-batches, what follows them in their rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.dist import World
from policy_opt.batch import Batch

SHORTEST = 8
"""Openings shorter than this are not worth a forward of their own."""


@dataclass(frozen=True)
class Part:
    """One micro-batch."""

    rows_R: Tensor
    """Rows of the batch."""
    opening_R: Tensor
    """For each, which of its chunk's openings it begins with."""
    offset_R: Tensor
    """Tokens of the row that the opening covers: the row's own work begins there."""


@dataclass(frozen=True)
class Chunk:
    """Rows that are worked on together. An opening leaves out its last token, whose state predicts the first action."""

    row_G: Tensor
    """For each opening a row that begins with it."""
    length_G: Tensor
    """Tokens of the opening; all 0 where nothing is shared."""
    parts: tuple[Part, ...]
    """Micro-batches of the rows' own tokens."""


@dataclass
class _Unit:
    """Rows with one opening; dealt out as one."""

    rows: list[int]
    opening: int

    def cost(self, length_B: Sequence[int]) -> int:
        return self.opening + sum(length_B[row] - self.opening for row in self.rows)


def plan(b: Batch, which_B: Tensor, budget: int, world: World, share: bool) -> list[Chunk]:
    """This process' chunks of the named rows; a micro-batch holds at most `budget` tokens, padding included.

    A row longer than the budget stands alone. Over all processes every named row stands in exactly one part.
    """
    length_B = b.real_BT.sum(1).tolist()
    units = _units(b, which_B, share)
    mine = _deal(units, [unit.cost(length_B) for unit in units], world)
    shared = [unit for unit in mine if unit.opening]
    plain = [_Unit([row], 0) for unit in mine if not unit.opening for row in unit.rows]
    chunks: list[Chunk] = []
    held: list[_Unit] = []
    for unit in shared:
        longest = max([unit.opening, *(u.opening for u in held)])
        if held and longest * (len(held) + 1) > budget:
            chunks.append(_chunk(held, length_B, budget))
            held = []
        held.append(unit)
    return [*chunks, *(_chunk(units, length_B, budget) for units in (held, plain) if units)]


def _units(b: Batch, which_B: Tensor, share: bool) -> list[_Unit]:
    """Rows by equal opening (the tokens before the first action, less one), in order of their first row."""
    rows = which_B.nonzero(as_tuple=True)[0].tolist()
    if not share:
        return [_Unit([row], 0) for row in rows]
    first_B = torch.where(b.mask_BT.any(1), b.mask_BT.long().argmax(1), 0).tolist()
    tokens_BT = b.tokens_BT.cpu().numpy()
    units: dict[bytes, _Unit] = {}
    for row in rows:
        opening = max(0, first_B[row] - 1)
        units.setdefault(tokens_BT[row, :opening].tobytes(), _Unit([], opening)).rows.append(row)
    for unit in units.values():
        if len(unit.rows) < 2 or unit.opening < SHORTEST:
            unit.opening = 0
    return list(units.values())


def _deal(units: list[_Unit], costs: list[int], world: World) -> list[_Unit]:
    """This process' units: the dearest first, each to whom has least so far; the same deal on every process."""
    if world.size == 1:
        return units
    load = [0] * world.size
    mine: list[int] = []
    for i in sorted(range(len(units)), key=lambda i: (-costs[i], i)):
        rank = load.index(min(load))
        load[rank] += costs[i]
        if rank == world.rank:
            mine.append(i)
    return [units[i] for i in sorted(mine)]


def _chunk(units: list[_Unit], length_B: Sequence[int], budget: int) -> Chunk:
    rows = [(row, g) for g, unit in enumerate(units) for row in unit.rows]
    own_R = torch.tensor([length_B[row] - units[g].opening for row, g in rows])
    row_R, opening_R = torch.tensor(rows).T
    length_G = torch.tensor([unit.opening for unit in units])
    parts = tuple(
        Part(row_R[part], opening_R[part], length_G[opening_R[part]]) for part in micro_batches(own_R, budget)
    )
    return Chunk(torch.tensor([unit.rows[0] for unit in units]), length_G, parts)


def micro_batches(length_R: Tensor, budget: int) -> list[Tensor]:
    """Indices in micro-batches of similar length, at most `budget` tokens with padding; long rows first."""
    order = torch.argsort(length_R, descending=True, stable=True)
    batches: list[Tensor] = []
    start = 0
    while start < len(order):
        size = max(1, budget // max(1, int(length_R[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches
