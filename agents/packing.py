"""Who computes what: rows are dealt out to processes, put into micro-batches, beside those they begin alike.

The members of a group read the same opening. Where the model can, an opening is computed once for several rows that
begin with it. A chunk is what is worked on together:

    padded          one micro-batch of rows of similar length, padded on the right
    padded, shared  some openings, whose keys and values are kept, and micro-batches of what follows them
    packed          one micro-batch end to end, without padding; an opening and what follows it stand in the same one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

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
    idle: bool = False
    """Nothing of it counts: this process has no work left, and others need it in their passes."""


@dataclass(frozen=True)
class Chunk:
    """Rows that are worked on together. An opening leaves out its last token, whose state predicts the first action."""

    row_G: Tensor
    """For each opening a row that begins with it."""
    length_G: Tensor
    """Tokens of the opening; 0 where nothing is shared."""
    parts: tuple[Part, ...]
    """Micro-batches of the rows' own tokens; one, unless padded rows share openings."""
    packed: bool = False
    """End to end, openings included; otherwise padded on the right."""

    @property
    def rows_R(self) -> Tensor:
        """Rows of the batch."""
        return torch.cat([part.rows_R for part in self.parts])

    def fed(self, length_B: Sequence[int]) -> int:
        """Tokens that go through a model, padding included."""
        own = [[length_B[row] for row in (part.rows_R.tolist())] for part in self.parts]
        after = [torch.tensor(x) - part.offset_R for x, part in zip(own, self.parts, strict=True)]
        if self.packed:
            return int(self.length_G.sum()) + sum(int(x.sum()) for x in after)
        openings = len(self.length_G) * int(self.length_G.max()) if len(self.length_G) else 0
        return openings + sum(len(x) * int(x.max()) for x in after)


@dataclass
class _Unit:
    """Rows with one opening; dealt out as one."""

    rows: list[int]
    opening: int

    def cost(self, length_B: Sequence[int]) -> int:
        return self.opening + sum(length_B[row] - self.opening for row in self.rows)


def plan(
    b: Batch,
    which_B: Tensor,
    budget: int,
    world: World,
    share: bool,
    pack: Literal["auto", "always", "never"] = "never",
) -> list[Chunk]:
    """This process' chunks of the named rows; a micro-batch holds at most `budget` tokens, padding included.

    A row longer than the budget stands alone. Over all processes every named row stands in exactly one part.

    Args:
        share: compute an opening once for several rows.
        pack: end to end; auto: where fewer tokens go through the model that way.
    """
    length_B = b.real_BT.sum(1).tolist()
    units = _units(b, which_B, share)
    mine = _deal(units, [unit.cost(length_B) for unit in units], world)
    if pack == "never":
        return _padded(mine, length_B, budget)
    packed = _packed(mine, length_B, budget)
    if pack == "auto":
        padded = _padded(mine, length_B, budget)
        if sum(c.fed(length_B) for c in padded) <= sum(c.fed(length_B) for c in packed):
            return padded
    return packed


def halves(chunk: Chunk, length_B: Sequence[int]) -> list[Chunk]:
    """The same rows in smaller chunks, for a device that had no room; nothing where a row stands alone already."""
    if len(chunk.parts) > 1 or (not chunk.packed and int(chunk.length_G.sum())):
        return [_plain(part.rows_R) for part in chunk.parts]
    (part,) = chunk.parts
    half = len(part.rows_R) // 2
    if not half:
        return []
    out = []
    for some in (slice(0, half), slice(half, None)):
        if not chunk.packed:
            out.append(_plain(part.rows_R[some]))
            continue
        units: dict[int, _Unit] = {}
        for row, g in zip(part.rows_R[some].tolist(), part.opening_R[some].tolist(), strict=True):
            units.setdefault(g, _Unit([], int(chunk.length_G[g]))).rows.append(row)
        out.append(_end_to_end(list(units.values())))
    return out


def idle(b: Batch) -> Chunk:
    """A chunk that is cheap and counts for nothing."""
    (part,) = _plain(b.real_BT.sum(1).argmin()[None].cpu()).parts
    return Chunk(part.rows_R, torch.zeros(1, dtype=torch.long), (replace(part, idle=True),))


def _padded(units: list[_Unit], length_B: Sequence[int], budget: int) -> list[Chunk]:
    """Chunks of openings with micro-batches of what follows, then of whole rows."""
    chunks: list[Chunk] = []
    held: list[_Unit] = []
    for unit in (unit for unit in units if unit.opening):
        longest = max([unit.opening, *(u.opening for u in held)])
        if held and longest * (len(held) + 1) > budget:
            chunks.append(_shared(held, length_B, budget))
            held = []
        held.append(unit)
    if held:
        chunks.append(_shared(held, length_B, budget))
    plain_R = torch.tensor([row for unit in units if not unit.opening for row in unit.rows], dtype=torch.long)
    length_R = torch.tensor([length_B[row] for row in plain_R.tolist()])
    return [*chunks, *(_plain(plain_R[part]) for part in micro_batches(length_R, budget))]


def _shared(units: list[_Unit], length_B: Sequence[int], budget: int) -> Chunk:
    rows = [(row, g) for g, unit in enumerate(units) for row in unit.rows]
    own_R = torch.tensor([length_B[row] - units[g].opening for row, g in rows])
    row_R, opening_R = torch.tensor(rows).T
    length_G = torch.tensor([unit.opening for unit in units])
    parts = tuple(
        Part(row_R[part], opening_R[part], length_G[opening_R[part]]) for part in micro_batches(own_R, budget)
    )
    return Chunk(torch.tensor([unit.rows[0] for unit in units]), length_G, parts)


def _plain(rows_R: Tensor) -> Chunk:
    """Whole rows, padded."""
    zero_R = torch.zeros_like(rows_R)
    return Chunk(rows_R[:1], torch.zeros(1, dtype=torch.long), (Part(rows_R, zero_R, zero_R),))


def _packed(units: list[_Unit], length_B: Sequence[int], budget: int) -> list[Chunk]:
    """Long units first, one after the other until the budget is full; a unit that is too long is cut.

    The opening of a unit that is cut stands in each of its pieces.
    """
    pieces = [piece for unit in units for piece in _cut(unit, length_B, budget)]
    pieces.sort(key=lambda unit: -unit.cost(length_B))
    bins: list[list[_Unit]] = []
    room = 0
    for piece in pieces:
        cost = piece.cost(length_B)
        if not bins or cost > room:
            bins.append([])
            room = budget
        bins[-1].append(piece)
        room -= cost
    return [_end_to_end(held) for held in bins]


def _cut(unit: _Unit, length_B: Sequence[int], budget: int) -> list[_Unit]:
    """A unit as pieces within the budget; rows without an opening are pieces of their own."""
    if not unit.opening:
        return [_Unit([row], 0) for row in unit.rows]
    pieces: list[_Unit] = []
    for row in unit.rows:
        if pieces and _Unit([*pieces[-1].rows, row], unit.opening).cost(length_B) <= budget:
            pieces[-1].rows.append(row)
        else:
            pieces.append(_Unit([row], unit.opening))
    return pieces


def _end_to_end(units: list[_Unit]) -> Chunk:
    """One packed micro-batch; an opening that one row only begins with is part of that row."""
    opening_G = [unit.opening if len(unit.rows) > 1 else 0 for unit in units]
    rows = [(row, g) for g, unit in enumerate(units) for row in unit.rows]
    row_R, opening_R = torch.tensor(rows).T
    length_G = torch.tensor(opening_G)
    part = Part(row_R, opening_R, length_G[opening_R])
    return Chunk(torch.tensor([unit.rows[0] for unit in units]), length_G, (part,), packed=True)


def _units(b: Batch, which_B: Tensor, share: bool) -> list[_Unit]:
    """Rows by equal opening (the tokens before the first action, less one), in order of their first row."""
    rows = which_B.nonzero(as_tuple=True)[0].tolist()
    if not share:
        return [_Unit([row], 0) for row in rows]
    first_B = torch.where(b.mask_BT.any(1), b.mask_BT.long().argmax(1), 0).tolist()
    tokens_BT = b.tokens_BT.cpu().numpy()
    picture_BT = b["picture_BT"].cpu().numpy() if b.media else tokens_BT[:, :0]
    units: dict[bytes, _Unit] = {}
    for row in rows:
        opening = max(0, first_B[row] - 1)
        same = tokens_BT[row, :opening].tobytes() + picture_BT[row, :opening].tobytes()
        units.setdefault(same, _Unit([], opening)).rows.append(row)
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
