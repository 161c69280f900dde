"""Conversations with numbered placeholders in place of their texts, for rendering a chat template's own part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Messages = Sequence[Mapping[str, Any]]

OPEN, CLOSE = "\ue000", "\ue001"  # private use: they frame a placeholder's number
_PLACE = re.compile(f"{OPEN}(\\d+){CLOSE}")
_MARKERS = re.compile(r"(\n*</?think>\n*)")  # what templates look for inside an assistant's text
_NAME = re.compile(r"[\w.\-]{1,64}")


class ChatFormatError(ValueError):
    """The tokenizer's chat template cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Shown:
    """An image among a message's words."""

    image: Any


Words = str | tuple[str | Shown, ...]
"""What a message says: text, or texts and images in order."""


def words_of(content: Any) -> Words:
    """A message's text, or where it has images its texts and images.

    Raises:
        ChatFormatError: a part is neither.
    """
    if isinstance(content, str):
        return content
    found: list[str | Shown] = []
    for part in content or ():
        kind = part.get("type")
        if kind not in ("text", "image"):
            raise ChatFormatError(f"a chat format has no tokens for a {kind!r} part; text and image have")
        found.append(part["text"] if kind == "text" else Shown(part.get("image")))
    texts = [x for x in found if isinstance(x, str)]
    return "".join(texts) if len(texts) == len(found) else tuple(found)


def text_of(content: Any) -> str:
    """A message's text: the string itself, or its text parts joined.

    Raises:
        ChatFormatError: there are images in it, which an assistant cannot say.
    """
    words = words_of(content)
    if not isinstance(words, str):
        raise ChatFormatError("text is expected here, and the message has images")
    return words


def skeleton_of(messages: Messages) -> tuple[list[dict[str, Any]], list[Words]]:
    """Messages with numbered placeholders instead of what they say, and that in order.

    In an assistant's text the thought markers stay, because templates look for them; the rest is hidden.
    """
    shapes: list[dict[str, Any]] = []
    texts: list[Words] = []

    def hide(text: Words) -> str:
        texts.append(text)
        return f"{OPEN}{len(texts) - 1}{CLOSE}"

    for message in messages:
        assistant = message["role"] == "assistant"
        text = text_of(message.get("content")) if assistant else words_of(message.get("content"))
        if isinstance(text, str) and assistant and "think>" in text:
            pieces = _MARKERS.split(text)
            content = "".join(p if i % 2 else (hide(p) if p else "") for i, p in enumerate(pieces))
        else:
            content = hide(text)
        shape = {"role": message["role"], "content": content}
        if "name" in message:  # a tool's name may come from the model: nothing but plain names reaches a template
            shape["name"] = message["name"] if _NAME.fullmatch(str(message["name"])) else "unknown"
        shapes.append(shape)
    return shapes, texts


def blocks_of(text: str) -> list[str | int]:
    """Split rendered text at its placeholders."""
    pieces = _PLACE.split(text)
    return [int(p) if i % 2 else p for i, p in enumerate(pieces) if i % 2 or p]
