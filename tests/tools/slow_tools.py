"""Tools that misbehave; importable, so that a worker process can run them."""

from __future__ import annotations

import os
import sys
import time

from tools import ToolError


def hang(seconds: float) -> str:
    """never mind the time"""
    time.sleep(seconds)
    return "late"


def spin() -> str:
    """busy for ever, deaf to signals that Python handles"""
    while True:
        try:
            time.sleep(0.001)
        except BaseException:
            continue


def explode(kind: str) -> str:
    """raise"""
    raise {"value": ValueError, "tool": ToolError, "exit": SystemExit, "memory": MemoryError}[kind]("boom")


def flood(size: int) -> str:
    """a long text"""
    return "x" * size


def die() -> str:
    """end the process"""
    os._exit(7)


def chatter() -> str:
    """print to every stream"""
    print("noise on stdout")
    print("noise on stderr", file=sys.stderr)
    os.write(1, b"raw noise")
    return "quiet"


def whoami() -> int:
    """the process that runs this"""
    return os.getpid()


def add(a: int, b: int) -> int:
    """a sum"""
    return a + b
