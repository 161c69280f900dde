"""Small random vision-language models of real architectures, and pictures for them.

`python -m tests.agents.seeing FOLDER` writes one that can be trained.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from agents.pictures import PictureFormat
from envs import Task, Verdict
from tests.agents.small import spread
from tests.agents.tokenizers import byte_bpe
from tests.envs.spot import Spot

VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
KINDS = ("qwen2_5_vl", "qwen3_vl")
"""Rotation by sections with windowed towers, and interleaved rotation with deep-stacked features."""


def seeing_tokenizer() -> Any:
    """The byte-level tokenizer with a vision model's tokens."""
    tokenizer = copy.deepcopy(byte_bpe())  # that one is shared
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION)})
    return tokenizer


def seeing_model(
    kind: str, tokenizer: Any, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 4.0
) -> Any:
    """A random model of about 400,000 parameters.

    Its weights are so large that log-probs depend visibly on what it is shown; with scale 1 it can be trained.
    """
    start, end, image, video = (tokenizer.convert_tokens_to_ids(token) for token in VISION)
    ids = {
        "image_token_id": image, "video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end
    }  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
    own = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    }  # fmt: skip
    vision: dict[str, Any] = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2}
    vision |= {"out_hidden_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if kind == "qwen2_5_vl":
        rope["mrope_section"] = [4, 6, 6]
        vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
        config = Qwen2_5_VLConfig(
            text_config={**own, "rope_parameters": rope}, vision_config=vision, tie_word_embeddings=False, **ids
        )
        return spread(Qwen2_5_VLForConditionalGeneration, config, dtype, seed, scale)
    rope |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    vision |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(
        text_config={**own, "head_dim": 32, "rope_parameters": rope}, vision_config=vision,
        tie_word_embeddings=False, **ids,
    )  # fmt: skip
    return spread(Qwen3VLForConditionalGeneration, config, dtype, seed, scale)


def processor_of(kind: str) -> Any:
    """Its image processor: pictures of 1 to 16 placeholder tokens."""
    patch = 14 if kind == "qwen2_5_vl" else 16
    side = 2 * patch
    return Qwen2VLImageProcessorPil(patch_size=patch, size={"shortest_edge": side**2, "longest_edge": 16 * side**2})


def picture_format(model: Any, kind: str) -> PictureFormat:
    """Pictures for a model."""
    config = model.config
    return PictureFormat(
        processor_of(kind), pad_id=config.image_token_id, start_id=config.vision_start_token_id,
        end_id=config.vision_end_token_id,
    )  # fmt: skip


def seeing_folder(
    folder: Path, kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 4.0
) -> Path:
    """A model, its tokenizer and its processor as transformers saves them."""
    tokenizer = seeing_tokenizer()
    seeing_model(kind, tokenizer, dtype, seed, scale).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor_of(kind).save_pretrained(folder)
    return folder


def scene(colour: str, width: int = 56, height: int = 56, at: float = 0.5) -> Image.Image:
    """A disc on grey."""
    image = Image.new("RGB", (width, height), "#888888")
    x, y, r = at * width, height / 2, min(width, height) / 4
    ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=colour)
    return image


class Wordy(Spot):
    """Pays for length, too, so that a policy that is never right has something to learn from."""

    def judge(self, task: Task, final: str | None) -> Verdict:
        verdict = super().judge(task, final)
        return replace(verdict, reward=max(verdict.reward, len(final or "") % 8 / 10))


if __name__ == "__main__":
    print(seeing_folder(Path(sys.argv[1]), "qwen3_vl", scale=1.0))
