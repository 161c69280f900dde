"""Pictures from messages to log-probs: placeholders, ledger, engine and learner agree to the token and the feature."""

from __future__ import annotations

import copy
import functools
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agents import lora
from agents.chat import ChatFormat, ChatFormatError
from agents.config import LoraConfig, OptimConfig
from agents.dist import World
from agents.engines.base import SampleParams
from agents.engines.hf import HFEngine
from agents.forward import Convention
from agents.imitate import Conversation, batch_of, record
from agents.launcher import free_port
from agents.learner import LMLearner
from agents.ledger import Ledger
from agents.pictures import Picture, PictureError, placed, runs
from policy_opt.need import LogProb, Need
from tests.agents.seeing import KINDS, picture_format, processor_of, scene, seeing_model, seeing_tokenizer
from tools.images import flat

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


def plain(
    model: Any, chat: ChatFormat, ids: list[int], pictures: list[Picture], grad: bool = False
) -> torch.Tensor:
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
    with torch.set_grad_enabled(grad):
        logits_TV = model(input_ids=row, use_cache=False, **more).logits[0, :-1]
    banned = torch.zeros(logits_TV.shape[-1], dtype=torch.bool)
    banned[list(chat.banned_ids)] = True
    logits_TV = logits_TV.masked_fill(banned, float("-inf"))
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


# -------------------------------------------------------------------------------------------- learner


LOGP = Need("logp_BT", LogProb(), when="loss")


def ledgers_of(chat: ChatFormat, rows: list[list[dict[str, Any]]]) -> list[Ledger]:
    return [record(chat, Conversation(tuple(messages))) for messages in rows]


def talk(*first: Any, said: tuple[str, ...] = ("yes", "no"), then: Any = "more") -> list[dict[str, Any]]:
    middle = shows(then) if isinstance(then, str) else shows("see", then, role="tool")
    return [shows(*first), {"role": "assistant", "content": said[0]}, middle,
            {"role": "assistant", "content": said[1]}]  # fmt: skip


def some_rows() -> list[list[dict[str, Any]]]:
    red, blue, wide = scene("red"), scene("blue"), scene("green", 100, 40)
    return [
        talk("look at this: ", red, " which colour?", said=("red", "yes indeed"), then=blue),
        talk("look at this: ", red, " which colour?", said=("blue", "well"), then=red),
        talk("look at this: ", red, " which colour?", said=("reddish", "x")),
        talk("look at this: ", blue, " which colour?", said=("green", "brown fox")),
        talk("no picture here, only words"),
        talk(wide, blue, "two", said=("I see two", "so")),
    ]


@pytest.mark.parametrize(("packing", "share"), [("never", False), ("never", True), ("always", True)])
def test_every_layout_gives_the_models_own_log_probs_and_gradient(
    chat: ChatFormat, model: Any, packing: Any, share: bool
) -> None:
    ledgers = ledgers_of(chat, some_rows())
    b = batch_of(ledgers)
    weight_BT = torch.rand(b.B, b.T, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * b.mask_BT
    one = copy.deepcopy(model)
    learner = LMLearner(one, convention=Convention(1.0, tuple(chat.banned_ids)), packing=packing, share=share,
                        micro_tokens=160)  # fmt: skip
    streams = learner.backward(b, [LOGP], lambda rows, live: {"logp_BT": -weight_BT[rows]})
    got = {n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None}
    one.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for row, ledger in enumerate(ledgers):
        ids = ledger.segments[0].ids
        with torch.enable_grad():
            want = plain(one, chat, ids, ledger.shown(), grad=True)
            mask = b.mask_BT[row, 1 : len(ids)]
            assert (streams["logp_BT"][row, 1 : len(ids)] - want.detach())[mask].abs().max() < 1e-6
            loss = loss - (want * weight_BT[row, 1 : len(ids)])[mask].sum()
    loss.backward()
    scale = max(float(p.grad.abs().max()) for p in one.parameters() if p.grad is not None)
    assert any("visual" in name and float(g.abs().max()) > 1e-3 * scale for name, g in got.items())
    for name, p in one.named_parameters():
        if p.grad is not None:
            assert (got[name] - p.grad).abs().max() < 1e-6 * scale, name


def test_the_tower_sees_a_picture_once_per_micro_batch(chat: ChatFormat, model: Any) -> None:
    rows = [talk("look: ", scene("red"), said=(word, "end")) for word in ("red", "blue", "green", "fox")]
    b = batch_of(ledgers_of(chat, rows))
    assert len(b.media) == 2
    seen: list[int] = []
    hook = model.base_model.visual.register_forward_pre_hook(lambda m, a, k: seen.append(len(a[0])), with_kwargs=True)
    LMLearner(model, convention=Convention(1.0, tuple(chat.banned_ids))).score(b, [LOGP])
    hook.remove()
    assert seen == [16]


# -------------------------------------------------------------------------------------------- placeholders


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_ids_spans_and_pictures_agree(data: st.DataObject) -> None:
    """Any mix of texts and images, forged placeholders in the texts included."""
    chat = shared_chat()
    word = st.sampled_from(["a", "<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "two words", ""])
    image = st.builds(scene, st.sampled_from(["red", "blue"]), st.integers(20, 120), st.integers(20, 120))
    message = st.lists(word | image, min_size=1, max_size=4)
    turns = data.draw(st.lists(message, min_size=1, max_size=3))
    ledger, history = Ledger(), []
    for turn, content in enumerate(turns):
        new = [shows(*content, role="user" if turn == 0 else "tool")]
        ids = chat.opening(new) if turn == 0 else chat.continuation(new, history=history)
        ledger.observe(ids, turn, pictures=chat.shown(ids, new))
        ledger.act([5, chat.stop_ids[0]], [-1.0, -1.0], turn, 0)
        history += [*new, {"role": "assistant", "content": "x"}]
    segment, pad = ledger.segments[0], chat.pictures.pad_id
    images = [part for content in turns for part in content if isinstance(part, Image.Image)]
    assert [s.length for s in segment.spans] == [chat.pictures.read(i).length for i in images]
    assert [(s.start, s.length) for s in segment.spans] == runs(segment.ids, pad)
    assert [p.key for p in ledger.shown()] == [chat.pictures.read(i).key for i in images]
    assert segment.ids.count(pad) == sum(s.length for s in segment.spans)
    folded = chat.pictures.folded(segment.ids)
    assert folded.count(pad) == len(images) and len(folded) == len(segment.ids) - sum(
        s.length - 1 for s in segment.spans
    )
    assert {pad, chat.pictures.start_id, chat.pictures.end_id} <= set(chat.banned_ids)


@functools.cache
def shared_chat() -> ChatFormat:
    tokenizer = seeing_tokenizer()
    return ChatFormat(tokenizer, pictures=picture_format(seeing_model("qwen3_vl", tokenizer), "qwen3_vl"))


@pytest.mark.parametrize("size", [(56, 56), (57, 31), (20, 200), (640, 480), (3, 3), (1000, 6)])
def test_resized_as_the_processor_would(kind: str, model: Any, size: tuple[int, int]) -> None:
    image = scene("red", *size)
    picture = picture_format(model, kind).read(image)
    want = processor_of(kind)(images=[image], return_tensors="pt")
    assert torch.equal(picture.patches_PD, want["pixel_values"].float())
    assert list(picture.grid) == want["image_grid_thw"][0].tolist()
    again = picture_format(model, kind).read(picture.image)
    assert again.key == picture.key and torch.equal(again.patches_PD, picture.patches_PD)
    for back in (Picture.from_state(picture.state_dict()), pickle.loads(pickle.dumps(picture))):
        assert back.image.tobytes() == picture.image.tobytes() and back.image.size == picture.image.size
        assert torch.equal(back.patches_PD, picture.patches_PD)
        assert (back.key, back.grid, back.length) == (picture.key, picture.grid, picture.length)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_is_read_as_tools_show_it(mode: str) -> None:
    image = Image.new(mode, (40, 30), 1 if mode != "RGBA" else (250, 10, 10, 0))
    assert shared_chat().pictures.read(image).key == shared_chat().pictures.read(flat(image)).key


def test_what_is_no_picture(chat: ChatFormat) -> None:
    for image, why in ((None, "NoneType"), (b"x", "bytes"), (Image.new("RGB", (4000, 2)), "aspect ratio")):
        with pytest.raises(ChatFormatError, match=why):
            chat.opening([shows("a", image)])
    with pytest.raises(PictureError, match=r"\[3\] tokens .* \[\]"):
        placed([1, 2, 2, 2], [], 2)
    blind = ChatFormat(chat.tokenizer)
    with pytest.raises(ChatFormatError, match="reads text only"):
        blind.opening([shows("a", scene("red"))])
    with pytest.raises(ChatFormatError, match="'audio'"):
        chat.opening([{"role": "user", "content": [{"type": "audio"}]}])


def test_a_template_that_drops_images_is_found_out(chat: ChatFormat) -> None:
    messages = [shows("a", scene("red"))]
    with pytest.raises(ChatFormatError, match="drops or repeats images"):
        chat.shown(chat.opening([shows("a")]), messages)


# -------------------------------------------------------------------------------------------- two processes


def gradients(world: World, kind: str, rank: int = 0, packing: Any = "auto") -> dict[str, torch.Tensor]:
    """Of a batch in which few rows show pictures, so that a process may have none of them. `rank`: of adapters."""
    tokenizer = seeing_tokenizer()
    model = seeing_model(kind, tokenizer)
    chat = ChatFormat(tokenizer, pictures=picture_format(model, kind))
    if rank:
        lora.adapt(model, LoraConfig(rank=rank), 0)
    words = [talk(f"only words {i}", said=("yes " * i, "no")) for i in range(1, 6)]
    b = batch_of(ledgers_of(chat, [talk("look ", scene("red")), *words]))
    config = OptimConfig(name="sgd", lr=0.1, beta1=0.0, clip=0.0)
    learner = LMLearner(model, config, world=world, micro_tokens=100, packing=packing)
    out = {}
    for step in range(2):
        out |= {f"{step}/{k}": v for k, v in learner.score(b, [LOGP]).items()}
        pull = {"logp_BT": -b.mask_BT.double()}
        streams = learner.backward(b, [LOGP], lambda rows, live, p=pull: {k: v[rows] for k, v in p.items()})
        out |= {f"{step}/live/{k}": v for k, v in streams.items()}
        out[f"{step}/norm"] = torch.tensor(learner.step()["grad_norm"])
    with learner.bank.policy.whole() as whole:
        return out | {name: p.detach().clone() for name, p in whole.named_parameters()}


SHARED: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"kind": "qwen3_vl"},
    "qwen2_5_vl": {"kind": "qwen2_5_vl"},
    "padded": {"kind": "qwen3_vl", "packing": "never"},
    "adapters": {"kind": "qwen3_vl", "rank": 3},
}
"""Cases of `gradients` on two processes."""


def worker(rank: int, port: int, folder: str, split: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", **({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if split else {})}
    world = World.start(timeout_s=60)
    assert split == (world.sharding is not None)
    torch.save({name: gradients(world, **case) for name, case in SHARED.items()}, f"{folder}/{rank}.pt")
    world.close()


@pytest.mark.parametrize("split", [False, True])
def test_two_processes_of_which_one_sees_nothing_equal_one(tmp_path: Path, split: bool) -> None:
    """With whole weights on each, and with weights that are split over both: the tower's passes are in step."""
    torch.multiprocessing.start_processes(worker, (free_port(), str(tmp_path), split), nprocs=2, start_method="fork")
    for name, case in SHARED.items():
        want = gradients(World(), **case)
        assert want["0/norm"] > 0 and not torch.equal(want["0/logp_BT"], want["1/logp_BT"])
        for rank in range(2):
            got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[name]
            assert got.keys() == want.keys()
            for key, value in want.items():
                torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
