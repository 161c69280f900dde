"""Pictures through vLLM, in process and over servers, against plain forwards of the model it was given.

The models are small and random, of two real architectures. vLLM's image processors need torchvision: it is installed
into a folder that only the engines' processes see.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from agents import lora, serve
from agents.chat import ChatFormat
from agents.config import LoraConfig, VllmConfig
from agents.dist import World
from agents.engines.base import EngineFailure, SampleParams
from agents.engines.vllm import VllmEngine
from agents.engines.vllm_server import ServerEngine
from agents.pictures import Picture, PictureError, PictureFormat
from agents.sync import WeightSync, probe_of
from tests.agents.seeing import (
    KINDS,
    picture_format,
    processor_of,
    scene,
    seeing_folder,
    seeing_model,
    seeing_tokenizer,
)
from tests.agents.test_pictures_runs import demonstrated, small
from tests.agents.test_train import start
from tests.engines.test_server import ready, serving

pytestmark = pytest.mark.engines
GAP, TEMPERATURE, CONTEXT = 1e-4, 0.8, 256
TORCHVISION = "torchvision==0.28.0"  # goes with torch 2.13


@contextmanager
def sighted(folder: Path):
    """Processes that are started meanwhile find torchvision; skips where it can be had from nowhere."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), TORCHVISION],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"no torchvision: {done.stderr.strip()[-200:]}")
    places = (str(Path(__file__).with_name("vision_site")), str(folder), os.environ.get("PYTHONPATH"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))
        yield


@pytest.fixture(scope="module")
def torchvision(tmp_path_factory):
    with sighted(tmp_path_factory.mktemp("torchvision")):
        yield


class Eyes:
    """A model, how it reads pictures and chats, and an engine that holds its weights."""

    def __init__(self, kind: str):
        tokenizer = seeing_tokenizer()
        self.model = seeing_model(kind, tokenizer, torch.float32)
        self.pictures: PictureFormat = picture_format(self.model, kind)
        self.chat = ChatFormat(tokenizer, vocab_size=len(tokenizer), pictures=self.pictures)
        self.engine = VllmEngine(
            VllmConfig(kv_gib=0.25), stop_ids=self.chat.stop_ids, banned_ids=self.chat.banned_ids,
            params=SampleParams(TEMPERATURE), rows=16, max_context=CONTEXT, pictures=self.pictures,
            tokenizer=tokenizer,
        )  # fmt: skip

    def read(self, *images) -> list[Picture]:
        return [self.pictures.read(image) for image in images]

    def fed(self, pictures: Sequence[Picture], at: int = 40) -> list[int]:
        """Text with pictures in it."""
        out = [at, at + 1, at + 5]
        for i, picture in enumerate(pictures):
            out += [*self.pictures.ids(picture), at + 7 + i, at + 3]
        return out

    def plain(self, ids, pictures: Sequence[Picture], banned=None, temperature: float = TEMPERATURE) -> torch.Tensor:
        """Log-prob of each id but the first by the model's own forward. [T - 1]"""
        return plain(self.model, self.chat, ids, pictures, banned, temperature)

    def gap(self, ids, said, pictures) -> float:
        """Largest difference between the log-probs of a sampled turn and the model's."""
        ours = self.plain([*ids, *said.ids], pictures)[len(ids) - 1 :]
        return float((ours - torch.tensor(said.logps)).abs().max())


@torch.no_grad()
def plain(model, chat, ids, pictures, banned=None, temperature: float = TEMPERATURE) -> torch.Tensor:
    row = torch.tensor([list(ids)])
    seen: dict[str, Any] = {}
    if pictures:
        seen = {
            "pixel_values": torch.cat([p.patches_PD for p in pictures]),
            "image_grid_thw": torch.tensor([p.grid for p in pictures]),
            "mm_token_type_ids": (row == chat.pictures.pad_id).int(),
        }
    logits_TV = model(input_ids=row, use_cache=False, **seen).logits[0, :-1].double() / temperature
    logits_TV[:, list(chat.banned_ids if banned is None else banned)] = float("-inf")
    return logits_TV.log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]


def finish(engine) -> dict:
    """All turns under way, by key."""
    out: dict = {}
    while done := engine.run():
        out |= dict(done)
    return out


def shift(module, scale: float = 0.05, seed: int = 1) -> None:
    """Weights as after some training."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, module.parameters()):
            p.add_(scale * torch.randn(p.shape, generator=draws))


def tie(model):
    """The model with its embeddings as its head, which most small ones have."""
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


@pytest.fixture(scope="module", params=KINDS)
def eyes(request, torchvision):
    eyes = Eyes(request.param)
    eyes.engine.deliver(eyes.model, 0)
    yield eyes
    eyes.engine.shutdown()


SCENES = [scene("red"), scene("blue", 84, 56, 0.2), scene("yellow", 56, 112), scene("lime", 90, 70, 0.7)]


def test_log_probs_over_turns_with_pictures_are_the_models(eyes):
    """Rows with none to three pictures of several sizes at the start, and another one before the second turn."""
    engine = eyes.engine
    engine.reset()
    shown = {(i,): eyes.read(*SCENES[:i]) for i in range(4)}
    rows = {key: eyes.fed(pictures) for key, pictures in shown.items()}
    for key, ids in rows.items():
        engine.turn(key, ids, (0, *key, 0), 8, pictures=shown[key])
    gaps = []
    for turn in range(3):
        for key, said in finish(engine).items():
            gaps.append(eyes.gap(rows[key], said, shown[key]))
            assert not set(said.ids) & set(eyes.chat.banned_ids)
            more = eyes.read(SCENES[(key[0] + turn) % 4]) if turn != 1 else []
            fed = eyes.fed(more, 60)
            rows[key] += [*said.ids, *fed]
            shown[key] = [*shown[key], *more]
            if turn < 2:
                engine.turn(key, fed, (0, *key, turn + 1), 8, pictures=more)
    assert len(gaps) == 12 and max(gaps) <= GAP, gaps


def test_equal_ids_with_other_pictures_are_other_rows(eyes):
    """What vLLM keeps of a prompt, it keeps by its pictures, too; whichever it saw first."""
    red, blue = eyes.read(scene("red", 112, 56), scene("blue", 112, 56))
    ids = [*range(40, 40 + 32), *eyes.fed([red])]
    assert ids == [*range(40, 40 + 32), *eyes.fed([blue])]
    for first, second in ((red, blue), (blue, red)):
        eyes.engine.reset()
        said = []
        for i, picture in enumerate((first, second, first)):
            eyes.engine.turn((i,), ids, (0, 0), 6, pictures=[picture])
            said.append(finish(eyes.engine)[(i,)])
            assert eyes.gap(ids, said[-1], [picture]) <= GAP
        assert abs(said[0].logps[0] - said[1].logps[0]) > 0.01 and said[0] != said[1]
        assert said[0].ids == said[2].ids
        assert eyes.gap(ids, said[0], [second]) > 100 * GAP, "the picture matters"


def test_a_scored_row_with_a_picture_has_the_models_log_probs(eyes):
    pictures = eyes.read(SCENES[1], SCENES[3])
    ids = [*eyes.fed(pictures), *range(70, 90)]
    scored = torch.tensor(eyes.engine.log_probs(ids, pictures), dtype=torch.float64)
    ours = eyes.plain(ids, pictures, banned=[], temperature=1.0)
    assert scored.shape == ours.shape and (scored - ours).abs().max() <= GAP


def test_an_image_of_another_size_than_its_placeholders_is_an_engine_failure(eyes):
    """As from an engine whose processor has other settings: never sampled from in silence."""
    (small,) = eyes.read(scene("red"))
    (large,) = eyes.read(scene("red", 112, 112))
    eyes.engine.reset()
    eyes.engine.turn((3,), eyes.fed([small]), (0, 0), 4, pictures=[replace(small, key=1, image=large.image)])
    with pytest.raises(EngineFailure, match=r"row \(3,\): vLLM expands its pictures to a prompt of"):
        finish(eyes.engine)
    eyes.engine.reset()


def test_placeholders_that_do_not_fit_are_refused_before_anything_is_asked(eyes):
    (picture,) = eyes.read(scene("red"))
    eyes.engine.reset()
    for pictures in ([], [picture, picture]):
        with pytest.raises(PictureError, match="placeholders of"):
            eyes.engine.turn((0,), eyes.fed([picture]), (0, 0), 4, pictures=pictures)
    assert eyes.engine.run() == []


@pytest.mark.parametrize("part", ["visual", "language_model"])
def test_delivered_weights_are_sampled_from_tower_and_text(eyes, part):
    """The picture was shown to the old weights: nothing of what they made of it is kept."""
    engine, (picture,) = eyes.engine, eyes.read(scene("red", 84, 84))
    ids = [*eyes.fed([picture]), *range(70, 80)]

    def turn():
        engine.reset()
        engine.turn((0,), ids, (0, 0), 6, pictures=[picture])
        return finish(engine)[(0,)]

    def score():
        return torch.tensor(engine.log_probs(ids, [picture]), dtype=torch.float64)

    before = turn()
    assert eyes.gap(ids, before, [picture]) <= GAP
    shift(getattr(eyes.model.model, part))
    assert eyes.gap(ids, before, [picture]) > 100 * GAP
    ours = eyes.plain(ids, [picture], banned=[], temperature=1.0)
    assert (score() - ours).abs().max() > 100 * GAP, "a probe with a picture tells stale weights"
    engine.deliver(eyes.model, engine.version + 1)
    assert (score() - ours).abs().max() <= GAP
    assert eyes.gap(ids, turn(), [picture]) <= GAP


@pytest.mark.parametrize("part", ["visual", "language_model"])
def test_weights_that_were_not_delivered_are_found(eyes, part, monkeypatch):
    """In the tower, too: the probe has a picture."""
    probe, pictures = probe_of(eyes.model, CONTEXT - 1, eyes.pictures)
    sync = WeightSync(eyes.engine, eyes.model, World(), probe, 1e-3, pictures)
    sync(eyes.engine.version + 1)
    assert sync.gap <= GAP
    call = eyes.engine.process.call
    with monkeypatch.context() as patch:
        patch.setattr(eyes.engine.process, "call", lambda name, *rest: None if name == "load" else call(name, *rest))
        shift(getattr(eyes.model.model, part), 0.01)
        with pytest.raises(EngineFailure, match="weight sync, version"):
            sync(eyes.engine.version + 1)
    eyes.engine.deliver(eyes.model, eyes.engine.version + 1)


def test_what_was_kept_of_a_picture_goes_with_the_weights_that_made_it(eyes):
    """Weights change between two turns of one row."""
    engine, (picture,) = eyes.engine, eyes.read(scene("blue", 84, 84))
    ids = eyes.fed([picture])
    engine.reset()
    engine.turn((0,), ids, (0, 0, 0), 4, pictures=[picture])
    ids += finish(engine)[(0,)].ids
    shift(eyes.model.model.visual, seed=2)
    engine.deliver(eyes.model, engine.version + 1)
    engine.turn((0,), [50, 51], (0, 0, 1), 4)
    assert eyes.gap([*ids, 50, 51], finish(engine)[(0,)], [picture]) <= GAP


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_head_is_delivered_whole(torchvision, kind):
    eyes = Eyes(kind)
    tie(eyes.model)
    (picture,) = eyes.read(scene("red"))
    ids = [*eyes.fed([picture]), *range(70, 80)]
    try:
        for version in range(2):
            eyes.engine.deliver(eyes.model, version)
            scored = torch.tensor(eyes.engine.log_probs(ids, [picture]), dtype=torch.float64)
            assert (scored - eyes.plain(ids, [picture], banned=[], temperature=1.0)).abs().max() <= GAP
            shift(eyes.model)
    finally:
        eyes.engine.shutdown()


def test_without_torchvision_it_says_what_to_install(monkeypatch):
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is there")
    monkeypatch.delenv("PYTHONPATH", raising=False)  # where the other tests have it
    eyes = Eyes(KINDS[0])
    with pytest.raises(EngineFailure, match=r"it reads pictures with torchvision, .*: install the build"):
        eyes.engine.deliver(eyes.model, 0)


def test_an_engine_for_text_takes_no_pictures():
    engine = VllmEngine(VllmConfig(), stop_ids=[1], max_context=64)
    eyes = Eyes(KINDS[0])
    (picture,) = eyes.read(scene("red"))
    with pytest.raises(ValueError, match="built without `pictures`"):
        engine.turn((0,), eyes.fed([picture]), (0, 0), 4, pictures=[picture])
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        VllmEngine(VllmConfig(), stop_ids=[1], max_context=64, pictures=eyes.pictures)


# ---------------------------------------------------------------------- servers


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """Weights that can be trained."""
    return seeing_folder(tmp_path_factory.mktemp("model") / "seeing", "qwen3_vl", scale=1.0)


@pytest.fixture(scope="module")
def served(torchvision, model_folder, tmp_path_factory):
    """A server of a small model, as the documented command starts it."""
    with serving(tmp_path_factory.mktemp("served"), "--max-context", "512", model=str(model_folder)) as server:
        yield ready(server)


def test_a_server_samples_scores_and_takes_weights_of_a_model_that_reads_pictures(served):
    eyes = Eyes("qwen3_vl")
    engine = eyes.engine = ServerEngine(
        VllmConfig(servers=(served.url,), retries=1), carries="weights", stop_ids=eyes.chat.stop_ids,
        banned_ids=eyes.chat.banned_ids, params=SampleParams(TEMPERATURE), rows=8, pictures=eyes.pictures,
    )  # fmt: skip
    red, blue, large = eyes.read(scene("red", 84, 84), scene("blue", 84, 84), scene("lime", 128, 96))
    shown = {(0,): [red], (1,): [blue], (2,): [large, red], (3,): []}
    for version in range(3):
        if version:
            shift(eyes.model.model.visual if version == 1 else eyes.model.model.language_model, seed=version)
        engine.deliver(eyes.model, version)
        rows = {key: eyes.fed(pictures) for key, pictures in shown.items()}
        for turn in range(2):
            for key in rows:
                fed = rows[key] if turn == 0 else eyes.fed([large], 60)
                rows[key] = fed if turn == 0 else [*rows[key], *fed]
                engine.turn(key, fed, (0, *key, turn), 6, pictures=[large] if turn else shown[key])
            for key, said in finish(engine).items():
                assert said.stop in ("stop", "length")
                pictures = [*shown[key], *([large] * turn)]
                assert eyes.gap(rows[key], said, pictures) <= GAP, (version, turn, key)
                rows[key] += said.ids
        ids = [*eyes.fed([red]), *range(70, 80)]
        scored = torch.tensor(engine.log_probs(ids, [red]), dtype=torch.float64)
        assert (scored - eyes.plain(ids, [red], banned=[], temperature=1.0)).abs().max() <= GAP
        engine.reset()
    engine.shutdown()


def test_a_tied_model_that_reads_pictures_is_served_with_its_processor(tmp_path, capsys):
    tokenizer = seeing_tokenizer()
    tied = tie(seeing_model("qwen3_vl", tokenizer, torch.float32))
    for part in (tied, tokenizer, processor_of("qwen3_vl")):
        part.save_pretrained(tmp_path / "tied")
    serve.main(["--print-only", "--model", str(tmp_path / "tied"), "--folder", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert f"--model {tmp_path / 'out'} " in printed and "--enable-scale-out" in printed
    assert """--limit-mm-per-prompt '{"image": 170, "video": 0}'""" in printed
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert not config.tie_word_embeddings and not config.get_text_config().tie_word_embeddings
    assert PictureFormat.of(config, str(tmp_path / "out")).read(scene("red")).length == 4


def test_adapters_are_delivered_alone(torchvision):
    """They stand on the text model's layers: vLLM takes none in a tower."""
    eyes = Eyes("qwen3_vl")
    model, (picture,) = eyes.model, eyes.read(scene("red"))
    lora.adapt(model, LoraConfig(rank=4), seed=0)
    ids = [*eyes.fed([picture]), *range(70, 80)]
    before = None
    try:
        for version in range(3):
            eyes.engine.deliver(model, version)
            scored = torch.tensor(eyes.engine.log_probs(ids, [picture]), dtype=torch.float64)
            ours = eyes.plain(ids, [picture], banned=[], temperature=1.0)
            assert (scored - ours).abs().max() <= GAP and (before is None or (ours - before).abs().max() > 0.05)
            eyes.engine.reset()
            eyes.engine.turn((0,), ids, (0, 0), 6, pictures=[picture])
            assert eyes.gap(ids, finish(eyes.engine)[(0,)], [picture]) <= GAP
            before = ours
            shift(model)
    finally:
        eyes.engine.shutdown()


# ---------------------------------------------------------------------- runs


def run(folder: Path, model: Path, **changes):
    """Two iterations on an environment that shows pictures and has a tool that returns some."""
    config = small(str(model), warm=demonstrated(), engine="vllm", **changes)
    trainer = start(config, folder)
    trainer.run()
    return trainer


def test_a_run_samples_what_it_trains(torchvision, model_folder, tmp_path):
    trainer = run(tmp_path / "run", model_folder, vllm=VllmConfig(kv_gib=0.25))
    assert max(m["logp_gap"] for m in trainer.history) <= GAP and max(m["sync_gap"] for m in trainer.history) <= GAP
    assert all(t.ledger.pictures for t in trainer.session.actor.played)


def test_a_run_over_a_server_samples_what_it_trains(served, model_folder, tmp_path):
    trainer = run(tmp_path / "run", model_folder, vllm=VllmConfig(servers=(served.url,)))
    assert max(m["logp_gap"] for m in trainer.history) <= GAP and max(m["sync_gap"] for m in trainer.history) <= GAP
