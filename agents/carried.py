"""Unfinished episodes between iterations: their token records on every process, their environments where they were
played.

A checkpoint holds the record and no environment: reading one must not be able to run code. After a resume the
environment is made again by giving it the same turns; if it does not answer with the same messages, the episode ends
as one whose environment failed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from agents.engines.base import Key, SampleParams
from agents.episode import EnvPool, Episode, Limits, key_of
from agents.ledger import Ledger, Segment, Span
from agents.pictures import Picture
from agents.rollout import Kept
from agents.trajectory import Trajectory, TurnInfo
from policy_opt.protocols import Job

_PLAIN = (
    "task_id", "task_index", "split", "level", "group", "member", "seat", "seed", "stop_reason", "version", "parent",
    "facts", "first_call", "unfinished",
)  # fmt: skip
_LISTS = {"ids": torch.long, "mask": torch.long, "logp": torch.float64, "version": torch.long, "turn": torch.long}


class ReplayError(RuntimeError):
    """An environment did not answer the same turns with the same messages."""


@dataclass
class Unfinished:
    """One episode that waits to be gone on with."""

    record: Trajectory
    """What has happened so far."""
    options: Mapping[str, Any]
    """Reset options of its environment."""
    home: int | None = None
    """Rank of the process that holds its environment; None: nobody does."""
    print: str | None = None
    """Fingerprint of its messages where `record` does not hold them."""
    age: int = 0
    """Iterations that began since it was cut off."""


class Carried:
    """The unfinished episodes of a run. All processes make the same calls but for `take`."""

    def __init__(self) -> None:
        self.waiting: dict[Key, Unfinished] = {}
        self.live: Kept = {}

    def homes(self, jobs: Sequence[Job], size: int) -> list[int]:
        """The rank that plays each job: who holds its environment, else every `size`-th, so that lengths mix."""
        found = []
        for i, job in enumerate(jobs):
            known = self.waiting.get(key_of(job)) if job.resume else None
            found.append(i % size if known is None or known.home is None else known.home)
        return found

    def take(self, jobs: Sequence[Job], pool: EnvPool, limits: Limits) -> Kept:
        """The episodes that these jobs go on with, out of the store; environments that nobody holds are made again."""
        kept: Kept = {}
        for key in (key_of(job) for job in jobs if job.resume):
            if key in self.live:
                kept[key] = self.live.pop(key)
            elif key in self.waiting:
                kept[key] = revived(self.waiting[key], pool.take(), limits)
        return kept

    def release(self, keys: Sequence[Key], pool: EnvPool) -> None:
        """Let go of the environments of these episodes, which go on elsewhere from their records."""
        for key in keys:
            if key in self.live:
                pool.give(self.live.pop(key).env, broken=False)

    def put(
        self,
        jobs: Sequence[Job],
        played: Sequence[Trajectory],
        homes: Sequence[int | None],
        kept: Kept,
        options: Mapping[str, Any],
    ) -> None:
        """Note how jobs ended; `kept` holds those cut off in this process."""
        for job, t, home in zip(jobs, played, homes, strict=True):
            before = self.waiting.pop(key_of(job), None) if job.resume else None
            if t.unfinished:
                self.waiting[key_of(job)] = Unfinished(t, before.options if before else dict(options), home)
        self.live |= kept

    def grow_old(self, pool: EnvPool) -> None:
        """A new iteration begins; what was not gone on with in the last one is dropped: its group was rejected."""
        for key, waiting in list(self.waiting.items()):
            waiting.age += 1
            if waiting.age > 1:
                del self.waiting[key]
                self.release([key], pool)

    def state_dict(self) -> list[dict[str, Any]]:
        """Records as tensors and plain values."""
        return [_packed(waiting) for _, waiting in sorted(self.waiting.items())]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Inverse of `state_dict`; nobody holds an environment then."""
        self.live = {}
        found = [_unpacked(entry) for entry in state]
        self.waiting = {(w.record.group, w.record.member): w for w in found}


def apart(record: Trajectory) -> Trajectory:
    """A record that can grow without the one that it was copied from."""
    copies: dict[str, Any] = {name: copy.copy(getattr(record, name)) for name in ("messages", "turns", "facts")}
    return replace(record, ledger=copy.deepcopy(record.ledger), **copies)


def revived(waiting: Unfinished, env: Any, limits: Limits) -> Episode:
    """An episode whose environment is given its turns once more."""
    record = waiting.record
    job = Job(record.task_index, record.group, record.member, record.split)
    episode = Episode(job, env, record.seed, limits)
    episode.reset(waiting.options)
    for turn in record.turns:
        if not episode.over:
            episode.say(turn.text, turn.stop)
    same = not episode.over and _print(episode.messages) == (waiting.print or _print(record.messages))
    record.messages, episode.result = episode.messages, record
    if not same:
        record.unfinished = False
        episode.fail(ReplayError(f"{record.task_id}: the environment did not repeat itself after a resume"))
    return episode


def _print(messages: Sequence[Mapping[str, Any]]) -> str:
    from envs import fingerprint

    return fingerprint(*messages)


def _packed(waiting: Unfinished) -> dict[str, Any]:
    record = waiting.record
    assert record.ledger is not None  # only a token engine cuts episodes off
    return {
        "record": {name: getattr(record, name) for name in _PLAIN},
        "sampler": asdict(record.sampler),
        "turns": [asdict(turn) for turn in record.turns],
        "segments": [
            {
                "parent": s.parent,
                "spans": [asdict(span) for span in s.spans],
                **{name: torch.tensor(getattr(s, name), dtype=kind) for name, kind in _LISTS.items()},
            }
            for s in record.ledger.segments
        ],
        "pictures": [picture.state_dict() for picture in record.ledger.pictures.values()],
        "options": dict(waiting.options),
        "print": waiting.print or _print(record.messages),
        "age": waiting.age,
    }


def _unpacked(state: Mapping[str, Any]) -> Unfinished:
    segments = [
        Segment(
            parent=entry["parent"],
            spans=[Span(**span) for span in entry["spans"]],
            **{name: entry[name].tolist() for name in _LISTS},
        )
        for entry in state["segments"]
    ]
    known = {f.name for f in fields(Trajectory)} & state["record"].keys()
    record = Trajectory(
        **{name: state["record"][name] for name in known},
        ledger=Ledger(segments, map(Picture.from_state, state.get("pictures", ()))),
        turns=[TurnInfo(**turn) for turn in state["turns"]],
        sampler=SampleParams(**state["sampler"]),
    )
    return Unfinished(record, state["options"], None, state["print"], state["age"])
