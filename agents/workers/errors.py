"""What can go wrong between a run and its environment workers, as types: their names become stop reasons."""

from __future__ import annotations

import builtins

from agents.cli import UsageError


class WorkerError(Exception):
    """A worker was lost and with it the episodes that it held; it is started again."""


class WorkerDied(WorkerError):
    """The worker ended: killed, crashed, unreachable."""


class WorkerTimeout(WorkerError):
    """A step or reset took too long, and the worker was ended for it."""


class WorkerMemory(WorkerError):
    """The worker held too much memory, or asked for too much."""


class WorkerBroken(WorkerError):
    """This worker cannot be started any more."""


class WorkersBroken(UsageError):
    """No worker can be started: there is nothing to play in."""


class EnvError(Exception):
    """An environment raised in a worker. Subclasses made by `raised` have the name of what it raised."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return self.text


_KNOWN = {
    name: getattr(builtins, name)
    for name in (
        "ArithmeticError", "AssertionError", "AttributeError", "FileNotFoundError", "IndexError", "KeyError",
        "LookupError", "NotImplementedError", "OSError", "PermissionError", "RecursionError", "RuntimeError",
        "StopIteration", "TimeoutError", "TypeError", "ValueError", "ZeroDivisionError",
    )
}  # fmt: skip


def raised(name: object, text: object) -> EnvError:
    """The exception that a worker reports, under its own name: a built-in one where it is one of these."""
    known = str(name) if str(name).isidentifier() else "EnvError"
    base = _KNOWN.get(known)
    kind = type(known[:80], (EnvError,) if base is None else (EnvError, base), {})
    return kind(str(text))
