"""A process with a policy of its own, which plays while this one learns.

It is built from the run's configuration alone: same model, chat format and environments. Weights travel through a
file that both processes map, which is written only while the other one is idle; orders and episodes travel over a
socket, pickled, between processes of one run only. It ends with the process that started it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agents.carried import Unfinished
from agents.config import AheadConfig, TrainConfig
from agents.dist import World
from agents.engines.base import EngineFailure, Key
from agents.engines.reference import log_prob_gap, plain_log_probs
from agents.rollout import OnProgress, Progress
from agents.trajectory import Trajectory
from policy_opt.protocols import Job

if TYPE_CHECKING:
    from agents.session import Session

_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")
"""Beginnings of the variables that make a process one of a launcher's group."""
_ALIGN = 64  # bytes
_LAST_WORDS = 2000  # characters of what it wrote that go into a message
_TICK_S = 1.0


class SharedWeights:
    """A model's tensors in a file that two processes map, in the order of their names.

    Args:
        model: whose parameters and buffers, tied ones once.
        path: None makes the file.
    """

    def __init__(self, model: Any, path: str | None = None) -> None:
        self.model = model
        sizes = {name: -(-t.numel() * t.element_size() // _ALIGN) * _ALIGN for name, t in tensors_of(model)}
        total = max(sum(sizes.values()), _ALIGN)
        self.path = path or _new_file(total)
        flat = torch.from_file(self.path, shared=True, size=total, dtype=torch.uint8)
        self.shelf: dict[str, Tensor] = {}
        for (name, t), part in zip(tensors_of(model), flat.split(list(sizes.values())), strict=True):
            self.shelf[name] = part[: t.numel() * t.element_size()].view(t.dtype).view(t.shape)
        self.whole = False

    @torch.no_grad()
    def write(self) -> bool:
        """Put the model's present weights there; after the first time only those that are trained. Whether all."""
        whole = not self.whole
        for name, t in tensors_of(self.model):
            if whole or t.requires_grad:
                self.shelf[name].copy_(t)
        self.whole = True
        return whole

    @torch.no_grad()
    def read(self, whole: bool) -> None:
        """Take the weights over into the model."""
        for name, t in tensors_of(self.model):
            if whole or t.requires_grad:
                t.copy_(self.shelf[name])


def tensors_of(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that a checkpoint would hold, each once, by name."""
    saved, seen = model.state_dict(keep_vars=True), set[int]()
    for name, tensor in saved.items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _new_file(size: int) -> str:
    handle, path = tempfile.mkstemp(prefix="palaestra-weights-")
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)  # a full disk is an error here, not a crash at the first write
        else:
            os.truncate(handle, size)
    finally:
        os.close(handle)
    return path


@dataclass(frozen=True)
class Order:
    """What to play, with the weights that stand in the shared file."""

    version: int
    """Of these weights."""
    probe: Sequence[int]
    """Ids whose log-probs show which weights arrived."""
    jobs: Sequence[Job]
    waiting: Mapping[Key, Unfinished]
    """Records of the unfinished episodes that jobs go on with."""
    alive: frozenset[Key]
    """Names of all episodes that may still be gone on with; environments of others are let go."""
    whole: bool = True
    """Read all weights, or only those that are trained."""


@dataclass(frozen=True)
class Played:
    """What came of an order."""

    trajectories: list[Trajectory]
    """In the order of the jobs."""
    log_probs: list[float]
    """Of the probe, by the plain forward of the model that played; all ids but the first."""
    engine_gap: float
    """Largest difference between its engine's log-probs and those of its model's plain forward."""


@dataclass(frozen=True)
class Failed:
    """It could not be played."""

    why: str


class PlayerProcess:
    """The process that plays, as the run sees it.

    Raises:
        EngineFailure: the process is lost, or what it was asked to do failed.
    """

    def __init__(self, config: TrainConfig, world: World, model: Any) -> None:
        self._whole = True
        rows = -(-config.rollout.rows // world.size)
        own = replace(
            config, ahead=AheadConfig(), processes=1, workers=-(-config.workers // world.size),
            threads=torch.get_num_threads(), rollout=replace(config.rollout, rows=rows),
        )  # fmt: skip
        self.weights = SharedWeights(model)
        self._said = tempfile.TemporaryFile(mode="w+b")
        ours, theirs = socket.socketpair()
        home = str(Path(__file__).resolve().parents[1])
        paths = {"PYTHONPATH": os.pathsep.join([home, *(p for p in sys.path if p)])}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from agents.player_process import serve; serve()",
                 str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._said, stderr=subprocess.STDOUT,
                env={k: v for k, v in os.environ.items() if not k.startswith(_GROUP)} | paths,
                start_new_session=True,  # a Ctrl-C is for the run, which ends it
            )  # fmt: skip
        self._link = Connection(ours.detach())
        self._send((own, str(world.device), self.weights.path))

    def write(self) -> None:
        """Put the model's weights, as they are now, where the next order finds them. It must be idle."""
        self._whole = self.weights.write()

    def play(self, order: Order, on_progress: OnProgress | None = None) -> Played:
        """Play with the weights that were written last; waits for it."""
        self._send(replace(order, whole=self._whole))
        while True:
            try:
                answer = self._link.recv()
            except (EOFError, OSError) as error:
                raise EngineFailure(self._lost()) from error
            if isinstance(answer, Failed):
                raise EngineFailure(f"the process that plays ahead: {answer.why}")
            if isinstance(answer, Played):
                return answer
            if on_progress is not None:
                on_progress(answer)

    def close(self) -> None:
        """End it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._link.close()
        with suppress(FileNotFoundError):
            os.unlink(self.weights.path)
        self._said.close()

    def _send(self, message: Any) -> None:
        try:
            self._link.send(message)
        except OSError as error:
            raise EngineFailure(self._lost()) from error

    def _lost(self) -> str:
        """What became of it."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "the process that plays ahead no longer answers"
        end = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        self._said.seek(0)
        words = self._said.read().decode(errors="replace").strip()[-_LAST_WORDS:]
        return f"the process that plays ahead was ended {end}" + (f"; it last said: {words}" if words else "")


# ---------------------------------------------------------------------- the other side


class Stage:
    """The process' own side: a session of which only the player is used."""

    def __init__(self, session: Session, path: str, tell: Callable[[Progress], None]) -> None:
        self.session, self.player, self.tell = session, session.player, tell
        self.weights = SharedWeights(session.model, path)
        os.unlink(path)  # both have it mapped; nothing is left behind, however they end

    @torch.no_grad()
    def play(self, order: Order) -> Played:
        """Take over the weights, see what they are, play."""
        player, model = self.player, self.session.model
        self.weights.read(order.whole)
        self.session.learner.version = order.version
        player.engine.reset()
        with player.world.autocast():
            log_probs = plain_log_probs(model, order.probe).double().tolist()
            gap = log_prob_gap(player.engine)
        player.carried.waiting = dict(order.waiting)
        gone = [key for key in player.carried.live if key not in order.alive]
        player.carried.release(gone, player.pool)
        return Played(player(order.jobs, on_progress=self.tell), log_probs, gap)


def serve() -> None:
    """The process: arguments are the number of its socket and the process it works for."""
    handle, parent = map(int, sys.argv[1:3])
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    link = Connection(handle)
    from agents.session import build

    config, device, path = link.recv()
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))
    session = build(config, World.start(config.dtype == "bfloat16"))
    stage = Stage(session, path, link.send)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the run is over
        while True:
            order: Order = link.recv()
            try:
                answer: Played | Failed = stage.play(order)
            except Exception as error:
                answer = Failed(f"{type(error).__name__}: {error}")
            link.send(answer)


def _watch(parent: int) -> None:
    """End this process when the one that it works for has ended."""
    while os.getppid() == parent:
        time.sleep(_TICK_S)
    os.killpg(0, signal.SIGKILL)
