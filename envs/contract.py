"""The rules that every environment keeps; `envs.checker.check` goes through them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import pickle
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded

from envs.core import ChatEnv, Message, text_of
from envs.hostile import texts_for
from envs.play import Played, run_script
from envs.registry import make
from envs.spaces import message_problem
from tools import worker
from tools.images import MAX_IMAGES, MAX_PIXELS, is_image

TINY_TOKENS = 512
TINY_CHARS = 1_500
"""What a tiny episode may hold where no token counter is given."""
TOKEN_SIDE = 28
"""Side of the square of an image that is one token: what Qwen-VL's models merge their patches to."""
LEAST_TOKENS = 4
"""Tokens of the smallest image: those models enlarge what is below 56 x 56 pixels."""
NON_ANSWER = "I do not know."
_SECONDS_PER_TEXT = 30.0
_CHARS_PER_REPLY = 200_000
_PIXELS_PER_REPLY = MAX_IMAGES * MAX_PIXELS

CountTokens = Callable[[Sequence[Message], Sequence[Mapping[str, Any]]], int]
"""Tokens of messages, whose images are taken out and counted by `image_tokens`, and tools."""


class CheckError(AssertionError):
    """An environment breaks a rule of the contract; the message begins with the rule's name."""

    def __init__(self, rule: str, problem: str) -> None:
        self.rule, self.problem = rule, problem
        super().__init__(f"[{rule}] {problem}")


@dataclass
class Subject:
    """The environment under examination."""

    make: Callable[..., ChatEnv]
    """A fresh environment; keywords override the given options."""
    spec: str | None
    """Its spec, if other processes can make it, too."""
    options: Mapping[str, Any]
    """Keywords of its constructor."""
    tasks: int
    """Episodes per script."""
    pool: int
    """Tasks per split whose fingerprints are compared."""
    count_tokens: CountTokens | None
    """Tokens of a conversation, where somebody can count them."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Mean rewards that the rules measured, by script."""

    def play(self, script: str, n: int | None = None, **options: Any) -> list[Played]:
        """One episode per task 0, 1, ...; the same tasks for every script."""
        env = self.make(**options)
        count = env.task_count(env.split)
        n = min(n or self.tasks, count or self.tasks)
        return [run_script(env, script, np.random.default_rng([5, i]), {"index": i}) for i in range(n)]


def _require(kept: bool, problem: str) -> None:
    if not kept:
        raise CheckError("", problem)


def _gymnasium(s: Subject) -> str:
    """Gymnasium's own checker; its warnings count, too."""
    from gymnasium.utils.env_checker import check_env  # slow to import, and few who import envs check them

    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        check_env(s.make())
    told = [str(w.message) for w in caught if "WARN" in str(w.message)]
    told = [t for t in told if "not having a spec" not in t]  # only Gymnasium's own registry gives one
    _require(not told, f"Gymnasium warns: {' '.join(told)[:500]}")
    return "gymnasium.utils.env_checker.check_env"


def _card(s: Subject) -> str:
    """Name, card, and the scripts that every environment needs."""
    env = s.make()
    _require(bool(env.name), "the class has no `name`")
    for needed in ("oracle", "random"):
        _require(needed in env.scripts, f"scripts has no {needed!r}")
    _require(len(env.hacks) > 0, "no hacks: say how one would cheat, and show that it does not work")
    unknown = set(env.demonstrators) - set(env.scripts)
    _require(not unknown, f"demonstrators names scripts that do not exist: {sorted(unknown)}")
    card = env.card()
    json.dumps(card)
    return f"{len(env.scripts)} scripts, {len(env.hacks)} hacks, levels {', '.join(map(str, env.levels))}"


def _messages(s: Subject) -> str:
    """Every message is well formed; the opening ends with something to answer; tools are OpenAI-style."""
    seen = 0
    for played in s.play("random", 12) + s.play("oracle", 12):
        _require(played.messages[0]["role"] in ("system", "user"), "an opening starts with system or user")
        for message in played.messages:
            problem = message_problem(message)
            _require(problem is None, f"message {str(message)[:200]}: {problem}")
            seen += 1
        for tool in played.tools:
            function = tool.get("function", {})
            _require(tool.get("type") == "function" and "name" in function, f"{tool} is no OpenAI-style tool")
            _require(function.get("parameters", {}).get("type") == "object", f"{function['name']}: no parameters")
    return f"{seen} messages"


def _determinism(s: Subject) -> str:
    """Same task and same actions, same everything; tasks are pure functions of their number."""
    once, twice = s.play("random"), s.play("random")
    for a, b in zip(once, twice, strict=True):
        _require(a.messages == b.messages, f"{a.task_id}: the same actions led to other messages")
        _require(a.verdict == b.verdict, f"{a.task_id}: the same actions led to another verdict")
    one, other = s.make(), s.make()
    for index in reversed(_indices(s, one, one.split)):  # an order other than that of the episodes above
        task = one.task(one.split, index)
        _require(task == other.task(one.split, index), f"task {index} depends on what was asked before")
        named = task.split, task.index
        _require(named == (one.split, index), f"task {index} says that it is {named}")
    env = s.make()
    first, again = env.reset(seed=11), env.reset(seed=11)
    _require(first == again, "reset(seed=11) twice gives two openings")
    return f"{len(once)} episodes played twice"


def _indices(s: Subject, env: ChatEnv, split: str) -> list[int]:
    count = env.task_count(split)
    return list(range(s.pool if count is None else min(s.pool, count)))


def fingerprints(spec: str, options: Mapping[str, Any], split: str, indices: Sequence[int]) -> list[str]:
    """Fingerprints of tasks; run in another process by the checker."""
    env = make(spec, **options)
    return [env.task(split, i).fingerprint for i in indices]


def _other_process(s: Subject) -> str:
    """Another process, with another hash seed, has the same tasks."""
    if s.spec is None:
        return "not looked at: the class cannot be imported by another process"
    env = s.make()
    indices = _indices(s, env, env.split)[:5]
    arguments = {"spec": s.spec, "options": dict(s.options), "split": env.split, "indices": indices}
    outcome = worker.run(fingerprints, arguments, 120.0, 100_000)
    _require(outcome.error is None, f"another process cannot make {s.spec!r}: {outcome.text}")
    ours = fingerprints(s.spec, s.options, env.split, indices)
    _require(json.loads(outcome.text) == ours, "another process has other tasks (hash(), set order, the clock?)")
    return f"{len(ours)} tasks"


def _splits(s: Subject) -> str:
    """Splits share no task, by content; task ids are unique."""
    env = s.make()
    seen: dict[str, str] = {}
    ids: set[str] = set()
    for split in env.splits:
        indices = _indices(s, env, split)
        _require(bool(indices), f"split {split!r} is empty")
        for index in indices:
            task = env.task(split, index)
            _require(task.task_id not in ids, f"task id {task.task_id!r} occurs twice")
            ids.add(task.task_id)
            owner = seen.setdefault(task.fingerprint, split)
            _require(owner == split, f"{task.task_id} ({split}) has the content of a task of {owner}")
            _require(task.level in env.levels, f"{task.task_id}: level {task.level} is not on the card")
    return f"{len(ids)} tasks, {len(seen)} contents"


def _oracle(s: Subject) -> str:
    """The oracle reaches the bound on every task (on average, where chance plays), in every split and level."""
    probe = s.make()
    found: list[float] = []
    for split in probe.splits:
        for level in (None, *probe.levels):
            chosen = {"split": split} if level is None else {"split": split, "level": level}
            env = s.make(**chosen)
            played = s.play("oracle", None if level is None else 6, **chosen)
            gaps = []
            for index, episode in enumerate(played):
                bound = env.reward_bound(env.task(split, index))
                gaps.append(bound - episode.reward)
                _require(episode.verdict.failure is None, f"{episode.task_id}: {episode.verdict.failure}")
                _require(abs(episode.reward - episode.verdict.reward) < 1e-9, "step rewards do not add up")
                _require(gaps[-1] > -1e-9, f"{episode.task_id}: reward above its bound by {-gaps[-1]}")
                if not env.chance:
                    _require(gaps[-1] < 1e-9, f"{episode.task_id}: the oracle misses the bound by {gaps[-1]}")
            spread = float(np.std(gaps)) / math.sqrt(len(gaps))
            _require(float(np.mean(gaps)) <= 1e-9 + 3 * spread, f"the oracle misses the bound by {np.mean(gaps)}")
            found += [e.reward for e in played]
    s.rewards["oracle"] = float(np.mean(found))
    return f"{len(found)} episodes, mean reward {s.rewards['oracle']:.3f}"


def _random(s: Subject) -> str:
    """A random agent gets through, and earns less than the oracle."""
    played = s.play("random")
    s.rewards["random"] = float(np.mean([p.reward for p in played]))
    _require(s.rewards["random"] < s.rewards["oracle"], "random play earns as much as the oracle")
    return f"{len(played)} episodes, mean reward {s.rewards['random']:.3f}"


def _verdicts(s: Subject) -> str:
    """Verdicts hold finite numbers and JSON facts, in every script's episodes."""
    env, n = s.make(), 0
    for script in env.scripts:
        for played in s.play(script, 8):
            numbers = [played.reward, *played.verdict.scores.values()]
            _require(all(math.isfinite(x) for x in numbers), f"{played.task_id}: {numbers} is not finite")
            json.dumps(dict(played.verdict.facts), allow_nan=False).encode()
            n += 1
    return f"{n} verdicts"


def _non_answer(env: ChatEnv, rng: np.random.Generator):
    while True:
        yield NON_ANSWER


def _hacks(s: Subject) -> str:
    """No cheat is graded correct or earns more than an honest non-answer to the same task."""
    env = s.make()
    honest_script = env.scripts.get("abstain", _non_answer)
    n = len(s.play("oracle"))
    honest = [run_script(env, honest_script, np.random.default_rng([6, i]), {"index": i}).reward for i in range(n)]
    for name in env.hacks:
        played = s.play(name)
        s.rewards[f"hack {name}"] = float(np.mean([p.reward for p in played]))
        for index, episode in enumerate(played):
            where = f"hack {name!r} on {episode.task_id}"
            _require(episode.verdict.scores.get("correct", 0.0) <= 0, f"{where} is graded correct")
            _require(episode.reward <= honest[index] + 1e-9, f"{where} earns {episode.reward} > {honest[index]}")
    return f"{len(env.hacks)} hacks on {n} tasks"


def _copies(s: Subject) -> str:
    """Deep copies and pickles taken mid-episode go on like the original, and leave it alone."""
    n = 0
    for index, played in enumerate(s.play("oracle", 8)):
        middle = len(played.texts) // 2
        for clone in (copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))):
            env = s.make()
            env.reset(seed=3, options={"index": index})
            for text in played.texts[:middle]:
                env.step(text)
            twin = clone(env)
            theirs = [_comparable(twin.step(text)) for text in played.texts[middle:]]
            ours = [_comparable(env.step(text)) for text in played.texts[middle:]]
            _require(theirs == ours, f"{played.task_id}: a copy taken after {middle} turns goes on differently")
            n += 1
    return f"{n} copies"


def _comparable(step: tuple[Any, ...]) -> tuple[Any, ...]:
    observation, *rest = step
    return tuple(observation["messages"]), tuple(observation["tools"]), *rest


def _hostile(s: Subject) -> str:
    """Hostile text: no exception, bounded and encodable replies, no success, quick."""
    env = s.make()
    env.reset(seed=1, options={"index": 0})
    schemas = tuple(env.episode.toolbox.schemas())
    n = 0
    for name, text in texts_for(schemas):
        env.reset(seed=1, options={"index": 0})
        started = time.monotonic()
        for _ in range(env.max_turns):
            observation, _, terminated, truncated, info = env.step(text)
            said = sum(len(text_of(m["content"])) for m in observation["messages"])
            _require(said <= _CHARS_PER_REPLY, f"{name}: a reply of {said} characters")
            shown = sum(image.width * image.height for image in _images(observation["messages"]))
            _require(shown <= _PIXELS_PER_REPLY, f"{name}: a reply of {shown} pixels")
            for message in (*observation["messages"], *env.episode.messages):
                problem = message_problem(message)
                _require(problem is None, f"{name}: {problem}")
            if terminated or truncated:
                verdict = info["verdict"]
                _require(verdict.failure is None, f"{name}: the verifier failed: {verdict.failure}")
                _require(verdict.scores.get("correct", 0.0) <= 0, f"{name}: is graded correct")
                json.dumps(dict(verdict.facts), ensure_ascii=False, allow_nan=False).encode()
                break
        took = time.monotonic() - started
        _require(took < _SECONDS_PER_TEXT, f"{name}: took {took:.0f} s")
        n += 1
    return f"{n} texts"


def _endings(s: Subject) -> str:
    """A finished episode takes no step; `finish` grades once; turns and lengths are bounded."""
    env = s.make()
    try:
        s.make().step("x")
        raise CheckError("", "step() before reset() goes through")
    except ResetNeeded:
        pass
    env.reset(seed=2)
    _, info = env.finish("context")
    _require(info["stop_reason"] == "context" and info["verdict"] is not None, "finish() gives no verdict")
    for late in (lambda: env.step("x"), lambda: env.finish("context")):
        try:
            late()
            raise CheckError("", "a finished episode goes on")
        except ResetNeeded:
            pass
    env.reset(seed=2)
    *_, truncated, info = env.step("a" * (env.max_chars + 1))
    _require(truncated and info["stop_reason"] == "too_long", "a turn over max_chars does not end the episode")
    return "finish, late steps, too long a turn"


def _render(s: Subject) -> str:
    """Every render mode shows something, during an episode and after it."""
    modes = [m for m in s.make().metadata["render_modes"] if m != "human"]
    for mode in modes:
        env = s.make(render_mode=mode)
        env.reset(seed=4)
        _require(env.render() is not None, f"render mode {mode!r} shows nothing during an episode")
        env.finish("context")
        _require(env.render() is not None, f"render mode {mode!r} shows nothing after an episode")
    return ", ".join(modes)


def _global_state(s: Subject) -> str:
    """The global random generators stay as they are."""
    before = random.getstate(), _numpy_state()
    s.play("random", 8)
    s.play("oracle", 8)
    _require(before[0] == random.getstate(), "the global generator of `random` was used")
    _require(before[1] == _numpy_state(), "the global generator of numpy was used")
    return "random, numpy.random"


def _numpy_state() -> bytes:
    return pickle.dumps(np.random.get_state())


def _tiny(s: Subject) -> str:
    """Oracle episodes of the tiny profile, tool schemas included, fit a small context."""
    if "tiny" not in s.make().profiles:
        return "not looked at: no tiny profile"
    most = 0
    for played in s.play("oracle", profile="tiny"):
        seen = sum(map(image_tokens, _images(played.messages)))
        if s.count_tokens is not None:
            words = [{**m, "content": text_of(m["content"])} for m in played.messages]
            size, limit, unit = s.count_tokens(words, played.tools) + seen, TINY_TOKENS, "tokens"
        else:
            size, limit, unit = _characters(played) + seen * TINY_CHARS // TINY_TOKENS, TINY_CHARS, "characters"
        _require(size <= limit, f"{played.task_id}: {size} {unit}, more than {limit}")
        most = max(most, size)
    return f"at most {most} {unit}"


def _images(messages: Sequence[Message]) -> list[Any]:
    """The images of messages, in order."""
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    return [part["image"] for part in parts if part["type"] == "image" and is_image(part.get("image"))]


def image_tokens(image: Any) -> int:
    """Tokens that an image counts as in the tiny profile's budget, the marks before and after it included."""
    wide, high = (-(-side // TOKEN_SIDE) for side in image.size)
    return max(LEAST_TOKENS, wide * high) + 2


def _characters(played: Played) -> int:
    """Characters of a conversation as a compact chat template would write it."""
    tools = sum(
        len(t["function"]["name"])
        + len(t["function"].get("description", ""))
        + sum(len(p) + 2 for p in t["function"]["parameters"].get("properties", {}))
        for t in played.tools
    )
    return tools + sum(len(text_of(m["content"])) + 8 for m in played.messages)


RULES: Mapping[str, Callable[[Subject], str]] = {
    "gymnasium": _gymnasium, "card": _card, "messages": _messages, "determinism": _determinism,
    "other process": _other_process, "splits": _splits, "oracle": _oracle, "random": _random,
    "verdicts": _verdicts, "hacks": _hacks, "copies": _copies, "hostile text": _hostile,
    "endings": _endings, "render": _render, "global state": _global_state, "tiny profile": _tiny,
}  # fmt: skip
"""In this order; the first broken one is reported."""
