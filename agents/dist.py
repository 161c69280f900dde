"""One to N processes over accelerate: rows and episodes are shared out, streams gathered, gradients summed.

Every process holds the whole batch's columns; only model work is divided. With one process every call here is the
identity, so nothing else in the code asks how many there are.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as td
from torch import Tensor

T = TypeVar("T")


class World:
    """The processes of a run. `rank` 0 writes files and talks to the user.

    Without an accelerator: this process alone, on the CPU.
    """

    def __init__(self, accelerator=None):
        self.accelerator = accelerator
        self.size = accelerator.num_processes if accelerator else 1
        self.rank = accelerator.process_index if accelerator else 0
        self.device = accelerator.device if accelerator else torch.device("cpu")
        self.precision = torch.bfloat16 if accelerator and accelerator.mixed_precision == "bf16" else None

    @classmethod
    def start(cls, bfloat16: bool = False) -> World:
        """Join the processes that a launcher started (RANK and WORLD_SIZE are set), on a GPU where there is one."""
        if "RANK" not in os.environ and not torch.cuda.is_available() and not bfloat16:
            return cls()
        from accelerate import Accelerator

        return cls(Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if bfloat16 else "no"))

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        """Mixed precision where the run asked for it; sampler and trainer both work under it."""
        return self.accelerator.autocast() if self.accelerator else nullcontext()

    def share(self, items: Sequence[T]) -> list[T]:
        """This process' items: every N-th, so that neighbours in length end up on different processes."""
        return list(items[self.rank :: self.size])

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over processes in place, in one flat message per type and device."""
        if self.size == 1:
            return
        groups: dict[tuple, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for group in groups.values():
            flat = torch.cat([t.reshape(-1) for t in group])
            moved = flat.to(self.device)  # the backend may know only the device's memory
            td.all_reduce(moved)
            for tensor, part in zip(group, moved.split([t.numel() for t in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """Every process' value, by rank. Values travel pickled, between processes of one run only."""
        if self.size == 1:
            return [value]
        out: list = [None] * self.size
        td.all_gather_object(out, value)
        return out

    def from_main(self, value: T) -> T:
        """The main process' value, everywhere."""
        return self.gather(value)[0]

    def close(self) -> None:
        """Leave the group of processes."""
        if self.size > 1 and td.is_initialized():
            td.destroy_process_group()


@contextmanager
def launched(module: str, argv: Sequence[str], processes: int) -> Iterator[None]:
    """Run `python -m module argv` in `processes - 1` further processes while this one does the same as rank 0.

    Does nothing inside a process that a launcher started. The others end with this one: a lost connection ends them.
    """
    if processes <= 1 or "RANK" in os.environ:
        yield
        return
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, (os.cpu_count() or 1) // processes)
        torch.set_num_threads(threads)  # this process has read the variable already
        shared["OMP_NUM_THREADS"] = str(threads)
    if sys.platform == "linux":
        shared["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")  # works without any network
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
    """End this process when one of the others is lost: a collective call would wait for it for ever."""
    code = process.wait()
    if code != 0 and not over.wait(5):
        print(f"error: process {rank} ended with exit code {code}; go on from the last checkpoint", file=sys.stderr)
        os._exit(1)


def _end(process: subprocess.Popen) -> None:
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
