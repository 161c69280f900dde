"""The engine over servers against servers that misbehave: refusals at the start, outcomes, and clear ends."""

from __future__ import annotations

import base64
import io
import json
import socket
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from agents import lora
from agents.chat import ChatFormat
from agents.cli import UsageError
from agents.config import LoraConfig, VllmConfig
from agents.engines import server as server_module
from agents.engines.base import EngineFailure
from agents.engines.server import Unreadable
from agents.engines.vllm_server import ServerEngine, read
from agents.evaluate import failure_of
from agents.pictures import PictureError, PictureFormat
from agents.rollout import Limits, play
from policy_opt.protocols import Job, Sampler
from tests.agents.letters import SHAPED
from tests.agents.odd_vllm import GENERATE, choice, generated, serving, slowly
from tests.agents.seeing import processor_of, scene
from tests.agents.small import Chatter, qwen3
from tests.agents.test_faults import refused
from tests.agents.test_train import model_folder, own_cache  # noqa: F401  (fixtures)
from tests.agents.tokenizers import byte_bpe


@pytest.fixture(autouse=True)
def no_naps(monkeypatch):
    """Waiting between attempts is not what is tested."""
    monkeypatch.setattr(server_module.time, "sleep", lambda seconds: None)


@pytest.fixture
def odd():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(byte_bpe())


def engine(*servers, carries="nothing", **changes) -> ServerEngine:
    options = {"servers": tuple(s.url for s in servers), "timeout_s": 0.5, "retries": 2, **changes}
    return ServerEngine(VllmConfig(**options), carries=carries, stop_ids=[3, 4], banned_ids=[0, 7], rows=8)


def turns(one: ServerEngine, rows: dict, budget: int = 8) -> dict:
    for key, ids in rows.items():
        one.turn(key, ids, (0, *key, 0), budget)
    out = {}
    while done := one.run():
        assert [key for key, _ in done] == sorted(key for key, _ in done)
        out |= dict(done)
    return out


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---------------------------------------------------------------------- requests


def test_a_request_says_everything_and_a_reply_is_taken_as_it_is(odd):
    one = engine(odd)
    got = turns(one, {(0, 0): [10, 11, 12]})[(0, 0)]
    assert (got.ids, got.logps, got.stop) == ((10, 3), (-1.0, -0.5), "stop")
    path, body = odd.seen[-1]
    assert path == "/v1/completions" and body["prompt"] == [10, 11, 12] and body["max_tokens"] == 8
    assert body["stop_token_ids"] == [3, 4] and body["ignore_eos"] and body["return_token_ids"]
    assert body["logit_bias"] == {"0": -100.0, "7": -100.0} and body["logprobs"] == 0
    assert (body["temperature"], body["top_p"], body["top_k"]) == (1.0, 1.0, 0)
    one.turn((0, 0), [20, 21], (0, 0, 0, 1), 8, Sampler(0.5))
    assert dict(one.run())[(0, 0)].ids == (10, 3)
    again = odd.seen[-1][1]
    assert again["prompt"] == [10, 11, 12, 10, 3, 20, 21] and again["temperature"] == 0.5
    assert again["seed"] != body["seed"] and 0 <= again["seed"] < 2**63
    with pytest.raises(ValueError, match="no sampler rule `eat`"):
        one.turn((1, 0), [5], (0,), 3, Sampler(1.0, "eat"))


def test_seeds_are_a_rows_own(odd):
    for rows in ({(0, 0): [10]}, {(0, 0): [10], (1, 0): [11]}):
        odd.seen.clear()
        turns(engine(odd), rows)
        assert {body["prompt"][0]: body["seed"] for path, body in odd.seen if "seed" in body}[10] == pytest.approx(
            seed_of((0, 0)), abs=0)


def seed_of(key) -> int:
    import numpy as np

    from agents.engines.base import stream

    return int(stream((0, *key, 0)).generate_state(1, np.uint64)[0]) >> 1


def test_rows_are_dealt_to_servers_by_group():
    with ExitStack() as stack:
        servers = [stack.enter_context(serving()) for _ in range(3)]
        turns(engine(*servers), {(g, m): [10 + g] for g in range(6) for m in range(4)})
        for number, server in enumerate(servers):
            seen = [body["prompt"][0] - 10 for _, body in server.seen if "seed" in body]
            assert sorted(seen) == sorted([number, number + 3] * 4)


def test_budget_and_context(odd):
    odd.context, odd.manner = 16, lambda body, attempt: (200, json.dumps(choice(
        [9] * body["max_tokens"], [-1.0] * body["max_tokens"])).encode())  # fmt: skip
    got = turns(engine(odd), {(0, 0): [10] * 5, (1, 0): [10] * 12, (2, 0): [10] * 16})
    assert [(len(t.ids), t.stop) for _, t in sorted(got.items())] == [(8, "length"), (4, "context"), (0, "context")]


# ---------------------------------------------------------------------- outcomes


ODD = {
    "no json": (200, b"<html>"), "a number": (200, b"3"), "no choices": (200, b"{}"),
    "no ids": (200, json.dumps({"choices": [{"logprobs": {"token_logprobs": []}}]}).encode()),
    "nothing": (200, json.dumps(choice([], [])).encode()),
    "lengths": (200, json.dumps(choice([9, 3], [-1.0])).encode()),
    "too many": (200, json.dumps(choice([9] * 9, [-1.0] * 9)).encode()),
    "too few": (200, json.dumps(choice([9, 9], [-1.0, -1.0])).encode()),
    "on after the stop": (200, json.dumps(choice([3, 9, 3], [-1.0] * 3)).encode()),
    "text": (200, json.dumps(choice(["9", 3], [-1.0] * 2)).encode()),
    "negative": (200, json.dumps(choice([-9, 3], [-1.0] * 2)).encode()),
    "nan": (200, b'{"choices": [{"token_ids": [3], "logprobs": {"token_logprobs": [NaN]}}]}'),
    "null": (200, json.dumps(choice([3], [None])).encode()),
    "deep": (200, b"[" * 100_000),
    "huge": (200, b'"' + b"x" * (2 << 20) + b'"'),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_malformed_or_oversized_reply_is_an_outcome_of_its_row(odd, kind):
    odd.manner = lambda body, attempt: ODD[kind] if body["prompt"][0] == 10 else None
    got = turns(engine(odd), {(0, 0): [10], (1, 0): [11]})
    assert (got[(0, 0)].ids, got[(0, 0)].stop) == ((), "error:reply")
    assert got[(1, 0)].stop == "stop"


def test_time_outs_and_server_errors_are_outcomes_while_the_server_lives(odd):
    odd.manner = lambda body, attempt: {10: lambda: slowly_for(odd), 11: lambda: (500, b"oops")}.get(
        body["prompt"][0], lambda: None)()  # fmt: skip
    got = turns(engine(odd, retries=1), {(0, 0): [10], (1, 0): [11], (2, 0): [12]})
    assert [got[(i, 0)].stop for i in range(3)] == ["error:timeout", "error:http_500", "stop"]
    assert odd.attempts["[11]"] == 2


def slowly_for(odd):
    import threading

    threading.Event().wait(0.8)
    return slowly(0)


def test_what_passes_is_tried_again(odd):
    manners = {1: (503, b""), 2: "hang up"}
    odd.manner = lambda body, attempt: manners.get(attempt)
    got = turns(engine(odd), {(i, 0): [10 + i] for i in range(4)})
    assert {t.stop for t in got.values()} == {"stop"} and set(odd.attempts.values()) == {3}


def test_a_lost_turn_ends_its_episode_and_no_other(odd, chat):
    """Counted as a failure, graded as it stands."""
    said = json.dumps(choice([chat.turn_ids("a")[0], chat.stop_ids[0]], [-1.0, -0.5])).encode()
    odd.manner = lambda body, attempt: (200, said if sum(body["prompt"]) % 3 else b"{}")
    script = [[{"role": "user", "content": "go on"}]]
    one = ServerEngine(VllmConfig(servers=(odd.url,), retries=0), carries="nothing", stop_ids=chat.stop_ids, rows=4)
    played = play([Job(i, i, 0) for i in range(12)], lambda: Chatter(script=script), chat, one,
                  Limits(max_turns=2, max_new_tokens=8, max_context=400), 0)  # fmt: skip
    failed = [t for t in played if failure_of(t)]
    assert 0 < len(failed) < 12
    assert {t.stop_reason for t in failed} == {"error:reply"}
    assert all(t.verdict is not None for t in played)


@settings(max_examples=200, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers(-5, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["choices", "token_ids", "logprobs", "token_logprobs", "x"]), inner, max_size=4), max_leaves=12,
))  # fmt: skip
def test_whatever_a_reply_is_reading_it_ends_well(reply):
    try:
        ids, logps, ended = read(reply, 4, [3])
    except Unreadable:
        return
    assert 0 < len(ids) == len(logps) <= 4 and (ended or len(ids) == 4)


# ---------------------------------------------------------------------- ends


def test_a_server_that_is_gone_ends_the_run_in_one_line():
    with serving() as odd:
        one = engine(odd, retries=1)
        url = odd.url
    one.turn((0, 0), [10], (0, 0), 4)
    with pytest.raises(EngineFailure, match=f"the server {url} is gone"):
        one.run()
    with serving() as odd:
        one, odd.alive, odd.manner = engine(odd), False, lambda body, attempt: (500, b"engine dead")
        one.turn((0, 0), [10], (0, 0), 4)
        with pytest.raises(EngineFailure, match="is gone"):
            one.run()


def test_a_refusal_is_told_with_the_servers_words(odd):
    odd.manner = lambda body, attempt: (400, json.dumps({"error": {"message": "prompt too long"}}).encode())
    one = engine(odd)
    one.turn((0, 0), [10], (0, 0), 4)
    with pytest.raises(EngineFailure, match="HTTP 400: prompt too long"):
        one.run()
    assert odd.attempts["[10]"] == 1


def test_a_server_that_was_restarted_has_lost_the_weights(odd):
    """The one that answers after a lost connection is asked what its weights are called."""
    one = engine(odd, carries="weights")
    model = qwen3(len(byte_bpe()))
    one.deliver(model, 1)
    orders = [path for path, body in odd.seen if path != "/v1/completions" and (body or "cache" in path)]
    assert orders == ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"]
    assert odd.weights.startswith("palaestra-")
    odd.manner = lambda body, attempt: "hang up" if attempt == 1 else None
    assert turns(one, {(0, 0): [10]})[(0, 0)].stop == "stop", "only the connection was lost"
    odd.weights = "default"
    one.turn((1, 0), [11], (0, 1), 4)
    with pytest.raises(EngineFailure, match="was restarted and has lost the weights"):
        one.run()


def test_a_server_that_cannot_tell_is_not_trusted_after_an_absence(odd):
    odd.routes = ("/collective_rpc", "/reset_prefix_cache")
    one = engine(odd, carries="weights")
    one.deliver(qwen3(len(byte_bpe())), 1)
    assert turns(one, {(0, 0): [10]})[(0, 0)].stop == "stop"
    odd.manner = lambda body, attempt: "hang up" if attempt == 1 else None
    one.turn((1, 0), [11], (0, 1), 4)
    with pytest.raises(EngineFailure, match="cannot tell whether it still has the weights"):
        one.run()


def test_an_evaluation_ends_in_one_line_too(capsys, monkeypatch, model_folder):  # noqa: F811
    from agents import cli, eval

    with serving() as odd:
        odd.manner = lambda body, attempt: (400, b"no")
        monkeypatch.setattr("sys.argv", ["eval", "--env", SHAPED, "--model", odd.url, "--tokenizer", model_folder])
        with pytest.raises(SystemExit) as stop:
            cli.run(eval.main)
    assert stop.value.code == 1
    assert capsys.readouterr().err.count("error: ") == 1


def test_weights_lie_in_the_exchange_folder_until_the_next_ones(odd, tmp_path):
    one = engine(odd, carries="weights", exchange=str(tmp_path))
    model = qwen3(len(byte_bpe()))
    folders = []
    for version in range(3):
        one.deliver(model, version)
        (folder,) = next(tmp_path.iterdir()).iterdir()
        assert (folder / "config.json").is_file() and list(folder.glob("*.safetensors"))
        assert str(folder) == [b for p, b in odd.seen if p == "/collective_rpc" and b][-1]["kwargs"]["weights_path"]
        folders.append(folder)
    assert len(set(folders)) == 3, "a name is never used twice: servers cache by name"
    one.shutdown()
    assert not list(tmp_path.iterdir())


def test_the_base_is_delivered_once_and_adapters_under_a_new_name_each_time(odd):
    one = engine(odd, carries="adapters")
    model = qwen3(len(byte_bpe()))
    lora.adapt(model, LoraConfig(rank=2), 0)
    for version in range(3):
        one.deliver(model, version)
        turns(one, {(version, 0): [10]})
    paths = [path for path, body in odd.seen if body and ("lora" in path or path == "/collective_rpc")]
    load, drop = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    assert paths == ["/collective_rpc", load, drop, load, drop, load]
    names = [body["lora_name"] for path, body in odd.seen if path == load and body]
    assert len(set(names)) == 3
    assert [body["model"] for path, body in odd.seen if "seed" in body] == names


# ---------------------------------------------------------------------- the start


@pytest.mark.parametrize("change, carries, words", [
    ({"raw": True}, "nothing", "--logprobs-mode processed_logprobs"),
    ({"routes": ()}, "weights", "VLLM_SERVER_DEV_MODE=1"),
    ({"routes": ("/collective_rpc",)}, "adapters", "--enable-lora"),
    ({"routes": ("/v1/load_lora_adapter",)}, "adapters", "VLLM_SERVER_DEV_MODE=1"),
])  # fmt: skip
def test_a_server_that_was_not_started_for_this_is_refused(odd, change, carries, words):
    for name, value in change.items():
        setattr(odd, name, value)
    with pytest.raises(UsageError) as said:
        engine(odd, carries=carries)
    assert words in str(said.value) and odd.url in str(said.value)


def test_a_short_context_is_refused(odd):
    odd.context = 100
    with pytest.raises(UsageError, match=r"--max-model-len 128, or give --rollout\.max-context 100"):
        ServerEngine(VllmConfig(servers=(odd.url,)), carries="nothing", stop_ids=[3], max_context=128)


def test_unreachable_at_the_start_is_one_line_and_exit_2(capsys, monkeypatch, tmp_path, model_folder):  # noqa: F811
    url = f"http://127.0.0.1:{closed_port()}"
    said = refused(capsys, monkeypatch, "--env", SHAPED, "--model", model_folder, "--engine", "vllm",
                   "--vllm.servers", url, "--runs", str(tmp_path))  # fmt: skip
    assert f"no server answers at {url}" in said and "docs/engines.md" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv, words", [
    (["--vllm.servers", "localhost:8000"], "like http://HOST:PORT"),
    (["--vllm.servers", "http://x", "--vllm.tensor-parallel", "2"], "servers have their own command line"),
    (["--vllm.servers", "http://x", "--vllm.merge"], "give --lora.rank"),
    (["--vllm.retries", "7"], "name some with --vllm.servers"),
])  # fmt: skip
def test_options_that_do_not_go_together(capsys, monkeypatch, tmp_path, model_folder, argv, words):  # noqa: F811
    assert words in refused(capsys, monkeypatch, "--env", SHAPED, "--model", model_folder, "--engine", "vllm", *argv,
                            "--runs", str(tmp_path))  # fmt: skip


def test_two_models_at_one_address_need_a_name(odd):
    assert engine(odd).servers[0].model == "odd"
    with pytest.raises(UsageError, match="does not serve 'other'; it serves odd"):
        ServerEngine(VllmConfig(servers=(f"{odd.url}#other",)), carries="nothing", stop_ids=[3])


# ---------------------------------------------------------------------- pictures

PAD = 61
FORM = PictureFormat(processor_of("qwen3_vl"), pad_id=PAD, start_id=60, end_id=62)


def seeing(odd, carries="nothing") -> ServerEngine:
    odd.spans = (PAD, 1)  # what the picture of the engine's trial has
    options = VllmConfig(servers=(odd.url,), timeout_s=0.5, retries=0)
    one = ServerEngine(options, carries=carries, stop_ids=[3, 4], banned_ids=[0, 7], rows=8, pictures=FORM)
    odd.spans = (PAD, 4)
    return one


def test_a_row_with_pictures_is_sent_with_all_of_them_and_one_placeholder_each(odd):
    one = seeing(odd)
    red, blue = FORM.read(scene("red", 64, 64)), FORM.read(scene("blue", 70, 60))
    assert red.length == blue.length == 4
    one.turn((0, 0), [10, *FORM.ids(red), 11], (0, 0), 8, pictures=[red])
    assert dict(one.run())[(0, 0)].ids == (10, 3)
    one.turn((0, 0), [12, *FORM.ids(blue), *FORM.ids(red)], (0, 1), 8, Sampler(0.5), pictures=[blue, red])
    got = dict(one.run())[(0, 0)]
    assert (got.logps, got.stop) == ((-1.0, -0.5), "stop")
    path, body = odd.seen[-1]
    assert path == GENERATE and body["model"] == "odd" and body["return_token_ids"]
    assert body["token_ids"] == [10, 60, PAD, 62, 11, 10, 3, 12, 60, PAD, 62, 60, PAD, 62]
    assert [part["uuid"] for part in body["content_parts"]] == [str(p.key) for p in (red, blue, red)]
    for part, picture in zip(body["content_parts"], (red, blue, red), strict=True):
        kind, _, data = part["url"].partition(",")
        with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
            assert (part["type"], kind) == ("image_url", "data:image/png;base64")
            assert sent.mode == "RGB" and ImageChops.difference(sent, picture.image).getbbox() is None
    how = body["sampling_params"]
    assert how["max_tokens"] == 8 and how["temperature"] == 0.5 and how["logprobs"] == 0 and how["ignore_eos"]
    assert how["stop_token_ids"] == [3, 4] and how["logit_bias"] == {"0": -100.0, "7": -100.0}


def test_a_row_without_pictures_goes_the_same_way(odd):
    one = seeing(odd)
    assert turns(one, {(0, 0): [10, 11]})[(0, 0)].ids == (10, 3)
    path, body = odd.seen[-1]
    assert path == GENERATE and body["token_ids"] == [10, 11] and body["content_parts"] is None


def test_a_server_that_expands_otherwise_ends_the_run(odd):
    one, picture = seeing(odd), FORM.read(scene("red", 64, 64))
    odd.spans = (PAD, 5)
    one.turn((2, 1), [10, *FORM.ids(picture)], (0, 0), 8, pictures=[picture])
    with pytest.raises(EngineFailure, match=r"row \(2, 1\): vLLM expands its pictures to a prompt of 8 tokens, .* 7"):
        one.run()


def test_a_row_is_scored_with_its_pictures(odd):
    one, picture = seeing(odd), FORM.read(scene("red", 64, 64))
    assert one.log_probs([10, *FORM.ids(picture), 11], [picture]) == [-0.25] * 7
    assert odd.seen[-1][1]["content_parts"][0]["uuid"] == str(picture.key)


@pytest.mark.parametrize("reply", [
    b"{}", json.dumps(choice([9, 3], [-1.0, -0.5])).encode(), json.dumps(generated([9], [-1.0], None)).encode(),
    json.dumps(generated([9, 3], [-1.0, None], [10])).encode(),
])  # fmt: skip
def test_a_malformed_reply_of_this_route_is_an_outcome_too(odd, reply):
    one = seeing(odd)
    odd.manner = lambda body, attempt: (200, reply)
    assert turns(one, {(0, 0): [10]})[(0, 0)].stop == "error:reply"


def test_what_old_weights_made_of_pictures_is_forgotten_with_them(odd):
    one = seeing(odd, "weights")
    odd.seen.clear()
    one.deliver(qwen3(len(byte_bpe())), 1)
    orders = [path for path, body in odd.seen if body or "cache" in path]
    assert orders == ["/collective_rpc", "/reset_prefix_cache", "/reset_encoder_cache", "/update_weight_version"]


@pytest.mark.parametrize("change, words", [
    ({"routes": ()}, "--enable-scale-out"), ({"raw": True}, "--logprobs-mode processed_logprobs"),
    ({"spans": (PAD, 2)}, "image processor is not the run's"),
])  # fmt: skip
def test_a_server_that_cannot_take_pictures_is_refused(odd, change, words):
    odd.spans = (PAD, 1)
    for name, value in change.items():
        setattr(odd, name, value)
    with pytest.raises(UsageError) as said:
        ServerEngine(VllmConfig(servers=(odd.url,)), carries="nothing", stop_ids=[3], pictures=FORM)
    assert words in str(said.value)


def test_pictures_that_do_not_fit_are_refused_before_anything_is_sent(odd):
    one, picture = seeing(odd), FORM.read(scene("red", 64, 64))
    for pictures in ([], [picture, picture]):
        with pytest.raises(PictureError, match="placeholders of"):
            one.turn((0, 0), [10, *FORM.ids(picture)], (0, 0), 8, pictures=pictures)
    with pytest.raises(ValueError, match="built without `pictures`"):
        engine(odd).turn((0, 0), [10], (0, 0), 8, pictures=[picture])
    assert one.run() == []
