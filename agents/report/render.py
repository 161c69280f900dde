"""One self-contained HTML file: styles, scripts and data inside, nothing fetched, no run's text ever markup.

The data are gzip in base64, in blocks that the page unpacks when a trajectory is opened, so a report of
thousands of trajectories opens at once. A content security policy forbids the page every request, and every
script but its own; images stand in the file, too, and are shown from data: addresses.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from agents.runfolder import plain

HERE = Path(__file__).resolve().parent
SCRIPTS = ("dom.js", "charts.js", "summary.js", "table.js", "trajectory.js", "main.js")


@dataclass(frozen=True)
class Page:
    """What a report shows, as plain data."""

    title: str
    """Heading and window title."""
    facts: Sequence[tuple[str, str]]
    """Name and value pairs under the heading."""
    summary: dict[str, Any]
    """All but the trajectories' contents; see `collect`."""
    blocks: Sequence[Sequence[dict[str, Any]]]
    """Contents of the trajectories, in the table's order, `block_size` to a block."""
    footer: str
    """The command that wrote the file, and when."""
    images: Sequence[tuple[str, str]] = ()
    """Media type and base64 of the images that the contents name by number."""


def render(page: Page) -> str:
    """The file's text: ASCII data inside UTF-8 markup; lone surrogates in titles are replaced."""
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template("report.html.j2").render(
        title=page.title,
        facts=page.facts,
        footer=page.footer,
        style=_raw((HERE / "style.css").read_text(encoding="utf-8"), "</style"),
        script=_raw(script, "</script"),
        script_hash=f"sha256-{digest}",
        summary=pack(page.summary),
        blocks=[pack(block) for block in page.blocks],
        images=page.images,
    )
    return text.encode("utf-8", "replace").decode("utf-8")


def pack(value: Any) -> str:
    """JSON, gzip, base64. ASCII JSON keeps lone surrogates as escapes; the gzip header carries no time."""
    text = json.dumps(plain(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("ascii"), compresslevel=6, mtime=0)).decode("ascii")


def unpack(text: str) -> Any:
    """The value that `pack` took."""
    return json.loads(gzip.decompress(base64.b64decode(text)))


def _raw(text: str, end: str) -> Markup:
    """Our own files go in unescaped, so they may not contain what ends their element."""
    if end in text.lower():
        raise ValueError(f"an asset of the report contains {end}")
    return Markup(text)
