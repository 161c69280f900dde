"""A rollout that is played while the learner learns, and handed over when the next iteration begins.

It is always played with the weights that it was sent with, and chosen by ids: what comes of it does not depend on
the clock. A checkpoint waits for it and holds its episodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from agents import store
from agents.carried import Unfinished, apart
from agents.cli import UsageError
from agents.config import AheadConfig, TrainConfig
from agents.dist import World
from agents.engines.base import EngineFailure, Key
from agents.engines.reference import plain_log_probs
from agents.episode import key_of
from agents.player_process import Order, PlayerProcess
from agents.rollout import Kept, OnProgress, Progress
from agents.sync import COARSE, Verifier, probe_ids
from agents.trajectory import Trajectory
from policy_opt.credits import MIS, TIS, Level
from policy_opt.errors import RecipeError
from policy_opt.protocols import Job
from policy_opt.recipe import Recipe

if TYPE_CHECKING:
    from agents.actor import Player

_POLL_S = 0.1
_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}  # of log-probs between two processes on one model
Share = Future[tuple[list[Trajectory], Kept]]
"""What one process plays of a rollout, and the unfinished episodes whose environments it holds."""


class Place(Protocol):
    """Where episodes are played ahead, with weights that the learner does not touch."""

    gap: float
    """Largest difference of log-probs between the weights that were sent last and those that it played with."""
    shared: bool
    """Whether it plays on the player's own engine, which is then taken until it is done."""

    def open(self) -> None:
        """Get ready, without waiting for it."""

    def deliver(self, player: Player) -> None:
        """Give it the policy's weights. Every process calls it at the same time. Raises EngineFailure."""

    def play(self, player: Player, jobs: Sequence[Job], tell: OnProgress) -> Share:
        """Begin to play; the result holds the environments, by name, of episodes that are left unfinished here."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""


class InThread:
    """In a thread of this process: for an engine that has weights of its own and computes elsewhere."""

    shared = True

    def __init__(self) -> None:
        self.gap = 0.0
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def open(self) -> None:
        """The engine is there already."""

    def deliver(self, player: Player) -> None:
        """Through the engine's own weight sync."""
        player.follow()
        self.gap = player.sync.gap if player.sync is not None else 0.0

    def play(self, player: Player, jobs: Sequence[Job], tell: OnProgress) -> Share:
        """On the player's own engine, which nothing else may use until it is done."""
        kept = player.carried.take(jobs, player.pool, player.limits)
        for episode in kept.values():  # what they are so far is being learned from
            episode.result = apart(episode.result)
        version = player.version()
        return self._threads.submit(lambda: (player.perform(jobs, kept, version, on_progress=tell), kept))

    def close(self) -> None:
        """The thread ends with what it plays."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class InProcess:
    """In a process of its own, with a copy of the model: Python steps environments there while it learns here.

    Args:
        start: starts the process.
        model: whose weights it plays with.
        probe: ids whose log-probs there must be those here, by `limit`, whenever weights are sent.
    """

    shared = False

    def __init__(self, start: Callable[[], PlayerProcess], model: Any, probe: Sequence[int], limit: float) -> None:
        self.start, self.model, self.probe, self.verifier = start, model, list(probe), Verifier(limit)
        self.gap = 0.0
        self.process: PlayerProcess | None = None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def open(self) -> None:
        """Start the process; it builds its model while this one goes on."""
        if self.process is None:
            self.process = self.start()

    @torch.no_grad()
    def deliver(self, player: Player) -> None:
        """Write the shared file, and note what the probe must give."""
        self.open()
        assert self.process is not None
        self.process.write()
        with player.world.autocast():
            self.ours = plain_log_probs(self.model, self.probe).double().cpu()

    def play(self, player: Player, jobs: Sequence[Job], tell: OnProgress) -> Share:
        """Over there; unfinished episodes stay there, too. What came of other weights is not handed over."""
        process, ours = self.process, self.ours
        assert process is not None
        resumed = [key_of(job) for job in jobs if job.resume]
        waiting: dict[Key, Unfinished] = {key: player.carried.waiting[key] for key in resumed}
        order = Order(player.version(), self.probe, jobs, waiting, frozenset(player.carried.waiting))
        player.carried.release(resumed, player.pool)

        def run() -> tuple[list[Trajectory], Kept]:
            found = process.play(order, tell)
            theirs = torch.tensor(found.log_probs, dtype=torch.float64)
            gap, wrong = self.verifier.check(ours, theirs.view(-1, len(ours)))
            if wrong:
                raise EngineFailure(f"weights that were sent ahead, version {order.version}: {wrong}")
            self.gap = max(gap, found.engine_gap)
            return found.trajectories, {}

        return self._threads.submit(run)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


@dataclass
class Flight:
    """A rollout that was sent: under way, or waiting to be collected."""

    jobs: list[Job]
    homes: Sequence[int | None]
    """The rank that plays each job; None: nobody holds its environment."""
    share: Share | None = None
    """What this process plays of it; None: it came out of a checkpoint."""
    played: list[Trajectory] | None = None
    """All of it, once it is there."""
    kept: Kept = field(default_factory=dict)
    """Environments of unfinished episodes that this process holds."""
    gap: float = 0.0
    """Largest difference of log-probs that was found between the weights that played it and those sent."""


class Ahead:
    """The rollout ahead of an actor. All processes make the same calls.

    Attributes:
        waited: seconds that the last `collect` had to wait.
    """

    def __init__(self, player: Player, place: Place) -> None:
        self.player, self.place = player, place
        self.flight: Flight | None = None
        self.waited = 0.0
        self._progress: Progress | None = None

    def open(self) -> None:
        """Get ready, without waiting for it."""
        self.place.open()

    def send(self, jobs: Sequence[Job]) -> None:
        """Begin to play with the weights as they are now. Raises EngineFailure."""
        if self.flight is not None:
            raise RuntimeError("a rollout is under way already; collect it first")
        player = self.player
        self.place.deliver(player)
        homes = player.carried.homes(jobs, player.world.size)
        mine = [job for job, home in zip(jobs, homes, strict=True) if home == player.world.rank]
        self._progress = None
        share = self.place.play(player, mine, self._tell)
        self.flight = Flight(list(jobs), homes, share)

    def settle(self, on_progress: OnProgress | None = None) -> None:
        """Wait until what was sent has been played, by all processes.

        Raises EngineFailure, on every process, where one of them failed.
        """
        flight = self.flight
        if flight is None or flight.played is not None:
            return
        assert flight.share is not None
        mine: list[Trajectory] = []
        problem: EngineFailure | None = None
        try:
            mine, flight.kept = self._wait(flight.share, len(flight.jobs), on_progress)
        except EngineFailure as error:
            problem = error
        found = self.player.world.gather((mine, self.place.gap, str(problem or "")))
        problems = [text for _, _, text in found if text]
        if problems:
            raise EngineFailure(str(problem or problems[0]), everywhere=True) from problem
        flight.gap = max(gap for _, gap, _ in found)
        shares = [iter(share) for share, _, _ in found]
        flight.played = [next(shares[home]) for home in flight.homes if home is not None]

    def collect(self, on_progress: OnProgress | None = None) -> tuple[list[Trajectory], float]:
        """The trajectories of what was sent, in the order of the jobs, and the gap of the weights that played it."""
        began = time.monotonic()
        self.settle(on_progress)
        self.waited = time.monotonic() - began
        flight, self.flight = self.flight, None
        assert flight is not None and flight.played is not None
        self.player.carried.put(flight.jobs, flight.played, flight.homes, flight.kept, {})
        return flight.played, flight.gap

    def free(self) -> None:
        """Wait until the player's own engine may be used."""
        if self.place.shared:
            self.settle()

    def close(self) -> None:
        """Give up what is under way."""
        self.place.close()

    def _tell(self, progress: Progress) -> None:
        self._progress = progress

    def _wait(self, share: Share, jobs: int, on_progress: OnProgress | None) -> tuple[list[Trajectory], Kept]:
        """The result of this process' share; signals are noticed while it waits."""
        told = None
        while not wait([share], _POLL_S).done:
            if on_progress is not None and self._progress is not told and self._progress is not None:
                told = self._progress
                on_progress(replace(told, done=round(told.done * jobs / max(told.total, 1)), total=jobs))
        try:
            return share.result()
        except EngineFailure:
            raise
        except Exception as error:
            raise EngineFailure(f"the rollout ahead failed: {type(error).__name__}: {error}") from error

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any] | None:
        """What was sent and has been played, as tensors and plain values; `settle` first."""
        flight = self.flight
        if flight is None:
            return None
        assert flight.played is not None, "settle before a checkpoint"
        return {
            "jobs": [[job.task_index, job.group, job.member, job.split, job.resume] for job in flight.jobs],
            "gap": flight.gap,
            "played": [_packed(t) for t in flight.played],
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Inverse of `state_dict`; nobody holds an environment then."""
        if state is None:
            self.flight = None
            return
        jobs = [Job(task, group, member, split, resume=resume) for task, group, member, split, resume in state["jobs"]]
        played = [_unpacked(entry) for entry in state["played"]]
        self.flight = Flight(jobs, [None] * len(jobs), played=played, gap=state["gap"])


def _packed(t: Trajectory) -> dict[str, Any]:
    """An episode as it is stored, with its log-probs in full."""
    assert t.ledger is not None
    payload = bytearray(store.pack(t, {}, {}))
    logps = [torch.tensor(s.logp, dtype=torch.float64) for s in t.ledger.segments]
    return {"episode": torch.frombuffer(payload, dtype=torch.uint8), "logp": logps}


def _unpacked(state: Mapping[str, Any]) -> Trajectory:
    found = store.unpack(state["episode"].numpy().tobytes()).trajectory
    assert found.ledger is not None
    for segment, logp_T in zip(found.ledger.segments, state["logp"], strict=True):
        segment.logp = logp_T.tolist()
    return found


# ---------------------------------------------------------------------- what a configuration asks for


def build(config: TrainConfig, world: World, player: Player, model: Any) -> Ahead:
    """Where episodes are played ahead: by an engine with weights of its own in a thread, else in a process.

    Raises UsageError where options do not go together.
    """
    if player.sync is not None:
        return Ahead(player, InThread())
    if world.sharding is not None:
        raise UsageError(
            "--ahead.on with FSDP: the engine hf plays with the weights of one process, and no process holds all. "
            "Take --engine vllm, or leave out --ahead.on"
        )
    probe = probe_ids(model.get_output_embeddings().weight.shape[0], player.limits.max_context)
    limit = _LIMITS.get(model.dtype, COARSE) if world.precision is None else COARSE
    return Ahead(player, InProcess(lambda: PlayerProcess(config, world, model), model, probe, limit))


def corrected(recipe: Recipe, config: AheadConfig) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with importance weights for a sampler that is an iteration behind, and notes on what was chosen.

    Raises RecipeError where its loss cannot be weighted.
    """
    if not config.on:
        return recipe, ()
    if recipe.phases:
        found = [corrected(phase.recipe, config) for phase in recipe.phases]
        phases = tuple(replace(p, recipe=r) for p, (r, _) in zip(recipe.phases, found, strict=True))
        return recipe.replace(phases=phases), tuple(dict.fromkeys(note for _, notes in found for note in notes))
    own = [part for part in recipe.credit if isinstance(part, (TIS, MIS))]
    if own:
        return recipe, (f"rollouts one iteration ahead: {recipe.slug} has importance weights of its own, {own[0]}",)
    if config.correction == "none":
        return recipe, ("rollouts one iteration ahead: nothing corrects for it (--ahead.correction none)",)
    terms = [term for term in recipe.terms if term.on and "w" in term.weights]
    if not terms or any(term.loss.gives == "" for term in terms):
        raise RecipeError(
            f"{recipe.slug}: its loss takes no importance weights, so nothing can correct for rollouts that are an "
            f"iteration behind; leave out --ahead.on, or give --ahead.correction none if it needs no correction"
        )
    level: Level = "token" if all(term.loss.gives == "BT" for term in terms) else "sequence"
    part = TIS(config.cap, level) if config.correction == "tis" else MIS(1 / config.cap, config.cap, level)
    weighted = recipe.replace(credit=(*recipe.credit, part))
    weighted.check()
    return weighted, (f"rollouts one iteration ahead: importance weights {part}",)
