"""The files of a comparison: comparison.json, comparison.png, comparison.html."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.cli import UsageError
from agents.compare import page, picture
from agents.runfolder import write_json


def write(summary: Mapping[str, Any], out: Path, command: str) -> None:
    """Write all three; `command` is said to have made them. UsageError where the folder cannot be written to."""
    try:
        write_json(out / "comparison.json", {**summary, "command": command})
        (out / "comparison.html").write_text(page.render(summary, command), encoding="utf-8")
        (out / "comparison.png").write_bytes(picture.png(summary))
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}") from error
