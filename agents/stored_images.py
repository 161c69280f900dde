"""The images of stored episodes: files named by a hash of their pixels, each written once."""

from __future__ import annotations

import hashlib
import io
import os
import re
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from tools.images import is_image

IMAGES = "images"
_NAME = re.compile(r"[0-9a-f]{32}")
_MODES = frozenset({"1", "L", "LA", "RGB", "RGBA", "I;16"})  # what a PNG file gives back as it was


class StoreError(ValueError):
    """A file that is no store, or a record or an image that cannot be read; the message names it."""


class ImageFiles:
    """Images by name in a folder, which is made with the first of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: set[str] = set()
        self._open: weakref.WeakValueDictionary[str, Image.Image] = weakref.WeakValueDictionary()

    def keep(self, image: Image.Image) -> str:
        """Write an image unless it is there, atomically; returns its name. OSError: the disk is full."""
        image = _plain(image)
        name = _name(image)
        path = self._path(name)
        if name in self._written or path.is_file():
            self._written.add(name)
            return name
        self._folder.mkdir(exist_ok=True)
        beside = path.with_name(f".{name}.{os.getpid()}")
        try:
            image.save(beside, "PNG")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        self._written.add(name)
        return name

    def load(self, name: Any) -> Image.Image:
        """An image by name; who holds it shares it with whoever asks next.

        Raises StoreError where its file is missing or damaged, or the name is none that `keep` gives.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise StoreError(f"{str(name)[:80]!r} names no stored image")
        image = self._open.get(name)
        if image is None:
            image = self._read(name)
            self._open[name] = image
        return image

    def _read(self, name: str) -> Image.Image:
        path = self._path(name)
        try:
            image = _plain(Image.open(io.BytesIO(path.read_bytes()), formats=["PNG"]))
        except FileNotFoundError:
            raise StoreError(f"the image {path} is missing") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise StoreError(f"the image {path} cannot be read: {error}") from error
        if _name(image) != name:
            raise StoreError(f"the image {path} is damaged: its pixels are others than when it was stored")
        return image

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.png"


def stored(message: Mapping[str, Any], keep: Callable[[Any], str]) -> dict[str, Any]:
    """A message whose images are kept, and named in their places."""

    def part(x: Any) -> Any:
        image: Any = x.get("image") if isinstance(x, Mapping) else None
        if not is_image(image) or 0 in image.size:
            return x
        return {**x, "image": {"png": keep(image), "width": image.width, "height": image.height}}

    return _with_parts(message, part)


def restored(message: Mapping[str, Any], load: Callable[[Any], Image.Image | None]) -> dict[str, Any]:
    """Inverse of `stored`; images of which a store of old kept the size only, or that are not had, stay as they are."""

    def part(x: Any) -> Any:
        image: Any = x.get("image") if isinstance(x, Mapping) else None
        found = load(image["png"]) if isinstance(image, Mapping) and "png" in image else None
        return x if found is None else {**x, "image": found}

    return _with_parts(message, part)


def _with_parts(message: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": list(map(change, content))} if isinstance(content, list | tuple) else dict(message)


def _plain(image: Image.Image) -> Image.Image:
    """The pixels alone, without a file's notes; RGB or RGBA for modes that PNG does not have."""
    if image.mode == "La":  # which Pillow converts to LA only
        image = image.convert("LA")
    if image.mode not in _MODES:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return Image.frombytes(image.mode, image.size, image.tobytes())


def _name(image: Image.Image) -> str:
    shape = f"{image.mode} {image.width} {image.height} ".encode()
    return hashlib.blake2b(shape + image.tobytes(), digest_size=16).hexdigest()
