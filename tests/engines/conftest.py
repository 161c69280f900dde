"""Small models that vLLM takes on a CPU, and an engine that is started once for the tests of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from agents.chat import ChatFormat
from agents.models import load_model
from tests.agents.small import qwen3
from tests.agents.tokenizers import byte_bpe

torch.set_num_threads(1)


def small_model(seed: int = 0, tied: bool = False):
    """A random Qwen3 of 100,000 parameters in float32, its heads of a width that vLLM has kernels for."""
    return qwen3(
        len(byte_bpe()), torch.float32, seed, hidden_size=64, intermediate_size=96, head_dim=32,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Warm starts of one test are not those of another."""
    monkeypatch.setenv("PALAESTRA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer."""
    return byte_bpe()


@pytest.fixture(scope="session")
def chat(tokenizer):
    """ChatML over it."""
    return ChatFormat(tokenizer, vocab_size=len(tokenizer))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer) -> Path:
    """A small model and its tokenizer as transformers saves them."""
    folder = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(model_folder):
    """The model of `model_folder`."""
    return load_model(str(model_folder))[0]
