"""The command line that `agents.serve` starts vLLM with, and the model that it serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agents import serve
from agents.cli import UsageError
from tests.agents.small import qwen3
from tests.agents.test_train import model_folder, own_cache  # noqa: F401  (fixtures)
from tests.agents.tokenizers import byte_bpe


def printed(capsys, *argv: str) -> list[str]:
    assert serve.main(["--print-only", *argv]) == 0
    return capsys.readouterr().out.split()


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_what_training_needs_is_on_the_command_line(capsys, tmp_path):
    words = printed(capsys, "--port", "8123", "--folder", str(tmp_path), "--", "--max-num-batched-tokens", "4096")
    assert value(words, "--logprobs-mode") == "processed_logprobs" and "VLLM_SERVER_DEV_MODE=1" in words
    assert (value(words, "--port"), value(words, "--max-model-len")) == ("8123", "512")
    assert value(words, "--served-model-name") == "bundled" and value(words, "--model") == str(tmp_path)
    assert words[-2:] == ["--max-num-batched-tokens", "4096"]
    assert "--enable-lora" not in words and not any("LORA" in w for w in words)
    words = printed(capsys, "--lora-rank", "12", "--folder", str(tmp_path))
    assert "--enable-lora" in words and value(words, "--max-lora-rank") == "16"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in words


def test_a_tied_head_is_written_as_its_own_matrix(capsys, tmp_path):
    """vLLM keeps a tied head's old matrix when weights are reloaded."""
    tied = qwen3(len(byte_bpe()), torch.float32, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    byte_bpe().save_pretrained(tmp_path / "tied")
    words = printed(capsys, "--model", str(tmp_path / "tied"), "--folder", str(tmp_path / "out"))
    assert value(words, "--model") == str(tmp_path / "out")
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    tensors = {name: t for file in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(file).items()}
    assert tensors.keys() == qwen3(len(byte_bpe())).state_dict().keys()
    assert torch.equal(tensors["lm_head.weight"], tied.lm_head.weight)


def test_an_untied_folder_is_served_as_it_is(capsys, model_folder):  # noqa: F811
    words = printed(capsys, "--model", model_folder, "--dtype", "bfloat16")
    assert value(words, "--model") == model_folder and value(words, "--dtype") == "bfloat16"
    assert Path(model_folder).is_dir() and value(words, "--max-model-len") == "128"


def test_without_vllm_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'palaestra\[vllm\]'"):
        serve.main([])
