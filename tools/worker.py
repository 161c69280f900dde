"""Runs a function in a process of its own that is killed when its time is up.

Workers are plain interpreters that run `serve`; they are kept and used again, one call
at a time, and belong to the process, not to any environment, so that environments stay copyable. The
function travels by name; its reply is JSON text, already cut to the limit on the worker's side, and after it the
bytes of each RGB image, so that nothing that a tool returns is unpickled here.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tools import images

START_LIMIT_S = 60.0
"""Seconds that a new worker may take to start, and to import what a function needs."""
MAX_MESSAGE = 64 * 1024 * 1024
_HEADER = struct.Struct(">I")


@dataclass(frozen=True)
class Outcome:
    """What came of a call in a worker."""

    value: str | list[Any]
    """The result as `tools.toolbox.as_result` gives it, or what went wrong."""
    error: str | None = None
    """None, ``timeout``, ``too_large``, ``tool_error`` or ``exception``."""

    @property
    def text(self) -> str:
        """The words of the result."""
        return self.value if isinstance(self.value, str) else images.words_of(self.value)


def check_importable(fn: Callable[..., Any], why: str) -> None:
    """Raise ValueError unless `fn` can be sent to a worker."""
    try:
        pickle.dumps(fn)
        inside_main = getattr(fn, "__module__", None) == "__main__"
    except Exception as error:
        raise ValueError(f"{why}, so its function must be importable from a module ({error})") from None
    if inside_main:
        raise ValueError(f"{why}, so its function must stand in a module, not in the script that is being run")


def run(fn: Callable[..., Any], arguments: Mapping[str, Any], timeout_s: float, max_chars: int) -> Outcome:
    """Call ``fn(**arguments)`` in a worker; give up, and kill it, after `timeout_s` seconds. Never raises."""
    try:
        worker = _take()
    except OSError as error:
        return Outcome(f"no worker process: {error}", "exception")
    try:
        outcome = worker.call(pickle.dumps((fn, dict(arguments), max_chars)), timeout_s)
    except BaseException:
        worker.kill()
        raise
    if worker.alive:
        _give_back(worker)
    return outcome


class Worker:
    """One worker process and the pipes to it."""

    def __init__(self) -> None:
        home = str(Path(__file__).resolve().parent.parent)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([home, *(p for p in sys.path if p)])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from tools.worker import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
        self.alive = True

    def call(self, payload: bytes, timeout_s: float) -> Outcome:
        """Send a call and wait; a worker that is late or dies is gone afterwards."""
        pipe_in, pipe_out = self.process.stdin, self.process.stdout
        assert pipe_in is not None and pipe_out is not None
        try:
            pipe_in.write(_HEADER.pack(len(payload)) + payload)
            pipe_in.flush()
            loaded = _read(pipe_out, time.monotonic() + START_LIMIT_S)  # importing is not the tool's time
            deadline = time.monotonic() + timeout_s
            reply = _read(pipe_out, deadline) if loaded == b"loaded" else loaded
            return _outcome(reply, lambda: _read(pipe_out, deadline))
        except TimeoutError:
            self.kill()
            return Outcome(f"no result within {timeout_s:g} s", "timeout")
        except (OSError, EOFError, ValueError):
            code = self.kill()
            return Outcome(f"the tool's process ended (exit code {code})", "exception")

    def kill(self) -> int | None:
        """Kill the process with all its children; returns the exit code."""
        self.alive = False
        try:
            os.killpg(self.process.pid, 9)
        except (ProcessLookupError, PermissionError):
            self.process.kill()
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    pass
        return code


_idle: list[Worker] = []
_owner = os.getpid()
_lock = threading.Lock()


def _take() -> Worker:
    global _owner
    with _lock:
        if _owner != os.getpid():  # a forked child must not share its parent's workers
            _idle.clear()
            _owner = os.getpid()
        while _idle:
            worker = _idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.kill()
    return Worker()


def _give_back(worker: Worker) -> None:
    with _lock:
        _idle.append(worker)


def shutdown() -> None:
    """End all idle workers (done by itself when the interpreter exits)."""
    with _lock:
        while _idle and _owner == os.getpid():
            _idle.pop().kill()


atexit.register(shutdown)


def _read(pipe: IO[bytes], deadline: float) -> bytes:
    """One message, or TimeoutError at the deadline."""
    (size,) = _HEADER.unpack(_read_exactly(pipe, _HEADER.size, deadline))
    if size > MAX_MESSAGE:
        raise EOFError("message too long")
    return _read_exactly(pipe, size, deadline)


def _read_exactly(pipe: IO[bytes], size: int, deadline: float) -> bytes:
    parts: list[bytes] = []
    descriptor = pipe.fileno()
    while size:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError("the pipe was closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def serve() -> None:
    """The worker's loop: read a call, say that it is loaded, run it, reply."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    source = sys.stdin.buffer
    # What a tool prints must not mix with the replies: they get the real stdout, print gets stderr.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(message: bytes) -> None:
        sink.write(_HEADER.pack(len(message)) + message)
        sink.flush()

    while header := source.read(_HEADER.size):
        payload = source.read(_HEADER.unpack(header)[0])
        try:
            fn, arguments, max_chars = pickle.loads(payload)  # sent by our own parent process
        except Exception as error:
            send(json.dumps([f"{type(error).__name__}: {error}", "exception"]).encode())
            continue
        send(b"loaded")
        value, error_kind = _result(fn, arguments, max_chars)
        shown = value if isinstance(value, str) else [p if isinstance(p, str) else p.size for p in value]
        send(json.dumps([shown, error_kind]).encode())
        for part in value:
            if not isinstance(part, str):
                send(part.tobytes())


def _end_with(parent: int) -> None:
    """A worker does not outlive the process that it works for, even one that was killed during a call."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def _outcome(reply: bytes, read: Callable[[], bytes]) -> Outcome:
    """A reply with the images that follow it."""
    value, error = json.loads(reply)
    if isinstance(value, str):
        return Outcome(value, error)
    from PIL import Image

    parts = [part if isinstance(part, str) else Image.frombytes("RGB", tuple(part), read()) for part in value]
    return Outcome(parts, error)


def _result(
    fn: Callable[..., Any], arguments: Mapping[str, Any], max_chars: int
) -> tuple[str | list[Any], str | None]:
    from tools.tool import ToolError
    from tools.toolbox import as_result

    try:
        value = as_result(fn(**arguments))
        return (value[:max_chars] if isinstance(value, str) else images.clip(value, max_chars)), None
    except images.TooLarge as error:
        return str(error)[:max_chars], "too_large"
    except ToolError as error:
        return str(error)[:max_chars], "tool_error"
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"[:max_chars], "exception"
