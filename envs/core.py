"""`ChatEnv`: a Gymnasium environment in which raw assistant text goes in and chat messages come out."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import gymnasium
import numpy as np
from gymnasium.error import InvalidAction, ResetNeeded

from envs.spaces import Observation, Schemas, Text, copied
from tools import CallFormat, ParsedTurn, Toolbox, ToolResult, get_format
from tools.images import is_image
from tools.toolbox import encodable

Message = dict[str, Any]
"""``{"role": "system" | "user" | "assistant" | "tool", "content": text or parts}``; tool messages carry a ``name``.
A part is ``{"type": "text", "text": ...}`` or ``{"type": "image", "image": <PIL image>}``."""
Script = Callable[["ChatEnv", np.random.Generator], Generator[str, Mapping[str, Any], None]]
"""A coroutine that plays an environment: it yields action texts and is sent observations."""

# Stop reasons: why an episode ended.
ANSWERED = "answered"
"""The environment ended it: the agent answered, won, lost."""
MAX_TURNS = "max_turns"
"""The agent used up its turns (truncated)."""
TOO_LONG = "too_long"
"""A turn was longer than `max_chars` (truncated)."""
CONTEXT = "context"
"""The agent's context has no room left; said by the agent's side through `finish`."""
LENGTH = "length"
"""The agent's last turn was cut; said by the agent's side through `finish`."""

_INDEX_RANGE = 2**31


@dataclass(frozen=True)
class Task:
    """What one episode is about; a pure function of (environment, split, index, level)."""

    task_id: str
    """Stable name, the same in every process; unique within the environment."""
    split: str
    """`train` or `eval`."""
    index: int
    """Number within the split."""
    level: int
    """Difficulty, as on the environment's card."""
    prompt: Mapping[str, Any]
    """What the opening messages are made of."""
    truth: Mapping[str, Any]
    """What the verifier knows; never shown to the agent."""
    fingerprint: str
    """Hash of the content; two splits share none."""


@dataclass(frozen=True)
class Verdict:
    """What the verifier says of an episode, exactly once."""

    reward: float
    """What the episode is worth; the rewards of its steps add up to this."""
    scores: Mapping[str, float]
    """Named scores, e.g. `correct`, `format`."""
    facts: Mapping[str, Any]
    """What was measured, e.g. `tool_calls`; JSON values. `answer_key`, where there is one, is the agent's final answer
    in a normal form, equal where answers are equal; None where it gave none."""
    failure: str | None = None
    """None, or why the verifier failed (its exception); the reward is then the environment's lowest."""


class Reply(NamedTuple):
    """What an environment says to a turn."""

    messages: tuple[Message, ...] = ()
    """The new messages."""
    done: bool = False
    """Whether the episode is over."""
    reward: float = 0.0
    """Reward of this step, where an environment gives some on the way."""


@dataclass
class Episode:
    """The state of a running episode."""

    task: Task
    toolbox: Toolbox
    messages: list[Message]
    """The whole conversation so far."""
    turns: int = 0
    """Turns the agent took."""
    results: list[ToolResult] = field(default_factory=list)
    """Every tool result so far."""
    final: str | None = None
    """The words of the turn that ended the episode; None if none did."""
    earned: float = 0.0
    """Rewards given on the way."""
    stop_reason: str | None = None
    """None while the episode runs."""
    verdict: Verdict | None = None


class ChatEnv(gymnasium.Env[dict[str, Any], str]):
    """Base of all environments. A family defines `task`, `opening`, `judge`, often `toolbox`, sometimes `reply`.

    Args:
        split: where tasks come from; by default the first of `splits`, which is `train` for all that train.
        profile: `default`, or `tiny`, whose episodes fit 512 tokens of the bundled tokenizer.
        level: a difficulty level, the name of a mix of levels, or None for the environment's own mix.
        render_mode: None or `ansi`.
        max_turns: turns after which an episode is truncated.
        max_chars: longest turn; a longer one ends the episode.
        call_format: name of a call format, or one.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012
    name: ClassVar[str] = ""
    """Short name, the first part of task ids."""
    splits: ClassVar[tuple[str, ...]] = ("train", "eval")
    profiles: ClassVar[tuple[str, ...]] = ("default", "tiny")
    levels: ClassVar[Mapping[int, str]] = {1: "the only level"}
    """Difficulty levels, each described."""
    mixes: ClassVar[Mapping[str, Mapping[int, float]]] = {}
    """Named mixes of levels (level -> weight) that `level=` accepts."""
    lowest_reward: ClassVar[float] = 0.0
    """What a failed verifier gives."""
    chance: ClassVar[bool] = False
    """Whether outcomes depend on chance: the oracle then reaches the bound on average only."""
    scripts: ClassVar[Mapping[str, Script]] = {}
    """Scripted players; at least `oracle` and `random`."""
    hacks: ClassVar[Mapping[str, Script]] = {}
    """Scripted cheats, of which none may succeed."""
    demonstrators: ClassVar[Mapping[str, float]] = {}
    """Scripts whose episodes warm a policy up, with weights; empty for none."""

    def __init__(
        self,
        *,
        split: str | None = None,
        profile: str = "default",
        level: int | str | None = None,
        render_mode: str | None = None,
        max_turns: int = 8,
        max_chars: int = 20_000,
        call_format: str | CallFormat = "hermes",
    ) -> None:
        self.split = one_of(self.splits[0] if split is None else split, self.splits, "split")
        self.profile = one_of(profile, self.profiles, "profile")
        self.level = self.known_level(level)
        if render_mode is not None:
            one_of(render_mode, self.metadata["render_modes"], "render_mode")
        if max_turns < 1 or max_chars < 1:
            raise ValueError(f"max_turns and max_chars must be positive, got {max_turns} and {max_chars}")
        self.render_mode = render_mode
        self.max_turns, self.max_chars = max_turns, max_chars
        self.call_format = get_format(call_format) if isinstance(call_format, str) else call_format
        self.observation_space = Observation()
        self.action_space = Text(max_chars)
        self._episode: Episode | None = None
        self._schemas = Schemas()

    # ------------------------------------------------------------ what a family defines

    def task(self, split: str, index: int, level: int | str | None = None) -> Task:
        """The task of that number: a pure function, the same in every process. Level None is the env's own."""
        raise NotImplementedError

    def opening(self, task: Task) -> Sequence[Message]:
        """The messages that an episode starts with. State of the episode that is the family's own is set up here."""
        raise NotImplementedError

    def judge(self, task: Task, final: str | None) -> Verdict:
        """Grade the episode, once. `final` is the text of the turn that ended it, None if none did."""
        raise NotImplementedError

    def toolbox(self, task: Task) -> Toolbox:
        """Fresh tools for one episode."""
        return Toolbox()

    def reply(self, turn: ParsedTurn) -> Reply:
        """Answer a turn. By default calls are run, and a turn without calls ends the episode."""
        if not turn.calls:
            return Reply(done=True)
        return Reply(tuple(self.call_tools(turn)))

    def task_count(self, split: str) -> int | None:
        """How many tasks the split has; None for as many as one likes."""
        return None

    def reward_bound(self, task: Task) -> float:
        """The best reward that can be reached on a task."""
        return 1.0

    # ------------------------------------------------------------ Gymnasium

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode; options `index`, `split`, `level` choose the task, else `index` derives from the seed."""
        super().reset(seed=seed)
        split, index, level = self._choose(options or {})
        task = self.task(split, index, level)
        toolbox = self.toolbox(task)
        schemas = toolbox.schemas()
        if schemas != self._schemas:
            self._schemas = Schemas(schemas)
        self._episode = Episode(task, toolbox, [])
        messages = tuple(self.opening(task))
        self._episode.messages.extend(copied(dict(message)) for message in messages)
        info = {"task_id": task.task_id, "split": task.split, "index": task.index, "level": task.level}
        return {"messages": messages, "tools": self._schemas}, info

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Take one turn of the agent: its raw text. Returns the new messages since."""
        episode = self._episode
        if episode is None or episode.stop_reason is not None:
            raise ResetNeeded(f"the episode of {self.name or type(self).__name__} is over; call reset() first")
        if not isinstance(action, str):
            raise InvalidAction(f"an action is the text of a turn, got {type(action).__name__}")
        episode.turns += 1
        if len(action) > self.max_chars:
            episode.messages.append({"role": "assistant", "content": encodable(str(action[: self.max_chars]))})
            return self._over((), TOO_LONG, terminated=False)
        text = action if type(action) is str else str(action)
        if not text.isascii():
            text = encodable(text)
        messages, results = episode.messages, episode.results
        messages.append({"role": "assistant", "content": text})
        turn = self.call_format.parse(text)
        ran = len(results)
        reply = self.reply(turn)
        for message in reply.messages:  # what is handed out belongs to the caller
            messages.append(message.copy() if type(message["content"]) is str else copied(message))
        if reply.done:
            episode.final = turn.content
            return self._over(reply.messages, ANSWERED, terminated=True, ran=ran)
        if episode.turns >= self.max_turns:
            return self._over(reply.messages, MAX_TURNS, terminated=False, ran=ran)
        episode.earned += reply.reward
        observation = {"messages": reply.messages, "tools": self._schemas}
        info = {"task_id": episode.task.task_id, "tool_results": tuple(results[ran:])}
        return observation, reply.reward, False, False, info

    def finish(self, stop_reason: str) -> tuple[float, dict[str, Any]]:
        """End the episode from outside (no room in the context, ...). It is graded all the same.

        Returns (the reward of this last step, info as at the end of `step`).
        """
        episode = self._episode
        if episode is None or episode.stop_reason is not None:
            raise ResetNeeded("there is no running episode to finish; call reset() first")
        _, reward, _, _, info = self._over((), stop_reason, terminated=False)
        return reward, info

    def render(self) -> str | None:
        """The conversation and the verdict as text (`ansi`)."""
        if self.render_mode is None:
            return None
        from envs.transcript import transcript

        return transcript(self._episode)

    # ------------------------------------------------------------ for families

    @property
    def episode(self) -> Episode:
        """The running (or just ended) episode."""
        if self._episode is None:
            raise ResetNeeded("no episode yet; call reset() first")
        return self._episode

    def call_tools(self, turn: ParsedTurn) -> list[Message]:
        """Run a turn's calls; their results as tool messages, in order."""
        episode = self.episode
        messages: list[Message] = []
        for call in turn.calls:
            result = episode.toolbox.call(call)
            episode.results.append(result)
            name = getattr(call, "name", "")
            messages.append(
                {
                    "role": "tool",
                    "name": name if name in episode.toolbox.tools else "unknown",
                    "content": result.text if result.parts is None else copied(list(result.parts)),
                }
            )
        return messages

    def known_level(self, level: int | str | None) -> int | str | None:
        """`level` if this environment has it, as a level, a mix or None; else ValueError with the nearest."""
        if isinstance(level, str) and level.isdecimal() and len(level) < 4:
            level = int(level)
        if level is not None and level not in self.levels and level not in self.mixes:
            one_of(str(level), [*map(str, self.levels), *self.mixes], "level")
        return level

    def card(self) -> dict[str, Any]:
        """What a newcomer wants to know of this environment."""
        task = self.task(self.split, 0)
        return {
            "name": self.name,
            "description": (type(self).__doc__ or "").strip().split("\n")[0],
            "levels": dict(self.levels),
            "mixes": {k: dict(v) for k, v in self.mixes.items()},
            "tools": [s["function"]["name"] for s in self.toolbox(task).schemas()],
            "splits": {s: self.task_count(s) for s in self.splits},
            "profiles": list(self.profiles),
            "max_turns": self.max_turns,
            "scripts": sorted(self.scripts),
            "hacks": sorted(self.hacks),
            "demonstrators": dict(self.demonstrators),
        }

    # ------------------------------------------------------------ inside

    def _choose(self, options: Mapping[str, Any]) -> tuple[str, int, int | str | None]:
        for key in options:
            one_of(key, ("index", "split", "level"), "reset option")
        split = one_of(options.get("split") or self.split, self.splits, "split")
        wanted = options.get("level")
        level = self.level if wanted is None else self.known_level(wanted)
        count = self.task_count(split)
        if options.get("index") is None:
            return split, int(self.np_random.integers(count or _INDEX_RANGE)), level
        index = int(options["index"])
        if index < 0 or (count is not None and index >= count):
            raise ValueError(f"{self.name} has no task {index} in split {split!r} ({count or 'endless'} tasks)")
        return split, index, level

    def _over(
        self, messages: tuple[Message, ...], stop_reason: str, terminated: bool, ran: int | None = None
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        episode = self.episode
        episode.stop_reason = stop_reason
        episode.verdict = verdict = self._grade(episode)
        info = {"task_id": episode.task.task_id, "verdict": verdict, "stop_reason": stop_reason}
        info["tool_results"] = () if ran is None else tuple(episode.results[ran:])
        observation = {"messages": messages, "tools": self._schemas}
        return observation, verdict.reward - episode.earned, terminated, not terminated, info

    def _grade(self, episode: Episode) -> Verdict:
        """The family's verdict with the facts that all environments share; a raising verifier is an outcome."""
        try:
            verdict = self.judge(episode.task, episode.final)
        except Exception as error:
            verdict = Verdict(self.lowest_reward, {}, {}, f"{type(error).__name__}: {error}"[:500])
        facts = {
            "level": episode.task.level,
            "turns": episode.turns,
            "tool_calls": episode.toolbox.calls,
            "tool_errors": sum(r.error is not None for r in episode.results),
        }
        return replace(verdict, reward=float(verdict.reward), facts={**facts, **verdict.facts})


def one_of(value: Any, known: Iterable[Any], what: str) -> Any:
    """`value` if it is known; else a ValueError that names the nearest known one."""
    known = list(known)
    if value in known:
        return value
    near = difflib.get_close_matches(str(value), [str(k) for k in known], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {value!r}{hint} (known: {', '.join(map(str, known))})")


def draw_level(level: int | str, mixes: Mapping[str, Mapping[int, float]], u: float) -> int:
    """The level of a task: `level` itself, or a draw from the mix of that name by `u` in [0, 1)."""
    if isinstance(level, int):
        return level
    left = u * sum(mixes[level].values())
    for choice, weight in mixes[level].items():
        left -= weight
        if left < 0:
            return choice
    return max(mixes[level])  # rounding: u was as good as 1


def text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The words of a message's content; other parts left out."""
    return content if isinstance(content, str) else " ".join(p["text"] for p in content if p["type"] == "text")


def fingerprint(*content: Any) -> str:
    """Hash of a task's content: equal content, equal hash, in every process. Images count by mode and pixels."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=_written)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _written(value: Any) -> Any:
    """What stands in a fingerprint for a value that JSON does not know."""
    if not is_image(value):
        return str(value)
    seen = value.convert("RGBA") if value.mode in ("P", "PA") else value  # indices alone are no colours
    return {"image": [value.mode, *value.size, hashlib.blake2b(seen.tobytes(), digest_size=16).hexdigest()]}
