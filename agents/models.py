"""Where policies come from: the bundled tiny model, a run's export, a local folder, or a Hugging Face id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agents import lora
from agents.chat import ChatFormat
from agents.cli import UsageError
from agents.pictures import PictureError, PictureFormat
from agents.sharding import full

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def load_model(spec: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A causal LM (or one that also reads images) in evaluation mode and its tokenizer.

    `spec` is `bundled`, the folder of a run, the folder of a transformers model, or a Hugging Face id.
    Raises UsageError saying what is missing.
    """
    place = locate(spec)
    _quiet()
    model, tokenizer = _bundled() if place is None else _from_transformers(place, dtype)
    if model.get_output_embeddings() is None:
        raise UsageError(f"{spec}: {type(model).__name__} has no language-model head")
    return model.to(dtype).eval(), tokenizer


def chat_of(model: Any, tokenizer: Any) -> ChatFormat:
    """How messages become tokens for a model that `load_model` gave; UsageError where its pictures cannot be read."""
    return _chat(tokenizer, model.config, model.name_or_path, model.get_output_embeddings().weight.shape[0])


def load_chat(spec: str) -> ChatFormat:
    """What `chat_of` gives for the model that `load_model` would load, without its weights; UsageError likewise."""
    from transformers import AutoConfig, AutoTokenizer

    from agents import bundled

    place = locate(spec) or str(bundled.path())
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(place), AutoConfig.from_pretrained(place)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise UsageError(f"cannot load the tokenizer of `{spec}`: {first}") from error
    return _chat(tokenizer, config, place, int(config.get_text_config().vocab_size))


def _chat(tokenizer: Any, config: Any, place: str, vocab_size: int) -> ChatFormat:
    try:
        pictures = PictureFormat.of(config, place)
    except PictureError as error:
        raise UsageError(str(error)) from error
    return ChatFormat(tokenizer, vocab_size=vocab_size, pictures=pictures)


def locate(spec: str) -> str | None:
    """What transformers should open for `spec`; None for the bundled model."""
    if spec == "bundled":
        return None
    path = Path(spec)
    if path.is_dir():
        if (path / "model" / "config.json").is_file():
            return str(path / "model")
        if (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir():
            raise UsageError(
                f"{spec} is a run without an exported model; finish it first: python -m agents.train --resume {spec}"
            )
        if not (path / "config.json").is_file():
            raise UsageError(f"{spec} is not a model folder: it has no config.json")
        return str(path)
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise UsageError(f"there is no folder {spec}")
    return spec


def _bundled() -> tuple[Any, Any]:
    from agents import bundled

    return bundled.load()


def _quiet() -> None:
    """No progress bars of transformers: they would tear the display apart."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _from_transformers(place: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        sees = getattr(AutoConfig.from_pretrained(place), "vision_config", None) is not None
        kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model = kind.from_pretrained(place, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise UsageError(
            f"cannot load the model `{place}`: {first}. Give `bundled`, a folder, or a Hugging Face id "
            f"(which needs network, or the model in the local cache)"
        ) from error
    return model, tokenizer


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights, by name: equal for equal models, whatever file they came from."""
    return digest_of(model.state_dict())


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(full(tensor).detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def trained_parameters(model: nn.Module) -> int:
    """Number of those that are trained: all, or the adapters'."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def is_tiny(model: nn.Module) -> bool:
    """Small enough that a second thread costs more in barriers than it computes."""
    return parameters(model) < 20_000_000


def export(
    model: Any, tokenizer: Any, folder: Path, card: Iterable[str] = (), pictures: PictureFormat | None = None
) -> None:
    """`save_pretrained` of model, tokenizer and image processor, readable by any transformers program.

    Adapters are merged.
    """
    _quiet()
    (lora.merged(model) if lora.layers(model) else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if pictures is not None:
        pictures.save(folder)
    (folder / "README.md").write_text("\n".join(card) + "\n", encoding="utf-8")
