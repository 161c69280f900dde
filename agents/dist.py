"""One to N processes over accelerate: rows and episodes are shared out, streams gathered, gradients summed.

Every process holds the whole batch's columns; only model work is divided. With one process every call here is the
identity, so nothing else in the code asks how many there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as td
from accelerate import Accelerator
from torch import Tensor

T = TypeVar("T")


class World:
    """The processes of a run. `rank` 0 writes files and talks to the user."""

    def __init__(self, accelerator: Accelerator | None = None):
        self.accelerator = accelerator
        self.size = accelerator.num_processes if accelerator else 1
        self.rank = accelerator.process_index if accelerator else 0
        self.device = accelerator.device if accelerator else torch.device("cpu")

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        """Mixed precision where the accelerator was given it; sampler and trainer both run under it."""
        return self.accelerator.autocast() if self.accelerator else nullcontext()

    def share(self, items: Sequence[T]) -> list[T]:
        """This process' items: every N-th, so that neighbours in length end up on different processes."""
        return list(items[self.rank :: self.size])

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over processes in place, in one flat message per dtype."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for group in by_dtype.values():
            flat = torch.cat([t.reshape(-1) for t in group])
            td.all_reduce(flat)
            for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """Every process' value, by rank. Values travel pickled between processes of one run only."""
        if self.size == 1:
            return [value]
        out: list = [None] * self.size
        td.all_gather_object(out, value)
        return out

    def from_main(self, value: T) -> T:
        """The main process' value, everywhere."""
        if self.size == 1:
            return value
        box = [value]
        td.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether any process says yes."""
        return any(self.gather(flag))

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            td.barrier()
