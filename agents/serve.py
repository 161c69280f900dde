"""`python -m agents.serve --model MODEL --port 8001`: a vLLM server that `--vllm.servers` can use.

Starts vLLM's OpenAI-compatible server with what training needs: log-probs after bans and temperature, routes that take
weights, room for adapters, and for a model that reads pictures the route that takes them beside token ids. A model
whose head is tied to its embeddings is written out with a head of its own first, because vLLM keeps a tied head's old
matrix when weights are reloaded. The command is printed, so that it can be adapted; everything after `--` is handed on
to vLLM.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agents import cli
from agents.cli import Count, Fraction, Natural, UsageError


@dataclass(frozen=True)
class ServeCommand:
    """A vLLM server for training and evaluation, on this machine's GPUs or its CPU."""

    model: str = "bundled"
    """bundled, a run or model folder, or a Hugging Face id: the model that the run starts from."""
    host: str = "127.0.0.1"
    """Address to listen at. Whoever reaches it can change the weights: keep it inside your network."""
    port: Natural = 8001
    """Port to listen at."""
    max_context: Natural | None = None
    """Tokens per episode at most; none: 512 for tiny models, else 4,096, or what the model has, as in training."""
    rows: Natural = 128
    """Episodes at the same time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and computation; as in training."""
    lora_rank: Count = 0
    """Take adapters of this rank; 0: whole weights."""
    tensor_parallel: Natural = 1
    """GPUs that the model is spread over."""
    memory: Fraction = 0.9
    """Share of each GPU's memory."""
    folder: str | None = None
    """Where a model with a head of its own is written, where that is needed; none: a new temporary folder."""
    print_only: bool = False
    """Print the command and stop."""


def main(argv: Sequence[str]) -> int:
    """The command: becomes the server."""
    ours, more = _split(argv)
    command = cli.parse(ServeCommand, ours, "python -m agents.serve")
    if not command.print_only and importlib.util.find_spec("vllm") is None:
        raise UsageError("serving needs vLLM: pip install 'palaestra[vllm]'")
    import torch

    gpu = torch.cuda.is_available()
    place, context, sees = prepare(command)
    variables, arguments = line(command, place, context, sees, gpu, more)
    print(" ".join([*(f"{k}={v}" for k, v in variables.items()), "python", *map(shlex.quote, arguments)]), flush=True)
    if not command.print_only:
        os.execve(sys.executable, [sys.executable, *arguments], {**os.environ, **variables})
    return 0


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our arguments, and those after `--`."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])


def prepare(command: ServeCommand) -> tuple[str, int, bool]:
    """What vLLM should open, the tokens per episode, and whether it reads pictures.

    Writes a model whose head is tied, or that is ours.
    """
    from transformers import AutoConfig

    from agents.models import DTYPES, chat_of, is_tiny, load_model, locate
    from agents.sync import write_model

    place = locate(command.model)
    config = AutoConfig.from_pretrained(place) if place is not None else None
    model: Any = None
    if config is None or config.tie_word_embeddings or config.get_text_config().tie_word_embeddings:
        model, tokenizer = load_model(command.model)
        folder = Path(command.folder or tempfile.mkdtemp(prefix="palaestra-serve-"))
        write_model(model, folder, DTYPES[command.dtype])
        tokenizer.save_pretrained(folder)
        pictures = chat_of(model, tokenizer).pictures
        if pictures is not None:
            pictures.save(folder)
        place, config = str(folder), model.config
    assert place is not None
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    tiny = model is not None and is_tiny(model)
    sees = getattr(config, "vision_config", None) is not None
    return place, command.max_context or min(512 if tiny else 4096, positions), sees


def line(
    command: ServeCommand, place: str, context: int, sees: bool, gpu: bool, more: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Environment variables and arguments of the server."""
    from agents.engines.vllm import most_pictures

    variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    arguments = [
        "-m", "vllm.entrypoints.openai.api_server", "--model", place, "--served-model-name", command.model,
        "--host", command.host, "--port", str(command.port), "--dtype", command.dtype,
        "--max-model-len", str(context), "--max-num-seqs", str(command.rows),
        "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
        "--tensor-parallel-size", str(command.tensor_parallel),
    ]  # fmt: skip
    if command.lora_rank:
        room = max(8, 1 << (command.lora_rank - 1).bit_length())  # a power of two, as vLLM wants it
        variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        arguments += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(room)]
    if sees:
        arguments += ["--enable-scale-out", "--limit-mm-per-prompt", json.dumps(most_pictures(context))]
    if gpu:
        arguments += ["--gpu-memory-utilization", str(command.memory)]
    else:
        variables |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
        arguments += ["--enforce-eager"]
    return variables, [*arguments, *more]


if __name__ == "__main__":
    cli.run(main)
