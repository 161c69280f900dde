"""The two sides that the loop talks to: the actor plays episodes, the learner holds the models.

`agents` implements both for language models; `policy_opt.table` implements both for a softmax table, as small
as can be, and is the place to look for what each call must do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from policy_opt.bank import ModelSpec, Optim
from policy_opt.batch import Batch
from policy_opt.need import Need


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn, as data for the actor."""

    temperature: float = 1.0
    """Softmax temperature, used by sampler and trainer alike."""
    hook: str | None = None
    """Name of a rule in `policy_opt.sampling.RULES` that sets every token's temperature; None: the plain one."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Numbers that the rule takes, e.g. statistics of the last batch. A part of the recipe updates them before
    every rollout (`Part.sampling`); empty (the first iteration): the plain temperature.

    Log-probs that the sampler records are those at the plain temperature, also under a hook: the trainer
    scores at it, and the importance ratio does not contain the rule.
    """


@dataclass(frozen=True)
class Edit:
    """Go back to a point of a finished episode, change something, play on."""

    parent: tuple[int, int]
    """(group, member) of the episode."""
    turn: int
    """The turn before which play goes on; 0 is a replacement of the whole episode."""
    text: str | None = None
    """What the policy is told or what its turn is replaced with; None: only play on."""
    kind: str = "continue"
    """continue | replace | repair | truncate: how `text` is used."""


@dataclass(frozen=True)
class Job:
    """One episode to play."""

    task_index: int
    """Index into the finite pool of tasks."""
    group: int
    """Group id, unique in the run; with `member` it seeds the episode's sampling."""
    member: int
    """Number inside the group."""
    split: str = "train"
    """Which tasks."""
    edit: Edit | None = None
    """Play on from an edited episode instead of from the start."""
    hint: str | None = None
    """Privileged text for the opening prompt; never in evaluation."""
    resume: bool = False
    """Go on with the unfinished episode of the same (group, member)."""
    budget: int | None = None
    """Tokens to sample now at most; the episode is then left unfinished, to be gone on with in a later call."""
    demo: bool = False
    """Return a demonstration of the task: its policy tokens are the demonstrator's."""
    rescore: bool = False
    """Verdict of the episode of the same (group, member) once more, nothing is sampled."""
    sampler: Sampler | None = None
    """None: the run's own."""


@dataclass(frozen=True)
class Ask:
    """A question to a judge."""

    kind: str
    text: str
    row: int = -1
    """The row of the batch it is about."""


@dataclass(frozen=True)
class JudgeFailure:
    """A judge that did not answer; never mistaken for an answer."""

    reason: str
    """timeout | unparsed | refused | error:<type>"""


class Actor(Protocol):
    """Plays episodes. Failures of an episode are rows with a stop reason, not exceptions.

    Two attributes are optional: `columns`, the facts that it delivers beside the standard columns, and
    `hooks`, the names of the sampler rules (`Sampler.hook`) that it serves; without it, none.
    """

    def play(self, jobs: Sequence[Job]) -> Batch:
        """One row per job (or per segment of it), in the order of the jobs.

        Columns besides the core and the units: reward_B (the verdict's), correct_B (0 or 1), length_B
        (generated tokens), truncated_B (0 or 1), scores_BK with names, and every numeric fact of the verdict
        as `<fact>_B`.
        """
        ...

    def judge(self, asks: Sequence[Ask]) -> Sequence[str | JudgeFailure]:
        """Answers in the order of the asks, each an answer or a typed failure."""
        ...

    def privileged(self, task_index: int, kind: str, level: int) -> str | None:
        """Hint, solution or feedback for a task; None where there is none."""
        ...


@runtime_checkable
class AheadActor(Protocol):
    """What an actor can do besides whose episodes are played while the learner learns.

    One attribute is optional: `gap`, the largest difference between log-probs under the weights that were sent and
    those that the sampler of the batch collected last worked with.
    """

    def send(self, jobs: Sequence[Job]) -> None:
        """Begin to play with the policy's weights as they are now, whatever they become; returns at once."""
        ...

    def collect(self) -> Batch:
        """The batch of the jobs sent last, as `play` gives it; waits until it is there."""
        ...


Pull = Callable[[Tensor, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""(rows_R, live streams [R, T], detached) -> cotangents [R, T]; a stream that is left out gets no gradient.
"""


@runtime_checkable
class Learner(Protocol):
    """Holds the policy and the bank."""

    version: int
    """Optimizer steps taken so far; the rollout records it per token."""

    @property
    def lr(self) -> float:
        """Learning rate that the next `step` uses for the policy."""
        ...

    def prepare(
        self, models: Mapping[str, ModelSpec], needs: Sequence[Need], optimizer: Optim | None
    ) -> None:
        """Build the bank's models that are not there yet; RecipeError for a need that cannot be served.

        Called before the first rollout of each phase. `optimizer` is the recipe's wish for the policy, None:
        yours.
        """
        ...

    def score(self, b: Batch, needs: Sequence[Need]) -> Mapping[str, Tensor]:
        """The needs by name, whole batch, no gradient: [B, T] (or a further axis), 0 outside need.where."""
        ...

    def backward(self, b: Batch, needs: Sequence[Need], pull: Pull) -> Mapping[str, Tensor]:
        """Accumulate the gradient of sum(cotangent * stream) over all rows; return all streams, detached.

        For each micro-batch of whole rows: forward with gradient, cotangents = pull(rows, streams.detach()),
        then sum(cotangent * stream).backward(). pull is pure: a learner may first ask it about guessed
        streams, to find rows without gradient. Every row's gradient counts once over all processes;
        gradients are summed over processes, never averaged. The streams returned are [B, T], the same on
        every process.
        """
        ...

    def step(self, lr_scale: float = 1.0) -> Mapping[str, float]:
        """Clip, step every optimizer, clear the gradients, version += 1; returns at least `grad_norm`."""
        ...

    def sync(self, name: str, decay: float = 0.0) -> None:
        """Bank model `name` <- decay * itself + (1 - decay) * policy."""
        ...
