"""The environment workers of a process: where each environment lives, and what became of them."""

from __future__ import annotations

import itertools
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agents.cli import UsageError
from agents.workers.errors import EnvError, WorkerBroken, WorkersBroken
from agents.workers.local import Process
from agents.workers.proxy import Facts, RemoteEnv
from agents.workers.supervisor import Connection, Supervisor
from agents.workers.wire import encode

if TYPE_CHECKING:
    from agents.config import WorkerConfig

_GRACE_S = 5.0
"""Seconds that workers have to close their environments at the end."""


class WorkerPool:
    """Makes environments that live in workers: call it for one. The workers end with it.

    Args:
        spec: of the environments, for messages.
        connections: the workers; environments are spread over them.
        timeout_s: seconds that a step or reset may take.

    Raises:
        UsageError: no environment can be made. WorkersBroken: the workers keep ending.
    """

    def __init__(self, spec: str, connections: Sequence[Connection], timeout_s: float) -> None:
        self.spec = spec
        self._workers = [Supervisor(connection, timeout_s) for connection in connections]
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._told: Counter[str] = Counter()
        self.close = weakref.finalize(self, _close, list(connections), os.getpid())
        try:
            self._facts = Facts.read(self._workers[0].facts())
        except EnvError as error:
            self.close()
            raise UsageError(f"{spec}: {error}") from error
        except WorkerBroken as error:
            self.close()
            raise WorkersBroken(f"{spec}: {error}") from error

    def __len__(self) -> int:
        """How many workers there are."""
        return len(self._workers)

    def __call__(self) -> RemoteEnv:
        """One more environment."""
        return RemoteEnv(self, self._facts, next(self._numbers))

    def place(self) -> Supervisor:
        """The worker with the fewest environments. WorkersBroken where none can be started any more."""
        with self._lock:
            sound = [worker for worker in self._workers if worker.broken is None]
        if not sound:
            raise WorkersBroken(f"{self.spec}: no environment worker is left: {self._workers[0].broken}")
        return min(sound, key=lambda worker: worker.load)

    @property
    def losses(self) -> Counter[str]:
        """How often workers were lost, by cause."""
        return sum((worker.losses for worker in self._workers), Counter())

    def news(self) -> list[str]:
        """What became of the workers since this was last asked, in words."""
        now = self.losses
        now["cannot be started"] = sum(worker.broken is not None for worker in self._workers)
        new, self._told = now - self._told, now
        if not new:
            return []
        return [f"environment workers lost: {', '.join(f'{n} x {cause}' for cause, n in sorted(new.items()))}"]


def _close(connections: Sequence[Connection], owner: int) -> None:
    """End all workers, side by side. A process forked from the owner leaves them alone."""
    if os.getpid() != owner:
        return
    for connection in connections:
        connection.hang_up()
    until = time.monotonic() + _GRACE_S
    for connection in connections:
        connection.close(max(0.0, until - time.monotonic()))


def start_workers(spec: str, arguments: Mapping[str, Any], count: int, config: WorkerConfig) -> WorkerPool:
    """Workers of a run, each ready to make environments of a spec.

    Raises:
        UsageError: there is no such environment, or it cannot live in a worker, or there is no Ray cluster.
        WorkersBroken: the workers keep ending.
    """
    try:
        encode(dict(arguments))
    except TypeError as error:
        raise UsageError(f"{spec}: arguments that cannot be sent to a worker: {error}") from error
    if config.ray is not None:
        from agents.workers.actors import actors

        return WorkerPool(spec, actors(spec, arguments, count, config), config.timeout_s)
    return WorkerPool(
        spec, [Process(spec, arguments, config.memory_gib) for _ in range(count)], config.timeout_s
    )
