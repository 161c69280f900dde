"""One to N processes over accelerate: rows and episodes are shared out, streams gathered, gradients summed.

Every process holds the whole batch's columns; only model work is divided. With one process every call here is the
identity, so nothing else in the code asks how many there are. Weights stand whole on every process, or with FSDP
split over all of them (`agents.sharding`).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as td
from torch import Tensor

from agents.cli import UsageError
from agents.sharding import Plan, Sharding

T = TypeVar("T")
BUCKET = 1 << 26
"""Numbers that are summed in one message at most, unless one tensor has more: a second copy of them is held."""


class World:
    """The processes of a run. `rank` 0 writes files and talks to the user.

    Without an accelerator: this process alone, on the CPU.

    Attributes:
        sharding: how models are split over the processes; None: each holds them whole.
        objects: the group that pickled values travel in, in main memory; None: the default one does.
        homes: (machine, process id) of every process.
        broken: a process was lost.
        advice: what to do then, for the end of the message.
    """

    def __init__(self, accelerator=None, plan: Plan | None = None, timeout_s: float = 1800.0):
        self.accelerator = accelerator
        self.size = accelerator.num_processes if accelerator else 1
        self.rank = accelerator.process_index if accelerator else 0
        self.device = accelerator.device if accelerator else torch.device("cpu")
        self.precision = torch.bfloat16 if accelerator and accelerator.mixed_precision == "bf16" else None
        self.timeout_s = timeout_s
        self.objects = None
        if self.size > 1 and td.get_backend() != "gloo":
            self.objects = td.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        split = plan is not None and self.size > 1
        self.sharding = Sharding(plan, self.size, self.device.type, self.precision) if split and plan else None
        self.homes = self.gather((_machine(), os.getpid()))
        self.broken, self.advice = False, ""

    @classmethod
    def start(cls, bfloat16: bool = False, timeout_s: float = 1800.0) -> World:
        """Join the processes that a launcher started (RANK and WORLD_SIZE are set), on a GPU where there is one.

        Args:
            bfloat16: compute in mixed precision.
            timeout_s: seconds that any process waits for the others before it gives up.

        Raises UsageError where accelerate's launcher was told something else than this program.
        """
        if "RANK" not in os.environ and not torch.cuda.is_available() and not bfloat16:
            return cls()
        _agree(bfloat16)
        plan = Plan.of_launcher() if "RANK" in os.environ else None
        if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost") and os.path.isdir("/sys/class/net/lo"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # works without any network
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
        accelerator = Accelerator(
            cpu=on_cpu, mixed_precision="bf16" if bfloat16 else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s))],
        )  # fmt: skip
        return cls(accelerator, plan, timeout_s)

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
        """Sum tensors over processes in place, in a few flat messages per type and device."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            moved = flat.to(self.device)  # the backend may know only the device's memory
            td.all_reduce(moved)
            for tensor, part in zip(bucket, moved.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """Every process' value, by rank. Values travel pickled, between processes of one run only."""
        if self.size == 1:
            return [value]
        out: list = [None] * self.size
        td.all_gather_object(out, value, group=self.objects)
        return out

    def from_main(self, value: T) -> T:
        """The main process' value, everywhere."""
        return self.gather(value)[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on the main process, everywhere. Where it raises, it does so there; the others just end."""
        if not self.main:
            done, value = self.from_main((False, None))
            if not done:
                raise SystemExit(2)
            return value  # type: ignore[return-value]
        try:
            value = work()
        except BaseException:
            self.from_main((False, None))
            raise
        return self.from_main((True, value))[1]

    @property
    def speaks(self) -> bool:
        """Whether this is the first process that is left."""
        return self.rank == min(set(range(self.size)).difference(self.gone()), default=0)

    def gone(self) -> list[int]:
        """Ranks on this machine whose process has ended."""
        here = _machine()
        return [rank for rank, (host, pid) in enumerate(self.homes) if host == here and not _alive(pid)]

    def close(self) -> None:
        """Leave the group of processes; one that has lost a member cannot be left in good order."""
        if self.size > 1 and td.is_initialized() and not self.broken:
            td.destroy_process_group()


def _agree(bfloat16: bool) -> None:
    """UsageError where accelerate's configuration asks for what this program does otherwise or not at all."""
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no" if not bfloat16 else "bf16")
    if said not in ("no", "bf16"):
        raise UsageError(f"mixed_precision: {said} in accelerate's configuration: there are `no` and `bf16`")
    if (said == "bf16") != bfloat16:
        raise UsageError(
            f"accelerate's configuration says mixed_precision: {said}, --dtype says "
            f"{'bfloat16' if bfloat16 else 'no bfloat16'}: give --dtype bfloat16 with `bf16` and another with `no` "
            f"(accelerate launch --mixed_precision {'bf16' if bfloat16 else 'no'})"
        )
    for variable, name in _FOREIGN.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise UsageError(f"accelerate's configuration asks for {name}; there are DDP and FSDP2")


_FOREIGN = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}  # fmt: skip


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type and device, in order, at most BUCKET numbers together."""
    groups: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        held: list[Tensor] = []
        for tensor in group:
            if held and sum(t.numel() for t in held) + tensor.numel() > BUCKET:
                yield held
                held = []
            held.append(tensor)
        yield held


# ---------------------------------------------------------------------- processes that are lost


def lost(error: BaseException, world: World | None) -> str | None:
    """What a failed message says of the other processes; None where the error is another one.

    world: None: the processes have not found each other yet.
    """
    text = str(error)
    alone = world is not None and world.size == 1
    if alone or not isinstance(error, RuntimeError) or not any(sign in text for sign in _SIGNS):
        return None
    if world is None:
        return f"not all processes came up: {text.splitlines()[0]}"
    world.broken = True
    end = time.monotonic() + 2
    while not (gone := world.gone()) and time.monotonic() < end:
        time.sleep(0.05)
    if gone:
        named = " and ".join(str(rank) for rank in gone)
        return f"process {named} of {world.size} has ended"
    if "imed out" in text:
        return f"a process did not answer for {world.timeout_s:g} s (--peer-timeout-s)"
    return f"the connection between the processes broke ({text.splitlines()[0]})"


_SIGNS = (
    "Timed out", "timed out", "Connection closed by peer", "Connection reset by peer", "Broken pipe",
    "Connection refused", "NCCL", "Socket Timeout",
)  # fmt: skip
"""What gloo, NCCL and the store say when another process does not answer."""


def _machine() -> str:
    """Names the process ids that this process sees: its host, and where there are such, its container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _alive(pid: int) -> bool:
    """Whether a process of this machine still runs; one that has ended and that nobody has waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return not Path("/proc/self").exists()
