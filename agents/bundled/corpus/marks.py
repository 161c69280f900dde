"""Marks: control characters around the spans of a document that the text before them determines.

`det("Zanvel")` marks a span; `strip` takes the marks out again and says where the spans were.
"""

from __future__ import annotations

OPEN, CLOSE = "\x02", "\x03"


def det(text: str) -> str:
    """`text` as a span that the context determines."""
    return f"{OPEN}{text}{CLOSE}"


def strip(text: str) -> tuple[str, list[tuple[int, int]]]:
    """(text without marks, [start, end) character spans that were marked); marks do not nest."""
    plain: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0
    for i, piece in enumerate(text.split(OPEN)):
        if i == 0:
            plain.append(piece)
            length += len(piece)
            continue
        inside, closed, outside = piece.partition(CLOSE)
        if not closed or CLOSE in outside:
            raise ValueError("marks must come in pairs and may not nest")
        spans.append((length, length + len(inside)))
        plain += [inside, outside]
        length += len(inside) + len(outside)
    return "".join(plain), spans


def unmark(text: str) -> str:
    """`text` with its marks taken out."""
    return text.replace(OPEN, "").replace(CLOSE, "")
