"""An environment that does to its process what it is told to, by the number of its task; and a busy one."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from envs import ChatEnv, Reply, Task, Verdict, fingerprint
from tools import ParsedTurn, ToolCall


class Faulty(ChatEnv):
    """Says two things; in tasks `on` it does `what` at its second turn. Loads nothing heavy, as workers load it."""

    name: ClassVar[str] = "faulty"

    def __init__(self, *, what: str = "", on: Sequence[int] = (), at: str = "step", **options: Any) -> None:
        super().__init__(**options)
        self.what, self.on, self.at = what, tuple(on), at
        if at == "make":
            self.do()

    def task(self, split: str, index: int, level: int | str | None = None) -> Task:
        name = f"{self.name}/{split}/{index}"
        return Task(name, split, index, 1, {"index": index}, {}, fingerprint(name))

    def opening(self, task: Task) -> list[dict[str, Any]]:
        if self.at == "reset" and task.index in self.on:
            self.do()
        return [{"role": "user", "content": f"number {task.index}"}]

    def reply(self, turn: Any) -> Reply:
        told: Any = f"result {self.episode.turns - 1}"
        if self.episode.turns == 2 and self.at == "step" and self.episode.task.index in self.on:
            told = object() if self.what == "object" else told
            told = [{"type": "image", "image": poster()}] if self.what == "poster" else told
            self.do()
        return Reply(({"role": "tool", "name": "say", "content": told},), done=self.episode.turns == 3)

    def judge(self, task: Task, final: str | None) -> Verdict:
        variety = len(set(final or "")) / 10
        return Verdict(variety, {"correct": float(variety > 0.1)}, {"answered": final is not None, "pair": (1, 2)})

    def do(self) -> None:
        """Hang, be killed, crash, leave, eat memory fast or slowly, alone or through a child, raise, or babble."""
        match self.what:
            case "hang":
                time.sleep(3600)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crash":
                ctypes.string_at(0)
            case "exit":
                print("these are my last words", file=sys.stderr, flush=True)
                os._exit(3)
            case "leave":
                sys.exit(4)
            case "gorge":
                self.eaten = bytearray(1 << 33)
            case "graze":
                self.eaten = []
                while True:
                    self.eaten.append(os.urandom(1 << 24))
            case "feed":
                child = "import time; x = bytearray(b'x') * (250 << 20); time.sleep(3600)"
                both = [subprocess.Popen([sys.executable, "-c", child], start_new_session=True) for _ in range(2)]
                both[0].wait()
            case "raise":
                raise KeyError("as told")
            case "file":
                raise FileNotFoundError(2, "No such file or directory", "/no/such/file")


def poster() -> Any:
    """A picture of 25 million pixels."""
    from PIL import Image

    return Image.new("1", (5000, 5000))


@dataclass(frozen=True)
class Shouting:
    """Calls are turns in capitals."""

    name: str = "shouting"
    mark: str = "!"

    def parse(self, text: str) -> ParsedTurn:
        return ParsedTurn(text, (ToolCall("shout", {}),) if text.isupper() and text.endswith(self.mark) else ())

    def render(self, content: str, calls: Sequence[ToolCall]) -> str:
        return content


class Hinting(Faulty):
    """Offers hints, calls tools in a format of its own."""

    name: ClassVar[str] = "hinting"

    def __init__(self, **options: Any) -> None:
        super().__init__(call_format=Shouting(mark="?"), **options)

    def privileged(self, index: int, kind: str, level: int) -> str:
        if index in self.on:
            self.do()
        return f"{kind} {level} of {index}"


class Busy(Faulty):
    """Every turn costs so many milliseconds of hashing; the episode has three turns, or as many as one likes."""

    name: ClassVar[str] = "busy"

    def __init__(self, *, ms: float = 5.0, talks: bool = False, **options: Any) -> None:
        super().__init__(max_turns=10**9 if talks else 8, **options)
        self.ms, self.talks = ms, talks

    def reply(self, turn: Any) -> Reply:
        until, data = time.thread_time() + self.ms / 1000, b"x" * 4096
        while time.thread_time() < until:
            data = hashlib.blake2b(data).digest() * 64
        return Reply(({"role": "tool", "name": "say", "content": "on"},)) if self.talks else super().reply(turn)
