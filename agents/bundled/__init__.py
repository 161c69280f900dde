"""The bundled tiny model: a Qwen3 of a million parameters that copies from its context and writes tool calls.

It is built from text that the project generates (`python -m agents.bundled build`) and knows no facts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM


MODEL = Path(__file__).parent / "model"


def path() -> Path:
    """The folder of the shipped model; `transformers.AutoModelForCausalLM.from_pretrained` opens it."""
    return MODEL


def load() -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """(float32 model in eval mode, tokenizer)."""
    from agents.bundled import model

    return model.read(path())
