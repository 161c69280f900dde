"""Tools that return images, good and bad; importable, so that a worker process can run them."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image


def pattern(mode: str, width: int = 7, height: int = 5) -> Image.Image:
    """an image whose pixels all differ, in any mode"""
    size = len(Image.new(mode, (width, height)).tobytes())
    return Image.frombytes(mode, (width, height), bytes((37 * i) % 251 for i in range(size)))


def show(mode: str) -> Any:
    """an image"""
    return pattern(mode)


def mixed(words: int, images: int) -> Any:
    """texts and images by turns"""
    return ["x" * words, *(part for i in range(images) for part in (pattern("RGB", 2 + i, 3), f"after {i}"))]


def many(count: int) -> Any:
    """images"""
    return [Image.new("L", (4, 4))] * count


def sized(width: int, height: int) -> Any:
    """an image of any size"""
    return Image.new("RGB", (width, height))


def huge() -> Any:
    """an image file of 20,000 x 20,000 pixels, opened and not read"""
    Image.MAX_IMAGE_PIXELS = None
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()))


def torn() -> Any:
    """an image file that ends too early"""
    file = io.BytesIO()
    pattern("RGB", 64, 64).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:80]))


def hidden() -> Any:
    """an image inside other data"""
    return {"picture": pattern("RGB")}


def beside() -> Any:
    """an image beside a number"""
    return (pattern("RGB"), 3)
