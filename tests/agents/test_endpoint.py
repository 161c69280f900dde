"""The endpoint engine: conversions both ways, a misbehaving server over real sockets, and a real server."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agents.cli import UsageError
from agents.engines.base import SampleParams
from agents.engines.endpoint import Endpoint, EndpointConfig, read_reply, to_plain, to_text, to_wire
from agents.evaluate import TextPlayer, evaluate
from agents.rollout import Limits
from tests.agents.bad_server import Behaviour, pictures, serving, structured
from tests.agents.parity import Parity
from tests.envs.spot import Spot
from tests.tools.picture_tools import pattern
from tools import HERMES, BadCall, ToolCall
from tools.images import flat

pytest.importorskip("openai", reason="the endpoint extra is not installed")

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.text(st.characters(codec="utf-8"), max_size=12)
)
arguments = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=8), leaves | st.lists(leaves, max_size=3)
)
calls = st.lists(
    st.builds(ToolCall, st.from_regex(r"[a-z_]{1,12}", fullmatch=True), arguments), min_size=1, max_size=3
)


@given(calls, st.sampled_from(["", "Let me look.", "<b>&"]))
@settings(deadline=None)
def test_structured_calls_read_back_as_themselves(made, words):
    text = to_text(words, [structured(c) for c in made], HERMES)
    turn = HERMES.parse(text)
    assert turn.content == words and list(turn.calls) == made


@given(calls)
@settings(deadline=None)
def test_a_turn_goes_out_as_it_came_in(made):
    """text -> wire -> text keeps every call, and each tool message names its call."""
    text = HERMES.render("words", made)
    history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
    history += [{"role": "tool", "name": c.name, "content": f"result {i}"} for i, c in enumerate(made)]
    wire = to_wire(history, HERMES)
    assert HERMES.parse(to_text(wire[1]["content"], wire[1]["tool_calls"], HERMES)).calls == tuple(made)
    ids = [c["id"] for c in wire[1]["tool_calls"]]
    assert len(set(ids)) == len(ids) and [m["tool_call_id"] for m in wire[2:]] == ids
    assert [m["content"] for m in wire[2:]] == [f"result {i}" for i in range(len(made))]


def test_a_tool_message_without_a_readable_call_becomes_a_user_message():
    bad = '<tool_call>{"name": oops}</tool_call><tool_call>{"name": "f", "arguments": {}}</tool_call>'
    wire = to_wire(
        [{"role": "assistant", "content": bad}]
        + [{"role": "tool", "content": text} for text in ("bad", "good")],
        HERMES,
    )  # fmt: skip
    assert [m["role"] for m in wire] == ["assistant", "user", "tool"]
    assert wire[2]["tool_call_id"] == wire[0]["tool_calls"][0]["id"]
    only_bad = to_wire([{"role": "assistant", "content": "<tool_call>{"}], HERMES)
    assert only_bad == [{"role": "assistant", "content": "<tool_call>{"}]


@pytest.mark.parametrize(
    "raw", ["{", "[1]", "nonsense", '{"a": NaN}', '{"a": 1, "a": 2}', "9" * 50, "[" * 10_000, "\x00"]
)
def test_unreadable_arguments_reach_the_environments_parser(raw):
    for name in ("f", "{}"):
        (call,) = HERMES.parse(to_text("", [structured(ToolCall(name, {}), raw)], HERMES)).calls
        assert isinstance(call, BadCall)


def test_without_native_tools_they_are_described_in_words():
    tool = {"type": "function", "function": {"name": "remainder", "parameters": {}}}
    plain = to_plain([{"role": "system", "content": "S"}, {"role": "tool", "content": "1"}], [tool])
    assert plain[0]["content"].startswith("S\n") and "remainder" in plain[0]["content"]
    assert plain[1] == {"role": "user", "content": "<tool_response>\n1\n</tool_response>"}
    assert to_plain([{"role": "user", "content": "u"}], [tool])[0]["role"] == "system"
    assert to_plain([{"role": "user", "content": "u"}], []) == [{"role": "user", "content": "u"}]


def an_image(value: int, width: int = 4) -> dict:
    return {"type": "image", "image": Image.new("RGB", (width, 3), (value, 0, 0))}


def kinds(message) -> list:
    """Texts, and the red of images, in order."""
    if isinstance(message["content"], str):
        return [message["content"]]
    seen = iter(pictures([message]))
    return [p["text"] if p["type"] == "text" else next(seen).getpixel((0, 0))[0] for p in message["content"]]


def test_images_stand_in_user_messages_only():
    text = HERMES.render("look", [ToolCall("zoom", {}), ToolCall("zoom", {})])
    history = [
        {"role": "system", "content": [{"type": "text", "text": "S"}, an_image(1)]},
        {"role": "user", "content": [an_image(2), {"type": "text", "text": "which?"}, an_image(3)]},
        {"role": "assistant", "content": text},
        {"role": "tool", "name": "zoom", "content": [{"type": "text", "text": "left"}, an_image(4), an_image(5)]},
        {"role": "tool", "name": "zoom", "content": [an_image(6)]},
        {"role": "assistant", "content": "hm"},
    ]
    wire = to_wire(history, HERMES)
    assert [m["role"] for m in wire] == ["system", "user", "user", "assistant", "tool", "tool", "user", "assistant"]
    assert [kinds(m) for m in wire if m["role"] != "assistant"] == [
        ["S[image]"], ["Shown before:", 1], [2, "which?", 3], ["left[image][image]"], ["[image]"],
        ["Shown by zoom:", 4, 5, "Shown by zoom:", 6],
    ]  # fmt: skip
    assert to_wire(history[:5], HERMES) == wire[:7], "what is shown last is not forgotten"
    plain = to_plain(history, [{"type": "function", "function": {"name": "zoom"}}])
    assert [m["role"] for m in plain] == ["system", "user", "user", "assistant", "user", "user", "assistant"]
    assert kinds(plain[0])[0].startswith("S[image]\n") and kinds(plain[1]) == ["Shown before:", 1]
    assert kinds(plain[4]) == ["<tool_response>\n", "left", 4, 5, "\n</tool_response>"]
    json.dumps([wire, plain])


def test_an_image_after_a_malformed_call_is_shown_too():
    wire = to_wire([{"role": "tool", "content": [an_image(7)]}, {"role": "user", "content": "on"}], HERMES)
    assert [(m["role"], kinds(m)) for m in wire] == [
        ("user", ["Tool: [image]"]), ("user", ["Shown by the tool:", 7]), ("user", ["on"])]  # fmt: skip


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "I;16"])
def test_images_of_any_mode_go_out_as_what_they_show(mode):
    image = pattern(mode)
    (message,) = to_wire([{"role": "user", "content": [{"type": "image", "image": image}]}], HERMES)
    (seen,) = pictures([message])
    assert seen.mode == "RGB" and seen.tobytes() == flat(image).tobytes()


@pytest.mark.parametrize("native", [True, False])
def test_a_server_that_sees_plays_an_environment_with_images(native):
    """It decodes the opening's picture and the tool's, and answers by the pixels."""
    with serving() as url:
        client = Endpoint(EndpointConfig.from_spec(f"{url}#seeing", retries=0, native_tools=native))
        player = TextPlayer(lambda: Spot(split="eval"), client, Limits(), threads=2)
        result = evaluate(player, "spot", episodes=12)
        client.close()
    assert result.success.mean == 1.0 and result.tool_calls.mean == 1.0 and not result.failures
    last = max(Behaviour.seen, key=lambda body: len(body["messages"]))["messages"]
    roles = ["user", "assistant", "tool", "user"] if native else ["system", "user", "assistant", "user"]
    assert [m["role"] for m in last] == roles and [p.size for p in pictures(last)] == [(56, 56), (28, 28)]


def test_lone_surrogates_can_be_sent():
    wire = to_wire([{"role": "user", "content": "a\ud800b"}], HERMES)
    json.dumps(wire, ensure_ascii=False).encode("utf-8")


json_values = st.recursive(
    leaves | st.floats(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3),
)
likely = st.fixed_dictionaries(
    {"choices": st.lists(st.dictionaries(st.sampled_from(["message", "finish_reason"]), json_values))}
)


@given(st.binary(max_size=60) | (json_values | likely).map(lambda v: json.dumps(v).encode()))
@settings(max_examples=120, deadline=None)
def test_no_reply_can_raise(body):
    said = read_reply(body, HERMES)
    assert said.stop in ("stop", "length", "error:reply") and isinstance(said.text, str)


def ask(url, manner, **options):
    options = {"retries": 0, "timeout_s": 5.0} | options
    client = Endpoint(EndpointConfig.from_spec(f"{url}#{manner}", **options))
    try:
        return client.complete([{"role": "user", "content": "q"}], [], HERMES, 2**40 + 5, 64)
    finally:
        client.close()


@pytest.mark.parametrize(
    ("manner", "stop", "text"),
    [
        ("good", "stop", "hello"),
        ("caller", "stop", '<tool_call>{"name": "remainder", "arguments": {"number": 3}}</tool_call>'),
        ("cut", "length", "hal"),
        ("garbage", "error:reply", ""),
        ("huge", "error:reply", ""),
        ("refusing", "error:http_400", ""),
        ("leaving", "error:connection", ""),
    ],
)
def test_what_a_server_does_is_an_outcome(manner, stop, text):
    with serving() as url:
        said = ask(url, manner)
    assert (said.stop, said.text) == (stop, text)
    assert said.tokens == (7 if not stop.startswith("error") else 0)


@pytest.mark.parametrize("manner", ["hanging", "trickling"])
def test_a_slow_server_is_given_up(manner):
    with serving() as url:
        assert ask(url, manner, timeout_s=0.4).stop == "error:timeout"


def test_a_busy_server_is_asked_again():
    with serving() as url:
        assert ask(url, "flaky", retries=3).text == "at last"
        assert Behaviour.attempts["flaky"] == 3


def test_nobody_there():
    assert ask("http://127.0.0.1:9/v1", "x").stop == "error:connection"


def test_the_request_says_how_to_sample():
    with serving() as url:
        ask(url, "good", params=SampleParams(temperature=0.5, top_k=7, top_p=0.9, max_new_tokens=32))
    (body,) = Behaviour.seen
    assert (body["temperature"], body["top_k"], body["top_p"], body["max_tokens"]) == (0.5, 7, 0.9, 32)
    assert 0 <= body["seed"] < 2**31 and "tools" not in body


def test_an_evaluation_survives_a_bad_server_and_says_so():
    with serving() as url:
        client = Endpoint(EndpointConfig.from_spec(f"{url}#refusing", retries=0))
        player = TextPlayer(lambda: Parity(split="eval"), client, Limits(), threads=4)
        result = evaluate(player, "parity", episodes=20)
        client.close()
    assert result.failures == {"error:http_400": 20} and result.marked and result.success.mean == 0


def test_episodes_pass_through_the_environments_parser():
    """A server that only ever calls the tool: the environment runs the calls until its turns are used up."""
    with serving() as url:
        client = Endpoint(EndpointConfig.from_spec(f"{url}#caller", retries=0))
        player = TextPlayer(lambda: Parity(split="eval", max_turns=3), client, Limits(), threads=2)
        result = evaluate(player, "parity", episodes=4)
        client.close()
    assert result.tool_calls.mean == 3 and result.stop_reasons == {"max_turns": 4}
    last = max(Behaviour.seen, key=lambda body: len(body["messages"]))
    assert [m["role"] for m in last["messages"]] == ["user", "assistant", "tool", "assistant", "tool"]
    assert last["messages"][2]["tool_call_id"] == last["messages"][1]["tool_calls"][0]["id"]
    assert last["tools"][0]["function"]["name"] == "remainder"
    seeds = [body["seed"] for body in Behaviour.seen]
    assert len(set(seeds)) == len(seeds), "every turn of every episode has a seed of its own"


def test_the_only_model_of_a_server_needs_no_name():
    with serving() as url:
        assert Endpoint(EndpointConfig.from_spec(url)).name == f"{url}#good"
    with serving(("a", "b")) as url, pytest.raises(UsageError, match="lists a, b"):
        Endpoint(EndpointConfig.from_spec(url))
    with pytest.raises(UsageError, match="does not answer"):
        Endpoint(EndpointConfig.from_spec("http://127.0.0.1:9/v1", retries=0))
    with pytest.raises(UsageError, match="http://localhost"):
        EndpointConfig.from_spec("localhost:8000")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The bundled model after a short warm start on the parity environment, as a folder; and its player."""
    import torch

    from agents import bundled, warm
    from agents.actor import Player
    from agents.chat import ChatFormat
    from agents.config import WarmConfig
    from agents.demonstrate import demonstrations
    from agents.dist import World
    from agents.engines.hf import HFEngine
    from agents.forward import Convention
    from agents.imitate import record

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, tokenizer = bundled.load()
    chat = ChatFormat(tokenizer, vocab_size=model.get_output_embeddings().weight.shape[0])
    demos = demonstrations(lambda: Parity(level=2), {"oracle": 1.0}, range(200), seed=0, max_turns=4)
    ledgers = [record(chat, demo) for demo in demos]
    convention = Convention(1.0, tuple(chat.banned_ids))
    warm.warm_start(
        model, ledgers, WarmConfig(cache=False), convention, seed=0, micro_tokens=4096, world=World(),
        on_step=lambda *step: None,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    params = SampleParams(temperature=0, max_new_tokens=64)
    engine = HFEngine(
        model, stop_ids=chat.stop_ids, banned_ids=chat.banned_ids, params=params, max_context=512
    )
    yield folder, Player(lambda: Parity(level=2, split="eval"), chat, engine, Limits(4, 64, 512), 0)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def real_server(trained, tmp_path_factory):
    """`transformers serve` on that folder, offline."""
    pytest.importorskip("uvicorn", reason="transformers serve needs uvicorn and fastapi")
    pytest.importorskip("fastapi", reason="transformers serve needs uvicorn and fastapi")
    home = tmp_path_factory.mktemp("hf")
    (home / "hub").mkdir()  # the server lists the cached models, and fails where there is no cache at all
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = shutil.which("transformers", path=os.path.dirname(sys.executable))
    command = [program, "serve", str(trained[0]), "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    surroundings = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, env=surroundings, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1#{trained[0]}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.full
def test_a_real_server_plays_like_the_same_model_in_process(trained, real_server):
    """Greedy decoding over HTTP, calls parsed there and written back here, equals the token engine's."""
    client = Endpoint(
        EndpointConfig.from_spec(real_server, params=SampleParams(temperature=0, max_new_tokens=64))
    )
    make_env = trained[1].make_env
    local = evaluate(trained[1], "parity")
    remote = evaluate(TextPlayer(make_env, client, Limits(4, 64, 512), threads=2), "parity")
    client.close()
    assert local.success.mean >= 0.9 and local.tool_calls.mean >= 0.9, "the warm start did not take"
    assert remote.failures == {} and remote.stop_reasons == {"answered": 20}
    assert remote.correct == local.correct and remote.calls == local.calls
    assert remote.length == 0 and remote.turns == local.turns


@pytest.mark.full
def test_a_real_server_without_native_tools(trained, real_server):
    """Tools in words make a prompt that the model does not know: every episode still has a typed end."""
    config = EndpointConfig.from_spec(
        real_server, params=SampleParams(max_new_tokens=16), native_tools=False, retries=1
    )
    client = Endpoint(config)
    result = evaluate(
        TextPlayer(trained[1].make_env, client, Limits(2, 16, 512), threads=2), "parity", episodes=6
    )
    client.close()
    assert result.episodes == 6 and set(result.stop_reasons) <= {
        "answered",
        "max_turns",
        "error:http_500",
        "error:connection",
    }
