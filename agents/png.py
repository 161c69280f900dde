"""Images as PNG files: in addresses (`data:` URIs), and back from addresses and files that somebody else wrote."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path

from PIL import Image

from tools.images import flat

MOST_PIXELS = 50_000_000
"""Larger images are not decoded: a small file can claim to hold gigabytes."""
_HEAD = "base64,"


class ImageFileError(ValueError):
    """An address or a file that holds no image, or too large a one."""


def encoded(image: Image.Image) -> bytes:
    """The RGB pixels as a PNG file, packed lightly: it is written far more often than it is kept."""
    file = io.BytesIO()
    flat(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


def address(image: Image.Image) -> str:
    """A `data:` URI of the image."""
    return "data:image/png;base64," + base64.b64encode(encoded(image)).decode("ascii")


def opened(url: str, folder: Path) -> Image.Image:
    """The image of a `data:` URI, or of a file named from `folder` on, RGB.

    Raises ImageFileError that says what is wrong with it.
    """
    if url.startswith(("http://", "https://")):
        raise ImageFileError(f"{url[:60]}: images are not fetched; give a file or a data: URI")
    try:
        if url.startswith("data:"):
            source = io.BytesIO(base64.b64decode(url.partition(_HEAD)[2], validate=True))
        else:
            source = io.BytesIO((folder / url.removeprefix("file://")).read_bytes())
        with Image.open(source) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ImageFileError(f"an image of {image.width} x {image.height} pixels; {MOST_PIXELS:,} are the most")
            return flat(image)
    except (OSError, binascii.Error, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageFileError(f"{url[:60]!r} holds no image: {error}") from error
