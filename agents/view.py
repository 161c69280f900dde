"""`python -m agents.view RUN`: one self-contained HTML file of a run, readable offline, for good.

Curves, evaluations with intervals, the doctor's findings, the configuration, and the stored trajectories turn by
turn, their tokens coloured by log-prob, advantage, entropy or any other column that was stored with them.
"""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from agents import cli
from agents.cli import UsageError
from agents.report import collect
from agents.report.render import render
from agents.report.stored import Episodes


@dataclass(frozen=True)
class ViewCommand:
    """One self-contained HTML file of a run."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of the run."""
    out: str | None = None
    """File to write; none: report.html in the run's folder."""
    trajectories: int = 2000
    """Trajectories to keep at most: whole groups, spread over the steps."""
    open: bool = False
    """Show the file in the browser."""


def main(argv: Sequence[str]) -> int:
    """The command."""
    command = cli.parse(ViewCommand, argv, "python -m agents.view")
    file = write_report(Path(command.run), Path(command.out) if command.out else None, command.trajectories)
    print(file)
    if command.open:
        webbrowser.open(file.resolve().as_uri())
    return 0


def write_report(run: Path, out: Path | None = None, limit: int = 2000) -> Path:
    """Write the report of a run, atomically; returns its path.

    Raises:
        UsageError: the folder is no run's, or the file cannot be written.
    """
    if not run.is_dir():
        raise UsageError(f"there is no folder {run}")
    known = ("config.json", "metrics.jsonl", "eval.jsonl", "trajectories")
    if not any((run / name).exists() for name in known):
        raise UsageError(f"{run} is not the folder of a run: it has none of {', '.join(known)}")
    if limit < 0:
        raise UsageError(f"--trajectories must be at least 0, got {limit}")
    data = collect.read(run)
    episodes = Episodes(run, limit)
    command = f"python -m agents.view {run.name}"
    page = collect.page(data, episodes, episodes.total, tokenizer_of(run, data), command, episodes.notes)
    file = out if out is not None else run / "report.html"
    beside = file.with_name(f".{file.name}.part")
    try:
        beside.write_text(render(page), encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UsageError(f"cannot write {file}: {error.strerror}") from error
    return file


def tokenizer_of(run: Path, data: collect.RunData) -> Any | None:
    """The run's tokenizer, from its own folders only: nothing is downloaded to look at a run."""
    from transformers import AutoTokenizer

    model = str(data.config.get("model") or "")
    if model == "bundled":
        from agents import bundled

        model = str(bundled.path())
    exported = run / "model"
    place = str(exported) if (exported / "tokenizer_config.json").is_file() else model
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True) if place else None
    except (OSError, ValueError, KeyError):
        return None


if __name__ == "__main__":
    cli.run(main)
