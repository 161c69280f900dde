"""Workers as actors of a Ray cluster: the same `Host`, placed, restarted and given memory by Ray (extra `ray`).

Every node needs the environment installed as this machine has it: only its spec travels. Between nodes Ray's own
protocol runs, which trusts every node of the cluster.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from agents.cli import UsageError
from agents.workers.errors import WorkerDied, WorkerTimeout, raised
from agents.workers.process import guard, limit

if TYPE_CHECKING:
    from agents.config import WorkerConfig

_RETRY_S = 0.2
_KNOCK_S = 10.0


class Serving:
    """What runs in an actor. The host is made on demand: an actor whose constructor raises is not restarted."""

    def __init__(self, spec: str, arguments: Mapping[str, Any], ceiling: int) -> None:
        guard(ceiling)
        self._made_of, self._ceiling = (spec, dict(arguments)), ceiling
        self._host: Any = None

    def facts(self) -> tuple[Any, list[str] | None]:
        """Facts of its environments, or why there are none."""
        from agents.workers.host import Host

        try:
            if self._host is None:
                limit(self._ceiling)
                self._host = Host(*self._made_of)
            return self._host.facts(), None
        except (Exception, SystemExit) as error:
            return None, [type(error).__name__, str(error)[:2000]]

    def handle(self, request: bytes) -> bytes:
        """The reply to a request."""
        return self._host.handle(request)

    def close(self) -> None:
        """Close all environments."""
        if self._host is not None:
            self._host.close()


class Actor:
    """One actor; Ray starts it again, on another node if need be, whenever it ends."""

    def __init__(self, spec: str, arguments: Mapping[str, Any], config: WorkerConfig) -> None:
        self._ray = _ray()
        self._gib = config.memory_gib
        self._last = ""
        self._closing: Any = None
        memory = int(config.memory_gib * 2**30)
        options = {"num_cpus": 1, "memory": memory, "max_restarts": -1, "scheduling_strategy": "SPREAD"}
        self._actor = self._ray.remote(Serving).options(**options).remote(spec, dict(arguments), memory)

    def start(self, timeout_s: float) -> dict[str, Any]:
        """Wait until it serves. EnvError where no environment can be made, WorkerError where it does not come up."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                facts, why = self._ask(self._actor.facts.remote(), until - time.monotonic())
                break
            except WorkerDied:  # between two lives an actor refuses calls
                if time.monotonic() + _RETRY_S > until:
                    raise
                time.sleep(_RETRY_S)
        if why is not None:
            raise raised(*why)
        return facts

    @property
    def alive(self) -> bool:
        """Ray knows; calls to an actor that has ended fail at once."""
        return True

    def call(self, request: bytes, timeout_s: float) -> bytes:
        """Send a request and wait for the reply."""
        return self._ask(self._actor.handle.remote(request), timeout_s)

    def _ask(self, promise: Any, timeout_s: float) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(promise, timeout=max(0.0, timeout_s))
        except errors.GetTimeoutError:
            self._ray.kill(self._actor, no_restart=False)
            raise WorkerTimeout(f"no answer within {timeout_s:g} s") from None
        except errors.RayError as error:
            self._last = str(error)
            raise WorkerDied(
                f"its worker, an actor of the Ray cluster, ended: it crashed, its node was lost, or it held more than "
                f"{self._gib:g} GiB"
            ) from None

    def last_words(self) -> str:
        """What Ray says of its end."""
        return self._last

    def restart(self) -> None:
        """Ray does it."""

    def hang_up(self) -> None:
        """Ask it to close its environments."""
        if self._ray.is_initialized():
            self._closing = self._actor.close.remote()

    def close(self, grace_s: float) -> None:
        """End it, once its environments are closed or `grace_s` is over."""
        if not self._ray.is_initialized():  # Ray has ended it
            return
        with suppress(self._ray.exceptions.RayError):
            if self._closing is not None:
                self._ray.get(self._closing, timeout=grace_s)
        self._ray.kill(self._actor)


def actors(spec: str, arguments: Mapping[str, Any], count: int, config: WorkerConfig) -> Sequence[Actor]:
    """So many actors on the cluster at `config.ray`. UsageError where Ray or the cluster is not to be had."""
    ray = _ray()
    if not ray.is_initialized():
        try:
            _knock(str(config.ray))
            ray.init(address=config.ray, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"--worker.ray {config.ray}: no cluster there ({str(error).splitlines()[0]}); "
                f"start one with: ray start --head"
            ) from error
    return [Actor(spec, arguments, config) for _ in range(count)]


def _knock(address: str) -> None:
    """OSError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a training run reports to nobody
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # losses are told by the run, not over its display
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UsageError("--worker.ray needs Ray: pip install 'palaestra[ray]'") from None
    return ray
