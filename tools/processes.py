"""A process with all that it started: how much memory they hold, and their end. Linux's /proc; elsewhere itself alone.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def family(pid: int) -> list[int]:
    """A process and its descendants, also those in sessions of their own."""
    found = [pid]
    for member in found:
        for children in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except OSError:  # it has just ended
                continue
    return found


def resident_bytes(pid: int) -> int:
    """Memory that a process and its descendants hold; 0 where the system does not say."""
    total = 0
    for member in family(pid):
        try:
            with open(f"/proc/{member}/statm", encoding="ascii") as stream:
                total += int(stream.read().split()[1]) * _PAGE
        except OSError:
            continue
    return total


def kill_family(pid: int) -> None:
    """Kill a process that leads a group of its own, the group, and every descendant."""
    members = family(pid)
    _kill([(os.killpg, pid), *((os.kill, member) for member in members)])


def kill_descendants() -> None:
    """Kill all that this process started, and what that started."""
    _kill([(os.kill, member) for member in family(os.getpid())[1:]])


def _kill(whom: Sequence[tuple[Callable[[int, int], None], int]]) -> None:
    for kill, pid in whom:
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
