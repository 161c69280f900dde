"""What a recipe remembers between iterations: per-task stores, part states, and their form in a checkpoint.

A checkpoint holds tensors and JSON only, so that reading one can run no code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from policy_opt.batch import Batch
from policy_opt.errors import RecipeError


class Store:
    """One number per task, kept across iterations; a task that was never written has none."""

    def __init__(self, values: Mapping[int, float] | None = None) -> None:
        self.values: dict[int, float] = dict(values or {})

    def __len__(self) -> int:
        return len(self.values)

    def get(self, task: int) -> float | None:
        """The task's number, or None."""
        return self.values.get(task)

    def put(self, task: int, value: float) -> None:
        """Remember a number for a task."""
        self.values[task] = float(value)

    def column(self, task_B: Tensor, missing: float = float("nan")) -> Tensor:
        """The numbers of the rows' tasks, float64 [B]; `missing` where there is none."""
        found = [self.values.get(task, missing) for task in task_B.tolist()]
        return torch.tensor(found, dtype=torch.float64, device=task_B.device)


def encode(value: Any) -> Any:
    """A part's state as nested dicts and lists of tensors, numbers and strings."""
    if isinstance(value, Store):
        keys = sorted(value.values)
        numbers = torch.tensor([value.values[k] for k in keys], dtype=torch.float64)
        return {"store": {"keys": torch.tensor(keys, dtype=torch.long), "values": numbers}}
    if isinstance(value, Batch):
        return {"batch": encode(value.state_dict())}
    if isinstance(value, Mapping):
        return {"map": {str(k): encode(v) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    if value is None or isinstance(value, Tensor | bool | int | float | str):
        return value
    raise RecipeError(
        f"a part keeps a {type(value).__name__} in its state; keep tensors, numbers, text or a Store"
    )


def decode(value: Any) -> Any:
    """Inverse of `encode` (tuples come back as lists)."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, Mapping):
        return value
    ((kind, content),) = value.items()
    if kind == "store":
        return Store(dict(zip(content["keys"].tolist(), content["values"].tolist(), strict=True)))
    inner = {k: decode(v) for k, v in content.items()} if kind == "map" else decode(content)
    return Batch.from_state(inner) if kind == "batch" else inner
