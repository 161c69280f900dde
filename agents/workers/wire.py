"""What travels between a process and its environment workers: plain data as JSON, in messages with a length.

Nothing that comes out of a worker can run code here: it read text that a model wrote, so it is trusted with the
verdicts it gives and with nothing else. JSON is extended by tuples, mappings with any keys, bytes, numpy arrays and
pictures; arrays and pictures travel as their raw bytes, and come back equal to the bit.
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
_MODES = ("1", "L", "LA", "RGB", "RGBA", "I", "F")


def encode(value: Any) -> bytes:
    """Plain data as bytes. TypeError names what is none."""
    return json.dumps(_plain(value), separators=(",", ":")).encode()


def decode(data: bytes | bytearray) -> Any:
    """Inverse of `encode`. ValueError for anything that `encode` does not write."""
    try:
        return json.loads(data, object_hook=_rich)
    except (KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"not a message of a worker: {error!r}") from error


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind is str or kind is int or kind is float or kind is bool or value is None:
        return value
    if kind is list:
        return [_plain(x) for x in value]
    if kind is dict and _TAG not in value and all(type(key) is str for key in value):
        return {key: _plain(x) for key, x in value.items()}
    return _tagged(value)


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
        picture = value if value.mode in _MODES else value.convert("RGBA")
        return {_TAG: "image", "mode": picture.mode, "size": list(picture.size), "v": _text(picture.tobytes())}
    raise TypeError(
        f"a {type(value).__name__} cannot leave an environment worker: messages, scores and facts are plain data"
    )


def _rich(item: dict[str, Any]) -> Any:
    """What a JSON object stands for."""
    kind = item.get(_TAG)
    if kind is None:
        return item
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

        return Image.frombytes(item["mode"], (int(item["size"][0]), int(item["size"][1])), data)
    raise ValueError(f"unknown kind of value {str(kind)[:40]!r}")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


class Channel:
    """Messages over one end of a pair of sockets, one at a time in each direction."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def send(self, message: bytes, timeout_s: float | None = None) -> None:
        """Send. TimeoutError where the other side does not read; OSError where it is gone."""
        if len(message) > MAX_MESSAGE:
            raise ValueError(f"a message of {len(message)} bytes is too long for an environment worker")
        self.end.settimeout(timeout_s)
        self.end.sendall(_HEADER.pack(len(message)) + message)

    def receive(self, timeout_s: float | None = None) -> bytes:
        """The next message. TimeoutError when time is up; EOFError where the other side is gone or writes nonsense."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        data = bytearray()
        self._fill(data, _HEADER.size, deadline)
        size = _HEADER.unpack_from(data)[0] + _HEADER.size
        if size > MAX_MESSAGE:
            raise EOFError(f"a message of {size} bytes")
        self._fill(data, size, deadline)
        if len(data) > size:
            raise EOFError("more than one message")
        return bytes(data[_HEADER.size :])

    def _fill(self, data: bytearray, size: int, deadline: float | None) -> None:
        """Read until there are `size` bytes, or a few more."""
        while len(data) < size:
            if deadline is None:
                self.end.settimeout(None)
            else:
                self.end.settimeout(max(1e-3, deadline - time.monotonic()))
            part = self.end.recv(max(1 << 16, min(size - len(data), 1 << 22)))
            if not part:
                raise EOFError("the connection was closed")
            data += part
            if deadline is not None and time.monotonic() > deadline and len(data) < size:
                raise TimeoutError

    def close(self) -> None:
        """Close this end."""
        self.end.close()
