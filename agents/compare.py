"""`python -m agents.compare --env E --algos A,B --seeds N`: recipes against each other at equal budget.

Every recipe is trained with every seed (same tasks, same number of episodes), then every trained policy plays
the same held-out tasks. Differences are paired over tasks, the seeds of a task taken together, with 95 %
intervals. A comparison that was interrupted goes on where it stopped: what is in the folder is not run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from agents import checkpoint, cli, stats
from agents.cli import UsageError
from agents.runfolder import read_json
from agents.stats import Interval


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
    out: str = "runs/compare"
    """Folder of the runs and of comparison.json."""
    jobs: int = 0
    """Runs at the same time; 0: one per core."""
    json: bool = False
    """End with one line of JSON."""


@dataclass(frozen=True)
class Trained:
    """One recipe with one seed, trained and evaluated."""

    algo: str
    seed: int
    before: Mapping[str, Any]
    """Evaluation of the warm start, as in eval.jsonl."""
    after: Mapping[str, Any]
    """The evaluation of the comparison, as `agents.eval --json` prints it."""


def main(argv: Sequence[str]) -> int:
    """The command."""
    command = cli.parse(CompareCommand, argv, "python -m agents.compare")
    algos = _algos(command.algos)
    out = Path(command.out)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=command.json)
    cells = [(algo, seed) for seed in range(command.seeds) for algo in algos]
    jobs = command.jobs or os.cpu_count() or 1
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar, ThreadPoolExecutor(jobs) as pool:
        task = bar.add_task("runs", total=len(cells))

        def one(cell: tuple[str, int]) -> Trained:
            trained = run_cell(command, *cell)
            bar.advance(task)
            return trained

        runs = list(pool.map(one, cells))
    summary = summarise(runs, algos)
    (out / "comparison.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    show(summary, console)
    console.print(f"written to {out / 'comparison.json'}")
    if command.json:
        print(json.dumps(summary))
    return 0


def _algos(text: str) -> list[str]:
    import policy_opt

    algos = [name.strip() for name in text.split(",") if name.strip()]
    if len(algos) < 2 or len(set(algos)) < len(algos):
        raise UsageError(f"--algos names two recipes or more, each once; got {text!r}")
    for name in algos:
        policy_opt.get(name)
    return algos


def run_cell(command: CompareCommand, algo: str, seed: int) -> Trained:
    """Train (or go on, or reuse) one run and play the tasks of the comparison."""
    run = Path(command.out) / f"{algo}-s{seed}"
    log = run.with_suffix(".log")
    if not (run / "summary.json").is_file():
        started = (run / "checkpoints").is_dir() and checkpoint.steps(run / "checkpoints")
        arguments = ["agents.train", "--resume", str(run)] if started else _fresh(command, algo, seed, run)
        _call([*arguments, "--plain"], log)
    result = run / "comparison.json"
    if not result.is_file():
        text = _call(
            [
                "agents.eval",
                "--model",
                str(run),
                "--episodes",
                str(command.episodes),
                "--no-record",
                "--json",
            ],
            log,
        )
        result.write_text(text.splitlines()[-1], encoding="utf-8")
    lines = (run / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    before = next(e for e in map(json.loads, lines) if e["label"] == "before")
    return Trained(algo, seed, before, read_json(result))


def _fresh(command: CompareCommand, algo: str, seed: int, run: Path) -> list[str]:
    options = [part for item in command.train for part in _option(item)]
    what = ["--env", command.env, "--algo", algo, "--seed", str(seed), "--run", str(run)]
    return ["agents.train", *what, *options]


def _option(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals:
        raise UsageError(f"--train takes NAME=VALUE, an option of agents.train; got {item!r}")
    return f"--{name}", value


def _call(arguments: Sequence[str], log: Path) -> str:
    """Run a module of ours, its output appended to a log; RuntimeError with the log's end where it fails."""
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(done.stdout + done.stderr)
    if done.returncode:
        end = (done.stdout + done.stderr)[-2000:]
        raise RuntimeError(f"python -m {' '.join(arguments)} exited {done.returncode}:\n{end}")
    return done.stdout


def summarise(runs: Sequence[Trained], algos: Sequence[str]) -> dict[str, Any]:
    """Per recipe its numbers over all seeds, and against the first recipe the paired differences."""
    pooled = {algo: _pool([r.after for r in runs if r.algo == algo]) for algo in algos}
    base_correct, base_calls = pooled[algos[0]]
    rows = []
    for algo in algos:
        correct, calls = pooled[algo]
        row: dict[str, Any] = {
            "algo": algo,
            "success": list(stats.success_interval(correct)),
            "tool_calls": list(stats.mean_interval(calls)),
            "seeds": [r.after["success"][0] for r in runs if r.algo == algo],
            "productivity": sum(map(sum, correct)) / max(1, sum(map(sum, calls))),
        }
        if algo != algos[0]:
            row["success_difference"] = list(stats.paired_difference(correct, base_correct))
            if sum(map(sum, base_calls)):
                row["tool_calls_ratio"] = list(stats.paired_ratio(calls, base_calls))
        rows.append(row)
    return {"baseline": algos[0], "tasks": len(base_correct), "warm_start": _warm_start(runs), "rows": rows}


def _pool(evaluations: Sequence[Mapping[str, Any]]) -> tuple[list[list[int]], list[list[int]]]:
    """(correct, calls) per task, the seeds' episodes of a task side by side."""
    if len({e["tasks_key"] for e in evaluations}) != 1:
        raise ValueError("the evaluations are of different tasks; remove the folder and start again")
    return _side_by_side([e["correct"] for e in evaluations]), _side_by_side(
        [e["calls"] for e in evaluations]
    )


def _side_by_side(seeds: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """Per task the numbers of all seeds."""
    return [[x for episodes in task for x in episodes] for task in zip(*seeds, strict=True)]


def _warm_start(runs: Sequence[Trained]) -> dict[str, float]:
    """Success and calls of the policies that the runs start from, and their calls beyond what is needed."""
    levels = [level for r in runs for level in r.before["levels"]]
    n = sum(level["episodes"] for level in levels)
    mean = {
        key: sum(level[key] * level["episodes"] for level in levels) / n
        for key in ("tool_calls", "minimal_calls")
        if all(level[key] is not None for level in levels)
    }
    surplus = {"surplus_calls": mean["tool_calls"] - mean["minimal_calls"]} if len(mean) == 2 else {}
    return {"success": sum(r.before["success"][0] for r in runs) / len(runs), **mean, **surplus}


def show(summary: Mapping[str, Any], console: Console) -> None:
    """The comparison as a table."""
    warm = summary["warm_start"]
    start = f"warm start: success {warm['success']:.3f}, tool calls {warm['tool_calls']:.2f} per episode"
    if "surplus_calls" in warm:
        start += f", needed {warm['minimal_calls']:.2f}, surplus {warm['surplus_calls']:+.2f}"
    console.print(start)
    title = f"{summary['tasks']} held-out tasks, 95 % intervals; differences against {summary['baseline']}"
    names = (
        "recipe",
        "success",
        "by seed",
        "tool calls",
        "correct / call",
        "success difference",
        "calls saved",
    )
    table = Table(*names, title=title)
    for row in summary["rows"]:
        saved = Interval(*(1 - x for x in row["tool_calls_ratio"])) if "tool_calls_ratio" in row else None
        table.add_row(
            row["algo"], str(Interval(*row["success"])), " ".join(f"{s:.3f}" for s in row["seeds"]),
            str(Interval(*row["tool_calls"])), f"{row['productivity']:.3f}",
            str(Interval(*row["success_difference"])) if "success_difference" in row else "",
            f"{saved.mean:.1%} [{saved.high:.1%}, {saved.low:.1%}]" if saved else "",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    from policy_opt.errors import RecipeError

    cli.run(main, (RecipeError,))
