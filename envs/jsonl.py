"""A user's own questions as an environment: `--env jsonl:FILE --reward module:function`."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from envs import answers
from envs.core import ChatEnv, Message, Script, Task, Verdict, fingerprint
from envs.hacks import COMMON_HACKS
from envs.random_agent import random_agent
from envs.spaces import message_problem

Row = Mapping[str, Any]
Reward = Callable[[str, Row], Any]
SYSTEM = "Answer with <answer>...</answer>."


def exact_match(text: str, row: Row) -> float:
    """1 if the last <answer> tag of `text` holds row["answer"] (normalised exact match), else 0."""
    answer = answers.extract(text)
    return float(answer is not None and answers.same(answer, str(row["answer"])))


def _oracle(env: ChatEnv, rng: np.random.Generator) -> Generator[str, Any, None]:
    """The row's `demonstration`, or its answer in a tag."""
    row = env.episode.task.truth
    yield str(row["demonstration"]) if "demonstration" in row else f"<answer>{row['answer']}</answer>"


class JsonlEnv(ChatEnv):
    """Questions from a file of JSON lines, answered in one turn and graded by a function.

    A line holds `question` (or `messages`), usually `answer`, optionally `demonstration` (an exemplary turn)
    and whatever else the reward wants. Which split a line belongs to is decided by a hash of its question,
    so that equal questions never stand in both.

    Args:
        file: the file.
        reward: ``module:function``, called with (text of the turn, the line as a dict); returns a number, of
            which 1 is full marks, or a mapping of scores that holds `reward`. Default: normalised exact
            match of the last ``<answer>`` tag with `answer`.
        eval_share: share of the questions that are kept for evaluation.
        system: the system message; empty for none.
        options: those of `ChatEnv`.
    """

    name = "jsonl"
    profiles = ("default",)
    hacks: ClassVar[Mapping[str, Script]] = COMMON_HACKS

    def __init__(
        self,
        *,
        file: str,
        reward: str | None = None,
        eval_share: float = 0.1,
        system: str = SYSTEM,
        **options: Any,
    ) -> None:
        if not 0 < eval_share < 1:
            raise ValueError(f"eval_share must be between 0 and 1, got {eval_share}")
        self.file, self.reward, self.eval_share, self.system = str(file), reward, eval_share, system
        rows = self._rows()
        if reward is None and any("answer" not in row for part in rows.values() for row in part):
            raise ValueError(f"{file}: without a reward function every line needs an `answer`")
        find_reward(reward)
        if all("answer" in row or "demonstration" in row for part in rows.values() for row in part):
            self.scripts = {"oracle": _oracle, "random": random_agent}  # type: ignore[misc]
            self.demonstrators = {"oracle": 1.0}  # type: ignore[misc]
        else:
            self.scripts = {"random": random_agent}  # type: ignore[misc]
        super().__init__(**{"max_turns": 1, **options})

    def task_count(self, split: str) -> int | None:
        return len(self._rows()[split])

    def task(self, split: str, index: int, level: int | str | None = None) -> Task:
        row = self._rows()[split][index]
        content = question_of(row)
        print_of = fingerprint(content)
        return Task(f"jsonl/{split}/{index}/{print_of[:8]}", split, index, 1, {"question": content}, row, print_of)

    def opening(self, task: Task) -> Sequence[Message]:
        content = task.prompt["question"]
        asked = [{"role": "user", "content": content}] if isinstance(content, str) else [dict(m) for m in content]
        if self.system and asked[0]["role"] != "system":
            asked.insert(0, {"role": "system", "content": self.system})
        return asked

    def judge(self, task: Task, final: str | None) -> Verdict:
        if final is None:
            return Verdict(self.lowest_reward, {"correct": 0.0}, {"answered": False})
        given = find_reward(self.reward)(final, dict(task.truth))
        scores = {k: float(v) for k, v in given.items()} if isinstance(given, Mapping) else {"reward": float(given)}
        reward = scores.pop("reward")
        facts = {"answered": True, "answer_key": answers.key(answers.extract(final) or final)}
        return Verdict(reward, {"correct": float(reward >= 1.0), **scores}, facts)

    def _rows(self) -> Mapping[str, Sequence[Row]]:
        # Held outside the environment, which stays small to copy and to send.
        path = Path(self.file)
        try:
            stat = path.stat()
        except OSError as error:
            raise ValueError(f"cannot read {self.file}: {error.strerror}") from None
        return _load(str(path.resolve()), stat.st_mtime_ns, stat.st_size, self.eval_share)


def question_of(row: Row) -> Any:
    """The question (text) or the messages of a line."""
    return row["messages"] if "messages" in row else row["question"]


@lru_cache(maxsize=8)
def _load(path: str, _mtime: int, _size: int, eval_share: float) -> Mapping[str, Sequence[Row]]:
    rows: list[tuple[float, Row]] = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                row = _read_row(line, f"{path}, line {number}")
                digest = hashlib.blake2b(json.dumps(question_of(row), sort_keys=True).encode(), digest_size=8)
                rows.append((int.from_bytes(digest.digest(), "big") / 2**64, row))
    places = sorted({place for place, _ in rows})
    if len(places) < 2:
        raise ValueError(f"{path}: needs at least two different questions, one to train on and one to evaluate on")
    # A small file may have no question below the share (or none above): then the outermost one goes there.
    border = min(max(eval_share, np.nextafter(places[0], 1.0)), places[-1])
    return {
        "train": tuple(row for place, row in rows if place >= border),
        "eval": tuple(row for place, row in rows if place < border),
    }


def _read_row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: an object expected, got {type(row).__name__}")
    if isinstance(row.get("messages"), list) and row["messages"]:
        for message in row["messages"]:
            if problem := message_problem(message):
                raise ValueError(f"{where}: messages: {problem}")
    elif not isinstance(row.get("question"), str):
        raise ValueError(f"{where}: needs a `question` (text) or `messages` (a list); has {sorted(row)}")
    return row


@lru_cache(maxsize=32)
def find_reward(spec: str | None) -> Reward:
    """The reward function of that name; ValueError says what is wrong with the name."""
    if spec is None:
        return exact_match
    module_name, colon, name = spec.partition(":")
    if not colon or not name:
        raise ValueError(f"reward {spec!r} must be module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"reward {spec!r}: {error}") from None
    if not callable(found):
        raise ValueError(f"reward {spec!r}: module {module_name!r} has no function {name!r}")
    return found
