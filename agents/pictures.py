"""Pictures as a vision-language model reads them: one place makes the placeholder tokens and the pixel tensors.

Engine and trainer both take what stands here, so that they cannot disagree. A picture is resized once, to a size that
the model's patches fill exactly; from then on nobody resizes it again (an engine that has a processor of its own is
handed the resized one). Its placeholders stand in the token record already expanded, between two tokens that mark
beginning and end, so that the runs of placeholder tokens in a row are its pictures, in order.

The families that are read are those whose processor cuts an image into one flat list of patches: Qwen2-VL,
Qwen2.5-VL, Qwen3-VL and what is built like them. Resizing and patches are Pillow's and NumPy's: no torchvision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tools.images import flat, is_image

_CACHED = 1 << 28  # bytes of patches kept: the members of a group open with the same pictures


class PictureError(ValueError):
    """A picture that cannot be read, or a token record whose placeholders do not fit its pictures."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture in the size that the model sees."""

    key: int
    """Names its pixels: 63 bits of a hash, never 0; equal for equal pixels, in any process or run."""
    image: Image.Image
    """RGB, resized: both sides are multiples of the model's merged patch."""
    patches_PD: Tensor
    """What the vision tower takes, float32: P patches of D = channels * frames * side^2 normalised values."""
    grid: tuple[int, int, int]
    """Frames, rows and columns of patches; their product is P."""
    length: int
    """Placeholder tokens: P / merge^2."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, for checkpoints."""
        rgb_HW3 = torch.from_numpy(np.array(self.image))
        grid = list(self.grid)
        return {"key": self.key, "rgb_HW3": rgb_HW3, "patches_PD": self.patches_PD, "grid": grid, "length": self.length}

    def __reduce__(self) -> tuple[Any, ...]:
        # Plain bytes: torch hands tensors to other processes through shared memory, for which these must be relatives.
        pixels = (self.image.size, self.image.tobytes())
        return _unpickled, (self.key, *pixels, self.patches_PD.numpy(), self.grid, self.length)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Picture:
        """Inverse of `state_dict`."""
        image = Image.fromarray(state["rgb_HW3"].numpy(), "RGB")
        frames, rows, columns = state["grid"]
        return cls(state["key"], image, state["patches_PD"], (frames, rows, columns), state["length"])


class PictureFormat:
    """Turns images into `Picture`s and placeholder ids.

    Args:
        processor: a transformers image processor of the Qwen-VL kind.
        pad_id: the placeholder token. start_id, end_id: what stands before and after a picture's placeholders.
    """

    def __init__(self, processor: Any, *, pad_id: int, start_id: int, end_id: int):
        self.processor, self.pad_id, self.start_id, self.end_id = processor, pad_id, start_id, end_id
        self.merge = int(processor.merge_size)
        self.side = int(processor.patch_size) * self.merge
        self._known: dict[bytes, Picture] = {}
        self._held = 0

    @classmethod
    def of(cls, config: Any, place: str) -> PictureFormat | None:
        """For a model of this configuration, whose files lie at `place`; None for one that reads no pictures.

        Raises PictureError where the model's processor is of a kind that is not read.
        """
        if getattr(config, "vision_config", None) is None:
            return None
        from transformers import AutoImageProcessor

        ids: list[Any] = [getattr(config, f"{name}_token_id", None) for name in ("image", "vision_start", "vision_end")]
        try:
            processor = AutoImageProcessor.from_pretrained(place, backend="pil")
        except (OSError, ValueError, ImportError) as error:
            first = str(error).strip().split("\n")[0]
            raise PictureError(f"{place}: its image processor cannot be loaded ({first})") from error
        if not (hasattr(processor, "patchify") and hasattr(processor, "merge_size")) or None in ids:
            raise PictureError(
                f"{place}: pictures for a {type(config).__name__} are not read; the families that are: Qwen2-VL, "
                f"Qwen2.5-VL, Qwen3-VL"
            )
        return cls(processor, pad_id=ids[0], start_id=ids[1], end_id=ids[2])

    def read(self, image: Any) -> Picture:
        """The picture that a model sees of an image.

        Raises PictureError where it is none, has no pixels, or is too narrow for the model.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        if not is_image(image):
            raise PictureError(f"an image part holds a PIL image under `image`, got {type(image).__name__}")
        image = flat(image)
        name = _digest(image)
        known = self._known.get(name)
        if known is not None:
            return known
        size = self.processor.size
        try:
            height, width = smart_resize(
                image.height, image.width, self.side, min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]
            )
        except (ValueError, ZeroDivisionError) as error:
            raise PictureError(f"an image of {image.width} x {image.height} pixels: {error}") from error
        if image.size != (width, height):
            image = image.resize((width, height), self.processor.resample)
        cut = self.processor(images=[image], do_resize=False, return_tensors="pt")
        frames, rows, columns = cut["image_grid_thw"][0].tolist()
        picture = Picture(
            key=max(1, int.from_bytes(_digest(image)[:8], "little") >> 1),
            image=image,
            patches_PD=cut["pixel_values"].float(),
            grid=(frames, rows, columns),
            length=frames * rows * columns // self.merge**2,
        )
        self._held += picture.patches_PD.nbytes
        if self._held > _CACHED:
            self._known, self._held = {}, picture.patches_PD.nbytes
        self._known[name] = picture
        return picture

    def ids(self, picture: Picture) -> list[int]:
        """Tokens that stand for a picture."""
        return [self.start_id, *[self.pad_id] * picture.length, self.end_id]

    def folded(self, ids: Sequence[int]) -> list[int]:
        """The same tokens with one placeholder per picture, as engines want them that expand placeholders."""
        return [i for i, before in zip(ids, [-1, *ids], strict=False) if i != self.pad_id or before != self.pad_id]

    def save(self, folder: Path) -> None:
        """Write the processor's settings where `of`, vLLM and transformers find them."""
        self.processor.save_pretrained(folder)


def runs(ids: Sequence[int], pad_id: int) -> list[tuple[int, int]]:
    """(first token, number of tokens) of each run of placeholders."""
    found, at = [], 0
    for i, run in groupby(ids):
        n = sum(1 for _ in run)
        if i == pad_id:
            found.append((at, n))
        at += n
    return found


def placed(ids: Sequence[int], pictures: Sequence[Picture], pad_id: int) -> list[tuple[int, Picture]]:
    """(first placeholder, picture) of each picture in a row.

    Raises PictureError where the runs of placeholders are not exactly the pictures' in number and length.
    """
    found = runs(ids, pad_id)
    if [n for _, n in found] != [p.length for p in pictures]:
        raise PictureError(
            f"placeholders of {[n for _, n in found]} tokens stand for pictures of {[p.length for p in pictures]}"
        )
    return [(start, picture) for (start, _), picture in zip(found, pictures, strict=True)]


def _unpickled(
    key: int, size: tuple[int, int], rgb: bytes, patches_PD: np.ndarray, grid: tuple[int, int, int], length: int
) -> Picture:
    return Picture(key, Image.frombytes("RGB", size, rgb), torch.from_numpy(patches_PD), grid, length)


def _digest(image: Image.Image) -> bytes:
    """Names the pixels of an RGB image."""
    return hashlib.blake2b(f"{image.width} x {image.height} ".encode() + image.tobytes(), digest_size=16).digest()
