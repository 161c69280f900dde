"""Conversations with numbered placeholders in place of their texts, for rendering a chat template's own part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]

OPEN, CLOSE = "\ue000", "\ue001"  # private use: they frame a placeholder's number
_PLACE = re.compile(f"{OPEN}(\\d+){CLOSE}")
_MARKERS = re.compile(r"(\n*</?think>\n*)")  # what templates look for inside an assistant's text
_NAME = re.compile(r"[\w.\-]{1,64}")


class ChatFormatError(ValueError):
    """The tokenizer's chat template cannot be used; the message says why and what to do."""


def text_of(content: Any) -> str:
    """A message's text: the string itself, or its text parts joined.

    Raises:
        ChatFormatError: a part is no text (images need a vision processor's expansion into tokens).
    """
    if isinstance(content, str):
        return content
    parts = []
    for part in content or ():
        if part.get("type") != "text":
            raise ChatFormatError(f"this chat format has no tokens for a {part.get('type')!r} part")
        parts.append(part["text"])
    return "".join(parts)


def skeleton_of(messages: Messages) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages with numbered placeholders instead of texts, and the texts in order.

    In an assistant's text the thought markers stay, because templates look for them; the rest is hidden.
    """
    shapes: list[dict[str, Any]] = []
    texts: list[str] = []

    def hide(text: str) -> str:
        texts.append(text)
        return f"{OPEN}{len(texts) - 1}{CLOSE}"

    for message in messages:
        text = text_of(message.get("content"))
        if message["role"] == "assistant" and "think>" in text:
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
