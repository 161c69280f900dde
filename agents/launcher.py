"""Our own launcher: one process becomes several on one machine; `accelerate launch` does so on several, too."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from agents.cli import UsageError


def refuse_second(given: int | None) -> None:
    """UsageError where so many processes are asked for, but a launcher has started another number."""
    size = os.environ.get("WORLD_SIZE") if "RANK" in os.environ else None
    if size is not None and given is not None and given != int(size):
        raise UsageError(
            f"--processes {given}: a launcher has started {size} already. Leave --processes out; accelerate launch "
            "has --num_processes"
        )


def again(module: str, run: object) -> str:
    """The command that goes on with a run, started as this one was."""
    command = f"-m {module} --resume {run}"
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, or accelerate launch, which is built on it
        return f"accelerate launch (with the options of this run) {command}"
    return f"python {command}"


@contextmanager
def launched(module: str, argv: Sequence[str], processes: int) -> Iterator[None]:
    """Run `python -m module argv` in `processes - 1` further processes while this one does the same as rank 0.

    Does nothing inside a process that a launcher started. The others end with this one: a lost connection ends them.
    """
    if processes <= 1 or "RANK" in os.environ:
        yield
        return
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        threads = max(1, (os.cpu_count() or 1) // processes)
        torch.set_num_threads(threads)  # this process has read the variable already
        shared["OMP_NUM_THREADS"] = str(threads)
    others = [
        subprocess.Popen(
            [sys.executable, "-m", module, *argv],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # a Ctrl-C is for rank 0, which tells the others
        )
        for rank in range(1, processes)
    ]
    os.environ |= {**shared, "RANK": "0", "LOCAL_RANK": "0"}
    over = threading.Event()
    for rank, other in enumerate(others, 1):
        threading.Thread(target=_watch, args=(other, rank, over), daemon=True).start()
    try:
        yield
    except BaseException:
        over.set()
        for other in others:
            other.kill()
        raise
    finally:
        over.set()
        for name in (*shared, "RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)
        for other in others:
            _end(other)


def _watch(process: subprocess.Popen, rank: int, over: threading.Event) -> None:
    """End this process when one of the others is lost and no message to it fails: it plays, or waits for no one."""
    code = process.wait()
    if code != 0 and not over.wait(5):
        what = f"error: process {rank} ended {_how(code)}; go on from the last checkpoint with --resume"
        print(what, file=sys.stderr)
        os._exit(1)


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _end(process: subprocess.Popen) -> None:
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
