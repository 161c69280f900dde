"""Out of memory in a micro-batch: the same rows again in halves, with the gradient that there would have been.

A backward pass that fails half-way leaves part of its gradient in the parameters, and nothing tells it from the
rest. So nothing is copied beforehand, which would cost memory and time in every micro-batch; where a backward pass
failed, the gradient of all micro-batches so far is thrown away and they are done again. A forward pass that fails
leaves nothing behind.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from agents.packing import Chunk, halves


class NoRoom(RuntimeError):
    """Memory does not suffice, and there is nothing left to halve."""

    @classmethod
    def alone(cls, tokens: int) -> NoRoom:
        """For one row."""
        return cls(
            f"a row of {tokens:,} tokens does not fit into memory, alone in its micro-batch (so that a smaller "
            "--micro-tokens does not help): --recompute takes less memory for a third more time, where it is not on "
            "yet, and a new run with a smaller --rollout.max-context has shorter rows"
        )

    @classmethod
    def together(cls, tokens: int) -> NoRoom:
        """For a pass that all processes make together."""
        return cls(
            f"a micro-batch of {tokens:,} tokens does not fit into memory, and a process cannot halve it alone while "
            "weights are split over processes: give a smaller --micro-tokens, or --recompute"
        )


def in_halves(
    chunks: Sequence[Chunk],
    length_B: Sequence[int],
    work: Callable[[Chunk], None],
    undone: Callable[[], bool] = lambda: False,
    alone: bool = True,
) -> int:
    """Do the work of all chunks, those that memory does not suffice for in halves; how often one was halved.

    Args:
        work: leaves nothing behind where it fails, or says so:
        undone: called after a failure; True: the work of all chunks has been thrown away.
        alone: no other process takes part in this work.

    Raises:
        NoRoom: where a row stands alone already, or this process does not.
    """
    todo, done, splits = list(chunks), 0, 0
    while done < len(todo):
        if _fits(work, todo[done]):
            done += 1
            continue
        if not alone:
            raise NoRoom.together(todo[done].fed(length_B))
        smaller = halves(todo[done], length_B)
        if not smaller:
            raise NoRoom.alone(length_B[int(todo[done].rows_R[0])])
        todo[done : done + 1] = smaller
        splits += 1
        if undone():
            done = 0
    return splits


def _fits(work: Callable[[Chunk], None], chunk: Chunk) -> bool:
    try:
        work(chunk)
    except RuntimeError as error:
        from accelerate.utils.memory import should_reduce_batch_size  # a slow import that few runs need

        if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
            raise
    else:
        return True
    if torch.cuda.is_available():  # the error is gone, and with it the frames that held the activations
        gc.collect()
        torch.cuda.empty_cache()
    return False


class Gradients:
    """What a learner's backward pass adds to the gradients of parameters, as long as it may have to begin again."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.before: dict[nn.Parameter, Tensor | None] = {p: p.grad for p in parameters}
        self.unsure = False
        self._drop()

    def begin(self) -> None:
        """From now on a failure leaves parts of a gradient behind."""
        self.unsure = True

    def done(self) -> None:
        """What was begun is complete."""
        self.unsure = False

    def undone(self) -> bool:
        """After a failure: whether everything had to be thrown away."""
        if not self.unsure:
            return False
        self._drop()
        self.unsure = False
        return True

    def add_up(self) -> None:
        """To what the parameters had before."""
        for p, grad in self.before.items():
            if grad is not None:
                p.grad = grad if p.grad is None else grad.add_(p.grad)

    def _drop(self) -> None:
        for p in self.before:
            p.grad = None
