"""One episode as training and evaluation see it: tokens, turns, verdict, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agents.engines.base import SampleParams
from agents.ledger import Ledger

if TYPE_CHECKING:
    from envs import Verdict


@dataclass(frozen=True)
class TurnInfo:
    """One policy turn and what the environment said of it."""

    text: str
    """The turn's text, decoded from the sampled ids (without the stop token)."""
    reward: float = 0.0
    """The environment's reward for this step."""
    calls: tuple[str, ...] = ()
    """Names of the tools that were called, in order; an unreadable call counts under the name `?`."""
    errors: tuple[str, ...] = ()
    """Error kinds of those calls that failed."""
    stop: str = "stop"
    """Why the sampler ended the turn: `stop`, `length` or `context`; `text` where no tokens are known."""


@dataclass
class Trajectory:
    """An episode, finished unless it says otherwise. `ledger` is None for text speakers (endpoints, scripts)."""

    task_id: str
    """Stable name of the task; empty if the environment failed before it named one."""
    task_index: int
    """Index of the task within its split."""
    split: str
    """`train` or `eval`, as the environment names its splits."""
    level: int
    """Difficulty level of the task."""
    group: int
    """Trajectories with one group id share a start state."""
    member: int
    """Number within the group."""
    seat: int = 0
    """Seat of a multi-agent environment; 0 where there is one agent."""
    seed: int = 0
    """Run seed from which the episode's streams derive."""
    ledger: Ledger | None = None
    """Token record."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The conversation, assistant turns included."""
    turns: list[TurnInfo] = field(default_factory=list)
    """Policy turns."""
    verdict: Verdict | None = None
    """What the verifier said; None only where the environment itself failed."""
    reward: float = 0.0
    """The verdict's reward; the lowest known one where there is no verdict."""
    stop_reason: str = ""
    """Why the episode ended."""
    version: int = 0
    """Policy version at the start of the episode."""
    sampler: SampleParams = field(default_factory=SampleParams)
    """How its tokens were drawn."""
    parent: int | None = None
    """Group member that this episode was edited or resumed from; None for a fresh one."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the rollout itself measured: `env_failed`, `privileged`, ..."""
    first_call: int | None = None
    """Sampled tokens before the one that begins the first tool call; None where there is no call."""
    unfinished: bool = False
    """Cut off by its token budget, to be gone on with: no verdict yet."""

    @property
    def length(self) -> int:
        """Sampled tokens."""
        return self.ledger.sampled if self.ledger is not None else 0

    @property
    def cut(self) -> bool:
        """Whether the episode was cut for want of tokens rather than ended by the policy or the environment."""
        if self.unfinished:
            return False
        last = self.turns[-1].stop if self.turns else ""
        return self.stop_reason in ("length", "context") or last in ("length", "context")
