"""`python -m agents.compare --env E --algos A,B --seeds N`: recipes against each other at equal budget.

Every recipe is trained with every seed (same tasks, same iterations), then every trained policy plays the same
held-out tasks. Differences are paired over seeds and tasks, with 95 % intervals. A comparison that was interrupted
goes on where it stopped with the same command, and more recipes or seeds can be added to it: what is in the folder
is not run again.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agents import cli
from agents.cli import UsageError
from agents.runfolder import RunFolder, plain
from agents.stats import Interval

MODULE = "agents.compare"


@dataclass(frozen=True)
class CompareCommand:
    """Train several recipes with several seeds and compare them on the same held-out tasks."""

    env: str = "tool_qa"
    """Environment: a name (python -m envs), package.module:Class, or jsonl:FILE."""
    algos: str = "grpo,otc_grpo"
    """Recipes, separated by commas; the first one is what the others are compared with."""
    seeds: int = 3
    """Training runs of each recipe: seeds 0, 1, ..."""
    episodes: int = 2000
    """Held-out tasks that every trained policy plays, one episode each."""
    train: tuple[str, ...] = ()
    """Options of agents.train for every run, NAME=VALUE (steps=100); may be given several times."""
    out: str | None = None
    """Folder of the runs and of comparison.html, .png and .json; none: runs/compare-ENV."""
    jobs: int = 0
    """Runs at the same time; 0: one per core, or one per GPU where there are some."""
    json: bool = False
    """End with one line of JSON."""


def main(argv: Sequence[str]) -> int:
    """The command; 0, or 128 + the signal that stopped it."""
    command = cli.parse(CompareCommand, argv, f"python -m {MODULE}")
    algos = check(command)
    from agents.compare.cells import plan
    from agents.compare.files import write
    from agents.compare.queue import Stopped, run_all
    from agents.compare.summary import summarise

    out = folder(command)
    cells = plan(command.env, algos, command.seeds, command.episodes, command.train, out)
    out.mkdir(parents=True, exist_ok=True)
    lock = RunFolder(out)  # one comparison at a time writes here
    console = Console(stderr=command.json)
    written = f"python -m {MODULE} {shlex.join(argv)}"
    try:
        run_all(cells, command.jobs, console)
        summary = summarise(cells, algos)
        write(summary, out, written)
    except Stopped as stop:
        console.print(f"stopped by {stop}; what is done is kept. Go on with:\n  {escape(written)}", highlight=False)
        return 128 + stop.number
    finally:
        lock.close()
    show(summary, console)
    console.print(f"written: {', '.join(str(out / f'comparison.{kind}') for kind in ('html', 'png', 'json'))}")
    if command.json:
        print(json.dumps(plain(summary), allow_nan=False), flush=True)
    return 0


def check(command: CompareCommand) -> list[str]:
    """The recipes' names; UsageError or RecipeError where the command cannot be meant."""
    for name, least in (("seeds", 1), ("episodes", 1), ("jobs", 0)):
        if getattr(command, name) < least:
            raise UsageError(f"--{name} must be at least {least}, got {getattr(command, name)}")
    algos = [name.strip() for name in command.algos.split(",") if name.strip()]
    if len(algos) < 2 or len(set(algos)) < len(algos):
        raise UsageError(f"--algos names two recipes or more, each once, separated by commas; got {command.algos!r}")
    import policy_opt

    for name in algos:
        policy_opt.get(name)
    return algos


def folder(command: CompareCommand) -> Path:
    """Where the comparison goes."""
    if command.out is not None:
        return Path(command.out)
    return Path("runs") / f"compare-{command.env.split('/')[-1].split(':')[-1]}"


def show(summary: Mapping[str, Any], console: Console) -> None:
    """The comparison as a table."""
    warm = summary["warm_start"]
    if warm is not None:
        start = f"before training: success {warm['success']:.3f}"
        if "tool_calls" in warm:
            start += f", tool calls {warm['tool_calls']:.2f} per episode"
        if "surplus_calls" in warm:
            start += f", needed {warm['minimal_calls']:.2f}, surplus {warm['surplus_calls']:+.2f}"
        console.print(start)
    over = "seeds and tasks" if summary["seeds"] > 1 else "tasks"
    title = f"{summary['env']}: {summary['seeds']} seeds, {summary['tasks']} held-out tasks, 95 % intervals over {over}"
    names = ("recipe", "success", "IQM", "by seed", f"less {summary['baseline']}", "tool calls", "calls saved")
    table = Table(*names, title=escape(title))
    for row in summary["rows"]:
        table.add_row(
            escape(row["algo"]) + (" [red](failures)[/]" if row["marked"] else ""),
            str(Interval(*row["success"])), f"{row['iqm'][0]:.3f}", " ".join(f"{s:.3f}" for s in row["by_seed"]),
            _signed(row["difference"]) if "difference" in row else "", str(Interval(*row["tool_calls"])),
            _saved(row.get("calls_ratio")),
        )  # fmt: skip
    console.print(table)


def _signed(interval: Sequence[float]) -> str:
    mean, low, high = interval
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _saved(ratio: Sequence[float] | None) -> str:
    """Tool calls saved, from the ratio of those made."""
    if ratio is None:
        return ""
    mean, low, high = (1 - x for x in ratio)
    return f"{mean:.1%} [{high:.1%}, {low:.1%}]"


def user_errors() -> tuple[type[BaseException], ...]:
    """What the user got wrong: one line and exit code 2."""
    from policy_opt.errors import RecipeError

    return (RecipeError,)


def run() -> None:
    """The command line: exit code 2 for a mistake, 1 where a run failed."""
    def guarded(argv: Sequence[str]) -> int:
        try:
            return main(argv)
        except Exception as error:
            from agents.compare.queue import CellFailed

            if not isinstance(error, CellFailed):
                raise
            print(f"error: {error}", file=sys.stderr)
            return 1

    cli.run(guarded, user_errors)
