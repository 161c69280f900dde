"""Pictures from messages to log-probs: placeholders, ledger, engine and learner agree to the token and the feature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agents.chat import ChatFormat, ChatFormatError
from agents.engines.base import SampleParams
from agents.engines.hf import HFEngine
from agents.ledger import Ledger
from agents.pictures import Picture, PictureError, PictureFormat, placed, runs
from tests.agents.seeing import KINDS, picture_format, processor_of, scene, seeing_model, seeing_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return seeing_tokenizer()


@pytest.fixture(scope="module")
def model(kind: str, tokenizer: Any) -> Any:
    return seeing_model(kind, tokenizer)


@pytest.fixture(scope="module")
def chat(kind: str, tokenizer: Any, model: Any) -> ChatFormat:
    return ChatFormat(tokenizer, vocab_size=len(tokenizer), pictures=picture_format(model, kind))


def shows(*content: Any, role: str = "user") -> dict[str, Any]:
    """A message of texts and images."""
    parts = [{"type": "text", "text": x} if isinstance(x, str) else {"type": "image", "image": x} for x in content]
    return {"role": role, "content": parts, **({"name": "zoom"} if role == "tool" else {})}


def engine_of(chat: ChatFormat, model: Any, **options: Any) -> HFEngine:
    options = {"params": SampleParams(max_new_tokens=6), "rows": 6, "max_context": 400, **options}
    return HFEngine(
        model, stop_ids=chat.stop_ids, banned_ids=chat.banned_ids, pictures=chat.pictures, **options
    )


def plain(model: Any, chat: ChatFormat, ids: list[int], pictures: list[Picture]) -> torch.Tensor:
    """Log-prob of each token but the first, by the model's own forward over the whole row."""
    row = torch.tensor([ids])
    more: dict[str, Any] = {}
    if pictures:
        more = {
            "pixel_values": torch.cat([p.patches_PD for p in pictures]),
            "image_grid_thw": torch.tensor([p.grid for p in pictures]),
            "mm_token_type_ids": (row == chat.pictures.pad_id).int(),
        }
    model.base_model.rope_deltas = None  # what an earlier call left
    with torch.no_grad():
        logits_TV = model(input_ids=row, use_cache=False, **more).logits[0, :-1]
    logits_TV[:, list(chat.banned_ids)] = float("-inf")
    return logits_TV.log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]


def test_engine_turns(chat: ChatFormat, model: Any) -> None:
    engine = engine_of(chat, model)
    red, blue, wide = scene("red"), scene("blue"), scene("red", 90, 50)
    openings = [
        [shows("look ", red, " what")], [shows("look ", red, " what")], [shows("look ", blue, " what")],
        [shows("no picture at all")], [shows(wide, red), ], [shows("a", red, blue, "b")],
    ]  # fmt: skip
    more = [shows("again ", blue, role="tool")]
    ledgers = [Ledger() for _ in openings]
    for i, messages in enumerate(openings):
        ids = chat.opening(messages)
        ledgers[i].observe(ids, 0, pictures=chat.shown(ids, messages))
        engine.turn((i,), ids, (0, i), 5, None, ledgers[i].shown())
    turns = [0] * len(ledgers)
    while done := engine.run():
        for (i,), said in done:
            ledgers[i].act(said.ids, said.logps, turns[i], 0)
            turns[i] += 1
            if turns[i] == 3:
                engine.close((i,))
                continue
            ids = chat.continuation(more, stopped=said.stop == "stop")
            shown = chat.shown(ids, more)
            ledgers[i].observe(ids, turns[i], pictures=shown)
            engine.turn((i,), ids, (turns[i], i), 5, None, [p for _, p in shown])
    gap = 0.0
    for ledger in ledgers:
        segment = ledger.segments[0]
        want = plain(model, chat, segment.ids, ledger.shown())
        got = torch.tensor(segment.logp)[1:]
        mask = torch.tensor(segment.mask)[1:].bool()
        gap = max(gap, float((want - got)[mask].abs().max()))
        assert mask.sum() >= 3
    assert gap < 1e-6, gap
    assert ledgers[0].segments[0].logp != ledgers[2].segments[0].logp
