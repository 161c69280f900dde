"""A small environment for tests of evaluation: even or odd? One tool, two levels, twenty evaluation tasks."""

from __future__ import annotations

from envs import ChatEnv, Task, Verdict, fingerprint
from tools import Tool, Toolbox


def remainder(number: int) -> str:
    """Remainder of a division by two.

    Args:
        number: a whole number.
    """
    return str(number % 2)


def _says(text):
    def script(env, rng):
        yield text

    return script


def _oracle(env, rng):
    task = env.episode.task
    if task.level == 2:
        arguments = f'{{"number": {task.prompt["number"]}}}'
        yield f'<tool_call>{{"name": "remainder", "arguments": {arguments}}}</tool_call>'
    yield f"<answer>{task.truth['answer']}</answer>"


def _random(env, rng):
    yield f"<answer>{('even', 'odd')[int(rng.integers(2))]}</answer>"


def _clumsy(env, rng):
    yield '<tool_call>{"name": "remainder", "arguments": {"number": 3</tool_call>'
    yield '<tool_call>{"name": "remander", "arguments": {"number": 3}}</tool_call>'
    yield "<answer>odd</answer>"


class Parity(ChatEnv):
    """Says whether a number is even or odd."""

    name = "parity"
    levels = {1: "asked plainly", 2: "with the tool"}  # noqa: RUF012
    scripts = {"oracle": _oracle, "random": _random, "clumsy": _clumsy}  # noqa: RUF012
    demonstrators = {"oracle": 1.0}  # noqa: RUF012
    hacks = {"silent": _says(""), "breaks_the_verifier": _says("<answer>raise</answer>")}  # noqa: RUF012

    def task(self, split, index, level=None):
        level = self.known_level(self.level if level is None else level) or 1 + index % 2
        number = 7 * index + (3 if split == "train" else 5)
        truth = "odd" if number % 2 else "even"
        return Task(
            f"parity/{split}/{index}", split, index, level, {"number": number}, {"answer": truth},
            fingerprint(split, number),
        )  # fmt: skip

    def opening(self, task):
        return ({"role": "user", "content": f"Is {task.prompt['number']} even or odd?"},)

    def toolbox(self, task):
        return Toolbox([Tool.from_function(remainder)])

    def task_count(self, split):
        return 20 if split == "eval" else None

    def judge(self, task, final):
        said = (final or "").removeprefix("<answer>").removesuffix("</answer>")
        if said == "raise":
            raise RuntimeError("the verifier broke")
        right = float(said == task.truth["answer"])
        return Verdict(right, {"correct": right}, {"minimal_calls": task.level - 1})
