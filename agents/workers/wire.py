"""What travels between a process and its environment workers: plain data as JSON, in messages with a length.

Nothing that comes out of a worker can run code here: it read text that a model wrote, so it is trusted with the
verdicts it gives and with nothing else. JSON is extended by tuples, mappings with any keys, bytes, numpy arrays and
pictures; arrays and pictures travel as their raw bytes, and come back equal to the bit (pictures with a palette as
RGBA).
"""

from __future__ import annotations

import base64
import json
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_MESSAGE = 256 * 1024 * 1024
_HEADER = struct.Struct(">I")
_TAG = "$"
_LEAVES = frozenset({str, int, float, bool, type(None)})
MAX_PIXELS = 16_000_000
"""Pixels of one picture."""
_MODES = frozenset(
    "1 L LA La RGB RGBA RGBa RGBX CMYK YCbCr HSV LAB I F I;16 I;16L I;16B".split()  # all that need no palette
)


def encode(value: Any) -> bytes:
    """Plain data as bytes. TypeError names what is none; ValueError a picture that is too large."""
    return _WRITER.encode(_plain(value)).encode()


def decode(data: bytes | bytearray) -> Any:
    """Inverse of `encode`. ValueError for anything that `encode` does not write."""
    try:
        return _READER.decode(data.decode())
    except (KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"not a message of a worker: {error!r}") from error


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in _LEAVES:
        return value
    if kind is list:
        return [x if type(x) in _LEAVES else _plain(x) for x in value]
    if kind is not dict:
        return _tagged(value)
    out = {}
    for key, x in value.items():
        if type(key) is not str or key == _TAG:
            return _tagged(value)
        out[key] = x if type(x) in _LEAVES else _plain(x)
    return out


def _tagged(value: Any) -> Any:
    if isinstance(value, tuple):
        return {_TAG: "tuple", "v": [_plain(x) for x in value]}
    if isinstance(value, Mapping):
        return {_TAG: "dict", "v": [[_plain(k), _plain(x)] for k, x in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {_TAG: "bytes", "v": _text(bytes(value))}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {_TAG: "array", "type": value.dtype.str, "shape": list(value.shape), "v": _text(value.tobytes())}
    if isinstance(value, np.generic) and value.dtype.kind in "biufU":
        return value.item()
    if isinstance(value, str | int | float):
        return next(t(value) for t in (str, int, float) if isinstance(value, t))
    if isinstance(value, list):
        return [_plain(x) for x in value]
    if hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):  # a picture of Pillow's
        _check_size(value.size)
        picture = value if value.mode in _MODES else value.convert("RGBA")
        return {_TAG: "image", "mode": picture.mode, "size": list(picture.size), "v": _text(picture.tobytes())}
    raise TypeError(
        f"a {type(value).__name__} cannot leave an environment worker: messages, scores and facts are plain data"
    )


def _rich(item: dict[str, Any]) -> Any:
    """What a JSON object stands for."""
    if _TAG not in item:
        return item
    kind = item[_TAG]
    if kind == "tuple":
        return tuple(item["v"])
    if kind == "dict":
        return dict(item["v"])
    data = base64.b64decode(item["v"], validate=True)
    if kind == "bytes":
        return data
    if kind == "array":
        dtype = np.dtype(str(item["type"]))
        if dtype.kind not in "biufc":
            raise ValueError(f"an array of {dtype} is not plain data")
        return np.frombuffer(data, dtype).reshape(item["shape"]).copy()
    if kind == "image" and item["mode"] in _MODES:
        from PIL import Image

        width, height = item["size"]
        _check_size((width, height))
        return Image.frombytes(item["mode"], (width, height), data)
    raise ValueError(f"unknown kind of value {str(kind)[:40]!r}")


def _check_size(size: tuple[int, int]) -> None:
    """Raise ValueError for a picture that nobody should make room for."""
    width, height = size
    if not (type(width) is type(height) is int and width >= 0 and height >= 0 and width * height <= MAX_PIXELS):
        raise ValueError(
            f"a picture of {width} x {height} pixels cannot leave an environment worker: "
            f"at most {MAX_PIXELS} pixels do; show a smaller one"
        )


_WRITER = json.JSONEncoder(separators=(",", ":"))
_READER = json.JSONDecoder(object_hook=_rich)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


class Channel:
    """Messages over one end of a pair of sockets, one at a time in each direction."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        end.setblocking(True)
        self._limit_s = 0.0
        self._buffer = memoryview(bytearray(1 << 16))

    def send(self, message: bytes, timeout_s: float = 0.0) -> None:
        """Send. TimeoutError where the other side does not read for so long (0: wait); OSError where it is gone."""
        if len(message) > MAX_MESSAGE:
            raise ValueError(f"a message of {len(message)} bytes is too long for an environment worker")
        self._within(timeout_s)
        try:
            self.end.sendall(_HEADER.pack(len(message)) + message)
        except BlockingIOError:
            raise TimeoutError from None

    def receive(self, timeout_s: float = 0.0) -> bytes:
        """The next message.

        Raises:
            TimeoutError: it is not there within `timeout_s` (0: wait).
            EOFError: the other side is gone, or writes nonsense.
        """
        self._within(timeout_s)
        until = time.monotonic() + timeout_s if timeout_s else float("inf")
        got = self._read(self._buffer, until)
        while got < _HEADER.size:
            got += self._read(self._buffer[got:], until)
        size = _HEADER.unpack_from(self._buffer)[0] + _HEADER.size
        if got == size:
            return bytes(self._buffer[_HEADER.size : size])
        if size > MAX_MESSAGE + _HEADER.size or got > size:
            raise EOFError(f"{got} bytes of a message of {size}")
        whole = memoryview(bytearray(size))
        whole[:got] = self._buffer[:got]
        while got < size:
            got += self._read(whole[got:], until)
        return bytes(whole[_HEADER.size :])

    def _read(self, into: memoryview, until: float) -> int:
        try:
            got = self.end.recv_into(into)
        except BlockingIOError:
            raise TimeoutError from None
        if not got:
            raise EOFError("the connection was closed")
        if time.monotonic() > until:
            raise TimeoutError
        return got

    def _within(self, limit_s: float) -> None:
        """Let the system wait no longer than this for a single read or write: cheaper than asking it before each."""
        if limit_s != self._limit_s:
            seconds = int(limit_s)
            value = struct.pack("ll", seconds, max(int((limit_s - seconds) * 1e6), int(0 < limit_s < 1)))
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self.end.setsockopt(socket.SOL_SOCKET, option, value)
            self._limit_s = limit_s

    def close(self) -> None:
        """Close this end."""
        self.end.close()
