"""`python -m agents.bundled build` makes the model from nothing; `card` measures the shipped one."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from agents import bundled
from agents.bundled import build, skills
from agents.bundled import model as architecture
from agents.cli import UsageError, nearest, parse


@dataclass(frozen=True)
class Build:
    """Builds tokenizer and model on one thread; an interrupted build goes on where it stopped."""

    out: Path = bundled.MODEL
    """Folder of the finished model."""
    work: Path = Path("runs/bundled")
    """Folder of the checkpoint from which an interrupted build goes on."""
    minutes: float | None = None
    """Length of the build, in minutes of a slow core (400,000 tokens each); default: as shipped."""
    seed: int = 0
    """Of the weights and of every document."""
    json: bool = False
    """Print the skill table as one last line of JSON."""


@dataclass(frozen=True)
class Card:
    """The skill table of a built model."""

    model: Path = bundled.MODEL
    """A folder that `build` wrote."""
    documents: int = 40
    """Documents per skill."""
    json: bool = False
    """Print the skill table as one last line of JSON."""


def main(argv: list[str]) -> int:
    """Runs a command; 2 for what the user got wrong."""
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    try:
        if name == "build":
            run_build(parse(Build, rest, "agents.bundled build"))
        elif name == "card":
            run_card(parse(Card, rest, "agents.bundled card"))
        elif name in ("-h", "--help"):
            print("usage: python -m agents.bundled {build,card} [options]")
        else:
            raise UsageError(f"unknown command `{name}`{nearest(name, ('build', 'card'))} (there are: build, card)")
    except UsageError as error:
        print(f"agents.bundled: {error}", file=sys.stderr)
        return 2
    return 0


def run_build(options: Build) -> None:
    torch.set_num_threads(1)
    plan = (
        build.Plan(seed=options.seed)
        if options.minutes is None
        else build.Plan.of_minutes(options.minutes, seed=options.seed)
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("building", total=plan.steps)

        def report(p: build.Progress) -> None:
            bar.update(task, completed=p.step, description=f"loss {p.loss:.3f}, {p.tokens_per_second:,.0f} tokens/s")

        try:
            model, tokenizer = build.train(plan, options.work, report)
        except ValueError as error:
            raise UsageError(str(error)) from error
    architecture.save(model, tokenizer, options.out)
    print(f"written to {options.out}")
    run_card(Card(options.out, json=options.json))


def run_card(options: Card) -> None:
    torch.set_num_threads(1)
    if not (options.model / "config.json").is_file():
        raise UsageError(f"there is no model in {options.model}; make one: python -m agents.bundled build")
    model, tokenizer = architecture.read(options.model)
    rows = skills.measure(model, tokenizer, options.documents)
    size = sum(file.stat().st_size for file in options.model.glob("*.safetensors"))
    table = Table(
        title=f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens, {size / 1e6:.1f} MB; "
        "names never seen in training"
    )
    for column in ("skill", "right at temperature 1", "greedy", "spans"):
        table.add_column(column, justify="left" if column == "skill" else "right")
    for row in rows:
        table.add_row(row.name, f"{row.sampled:.3f}", f"{row.greedy:.3f}", str(row.spans))
    Console().print(table)
    if options.json:
        print(
            json.dumps(
                {
                    "parameters": model.num_parameters(),
                    "bytes": size,
                    "skills": [dataclasses.asdict(row) for row in rows],
                }
            )
        )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
