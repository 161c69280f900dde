"""Weights from the trainer to an engine that has its own, and the proof that they arrived.

Before every rollout the engine gets the policy's weights if they have changed, and then, changed or not, it scores a
probe: a few fixed ids. Its log-probs must be the trainer's. Every known way of sampling from other weights than are
trained shows there: a tied head that kept its old matrix, an adapter that was not delivered, weights that sleep mode
dropped. Two comparisons, because a small step of the optimizer moves log-probs less than half precision rounds them:

- the largest difference must stay below a limit;
- where the probe has moved well beyond rounding since an earlier sync, the engine must have moved along.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from agents.cli import UsageError
from agents.dist import World
from agents.engines.base import EngineFailure
from agents.engines.reference import plain_log_probs
from agents.pictures import Picture, PictureFormat

GAPS = {torch.float32: 1e-3}
"""Default limit of the largest difference, by the engine's type."""
COARSE = 0.25
"""The same for half precisions."""
_PROBE = 48  # ids; enough that every weight has a share in some log-prob
_CLEAR = 8.0  # times the rounding noise: a movement of the probe that cannot be noise
_LAG = 0.25  # share of such a movement that the engine may lack


class Receiver(Protocol):
    """An engine with weights of its own."""

    version: int

    def deliver(self, model: Any, version: int) -> None:
        """Take over the model's weights, adapters included; what was computed with older ones is dropped.

        Raises EngineFailure.
        """
        ...

    def log_probs(self, ids: Sequence[int], pictures: Sequence[Picture] = ()) -> list[float]:
        """Log-prob of each id of a row given those before it, all but the first, at temperature 1, nothing banned.

        pictures: those whose placeholders stand in `ids`, in order.

        An engine that has several copies of the weights appends what each of them says.

        Raises EngineFailure.
        """
        ...


def probe_of(model: Any, most: int, pictures: PictureFormat | None) -> tuple[list[int], list[Picture]]:
    """Ids that a check scores, at most so many, and for a model that reads pictures one that stands among them.

    Without it a tower whose weights did not arrive would not show.
    """
    vocab_size = model.get_output_embeddings().weight.shape[0]
    if pictures is None:
        return probe_ids(vocab_size, most), []
    side = 2 * pictures.side
    bands = np.arange(side * side * 3, dtype=np.uint32).reshape(side, side, 3)
    picture = pictures.read(Image.fromarray((bands * 2654435761 >> 24).astype(np.uint8), "RGB"))
    shown = pictures.ids(picture)
    words = probe_ids(vocab_size, most - len(shown), avoid=(pictures.pad_id, pictures.start_id, pictures.end_id))
    if len(words) < 2:
        raise UsageError(f"a context of {most} tokens has no room for a picture of {len(shown)}")
    return [*words[:1], *shown, *words[1:]], [picture]


def probe_ids(vocab_size: int, length: int, avoid: Sequence[int] = ()) -> list[int]:
    """Fixed ids that differ from their neighbours, without those of `avoid`; `length` at most 48."""
    usable = sorted(set(range(vocab_size)) - set(avoid))
    return [usable[(7 * i + i * i) % len(usable)] for i in range(1, min(length, _PROBE) + 1)]


@dataclass
class Verifier:
    """Compares an engine's log-probs of the probe with the trainer's, now and at earlier syncs."""

    limit: float
    """Largest difference that is accepted."""
    noise: float | None = None
    """Mean difference when the weights were first delivered: rounding."""
    anchors: dict[str, Tensor] = field(default_factory=dict)
    """The trainer's log-probs at the first and at the last sync. [T - 1]"""

    def check(self, ours: Tensor, theirs: Tensor) -> tuple[float, str]:
        """The largest difference, and what is wrong (empty: nothing)."""
        gap, mean = float((theirs - ours).abs().max()), float((theirs - ours).abs().mean(-1).max())
        if not gap <= self.limit:
            return gap, f"log-probs of the probe are {gap:.3g} off the trainer's; at most {self.limit:g} is rounding"
        noise = mean if self.noise is None else self.noise
        for when, before in self.anchors.items():
            moved = float((ours - before).abs().mean())
            if moved > _CLEAR * noise and mean > _LAG * moved:
                return gap, (
                    f"log-probs of the probe moved by {moved:.3g} on average since the {when} sync, and the engine's "
                    f"are still {mean:.3g} away (rounding: {noise:.3g})"
                )
        self.noise = noise
        self.anchors = {"last": ours, "first": self.anchors.get("first", ours)}
        return gap, ""


class WeightSync:
    """Delivers the policy's weights to an engine and verifies them. Every process calls it at the same time.

    Args:
        engine: takes weights and scores the probe.
        model: the policy with whole weights; its forward, under the run's precision, is what the engine must
            reproduce.
        probe: ids that are scored.
        limit: largest difference of log-probs that is accepted.
        pictures: those whose placeholders stand in the probe.
    """

    def __init__(
        self,
        engine: Receiver,
        model: Any,
        world: World,
        probe: Sequence[int],
        limit: float,
        pictures: Sequence[Picture] = (),
    ):
        self.engine, self.model, self.world = engine, model, world
        self.probe, self.pictures = list(probe), list(pictures)
        self.verifier = Verifier(limit)
        self.delivered: int | None = None
        self.gap = self.seconds = 0.0

    def __call__(self, version: int) -> None:
        """Bring the engine to this version of the weights; raises EngineFailure, on every process, if it is not."""
        problem = self._follow(version)
        problems = [f"process {rank}: {p}" for rank, p in enumerate(self.world.gather(problem)) if p]
        if problems:
            raise EngineFailure(problem or problems[0], everywhere=True)

    def _follow(self, version: int) -> str:
        """Deliver and verify; what went wrong, or nothing."""
        with torch.no_grad(), self.world.autocast():
            ours = plain_log_probs(self.model, self.probe, pictures=self.pictures).double().cpu()
        try:
            if self.delivered != version:
                began = time.monotonic()
                self.engine.deliver(self.model, version)
                self.seconds += time.monotonic() - began
                self.delivered = self.engine.version = version
            scored = self.engine.log_probs(self.probe, self.pictures)
            theirs = torch.tensor(scored, dtype=torch.float64).view(-1, len(ours))
        except EngineFailure as error:
            return str(error)
        self.gap, wrong = self.verifier.check(ours, theirs)
        return wrong and f"weight sync, version {version}: {wrong}. {CAUSES}"

    def metrics(self) -> dict[str, float]:
        """`sync_gap` of the last check, and `sync_seconds` of the deliveries since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return {"sync_gap": self.gap, "sync_seconds": round(seconds, 4)}


CAUSES = (
    "The engine does not sample from the policy that is trained. Likely causes: weights that did not arrive (a head "
    "tied to the embeddings, an adapter), weights that were dropped (sleep mode), another model or precision behind "
    "the engine. If it is rounding after all, raise --vllm.gap"
)


# ---------------------------------------------------------------------- the policy as files


def write_model(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """The model in `dtype` as transformers and vLLM read it, its head never tied, by whichever process calls this.

    Tied, vLLM would keep the head's old matrix when weights are reloaded. `save_pretrained` would tie it again, and
    writes nothing in processes other than the first.
    """
    from transformers.core_model_loading import revert_weight_conversion

    head = model.get_output_embeddings()
    name = next(n for n, module in model.named_modules() if module is head)
    tensors = {n: t.detach() for n, t in model.state_dict().items()}
    state = {n: t.to("cpu", dtype if t.is_floating_point() else t.dtype) for n, t in tensors.items()}
    state[f"{name}.weight"] = head.weight.detach().to("cpu", dtype, copy=True)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {n: t.contiguous() for n, t in revert_weight_conversion(model, state).items()}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(folder)
    _note(folder / "config.json", type(model).__name__, dtype)


def _note(file: Path, architecture: str, dtype: torch.dtype) -> None:
    """The written configuration names class and type, and that nothing is tied."""
    config = json.loads(file.read_text(encoding="utf-8")) | {"architectures": [architecture]}
    for part in (config, config.get("text_config", {})):
        if "dtype" in part or part is config:
            part["dtype"] = str(dtype).removeprefix("torch.")
        if "tie_word_embeddings" in part or part is config:
            part["tie_word_embeddings"] = False
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
