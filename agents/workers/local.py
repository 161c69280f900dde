"""A worker that is a process of this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from agents.workers.errors import EnvError, WorkerDied, WorkerMemory, WorkerTimeout, raised
from agents.workers.process import EXIT_MEMORY
from agents.workers.wire import Channel, decode, encode
from tools.processes import kill_family

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_LAST_LINES = 8


class Process:
    """One process after another in the same place; `start` waits for it, `restart` begins the next.

    Args:
        spec, arguments: of the environments, resolved in the process.
        memory_gib: what it may hold, with all that it starts.
    """

    def __init__(self, spec: str, arguments: Mapping[str, Any], memory_gib: float) -> None:
        self._opening = encode([spec, dict(arguments)])
        self._memory_gib = memory_gib
        self._owner = os.getpid()
        self._closed = False
        self._spawn()

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        home = str(Path(__file__).resolve().parents[2])
        paths = {"PYTHONPATH": os.pathsep.join([home, *(p for p in sys.path if p)]), "PYTHONUNBUFFERED": "1"}
        command = "from agents.workers.process import serve; serve()"
        arguments = [theirs.fileno(), os.getpid(), int(self._memory_gib * 2**30)]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", command, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env={**dict.fromkeys(_ONE_THREAD, "1"), **os.environ, **paths},
                start_new_session=True,  # a Ctrl-C is for the run, which ends its workers
            )
        self._said: deque[str] = deque(maxlen=_LAST_LINES)
        self._hearing = threading.Thread(target=_hear, args=(self.process.stdout, self._said), daemon=True)
        self._hearing.start()
        self._channel = Channel(ours)
        with suppress(OSError):  # one that has ended already is noticed by `start`
            self._channel.send(self._opening, 10.0)

    def start(self, timeout_s: float) -> dict[str, Any]:
        """Wait until it has made an environment; its facts. EnvError where it cannot, WorkerError where it ended."""
        reply = decode(self.call(None, timeout_s))
        if "error" in reply:
            raise raised(*reply["error"])
        return reply["ok"]

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def call(self, request: bytes | None, timeout_s: float) -> bytes:
        """Send a request, if any, and wait for the reply. A worker that raises WorkerError needs a restart."""
        if os.getpid() != self._owner:
            raise RuntimeError("environment workers serve the process that started them, not one forked from it")
        try:
            if request is not None:
                self._channel.send(request, timeout_s)
            return self._channel.receive(timeout_s)
        except TimeoutError:
            self._end()
            raise WorkerTimeout(f"no answer within {timeout_s:g} s") from None
        except (OSError, EOFError):
            raise self._cause(self._end(grace_s=1.0)) from None

    def last_words(self) -> str:
        """The last lines that the process wrote."""
        self._hearing.join(1.0)
        return "\n".join(self._said)

    def restart(self) -> None:
        """End the process, if it has not ended, and begin another; does not wait for it."""
        self._end()
        if not self._closed:
            self._spawn()

    def _end(self, grace_s: float = 0.0) -> int:
        """Kill the process with all that it started; its exit code, its own where it ends within `grace_s`."""
        self._channel.close()
        if self.process.returncode is None:
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                pass
            kill_family(self.process.pid)
        return self.process.wait()

    def _cause(self, code: int) -> EnvError | WorkerDied | WorkerMemory:
        if code == EXIT_MEMORY:
            return WorkerMemory(f"its worker held more than {self._memory_gib:g} GiB")
        if code < 0:
            name = signal.Signals(-code).name
            return WorkerDied(f"its worker was killed by {name}" + " (out of memory?)" * (name == "SIGKILL"))
        return WorkerDied(f"its worker ended with exit code {code}")

    def hang_up(self) -> None:
        """Ask the process to end: it closes its environments first."""
        if os.getpid() == self._owner:
            self._channel.close()

    def close(self, grace_s: float) -> None:
        """End the process, by force if it has not ended within `grace_s` of being asked."""
        if os.getpid() == self._owner:
            self._closed = True
            self.hang_up()
            self._end(grace_s)


def _hear(stream: IO[bytes], said: deque[str]) -> None:
    """Keep the last lines of what a process writes, until it has ended."""
    with stream:
        for line in iter(lambda: stream.readline(4096), b""):
            said.append(line.decode("utf-8", "replace").rstrip())
