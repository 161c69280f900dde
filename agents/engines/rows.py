"""Open rows and the state of those that are in the middle of a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from agents.engines.base import Key
from agents.engines.sampling import uniforms
from agents.pictures import Picture
from policy_opt.protocols import Sampler


@dataclass(eq=False)
class Row:
    """An open episode."""

    key: Key
    ids: list[int] = field(default_factory=list)
    """Everything fed and sampled so far; for placeholders, what `Gallery.named` calls them."""
    pictures: list[Picture] = field(default_factory=list)
    """Those whose placeholders are among them, in order."""
    place_3T: Tensor | None = None
    """Rotary positions of what has been fed, in a model that reads pictures; None: places in the row."""
    delta: int = 0
    """Rotary position of the next token, less its place in the row: pictures take up less."""
    stored: int = 0
    """How many of them have keys and values in memory; the shared prefix counts."""
    slot: int = -1
    """Slot in memory; -1 while the row waits for one."""
    base: int = 0
    """Length of the shared prefix that the row reads instead of storing it."""
    budget: int = 0
    """Tokens that the current turn may sample."""
    seed: Key = ()
    """Names the current turn's random stream."""
    sampler: Sampler | None = None
    """How the current turn is drawn; None: as the engine's own settings say."""
    busy: bool = False
    """Whether a turn has been asked for and not finished."""
    origin: int = 0
    """Place in the slot of the next token, less the engine's tick at which it is fed."""


class Decoding:
    """Rows in the middle of a turn. Tensors are indexed by slot (S), so that rows come and go without moving."""

    def __init__(self, rows: int, stop_ids: Sequence[int], vocab_size: int, device: torch.device) -> None:
        self.device, self.width, self.tick = device, 0, 0
        self.rows: list[Row] = []
        self._stop_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._stop_V[list(stop_ids)] = True
        self._last_S, self._pos_S, self._base_S, self._count_S, self._budget_S = (
            torch.zeros(rows, dtype=torch.long, device=device) for _ in range(5)
        )
        self._u_SM, self._logp_SM = (torch.zeros(rows, 0, dtype=torch.float64, device=device) for _ in range(2))
        self._id_SM = torch.zeros(rows, 0, dtype=torch.long, device=device)
        self.clear()

    def clear(self) -> None:
        """No row is in a turn."""
        self.rows = []
        self._begun: list[Row] = []
        self._arrange()

    def drop(self, rows: Sequence[Row]) -> None:
        """Take rows out; those that are not in a turn are ignored."""
        gone = set(map(id, rows))
        if any(id(row) in gone for row in self.rows):
            self.rows = [row for row in self.rows if id(row) not in gone]
            self._arrange()

    def _arrange(self) -> None:
        self.rows.sort(key=lambda row: row.slot)
        slots = [row.slot for row in self.rows]
        self.slot_D = torch.tensor(slots, dtype=torch.long, device=self.device)
        self.span = slots[-1] + 1 if slots else 0
        self.dense = self.span == len(slots)
        self._origin = max((row.origin for row in self.rows), default=0)

    # ------------------------------------------------------------------ what the next forward feeds

    @property
    def reach(self) -> int:
        """One more than the highest place in a slot that the next forward attends to."""
        return self._origin + self.tick + 1 if self.rows else 0

    def pending(self) -> tuple[Tensor, Tensor, Tensor]:
        """Last sampled ids, rotary positions, and places in the slots, of the rows in `slot_D`. Each [D]."""
        pos_D = self._pos_S[self.slot_D]
        return self._last_S[self.slot_D], pos_D, pos_D - self._base_S[self.slot_D]

    def fed(self) -> None:
        """The forward has been run: every row's position advances."""
        self._pos_S[self.slot_D] += 1
        self.tick += 1

    # ------------------------------------------------------------------ turns

    def begin(self, rows: Sequence[Row]) -> None:
        """Start the turns of rows whose fed tokens are all in memory. They join at the next `record`."""
        self._begun = list(rows)
        if not rows:
            return
        self._widen(max(row.budget for row in rows))
        drawn = np.zeros((len(rows), self.width))
        for i, row in enumerate(rows):
            drawn[i, : row.budget] = uniforms(row.seed, row.budget)
            row.origin = row.stored - row.base - self.tick
        state = torch.tensor(
            [(r.slot, r.stored + r.delta, r.base + r.delta, r.budget) for r in rows], device=self.device
        )  # fmt: skip
        slot_P, self._pos_S[state[:, 0]] = state[:, 0], state[:, 1]
        self._base_S[slot_P], self._budget_S[slot_P], self._count_S[slot_P] = state[:, 2], state[:, 3], 0
        self._u_SM[slot_P] = torch.from_numpy(drawn).to(self.device)

    def _widen(self, width: int) -> None:
        if width > self.width:
            for name in ("_u_SM", "_logp_SM", "_id_SM"):
                setattr(self, name, torch.nn.functional.pad(getattr(self, name), (0, width - self.width)))
            self.width = width

    def current(self) -> tuple[Tensor, Tensor]:
        """Slots [R] of the rows that draw a token now (those in a turn, then those that begin), their uniforms."""
        begun = torch.tensor([row.slot for row in self._begun], dtype=torch.long, device=self.device)
        slot_R = torch.cat([self.slot_D, begun]) if self._begun else self.slot_D
        return slot_R, self._u_SM[slot_R, self._count_S[slot_R]]

    def samplers(self) -> list[Sampler | None]:
        """Of the rows that `current` names."""
        return [row.sampler for row in (*self.rows, *self._begun)]

    def record(self, slot_R: Tensor, id_R: Tensor, logp_R: Tensor) -> list[tuple[Row, list[int], list[float]]]:
        """Note the drawn tokens; returns and drops the rows whose turn is over, with their ids and log-probs."""
        count_R = self._count_S[slot_R]
        self._id_SM[slot_R, count_R] = id_R
        self._logp_SM[slot_R, count_R] = logp_R.double()
        self._last_S[slot_R] = id_R
        count_R = count_R + 1
        self._count_S[slot_R] = count_R
        over_R = self._stop_V[id_R] | (count_R >= self._budget_S[slot_R])
        over = over_R.nonzero()[:, 0].tolist()
        if not over and not self._begun:
            return []
        rows = self.rows + self._begun
        finished = self._collect([rows[i] for i in over], slot_R[over_R], count_R[over_R])
        gone = set(over)
        self.rows = [row for i, row in enumerate(rows) if i not in gone]
        self._begun = []
        self._arrange()
        return finished

    def _collect(self, rows: list[Row], slot_F: Tensor, count_F: Tensor) -> list[tuple[Row, list[int], list[float]]]:
        if not rows:
            return []
        counts = count_F.tolist()
        ids, logps = (
            self._id_SM[slot_F, : max(counts)].tolist(),
            self._logp_SM[slot_F, : max(counts)].tolist(),
        )
        return [(row, ids[i][:n], logps[i][:n]) for i, (row, n) in enumerate(zip(rows, counts, strict=True))]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Rows moved from slots `source` to slots `target`; `Row.slot` is already the new one."""
        for name in ("_last_S", "_pos_S", "_base_S", "_count_S", "_budget_S", "_u_SM", "_logp_SM", "_id_SM"):
            state = getattr(self, name)
            state[target] = state[source]
        self._arrange()
