"""`python -m agents.export RUN`: a run's stored episodes as JSON lines, one episode a line.

Every line holds the conversation (`messages`), the turns, the verdict, the ids of the episode, what the
writer said of it (`step`, ...), and, unless --no-tokens is given, `segments` with token ids, mask,
log-probs, versions and the per-token columns that were stored. An image of a message is named:
`{"png": NAME, "width": ..., "height": ...}` is the file `images/NAME.png` beside the stored episodes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from agents import cli
from agents.cli import UsageError
from agents.runfolder import plain
from agents.store import Stored, StoreError, TrajectoryReader


@dataclass(frozen=True)
class ExportCommand:
    """A run's stored episodes as JSON lines."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of the run, or of its stored episodes."""
    out: str | None = None
    """File to write; none: standard output."""
    tokens: bool = True
    """Write token ids, mask, log-probs and columns, too."""


def main(argv: Sequence[str]) -> int:
    """The command."""
    command = cli.parse(ExportCommand, argv, "python -m agents.export")
    reader = open_store(Path(command.run))
    lines = (json.dumps(plain(as_json(stored, command.tokens)), allow_nan=False) for stored in reader.records())
    if command.out is None:
        for line in lines:
            print(line)
    else:
        try:
            with Path(command.out).open("w", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
        except OSError as error:
            raise UsageError(f"cannot write {command.out}: {error.strerror}") from error
        print(f"{len(reader)} episodes -> {command.out}", file=sys.stderr)
    if reader.dropped:
        print(f"the last record is torn and was left out ({reader.dropped_bytes} bytes)", file=sys.stderr)
    return 0


def open_store(run: Path) -> TrajectoryReader:
    """The episodes of a run folder; UsageError where there are none."""
    folder = run / "trajectories" if (run / "trajectories").is_dir() else run
    try:
        return TrajectoryReader(folder, images=False)
    except StoreError as error:
        raise UsageError(str(error)) from error


def as_json(stored: Stored, tokens: bool = True) -> dict[str, Any]:
    """A record as plain data."""
    t = stored.trajectory
    line = {**t.__dict__, **stored.extra}
    line["turns"] = [asdict(turn) for turn in t.turns]
    line["verdict"] = None if t.verdict is None else asdict(t.verdict)
    line["sampler"] = asdict(t.sampler)
    del line["ledger"]
    if tokens and t.ledger is not None:
        line["segments"] = [
            {**asdict(segment), **{name: values[i].tolist() for name, values in stored.columns.items()}}
            for i, segment in enumerate(t.ledger.segments)
        ]
    return line


if __name__ == "__main__":
    cli.run(main)
