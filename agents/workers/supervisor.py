"""One worker over its whole life: a call at a time, a new start after each loss, and an end to starting in vain."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, Protocol

from agents.workers.errors import EnvError, WorkerBroken, WorkerDied, WorkerError, WorkerMemory, WorkerTimeout, raised
from agents.workers.wire import decode, encode

START_LIMIT_S = 120.0
"""Seconds that a worker may take to start and to make its first environment."""
STARTS = 3
"""Starts in a row after which one is given up; one that takes too long is given up at once."""


class Connection(Protocol):
    """A way to a worker: a process of this machine, or a Ray actor."""

    def start(self, timeout_s: float) -> dict[str, Any]:
        """Wait until it serves; the facts of its environments. EnvError or WorkerError where it does not."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it is worth calling, as far as one can tell without calling."""
        ...

    def call(self, request: bytes, timeout_s: float) -> bytes:
        """The reply to a request. WorkerError where the worker was lost."""
        ...

    def last_words(self) -> str:
        """What it wrote before it was lost."""
        ...

    def restart(self) -> None:
        """Make sure that it runs again, without waiting for it."""
        ...

    def hang_up(self) -> None:
        """Ask it to end."""
        ...

    def close(self, grace_s: float) -> None:
        """End it, by force if it has not ended within `grace_s` of being asked."""
        ...


class Supervisor:
    """A worker that is started again whenever it is lost. Calls from several threads wait for each other.

    Attributes:
        load: environments that live in it, kept by whoever places them.
        broken: why it cannot be started any more, or None.
        losses: how often it was lost, by the name of the cause.
    """

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self.connection, self.timeout_s = connection, timeout_s
        self.load = 0
        self.broken: str | None = None
        self.losses: Counter[str] = Counter()
        self._up = False
        self._last = ""
        self._gone: list[int] = []
        self._lock = threading.Lock()

    def facts(self) -> dict[str, Any]:
        """Wait for the first start. EnvError where no environment can be made, WorkerBroken where it keeps ending."""
        with self._lock:
            return self._start()

    def forget(self, number: int) -> None:
        """An environment is not used any more; the worker is told with the next call."""
        self._gone.append(number)

    def call(self, operation: str, number: int, *arguments: Any) -> Any:
        """Do something with an environment and return what comes of it.

        Raises:
            EnvError: the environment raised; under its own name.
            WorkerError: the worker was lost, now or since the episode began.
        """
        with self._lock:
            if self._up and not self.connection.alive:
                self._lost(WorkerDied("its worker ended while it was idle"))
            if not self._up:
                self._start()
            gone, self._gone = self._gone, []
            request = encode([operation, number, list(arguments), gone])
            try:
                reply = _read(self.connection.call(request, self.timeout_s))
            except BaseException as error:  # whatever it was: the next reply would be the one to this call
                self._lost(error)
                raise
        match reply:
            case {"ok": result}:
                return result
            case {"error": ["MemoryError", text]}:
                raise WorkerMemory(f"more memory was asked for than a worker may hold {text}".strip())
            case {"error": [name, text]}:
                raise raised(name, text)
        raise WorkerDied(f"its worker was lost in another episode: {self._last}")

    def _start(self) -> dict[str, Any]:
        """Wait until it serves; a worker that keeps ending is broken for good."""
        if self.broken is not None:
            raise WorkerBroken(self.broken)
        why = ""
        for attempt in range(STARTS):
            if attempt:
                self.connection.restart()
            try:
                facts = self.connection.start(START_LIMIT_S)
                self._up = True
                return facts
            except EnvError as error:
                self.broken = str(error)
                self.connection.close(0.0)
                raise
            except WorkerError as error:
                why = f"{error}\n{self.connection.last_words()}".strip()
                if isinstance(error, WorkerTimeout):
                    break
        self.broken = f"a worker did not start, {attempt + 1} times in a row: {why}"
        self.connection.close(0.0)
        raise WorkerBroken(self.broken)

    def _lost(self, error: BaseException) -> None:
        self._up, self._last = False, str(error)
        self.losses[type(error).__name__] += 1
        self.connection.restart()


def _read(reply: bytes) -> dict[str, Any]:
    """A reply as it must be; WorkerDied for anything else, which no worker of ours writes."""
    try:
        found = decode(reply)
        match found:
            case {"ok": _} | {"lost": True} | {"error": [str(), str()]}:
                return found
        raise ValueError("neither a result nor an error")
    except ValueError as error:
        raise WorkerDied(f"its worker wrote what cannot be read: {error}"[:200]) from None
