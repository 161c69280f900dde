"""What an environment's step costs beyond its own logic, and what checking an observation costs. Table, then JSON.

    python -m tests.benchmarks.envs [--steps 2000] [--repeats 60]

One thread, CPU time in microseconds: best of many short runs (for steps the tenth percentile over
short episodes), because others may use the machine. The null environments answer every turn with one fixed
message, so that nothing but the interface is measured; `overhead` is the step less the same reply made by a plain
function. Peers stand beside it where they are installed: gymnasium's own `Text` environment through `make`, GEM,
TextArena, reasoning-gym, skyrl-gym (`pip install gem-llm textarena reasoning-gym skyrl-gym`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable

import gymnasium
import numpy as np
from gymnasium import spaces
from rich.console import Console
from rich.table import Table

import envs
from envs import ChatEnv, Reply, Task, Verdict
from envs.play import run_script
from tools import ParsedTurn

STEP_LIMIT_US, CHECK_LIMIT_US = 2.0, 0.5
EPISODE = 50
TURN = "I go on with the next step of my plan."


class Null(ChatEnv):
    """Answers every turn with one fixed message."""

    name = "null"

    def task(self, split, index, level=None):
        return Task(f"null/{split}/{index}", split, index, 1, {}, {}, str(index))

    def opening(self, task):
        return ({"role": "user", "content": "go"},)

    def judge(self, task, final):
        return Verdict(0.0, {}, {})

    def reply(self, turn):
        return Reply(({"role": "user", "content": "go on"},))


class NullText(gymnasium.Env):
    """The same over Gymnasium's own Text spaces."""

    def __init__(self) -> None:
        self.observation_space = self.action_space = spaces.Text(10_000)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "go", {}

    def step(self, action):
        return "goon", 0.0, False, False, {}


def best(call: Callable[[], object], count: int, repeats: int) -> float:
    """Microseconds of CPU time per call."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        for _ in range(count):
            call()
        times.append(time.process_time() - started)
    return min(times) / count * 1e6


def null_step(count: int, repeats: int) -> tuple[float, float]:
    """(a step of the null environment, its own logic alone), in episodes of `EPISODE` turns."""
    env = Null(max_turns=10**9)
    step, turn = env.step, ParsedTurn(TURN)

    def episodes(call: Callable[[], object]) -> float:
        times = []
        for _ in range(max(1, repeats * count // EPISODE)):
            env.reset(options={"index": 0})   # conversations do not grow for ever, and resets are not steps
            times.append(best(call, EPISODE, 1))
        return float(np.quantile(times, 0.1))

    return episodes(lambda: step(TURN)), episodes(lambda: env.reply(turn))


def observation_check(count: int, repeats: int) -> tuple[float, float]:
    """(our observation space on tool_qa's opening, Gymnasium's Text on as many characters)."""
    env = envs.make("tool_qa")
    observation, _ = env.reset(seed=0)
    space = env.observation_space
    size = sum(len(m["content"]) for m in observation["messages"])
    text, theirs = "a" * size, spaces.Text(10_000)
    return best(lambda: observation in space, count, repeats), best(lambda: text in theirs, count // 10, repeats)


def whole_episodes(name: str, count: int = 200) -> tuple[float, float]:
    """(CPU microseconds per oracle episode of fresh tasks, per step), tasks and tools included."""
    env = envs.make(name)
    rng = np.random.default_rng(0)
    started = time.process_time()
    played = [run_script(env, "oracle", rng, {"index": i}) for i in range(count)]
    took = (time.process_time() - started) * 1e6
    return took / count, took / sum(len(p.texts) for p in played)


def peers(count: int, repeats: int) -> dict[str, float]:
    """Microseconds per step of what else is installed."""
    found: dict[str, float] = {}
    gymnasium.register("bench/NullText-v0", entry_point=NullText)
    env = gymnasium.make("bench/NullText-v0", disable_env_checker=True)
    env.reset()
    found["gymnasium Text env, through make"] = best(lambda: env.step("a"), count, repeats)
    for label, build in {
        "gem guess-the-number": _gem, "textarena tic-tac-toe": _textarena, "reasoning-gym score": _reasoning_gym,
        "skyrl-gym": _skyrl,
    }.items():  # fmt: skip
        try:
            found[label] = best(build(), max(1, count // 10), repeats)
        except ImportError:   # not installed
            continue
        except Exception as error:   # another version's interface; the others are measured all the same
            print(f"{label}: left out, {type(error).__name__}: {error}", file=sys.stderr)
    return found


def _gem() -> Callable[[], object]:
    import gem  # type: ignore[import-not-found]

    env = gem.make("game:GuessTheNumber-v0-easy")
    env.reset(seed=0)

    def guess() -> None:
        *_, terminated, truncated, _ = env.step("\\boxed{50}")
        if terminated or truncated:
            env.reset()

    return guess


def _textarena() -> Callable[[], object]:
    import textarena  # type: ignore[import-not-found]

    env = textarena.make("TicTacToe-v0")

    def game() -> None:
        env.reset(num_players=2, seed=0)
        env.step("[4]")

    return game


def _reasoning_gym() -> Callable[[], object]:
    import reasoning_gym  # type: ignore[import-not-found]

    data = reasoning_gym.create_dataset("basic_arithmetic", size=100, seed=0)
    return lambda: data.score_answer("5", data[3])


def _skyrl() -> Callable[[], object]:
    import skyrl_gym  # type: ignore[import-not-found]

    extras = {"reward_spec": {"method": "rule", "ground_truth": "5"}}
    return lambda: skyrl_gym.make("gsm8k", extras=extras).step("#### 5")


def main() -> None:
    """Measure, print, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=60)
    arguments = parser.parse_args()
    count, repeats = arguments.steps, arguments.repeats
    step, own = null_step(count, repeats)
    check, text_check = observation_check(count, repeats)
    episode, per_step = whole_episodes("tool_qa")
    rows: list[tuple[str, float, float | None]] = [
        ("null env: whole step", step, None), ("null env: its own logic", own, None),
        ("overhead of a step", step - own, STEP_LIMIT_US), ("observation in space", check, CHECK_LIMIT_US),
        ("gymnasium Text, as many characters", text_check, None), ("tool_qa: per oracle episode", episode, None),
        ("tool_qa: per step, tasks and tools included", per_step, None),
        *((name, value, None) for name, value in peers(count, repeats).items()),
    ]  # fmt: skip
    table = Table(title="Environment steps, microseconds of CPU time")
    for column in ("what", "µs", "bound"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, value, bound in rows:
        table.add_row(name, f"{value:.2f}", "" if bound is None else f"≤ {bound:g}")
    Console().print(table)
    print(json.dumps({
        "overhead_us": round(step - own, 3), "check_us": round(check, 3), "rows": {n: round(v, 3) for n, v, _ in rows},
        "python": platform.python_version(), "gymnasium": gymnasium.__version__,
        "load": [round(x, 2) for x in os.getloadavg()],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
