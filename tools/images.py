"""Images that tools return: bounded before a pixel is read, RGB from here on, never pickled.

Pillow is not imported here: who holds an image has imported it, and nobody else pays for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

MAX_IMAGES = 8
"""Images of one result."""
MAX_SIDE = 4_096
"""Pixels along one side of an image."""
MAX_PIXELS = 4_000_000
"""Pixels of one image."""


class TooLarge(ValueError):
    """More images, or larger ones, than a result may hold."""


def is_image(value: Any) -> bool:
    """Whether `value` is a PIL image."""
    kind = getattr(sys.modules.get("PIL.Image"), "Image", None)  # None also while another thread imports it
    return kind is not None and isinstance(value, kind)


def parts_of(value: Any) -> list[Any] | None:
    """What a tool returned as texts and RGB images in order; None where no image is in it.

    Raises:
        TooLarge: it breaks a bound. ValueError: an image has no pixels. TypeError: something else than text
            stands beside an image.
    """
    parts = [value] if is_image(value) else value
    if not isinstance(parts, (list, tuple)) or not any(map(is_image, parts)):
        return None
    images = [part for part in parts if is_image(part)]
    if len(images) > MAX_IMAGES:
        raise TooLarge(f"{len(images)} images, at most {MAX_IMAGES} are allowed")
    for image in images:
        check_size(*image.size)
    for part in parts:
        if not isinstance(part, str) and not is_image(part):
            raise TypeError(f"a tool returns texts and images in a list, no {type(part).__name__}")
    return [rgb(part) if is_image(part) else part for part in parts if part != ""]


def check_size(width: int, height: int) -> None:
    """Raise TooLarge, or ValueError for no pixels, unless an image of this size may be part of a result."""
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels shows nothing")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise TooLarge(
            f"an image of {width} x {height} pixels, at most {MAX_SIDE} a side and {MAX_PIXELS} in all are allowed"
        )


def rgb(image: Any) -> Any:
    """An RGB copy of an image within the bounds; see `flat`."""
    image.load()
    check_size(*image.size)  # some files say their size only when they are loaded
    return flat(image)


def flat(image: Any) -> Any:
    """An RGB copy. What is transparent shows white; 16-bit greys keep their upper 8 bits."""
    from PIL import Image

    if image.mode.startswith("I;16"):  # Pillow would clip them at 255
        image = image.convert("I").point(lambda grey: grey * (1 / 256)).convert("L")
    elif image.has_transparency_data:
        if image.mode == "La":  # which Pillow converts to LA only
            image = image.convert("LA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    plain = Image.new("RGB", image.size)  # without the file, the notes and the colour profile of the original
    plain.paste(image.convert("RGB"))
    return plain


def words_of(parts: Sequence[Any]) -> str:
    """The texts among parts, with a space between two."""
    return " ".join(part for part in parts if isinstance(part, str))


def clip(parts: Sequence[Any], limit: int) -> list[Any]:
    """The parts with the first `limit` characters of their words; texts of which none is left are left out."""
    kept: list[Any] = []
    left = limit
    for part in parts:
        if isinstance(part, str):
            part = part[: max(0, left)]
            left -= len(part) + 1
        if part != "":
            kept.append(part)
    return kept
