"""The images of a report: each distinct one once, small, bounded in all."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from tools.images import is_image

MAX_SIDE = 512
"""Pixels along the longer side of an image of the report."""
MAX_BYTES = 16_000_000
"""Characters of all images in base64; further images show their size."""
_LARGE = 100_000  # bytes of a PNG file above which an image is a JPEG


class Gallery:
    """Images, numbered as they come.

    Attributes:
        images: media type and base64 of each.
        left_out: distinct images for which there was no room.
    """

    def __init__(self) -> None:
        self.images: list[tuple[str, str]] = []
        self.left_out = 0
        self._numbers: dict[bytes, int | None] = {}
        self._room = MAX_BYTES

    def part(self, image: Any) -> dict[str, Any]:
        """What the page is told of an image: its size, and its number where it is in the report."""
        if is_image(image):
            return {"width": image.width, "height": image.height, "image": self._number(image)}
        known = image if isinstance(image, Mapping) else {}  # a stored image whose file is missing
        sides = [known.get(side) for side in ("width", "height")]
        width, height = (side if isinstance(side, int) else None for side in sides)
        return {"width": width, "height": height, "image": None}

    def _number(self, image: Image.Image) -> int | None:
        """Number of the image; None where there is no room for it."""
        if 0 in image.size:
            return None
        seen = image.convert("RGBA" if image.has_transparency_data else "RGB")
        key = hashlib.blake2b(f"{seen.mode} {seen.size} ".encode() + seen.tobytes(), digest_size=16).digest()
        if key not in self._numbers:
            kind, data = _small(seen)
            if len(data) > self._room:
                self.left_out += 1
                self._numbers[key] = None
            else:
                self._room -= len(data)
                self._numbers[key] = len(self.images)
                self.images.append((kind, data))
        return self._numbers[key]


def _small(image: Image.Image) -> tuple[str, str]:
    """(media type, base64) of an image within `MAX_SIDE`."""
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    kind = "image/png"
    if file.tell() > _LARGE and image.mode == "RGB":
        file, kind = io.BytesIO(), "image/jpeg"
        image.save(file, "JPEG", quality=85)
    return kind, base64.b64encode(file.getvalue()).decode("ascii")
