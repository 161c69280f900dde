"""A cell of a comparison: one recipe trained with one seed and evaluated. What is left to do is read off the disk.

    OUT/grpo-s0/           the run, as agents.train writes it
    OUT/grpo-s0.json       its evaluation, as `agents.eval --json` prints it
    OUT/grpo-s0.log        what both said
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from agents import cli
from agents.cli import UsageError
from agents.config import TrainConfig
from agents.runfolder import read_json, read_jsonl

OWN = {"env", "algo", "seed", "run", "runs", "resume", "from_step", "dry_run", "json", "plain"}
"""Options of agents.train that the comparison sets itself."""
FREE = {"run", "runs", "resume", "from_step", "dry_run", "json", "plain", "save"}
"""Options in which two runs may differ and yet be the same training."""


@dataclass(frozen=True)
class Cell:
    """One recipe with one seed."""

    algo: str
    seed: int
    out: Path
    """Folder of the comparison."""
    config: TrainConfig
    """Its training."""
    options: tuple[str, ...]
    """The same as a command line."""
    episodes: int
    """Held-out tasks that it plays."""

    @property
    def name(self) -> str:
        """What messages and files call it."""
        return f"{self.algo.replace(':', '.')}-s{self.seed}"

    @property
    def run(self) -> Path:
        """Folder of the run."""
        return self.out / self.name

    @property
    def log(self) -> Path:
        """What training and evaluation said."""
        return self.out / f"{self.name}.log"

    @property
    def result(self) -> Path:
        """The evaluation."""
        return self.out / f"{self.name}.json"

    # -- what is left to do ----------------------------------------------------------------------------------

    @property
    def trained(self) -> bool:
        """Has the training ended?"""
        return (self.run / "summary.json").is_file()

    @property
    def done(self) -> bool:
        """Trained, and evaluated on as many tasks as asked for?"""
        if not self.trained or not self.result.is_file():
            return False
        return read_json(self.result).get("asked") == self.episodes

    def command(self) -> tuple[str, list[str]]:
        """(what, arguments after `python -m`) of the next thing to do."""
        if self.trained:
            what = ["--model", str(self.run), "--episodes", str(self.episodes), "--no-record", "--json"]
            return "evaluating", ["agents.eval", *what]
        if (self.run / "config.json").is_file():
            return "training", ["agents.train", "--resume", str(self.run), "--plain"]
        return "training", ["agents.train", *self.options, "--run", str(self.run), "--plain"]

    def store(self, printed: str) -> None:
        """Keep the evaluation that `agents.eval --json` printed."""
        result = json.loads(printed.splitlines()[-1]) | {"asked": self.episodes}
        beside = self.result.with_suffix(".part")
        beside.write_text(json.dumps(result), encoding="utf-8")
        beside.replace(self.result)

    def refuse_another(self) -> None:
        """UsageError where the folder holds another training under this name."""
        if not (self.run / "config.json").is_file():
            return
        saved = cli.from_mapping(read_json(self.run / "config.json"), TrainConfig, where=f"{self.run}/config.json")
        for field in fields(TrainConfig):
            old, new = getattr(saved, field.name), getattr(self.config, field.name)
            if old != new and field.name not in FREE:
                raise UsageError(
                    f"{self.run} was trained with {field.name} = {_brief(old)}, not {_brief(new)}: "
                    f"name another folder with --out, or leave the option as it was"
                )

    # -- what it left behind ---------------------------------------------------------------------------------

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One record an iteration, as far as it got."""
        return read_jsonl(self.run / "metrics.jsonl")

    @cached_property
    def after(self) -> Mapping[str, Any]:
        """The evaluation of the comparison."""
        return read_json(self.result)

    @cached_property
    def before(self) -> Mapping[str, Any] | None:
        """The evaluation before training, by the run itself."""
        records = read_jsonl(self.run / "eval.jsonl")
        return next((e for e in records if e.get("label") == "before"), None)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def train_options(items: Sequence[str], episodes: int) -> list[str]:
    """`--train NAME=VALUE ...` as arguments of agents.train, over the comparison's own defaults.

    One process and no evaluation on harder tasks: the cells fill the cores, and all of them play the same tasks
    in the end.
    """
    given: list[tuple[str, str]] = []
    for item in items:
        name, equals, value = item.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not name:
            raise UsageError(f"--train takes NAME=VALUE, an option of agents.train, e.g. steps=40; got {item!r}")
        if name in OWN:
            raise UsageError(f"--train {name}=...: the comparison sets `{name}` itself")
        given.append((name, value))
    defaults = {"processes": "1", "eval.episodes": str(min(episodes, 500)), "eval.hard_episodes": "0"}
    named = {name for name, _ in given}
    pairs = [(k, v) for k, v in defaults.items() if k not in named] + given
    return [part for name, value in pairs for part in _argument(name, value)]


def _argument(name: str, value: str) -> tuple[str, ...]:
    option = f"--{name.replace('_', '-')}"
    if value in ("True", "true"):
        return (option,)
    if value in ("False", "false"):
        head, dot, last = option[2:].rpartition(".")
        return (f"--{head}{dot}no-{last}",)
    return (option, value)


def plan(env: str, algos: Sequence[str], seeds: int, episodes: int, train: Sequence[str], out: Path) -> list[Cell]:
    """All cells, seeds outermost, so that an interrupted comparison is one of fewer seeds.

    Everything that can be wrong is looked at here, before anything runs.

    Raises:
        UsageError: an option, the environment, or a folder that holds something else.
        RecipeError: an unknown recipe, or a setting that does not fit it.
        SystemExit: 2, an unknown option of agents.train.
    """
    import policy_opt
    from agents.eval import EvalCommand, env_maker
    from agents.train import resolve

    options = train_options(train, episodes)
    cells = []
    for seed in range(seeds):
        for algo in algos:
            arguments = ("--env", env, "--algo", algo, "--seed", str(seed), *options)
            cells.append(Cell(algo, seed, out, resolve(arguments), arguments, episodes))
    config = cells[0].config
    env_maker(EvalCommand(env=env, env_args=config.env_args, reward=config.reward, level=config.level))
    for algo in algos:
        policy_opt.get(algo).set(*config.set).check()
    for cell in cells:
        cell.refuse_another()
    return cells
