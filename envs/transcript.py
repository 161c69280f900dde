"""An episode as a person wants to read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tools.images import is_image

if TYPE_CHECKING:
    from envs.core import Episode

_CONTROL = {c: "�" for c in range(32) if c not in (9, 10)} | {127: "�"}


def transcript(episode: Episode | None) -> str:
    """The conversation turn by turn, then the verdict. Control characters cannot reach the terminal."""
    if episode is None:
        return "(no episode)\n"
    lines = [f"== {episode.task.task_id} (level {episode.task.level})"]
    for message in episode.messages:
        speaker = f"{message['role']}:{message['name']}" if message.get("name") else message["role"]
        lines.append(f"{speaker:>18} | " + _shown(message["content"]).replace("\n", "\n" + " " * 18 + " | "))
    if episode.verdict is not None:
        scores = ", ".join(f"{k} {v:g}" for k, v in episode.verdict.scores.items())
        failure = f", verifier failed: {episode.verdict.failure}" if episode.verdict.failure else ""
        lines.append(f"== {episode.stop_reason}: reward {episode.verdict.reward:g} ({scores}){failure}")
    return "\n".join(lines) + "\n"


def _shown(content: Any) -> str:
    if isinstance(content, str):
        return content.translate(_CONTROL)
    return " ".join(p["text"].translate(_CONTROL) if p["type"] == "text" else _image(p.get("image")) for p in content)


def _image(image: Any) -> str:
    return f"[image {image.width}x{image.height}]" if is_image(image) else "[image]"
