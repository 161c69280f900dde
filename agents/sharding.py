"""FSDP2: parameters, gradients and optimizer states split over the processes of a run, by rows of every tensor.

A model is sharded in groups: each decoder block is one, everything else (embeddings, last norm, head) another. A
group's parameters are gathered when a forward or backward pass reaches it, and let go behind it; its gradient is
summed over processes (summed, not averaged: a loss here is a sum over the whole batch) into the shard that each
process keeps. Hence all processes must make the same passes in the same order: `even` sees to that.

Whoever needs whole weights gets them by name: a sampler for as long as it plays (`Sharded.gathered`), a checkpoint one
tensor at a time (`collect`). What is on disk does not depend on how many processes wrote it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from agents.cli import UsageError
from agents.critic import trunk_of

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What a launcher's FSDP configuration asks for."""

    reshard: bool = True
    """Let a block's gathered weights go after its forward pass, and gather them again for the backward pass."""
    blocks: tuple[str, ...] = ()
    """Classes of the modules that are groups of their own; none: the blocks that the model says may not be split."""

    @classmethod
    def of_launcher(cls) -> Plan | None:
        """As accelerate's launcher says in its variables; None: it does not ask for FSDP. Raises UsageError."""
        if not _says("ACCELERATE_USE_FSDP"):
            return None
        for variable, option, refused, instead in _REFUSED:
            if os.environ.get(variable, "").lower() in refused:
                raise UsageError(f"{option}: {os.environ[variable]} in accelerate's configuration: {instead}")
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UsageError("accelerate's configuration asks for FSDP 1: set fsdp_version: 2")
        wrap = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
        return cls(
            os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true",
            tuple(name.strip() for name in wrap.split(",") if name.strip()),
        )


_REFUSED = (
    ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params", ("true",), "shards stay on their device; set it to false"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing", ("true",),
     "set it to false and give --recompute"),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "fsdp_cpu_ram_efficient_loading", ("true",),
     "every process reads the model itself; set it to false"),
    ("FSDP_AUTO_WRAP_POLICY", "fsdp_auto_wrap_policy", ("size_based_wrap",),
     "groups are decoder blocks; set it to TRANSFORMER_BASED_WRAP"),
    ("FSDP_STATE_DICT_TYPE", "fsdp_state_dict_type", ("sharded_state_dict", "local_state_dict"),
     "checkpoints are whole; leave it out"),
)  # fmt: skip
"""Settings that would be ignored: variable, its name in the file, refused values, what to do."""


def _says(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


class Sharding:
    """How the models of a run are sharded, and those that are.

    Args:
        device: type of the processes' device.
        precision: what gathered weights are computed with; None: as they are. Gradients are summed in float32.
    """

    def __init__(self, plan: Plan, size: int, device: str, precision: torch.dtype | None = None):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy

        self.plan, self.precision = plan, precision
        self.mesh = init_device_mesh(device, (size,))
        wide = torch.float32 if precision is not None else None
        self.policy = MixedPrecisionPolicy(precision, wide, cast_forward_inputs=False)
        self.models: dict[nn.Module, Sharded] = {}

    def shard(self, model: Any) -> Sharded:
        """Shard a model in place, or find that it is; all processes call this. Optimizers are built afterwards."""
        if model not in self.models:
            self.models[model] = Sharded(model, self)
        return self.models[model]

    @contextmanager
    def lent(self, model: Any) -> Iterator[Sharded]:
        """Shard a model that is needed for as long as the `with` lasts; all processes call this."""
        try:
            yield self.shard(model)
        finally:
            del self.models[model]

    def blocks(self, model: Any) -> list[nn.Module]:
        """The modules that are groups of their own."""
        trunk = trunk_of(model)
        names = set(self.plan.blocks or getattr(trunk, "_no_split_modules", None) or ())
        found = [module for module in trunk.modules() if type(module).__name__ in names]
        found.reverse()  # a block within a block is a group before the outer one
        if not found:
            classes = sorted({type(m).__name__ for m in trunk.modules() if m is not trunk})
            raise UsageError(
                f"{type(trunk).__name__} has no blocks {sorted(names)} to shard; name their class in accelerate's "
                f"configuration: fsdp_transformer_layer_cls_to_wrap, one of {', '.join(classes)}"
            )
        return found


class _Root(nn.Module):
    """The outermost group. What runs inside its forward pass may read every parameter that is in no block."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


class Sharded:
    """A model whose parameters are shards, and an empty twin of it that whole weights can be put into."""

    def __init__(self, model: Any, how: Sharding):
        from torch.distributed.fsdp import FSDPModule, fully_shard

        self.how = how
        self.twin, self._places = _skeleton(model)
        self.root = _Root(model)
        for block in how.blocks(model):
            fully_shard(block, mesh=how.mesh, mp_policy=how.policy, reshard_after_forward=how.plan.reshard)
        fully_shard(self.root, mesh=how.mesh, mp_policy=how.policy, reshard_after_forward=False)
        self.groups = [module for module in self.root.modules() if isinstance(module, FSDPModule)]
        for group in self.groups:
            group.set_gradient_divide_factor(1.0)
            group.set_force_sum_reduction_for_comms(True)
        self.device = next(model.parameters()).device
        with torch.no_grad():
            self.root(lambda: None)  # torch finds out now which group is the outermost
        self.rest()

    def __call__(self, work: Callable[[], T]) -> T:
        """Run `work`, which may use the model's trunk and head. Tensors that are to have a gradient must be returned.

        What it returns may hold no views. The head stays gathered until `rest`.
        """
        return self.root(work)

    def rest(self) -> None:
        """Nothing is gathered any more. All that reads or writes parameters outside of passes begins with this."""
        if hasattr(self.root, "reset_iter_state"):  # also forgets the forward passes that no backward pass followed
            self.root.reset_iter_state()  # type: ignore[operator]
        else:
            for group in self.groups:
                group.reshard()

    @contextmanager
    def gathered(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Iterator[Any]:
        """The twin with whole weights, on this device and of this type; afterwards it is empty again."""
        self.rest()
        model = self.root.model
        device = self.device if device is None else device
        with torch.no_grad():
            for name, p in model.named_parameters():
                whole = full(p).to(device, dtype)
                self._put(name, nn.Parameter(whole, p.requires_grad))
            for name, buffer in model.named_buffers():
                owner, _, leaf = name.rpartition(".")
                self.twin.get_submodule(owner)._buffers[leaf] = buffer.to(device)
        try:
            yield self.twin
        finally:
            for name, p in model.named_parameters():
                self._put(name, nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad))

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        for module, leaf in self._places[name]:
            module._parameters[leaf] = parameter


def _skeleton(model: Any) -> tuple[Any, dict[str, list[tuple[nn.Module, str]]]]:
    """A copy of a model without weights, and where each of its parameters stands (tied ones in several places)."""
    names = {id(p): name for name, p in model.named_parameters()}
    meta = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    twin = copy.deepcopy(model, dict(meta))
    of_twin = {id(meta[key]): name for key, name in names.items()}
    places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in names.values()}
    for module in twin.modules():
        for leaf, p in module._parameters.items():
            if p is not None:
                places[of_twin[id(p)]].append((module, leaf))
    return twin, places


# ---------------------------------------------------------------------- tensors that may be shards


def local(tensor: Tensor) -> Tensor:
    """The rows that this process holds, sharing memory; a plain tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, on every process; all of them call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()


def collect(tensor: Tensor) -> Tensor:
    """The whole tensor, of a shard on the first process only, in main memory; all processes call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole = full(tensor)
    return whole.cpu() if td.get_rank() == 0 else torch.empty(0, dtype=tensor.dtype)


def whole_like(piece: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that is split as a parameter is (a moment of its gradient, say), whole."""
    if not isinstance(parameter, DTensor):
        return piece
    shape, stride = parameter.shape, parameter.stride()
    return collect(DTensor.from_local(piece, parameter.device_mesh, [Shard(0)], shape=shape, stride=stride))


def part_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """The rows of a whole tensor that this process holds of a parameter."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    pieces = whole.chunk(mesh.size(), 0)
    rank = mesh.get_local_rank()
    return pieces[rank] if rank < len(pieces) else whole[:0]


def put(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into one that may be a shard."""
    local(target).copy_(part_of(whole, target))


# ---------------------------------------------------------------------- passes in step


def total_norm(grads: Sequence[Tensor], split: bool) -> float:
    """Norm over all gradients; `split`: they are this process' rows of them."""
    norm = torch.nn.utils.get_total_norm(list(grads))
    if not split:
        return float(norm)
    square = norm.double().square()
    td.all_reduce(square)
    return float(square.sqrt())
