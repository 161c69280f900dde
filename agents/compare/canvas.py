"""Drawing in two forms from one set of calls: SVG for the page, which follows light and dark, and PNG.

Coordinates are points from the top left. Colours are names: the SVG takes the page's CSS variables of that
name, the PNG the light palette.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Literal, Protocol

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]

SERIES = ("s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7")
"""Colours of recipes, in order; told apart also by those who see few colours, as far as eight can be."""
LIGHT = {
    "paper": "#f6f5f1", "card": "#ffffff", "ink": "#1f2428", "soft": "#626a73", "faint": "#9aa1a9", "line": "#e4e2db",
    "s0": "#23648c", "s1": "#c2571f", "s2": "#2f7d4f", "s3": "#8a4fa3", "s4": "#a67c00", "s5": "#1d8a91",
    "s6": "#b0366b", "s7": "#5f6b4a",
}  # fmt: skip
DARK = {
    "s0": "#6fb1d9", "s1": "#f08c55", "s2": "#6cc48f", "s3": "#c39ad9", "s4": "#dfb24a", "s5": "#5ec9cf",
    "s6": "#ee86ae", "s7": "#a9b88a",
}  # fmt: skip
"""The series on dark ground; the page's own style has the rest."""


def series(i: int) -> str:
    """Colour of the i-th recipe; they repeat after the eighth."""
    return SERIES[i % len(SERIES)]


class Canvas(Protocol):
    """What can be drawn."""

    def line(self, points: Sequence[Point], colour: str, width: float = 1.0, dash: bool = False) -> None:
        """A polyline."""

    def area(self, points: Sequence[Point], colour: str, opacity: float = 1.0) -> None:
        """A filled polygon."""

    def dot(self, at: Point, radius: float, colour: str, fill: str | None = None) -> None:
        """A circle, filled with its colour or outlined around another."""

    def text(
        self, at: Point, text: str, size: float = 12, colour: str = "ink", anchor: Anchor = "start", bold: bool = False
    ) -> None:
        """One line of text; `at` is its baseline."""

    def hint(self, box: tuple[float, float, float, float], text: str) -> None:
        """Text that appears over a box (x, y, width, height), where the form can do so."""


class SVG:
    """A drawing for a page."""

    def __init__(self, width: float, height: float, label: str):
        self.width, self.height, self.label = width, height, label
        self.body: list[str] = []

    def line(self, points: Sequence[Point], colour: str, width: float = 1.0, dash: bool = False) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = ' stroke-dasharray="4 4"' if dash else ""
        self.body.append(
            f'<polyline points="{path}" fill="none" stroke="var(--{colour})" stroke-width="{width:g}" '
            f'stroke-linejoin="round" stroke-linecap="round"{dashes}/>'
        )

    def area(self, points: Sequence[Point], colour: str, opacity: float = 1.0) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.body.append(f'<polygon points="{path}" fill="var(--{colour})" fill-opacity="{opacity:g}"/>')

    def dot(self, at: Point, radius: float, colour: str, fill: str | None = None) -> None:
        inside = "" if fill is None else f' stroke="var(--{colour})" stroke-width="1.4"'
        self.body.append(
            f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:g}" fill="var(--{fill or colour})"{inside}/>'
        )

    def text(
        self, at: Point, text: str, size: float = 12, colour: str = "ink", anchor: Anchor = "start", bold: bool = False
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.body.append(
            f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" font-size="{size:g}" fill="var(--{colour})" '
            f'text-anchor="{anchor}"{weight}>{_safe(text)}</text>'
        )

    def hint(self, box: tuple[float, float, float, float], text: str) -> None:
        x, y, width, height = box
        self.body.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="transparent">'
            f"<title>{_safe(text)}</title></rect>"
        )

    def done(self) -> str:
        """The element."""
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{_safe(self.label)}" '
            f'xmlns="http://www.w3.org/2000/svg">{"".join(self.body)}</svg>'
        )


def _safe(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))


class PNG:
    """The same as pixels: drawn larger and scaled down, so that edges are smooth."""

    def __init__(self, width: float, height: float, scale: int = 2, fine: int = 2):
        self.factor, self.fine = scale * fine, fine
        self.size = round(width * scale), round(height * scale)
        self.image = Image.new("RGB", (self.size[0] * fine, self.size[1] * fine), LIGHT["paper"])
        self.pen = ImageDraw.Draw(self.image)

    def _at(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self.factor, y * self.factor) for x, y in points]

    def line(self, points: Sequence[Point], colour: str, width: float = 1.0, dash: bool = False) -> None:
        thick = max(1, round(width * self.factor))
        for piece in _dashes(points) if dash else [points]:
            self.pen.line(self._at(piece), LIGHT[colour], thick, joint="curve")

    def area(self, points: Sequence[Point], colour: str, opacity: float = 1.0) -> None:
        corners = self._at(points)
        left, top = (max(0, int(min(axis))) for axis in zip(*corners, strict=True))
        right, bottom = (int(max(axis)) + 2 for axis in zip(*corners, strict=True))
        mask = Image.new("L", (right - left, bottom - top), 0)
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in corners], fill=round(255 * opacity))
        self.image.paste(LIGHT[colour], (left, top, right, bottom), mask)

    def dot(self, at: Point, radius: float, colour: str, fill: str | None = None) -> None:
        ((x, y),), r = self._at([at]), radius * self.factor
        outline = None if fill is None else LIGHT[colour]
        self.pen.ellipse((x - r, y - r, x + r, y + r), LIGHT[fill or colour], outline, round(1.4 * self.factor))

    def text(
        self, at: Point, text: str, size: float = 12, colour: str = "ink", anchor: Anchor = "start", bold: bool = False
    ) -> None:
        font = ImageFont.load_default(size * self.factor)
        side = {"start": "l", "middle": "m", "end": "r"}[anchor]
        # Pillow's own font has one weight; a thin outline makes it heavier.
        stroke = max(1, round(size * self.factor / 45)) if bold else 0
        self.pen.text(self._at([at])[0], text, LIGHT[colour], font, f"{side}s", stroke_width=stroke)

    def hint(self, box: tuple[float, float, float, float], text: str) -> None:
        """Nothing: pixels have no hints."""

    def done(self) -> bytes:
        """The file."""
        stream = io.BytesIO()
        self.image.resize(self.size, Image.Resampling.BOX).save(stream, "PNG", optimize=True)
        return stream.getvalue()


def _dashes(points: Sequence[Point], length: float = 4.0) -> list[list[Point]]:
    """Pieces of a straight line, as long as the gaps between them."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    whole = max(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5, 1e-9)
    count = max(1, int(whole / (2 * length)))

    def along(s: float) -> Point:
        share = min(1.0, s / whole)
        return x0 + (x1 - x0) * share, y0 + (y1 - y0) * share

    return [[along(2 * length * i), along(2 * length * i + length)] for i in range(count)]
