"""Which stored episodes a report keeps: all of them, or whole groups spread over the run."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import numpy as np

from agents.report.episodes import Entry
from agents.store import Stored, StoreError, TrajectoryReader


class Episodes:
    """The episodes of a run that a report keeps.

    Attributes:
        total: stored episodes.
        notes: what could not be read.
    """

    def __init__(self, run: Path, limit: int) -> None:
        self.notes: list[str] = []
        self._damaged = 0
        self._missed = False
        self._reader: TrajectoryReader | None = None
        folder = run / "trajectories"
        if folder.is_dir():
            try:
                self._reader = TrajectoryReader(folder, images=False)
            except StoreError as error:
                self.notes.append(str(error))
        self.total = len(self._reader) if self._reader is not None else 0
        self._keep = range(self.total) if self.total <= limit else choose(self._keys(), limit)
        if self._reader is not None and self._reader.dropped:
            self.notes.append("the last stored episode is torn and left out")

    def __iter__(self) -> Iterator[Entry]:
        for i in self._keep:
            stored = self._read(i)
            if stored is not None:
                self._add_images(stored)
                step = stored.extra.get("step")
                yield Entry(step if isinstance(step, int) else None, stored.trajectory, stored.columns)

    def _add_images(self, stored: Stored) -> None:
        """The episode's images in their places; said, and shown by size, where they cannot be read."""
        assert self._reader is not None
        try:
            stored.trajectory.messages = self._reader.with_images(stored.trajectory.messages, self._miss)
        except (TypeError, AttributeError) as error:  # of messages that somebody else wrote
            self._miss(error)

    def _miss(self, error: Exception) -> None:
        """An image is not to be had: said once."""
        if not self._missed:
            self.notes.append("images of some episodes are missing or damaged")
        self._missed = True

    def _read(self, i: int) -> Stored | None:
        """Record i; None, counted, where it is damaged."""
        assert self._reader is not None
        try:
            return self._reader.read(i)
        except StoreError:
            self._damaged += 1
            if self._damaged == 1:
                self.notes.append("damaged episodes are left out")
            return None

    def _keys(self) -> list[Hashable]:
        """Which group each record belongs to."""
        keys: list[Hashable] = []
        for i in range(self.total):
            stored = self._read(i)
            t = stored.trajectory if stored is not None else None
            keys.append(None if t is None or stored is None else (stored.extra.get("step"), t.split, t.group))
        return keys


def choose(keys: Sequence[Hashable], limit: int) -> list[int]:
    """Indices of at most `limit` records: whole groups (records of one key), evenly spaced, first and last kept.

    Records whose key is None are left out.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        if key is not None:
            groups.setdefault(key, []).append(i)
    members = list(groups.values())
    for count in range(len(members), 0, -1):
        picked = {round(x) for x in np.linspace(0, len(members) - 1, count)}
        if sum(len(members[g]) for g in picked) <= limit:
            return sorted(i for g in picked for i in members[g])
    return []
