"""The architecture of the bundled model, and how it is written and read."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from agents.bundled import circuit
from agents.bundled.chat import END, STOP
from agents.bundled.tokenizer import MAX_LENGTH, token_id

WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, MLP = 128, 4, 4, 4, 32, 256


def create(tokenizer: PreTrainedTokenizerBase, seed: int, **changes: int) -> Qwen3ForCausalLM:
    """A fresh float32 model with an induction circuit; the global random generator stays as it was."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        intermediate_size=MLP,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=token_id(tokenizer, STOP),
        pad_token_id=token_id(tokenizer, END),
    )
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    circuit.initialise(model, tokenizer, seed)
    return model


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes weights as bfloat16 safetensors, configuration and tokenizer; `model` itself stays float32."""
    stored = copy.deepcopy(model).bfloat16()
    stored.generation_config.eos_token_id = [token_id(tokenizer, STOP), token_id(tokenizer, END)]
    stored.generation_config.pad_token_id = token_id(tokenizer, END)
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read(folder: Path) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """(float32 model in eval mode, tokenizer) from a folder that `save` wrote."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(folder)
