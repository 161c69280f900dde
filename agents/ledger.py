"""The token record of an episode: what the engine was fed and what it sampled, verbatim.

Model text is never tokenised again: sampled ids stand here exactly as they left the sampler, with the
sampler's log-probs. Environment text is tokenised once, alone, and recorded with mask 0. Where a chat
template rewrites history, a new segment begins that names its parent. The concatenation of a segment is the
row that is trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.pictures import Picture


@dataclass(frozen=True)
class Span:
    """A marked stretch of one segment: an image's expanded placeholder tokens, or privileged text."""

    kind: str
    """`image` (its `ref` names the picture) or `privileged` (hints, solutions, feedback; never in evaluation)."""
    start: int
    """First token, an index into the segment."""
    length: int
    """Number of tokens."""
    ref: Any = None
    """What the tokens stand for; for an image, the key of its picture (`Ledger.pictures`)."""


@dataclass
class Segment:
    """One append-only run of tokens. All lists have the same length T; entry t speaks of token t."""

    parent: int | None = None
    """Index of the segment that this one continues with rewritten history; None for the first."""
    ids: list[int] = field(default_factory=list)
    """Token ids, as the engine was fed."""
    mask: list[int] = field(default_factory=list)
    """1 where the policy sampled the token (its stop token included), 0 elsewhere."""
    logp: list[float] = field(default_factory=list)
    """The sampler's log-prob in nats (full softmax at its temperature, banned ids removed); 0 where mask is 0."""
    version: list[int] = field(default_factory=list)
    """Policy version that sampled the token; -1 where mask is 0."""
    turn: list[int] = field(default_factory=list)
    """Index of the policy turn that the token belongs to; environment text carries the turn that it leads to."""
    spans: list[Span] = field(default_factory=list)
    """Images and privileged text."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sampled(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(self.mask)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading ids that two rows share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class LedgerError(ValueError):
    """A token record that would no longer say what the engine was fed."""


class Ledger:
    """Segments of one episode; only the last one grows.

    `observe` appends what the environment (or the chat format) wrote, `act` what the policy sampled, `branch`
    starts a segment whose history is rewritten.

    Attributes:
        pictures: those that spans refer to, by key.
    """

    def __init__(self, segments: Sequence[Segment] = (), pictures: Iterable[Picture] = ()) -> None:
        self.segments: list[Segment] = list(segments) or [Segment()]
        self.pictures: dict[int, Picture] = {picture.key: picture for picture in pictures}

    @property
    def turns(self) -> int:
        """Number of policy turns recorded so far over all segments."""
        return 1 + max((t for s in self.segments for t, m in zip(s.turn, s.mask, strict=True) if m), default=-1)

    @property
    def sampled(self) -> int:
        """Number of sampled tokens over all segments."""
        return sum(segment.sampled for segment in self.segments)

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments)

    def observe(
        self,
        ids: Sequence[int],
        turn: int,
        *,
        privileged: range = range(0),
        pictures: Sequence[tuple[int, Picture]] = (),
    ) -> None:
        """Append tokens that the policy did not sample.

        Args:
            turn: the policy turn that they lead to.
            privileged: which of them are privileged text.
            pictures: (first of its placeholders in `ids`, picture).
        """
        n, segment = len(ids), self.segments[-1]
        if privileged:
            segment.spans.append(Span("privileged", len(segment) + privileged.start, len(privileged)))
        for start, picture in pictures:
            segment.spans.append(Span("image", len(segment) + start, picture.length, picture.key))
            self.pictures[picture.key] = picture
        segment.ids.extend(ids)
        segment.mask.extend([0] * n)
        segment.logp.extend([0.0] * n)
        segment.version.extend([-1] * n)
        segment.turn.extend([turn] * n)

    def act(self, ids: Sequence[int], logps: Sequence[float], turn: int, version: int) -> None:
        """Append tokens exactly as sampled, the stop token included.

        Raises:
            LedgerError: ids and log-probs differ in number, or nothing was fed before the first sampled
                token.
        """
        n, segment = len(ids), self.segments[-1]
        if len(logps) != n:
            raise LedgerError(f"{n} sampled ids but {len(logps)} log-probs in turn {turn}")
        if n and not segment.ids:
            raise LedgerError("a segment cannot begin with sampled tokens: the policy must have been fed something")
        segment.ids.extend(ids)
        segment.mask.extend([1] * n)
        segment.logp.extend(logps)
        segment.version.extend([version] * n)
        segment.turn.extend([turn] * n)

    def branch(self, ids: Sequence[int], turn: int, *, pictures: Sequence[tuple[int, Picture]] = ()) -> None:
        """Start a segment with rewritten history `ids` (mask 0), continuing the last one."""
        self.segments.append(Segment(parent=len(self.segments) - 1))
        self.observe(ids, turn, pictures=pictures)

    def shown(self, segment: int = -1) -> list[Picture]:
        """The pictures of one segment, in the order of their placeholders."""
        return [self.pictures[span.ref] for span in self.segments[segment].spans if span.kind == "image"]

    def concat(self, segment: int = -1) -> list[int]:
        """The ids of one segment: what the engine holds for this row (plus a last turn it has not been fed yet)."""
        return list(self.segments[segment].ids)
