"""Episodes on disk: an append-only file of checksummed records and an index of where they begin.

    episodes.bin    "PALT" u32 version, then records: u32 length, u32 CRC-32 of the payload, payload
    episodes.idx    u64 offset of each record in episodes.bin
    images/         the images of messages, each once, as PNG files named by a hash of their pixels

A payload is a zlib-packed JSON head (conversation, turns, verdict, ids of the episode; runs of turn and
version numbers) followed by the arrays of each segment: token ids in 2 or 4 bytes, the mask in bits, float32
log-probs of sampled tokens only, further per-token columns in float16. A 600-token episode takes about 4 KB.

Whatever stands after the last whole record (a process was killed while it wrote) is left out by the reader,
which counts it, and cut off by the next writer. The index is only an accelerator: records that it lacks are
found.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from agents.engines.base import SampleParams
from agents.ledger import Ledger, Segment, Span
from agents.stored_images import IMAGES, ImageFiles, StoreError, restored, stored
from agents.trajectory import Trajectory, TurnInfo
from envs import Verdict

__all__ = ["DATA", "INDEX", "StoreError", "Stored", "TrajectoryReader", "TrajectoryWriter"]
DATA, INDEX = "episodes.bin", "episodes.idx"
_MAGIC, _VERSION = b"PALT", 1
_START = struct.Struct("<4sI")
_RECORD = struct.Struct("<II")
_HEAD = struct.Struct("<II")  # packed and unpacked bytes of the JSON head
_OFFSET = struct.Struct("<Q")
_LARGEST = 1 << 28  # bytes of a record, packed or not: beyond that a file is not believed


Columns = Mapping[str, Sequence[Any]]
"""Per-token numbers by name: one sequence per segment, as long as the segment."""


@dataclass(frozen=True)
class Stored:
    """A record."""

    trajectory: Trajectory
    """The episode."""
    columns: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Per-token columns that were stored with it, float16: one array per segment."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What the writer said of it, such as `step`."""


class TrajectoryWriter:
    """Appends episodes to a folder; made if need be, gone on with if it is there.

    Attributes:
        cut: bytes of a torn last record that were cut off on opening.
    """

    def __init__(self, folder: Path | str) -> None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        data, index = path / DATA, path / INDEX
        offsets: list[int] = []
        end, size = _START.size, data.stat().st_size if data.exists() else 0
        if size < _START.size:
            data.write_bytes(_START.pack(_MAGIC, _VERSION))
            size = _START.size
        else:
            offsets, end = _scan(data, _indexed(index))
        self.cut = size - end
        self._count, self._end = len(offsets), end
        self._images = ImageFiles(path / IMAGES)
        self._data, self._index = data.open("r+b"), index.open("wb")
        self._data.truncate(end)
        self._data.seek(end)
        self._index.write(b"".join(map(_OFFSET.pack, offsets)))
        self.flush()

    def append(self, trajectory: Trajectory, columns: Columns | None = None, **extra: Any) -> int:
        """Write an episode; returns its number.

        Args:
            trajectory: the episode.
            columns: per-token numbers to keep with it in float16.
            extra: anything of JSON to keep with it, such as `step=12`.

        Raises:
            ValueError: a column does not fit the segments. OSError: the disk is full; the file stays
                readable.
        """
        payload = pack(trajectory, columns or {}, extra, self._images.keep)
        record = _RECORD.pack(len(payload), zlib.crc32(payload)) + payload
        try:
            self._data.write(record)
            self._data.flush()
        except OSError:
            self._data.seek(self._end)
            self._data.truncate(self._end)
            raise
        self._index.write(_OFFSET.pack(self._end))
        self._end += len(record)
        self._count += 1
        return self._count - 1

    def __len__(self) -> int:
        return self._count

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._data.flush()
        self._index.flush()

    def close(self) -> None:
        """Flush and close."""
        self._data.close()
        self._index.close()

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class TrajectoryReader(Sequence[Trajectory]):
    """The episodes of a folder by number, also while a writer goes on (as they were when it was opened).

    Args:
        folder: what the writer was given.
        images: whether messages get their images back; else their parts keep the name and the size of the file.

    Attributes:
        dropped: 1 if the last record is torn and left out, else 0.
        dropped_bytes: its size.

    Raises:
        StoreError: the folder holds no store.
    """

    def __init__(self, folder: Path | str, *, images: bool = True) -> None:
        self._path = Path(folder) / DATA
        self._images = ImageFiles(Path(folder) / IMAGES)
        self._restore = images
        if not self._path.is_file():
            raise StoreError(f"{folder} holds no stored episodes ({DATA} is missing)")
        self._offsets, end = _scan(self._path, _indexed(Path(folder) / INDEX))
        self.dropped_bytes = self._path.stat().st_size - end
        self.dropped = int(self.dropped_bytes > 0)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self.read(i).trajectory

    def read(self, i: int) -> Stored:
        """Record i with its columns and extras.

        Raises:
            IndexError: there is none. StoreError: it is damaged, or an image of it is missing.
        """
        offset = self._offsets[i]
        with self._path.open("rb") as file:
            file.seek(offset)
            length, crc = _RECORD.unpack(file.read(_RECORD.size))
            payload = file.read(length)
        if zlib.crc32(payload) != crc:
            raise StoreError(f"record {i} of {self._path} is damaged: its checksum does not match")
        try:
            record = unpack(payload)
            if self._restore:
                record.trajectory.messages = self.with_images(record.trajectory.messages)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error, zlib.error) as error:
            raise StoreError(f"record {i} of {self._path} cannot be read: {error}") from error
        return record

    def with_images(
        self, messages: Sequence[Mapping[str, Any]], without: Callable[[StoreError], None] | None = None
    ) -> list[dict[str, Any]]:
        """Messages as they are stored with their images in place.

        Raises StoreError for an image whose file is missing, damaged, or named as none of this store is; with
        `without`, which is told the error, the messages then have that image's name and size instead.
        """

        def load(name: Any) -> Image.Image | None:
            try:
                return self._images.load(name)
            except StoreError as error:
                if without is None:
                    raise
                without(error)
                return None

        return [restored(message, load) for message in messages]

    def records(self) -> Iterator[Stored]:
        """All records in order."""
        return (self.read(i) for i in range(len(self)))


def _indexed(path: Path) -> list[int]:
    """Offsets that the index names; a torn last entry is left out."""
    raw = path.read_bytes() if path.exists() else b""
    return [offset for (offset,) in _OFFSET.iter_unpack(raw[: len(raw) // _OFFSET.size * _OFFSET.size])]


def _scan(path: Path, indexed: Sequence[int]) -> tuple[list[int], int]:
    """Offsets of all whole records and the end of the last; the index is followed as far as it is right."""
    size = path.stat().st_size
    offsets: list[int] = []
    with path.open("rb") as file:
        start = file.read(_START.size)
        if len(start) < _START.size or _START.unpack(start) != (_MAGIC, _VERSION):
            raise StoreError(f"{path} is no file of stored episodes, or of another version")
        end = _START.size

        def whole(offset: int) -> int | None:
            """End of the record at `offset` if it is all there."""
            file.seek(offset)
            head = file.read(_RECORD.size)
            if len(head) < _RECORD.size:
                return None
            length = _RECORD.unpack(head)[0]
            stop = offset + _RECORD.size + length
            return stop if _HEAD.size <= length <= _LARGEST and stop <= size else None

        for offset in indexed:
            stop = whole(offset) if offset == end else None
            if stop is None:
                break
            offsets.append(offset)
            end = stop
        while (stop := whole(end)) is not None:
            offsets.append(end)
            end = stop
        while offsets and not _sound(file, offsets[-1]):  # a tail can be of full length and yet not written
            end = offsets.pop()
    return offsets, end


def _sound(file: Any, offset: int) -> bool:
    file.seek(offset)
    length, crc = _RECORD.unpack(file.read(_RECORD.size))
    return zlib.crc32(file.read(length)) == crc


# ---------------------------------------------------------------------------------------------- payload


def pack(
    trajectory: Trajectory, columns: Columns, extra: Mapping[str, Any], keep: Callable[[Any], str] | None = None
) -> bytes:
    """An episode as the payload of a record. `keep` keeps an image and says its name; without it sizes remain."""
    segments = trajectory.ledger.segments if trajectory.ledger is not None else []
    skipped = ("ledger", "turns", "verdict", "sampler")
    head = {f.name: getattr(trajectory, f.name) for f in fields(Trajectory) if f.name not in skipped}
    if keep is not None:
        head["messages"] = [stored(message, keep) for message in trajectory.messages]
    head |= {
        "turns": [asdict(turn) for turn in trajectory.turns],
        "verdict": None if trajectory.verdict is None else _verdict(trajectory.verdict),
        "sampler": asdict(trajectory.sampler),
        "segments": None if trajectory.ledger is None else [_outline(s) for s in segments],
        "columns": sorted(columns),
        "extra": dict(extra),
    }
    text = json.dumps(head, default=_plain, separators=(",", ":")).encode()
    packed = zlib.compress(text, 6)
    arrays = [array for segment in segments for array in _arrays(segment)]
    for name in sorted(columns):
        if len(columns[name]) != len(segments):
            raise ValueError(f"column {name} has {len(columns[name])} segments, the episode {len(segments)}")
        for segment, values in zip(segments, columns[name], strict=True):
            if len(values) != len(segment):
                raise ValueError(f"column {name} has {len(values)} entries for a segment of {len(segment)}")
            with np.errstate(over="ignore"):
                arrays.append(np.asarray(values, dtype="<f2").tobytes())
    return b"".join([_HEAD.pack(len(packed), len(text)), packed, *arrays])


def unpack(payload: bytes) -> Stored:
    """Inverse of `pack`, up to the precision of its arrays."""
    n, size = _HEAD.unpack_from(payload)
    if size > _LARGEST:
        raise ValueError("its head is too large to be true")
    head = json.loads(zlib.decompressobj().decompress(payload[_HEAD.size : _HEAD.size + n], size))
    at = _HEAD.size + n
    segments = None
    if head["segments"] is not None:
        segments = []
        for outline in head["segments"]:
            segment, at = _segment(outline, payload, at)
            segments.append(segment)
    columns: dict[str, list[np.ndarray]] = {}
    for name in head["columns"]:
        columns[name] = []
        for segment in segments or []:
            columns[name].append(np.frombuffer(payload, "<f2", len(segment), at))
            at += 2 * len(segment)
    extra = head.pop("extra")
    del head["columns"], head["segments"]
    head["turns"] = [TurnInfo(**{**t, "calls": tuple(t["calls"]), "errors": tuple(t["errors"])}) for t in head["turns"]]
    head["verdict"] = None if head["verdict"] is None else Verdict(**head["verdict"])
    head["sampler"] = SampleParams(**head["sampler"])
    ledger = None if segments is None else Ledger(segments)
    return Stored(Trajectory(ledger=ledger, **head), columns, extra)


def _outline(segment: Segment) -> dict[str, Any]:
    """What of a segment goes into the JSON head: its length, and turns and versions as runs."""
    return {
        "parent": segment.parent,
        "length": len(segment),
        "wide": max(segment.ids, default=0) >= 1 << 16,
        "turn": _runs(segment.turn),
        "version": _runs(segment.version),
        "spans": [asdict(span) for span in segment.spans],
    }


def _arrays(segment: Segment) -> list[bytes]:
    mask = np.array(segment.mask, dtype=bool)
    ids = np.array(segment.ids, dtype="<u4" if max(segment.ids, default=0) >= 1 << 16 else "<u2")
    logp = np.array(segment.logp, dtype="<f4")[mask]
    return [ids.tobytes(), np.packbits(mask).tobytes(), logp.tobytes()]


def _segment(outline: Mapping[str, Any], payload: bytes, at: int) -> tuple[Segment, int]:
    n, kind = outline["length"], "<u4" if outline["wide"] else "<u2"
    ids = np.frombuffer(payload, kind, n, at)
    at += ids.nbytes
    bits = np.frombuffer(payload, np.uint8, math.ceil(n / 8), at)
    mask = np.unpackbits(bits, count=n)
    at += bits.nbytes
    sampled = np.frombuffer(payload, "<f4", int(mask.sum()), at)
    logp = np.zeros(n)
    logp[mask == 1] = sampled
    segment = Segment(
        parent=outline["parent"], ids=ids.tolist(), mask=mask.tolist(), logp=logp.tolist(),
        version=_unrun(outline["version"], n), turn=_unrun(outline["turn"], n),
        spans=[Span(**span) for span in outline["spans"]],
    )  # fmt: skip
    return segment, at + sampled.nbytes


def _runs(values: Sequence[int]) -> list[tuple[int, int]]:
    """(value, how often in a row)."""
    return [(value, len(list(run))) for value, run in groupby(values)]


def _unrun(runs: Sequence[Sequence[int]], n: int) -> list[int]:
    total = sum(count for _, count in runs)
    if total != n or any(count < 0 for _, count in runs):
        raise ValueError(f"runs of {total} entries for {n} tokens")
    return [value for value, count in runs for _ in range(count)]


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "reward": verdict.reward, "scores": dict(verdict.scores), "facts": dict(verdict.facts),
        "failure": verdict.failure,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """What JSON does not know: numbers of numpy as numbers, pictures by size, all else by name."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if hasattr(value, "size") and hasattr(value, "mode"):
        return {"width": value.size[0], "height": value.size[1]}
    return f"<{type(value).__name__}>"
