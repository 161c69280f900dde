"""Low-rank adapters through peft: only they are trained; the base weights stand once for all models made from a policy.

The adapters are injected into the model's own linear layers, so that the model keeps its class: trunk, head and
everything that works on the plain model works on the adapted one. A layer with weight W answers with
W + (alpha / rank) B A; B starts at zero, so that at first nothing changes.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from agents.cli import UsageError, nearest
from agents.config import LoraConfig

if TYPE_CHECKING:
    from agents.sharding import Sharding

ADAPTER = "default"
"""peft's name of the one adapter."""


def adapt(model: Any, config: LoraConfig, seed: int) -> None:
    """Freeze the model and give its layers adapters, in place; their start is a function of the seed and the layer.

    Raises UsageError where peft is missing or a target is no linear layer of the model.
    """
    peft = _import_peft()
    targets, plain = _targets(model, config.targets)
    wanted = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha if config.alpha is not None else 2 * config.rank,
        target_modules=targets, exclude_modules=plain or None, task_type="CAUSAL_LM",
    )  # fmt: skip
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):  # peft draws from the global generators
        peft.inject_adapter_in_model(wanted, model, adapter_name=ADAPTER)
    with torch.no_grad():
        for name, layer in layers(model).items():
            start, draw = layer.lora_A[ADAPTER].weight, _generator(seed, name)
            start.copy_(nn.init.kaiming_uniform_(torch.empty(start.shape), a=math.sqrt(5), generator=draw))


def check(config: LoraConfig) -> None:
    """UsageError where options of adapters are given but no adapters."""
    if not config.rank and (config.alpha is not None or config.targets):
        raise UsageError("--lora.alpha and --lora.targets say what adapters are like: give --lora.rank, too")


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/lora/{name}".encode(), digest_size=6).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _targets(model: Any, wanted: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Last names of the layers that get adapters, and the full names of those that get none.

    These are heads, and the layers of a vision tower, to which vLLM takes no adapters.
    """
    from transformers.pytorch_utils import Conv1D

    from agents.critic import decoder_of  # which imports this module

    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head]
    tower = linear.difference(heads, _within(model, decoder_of(model)))
    known = sorted({name.rpartition(".")[2] for name in linear.difference(heads, tower)})
    for name in wanted:
        if name in {head.rpartition(".")[2] for head in heads}:
            raise UsageError(f"--lora.targets {name}: the language-model head gets no adapter")
        if name not in known:
            raise UsageError(
                f"--lora.targets: no linear layer is called `{name}`{nearest(name, known)}; "
                f"there are: {', '.join(known)}"
            )
    return sorted(wanted or known), [*heads, *sorted(tower)]


def _within(model: Any, part: nn.Module) -> set[str]:
    """Names of the modules of a part of the model."""
    inside = set(map(id, part.modules()))
    return {name for name, module in model.named_modules() if id(module) in inside}


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError("adapters need peft: pip install 'palaestra[lora]'") from error
    return peft


# ---------------------------------------------------------------------- what an adapted model is made of


def layers(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by the name that the plain layer had; empty for a model without any."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}


def weight_of(layer: Any) -> Tensor:
    """A linear layer's weight, its adapter's product added where it has one; the layer's own tensor where not."""
    if not hasattr(layer, "base_layer"):
        return layer.weight
    base = layer.base_layer.weight
    return base + layer.get_delta_weight(ADAPTER).to(base.dtype)


def frozen(model: nn.Module) -> frozenset[int]:
    """Identities of the base weights under adapters: parameters and buffers that are never trained."""
    if not layers(model):
        return frozenset()
    tensors = (*model.parameters(), *model.buffers())
    return frozenset(id(t) for t in tensors if not t.requires_grad)


def base_names(model: nn.Module) -> frozenset[str]:
    """Names in the state of what is never trained under adapters; none for a model without any."""
    if not layers(model):
        return frozenset()
    return frozenset(name for name, t in model.state_dict(keep_vars=True).items() if not t.requires_grad)


def twin(module: Any, base: frozenset[int]) -> Any:
    """A deep copy that shares the base weights: of an adapted model only the adapters are copied."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(t): t for t in tensors if id(t) in base})


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the base weights by name: what the adapters belong to."""
    from agents.models import digest_of

    state = model.state_dict(keep_vars=True)
    return digest_of({name: state[name] for name in base_names(model)})


# ---------------------------------------------------------------------- for others to use


def merged(model: Any) -> Any:
    """A plain model that computes the same; whatever has no adapter is shared with `model`."""
    return _plain(model, lambda layer: nn.Parameter(weight_of(layer).detach(), requires_grad=False))


def without(model: Any) -> Any:
    """The plain model under the adapters, its tensors shared with `model`."""
    return _plain(model, lambda layer: layer.base_layer.weight)


@contextmanager
def beneath(model: Any, sharding: Sharding | None = None) -> Iterator[Any]:
    """The plain model under the adapters, trainable for as long as the `with` lasts; a model without any is itself.

    sharding: how the model is split over processes. The plain model then has weights of its own, equally split, which
        become those under the adapters at the end of the `with`.
    """
    if not layers(model):
        yield model
        return
    if sharding is None:
        plain = without(model)
        try:
            yield plain.requires_grad_(True)
        finally:
            plain.requires_grad_(False)
        return
    from agents.sharding import local  # which imports this module

    with sharding.shard(model).gathered("cpu") as whole:
        plain = without(whole).requires_grad_(True)
    with sharding.lent(plain):
        yield plain
        state = base_state(model)
        for name, tensor in plain.state_dict().items():
            local(state[name]).copy_(local(tensor))


def base_state(model: Any) -> dict[str, Tensor]:
    """State of the plain model under the adapters, by its names; the tensors are the model's own, detached."""
    state = model.state_dict()
    return {name.replace(".base_layer.", "."): state[name] for name in base_names(model)}


def _plain(model: Any, weight: Callable[[Any], nn.Parameter]) -> Any:
    """A model without adapters that shares its tensors with `model`, but for the weights of adapted layers."""
    everything = (*model.parameters(), *model.buffers())
    plain = copy.deepcopy(model, {id(t): t for t in everything})
    for name, layer in layers(plain).items():
        base = layer.base_layer
        base.weight = weight(layer)
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, base)
    del plain.peft_config
    return plain


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors under the names that peft's files have."""
    out = {}
    for name, layer in layers(model).items():
        for part in ("lora_A", "lora_B"):
            out[f"base_model.model.{name}.{part}.weight"] = getattr(layer, part)[ADAPTER].weight.detach()
    return out


def save(model: Any, folder: Path, base: str | None = None) -> None:
    """An adapter folder as peft and vLLM read it; `base` names the model it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.base_model_name_or_path = base
    config.save_pretrained(folder)
    plain = {name: t.to("cpu", copy=True).contiguous() for name, t in adapter_state(model).items()}
    save_file(plain, folder / "adapter_model.safetensors", {"format": "pt"})
