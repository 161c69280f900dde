"""Real vLLM servers: sampling, weights and adapters, a run over two of them, one that is killed, evaluation."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from agents import cli, eval, lora, train
from agents.chat import ChatFormat
from agents.cli import UsageError
from agents.config import LoraConfig, VllmConfig
from agents.dist import World
from agents.engines.base import EngineFailure, SampleParams
from agents.engines.reference import log_prob_gap, plain_log_probs
from agents.engines.vllm_server import ServerEngine
from agents.evaluate import evaluate
from agents.models import load_model
from agents.sync import WeightSync, probe_ids
from tests.agents.letters import SHAPED

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("ignore")]
GAP = 1e-4
ROWS = 16


@dataclass
class Running:
    """A server process."""

    url: str
    process: subprocess.Popen
    log: Path


@contextmanager
def serving(folder: Path, *more: str, model: str = "bundled"):
    """`python -m agents.serve` on a free port; not waited for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / f"server-{port}.log"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "agents.serve", "--model", model, "--port", str(port), "--rows", str(ROWS),
             "--folder", str(folder / f"model-{port}"), *more],
            stdout=out, stderr=out, env=env, cwd=Path(__file__).parents[2], start_new_session=True,
        )  # fmt: skip
    try:
        yield Running(f"http://127.0.0.1:{port}", process, log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ready(server: Running, seconds: float = 240) -> Running:
    end = time.monotonic() + seconds
    while True:
        assert server.process.poll() is None and time.monotonic() < end, server.log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=2):
                return server
        except OSError:
            time.sleep(0.5)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Two servers of the bundled model that take weights and adapters."""
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        both = [stack.enter_context(serving(folder, "--lora-rank", "8")) for _ in range(2)]
        yield [ready(server) for server in both]


@pytest.fixture(scope="module")
def chat():
    model, tokenizer = load_model("bundled")
    return ChatFormat(tokenizer, vocab_size=model.get_output_embeddings().weight.shape[0])


def engine_of(servers, chat, model, carries="weights", **changes) -> tuple[ServerEngine, WeightSync]:
    options = {"servers": tuple(s.url for s in servers), "retries": 1, **changes}
    engine = ServerEngine(
        VllmConfig(**options), carries=carries, stop_ids=chat.stop_ids, banned_ids=chat.banned_ids,
        params=SampleParams(0.8), rows=ROWS, max_context=256,
    )  # fmt: skip
    engine.vocab_size, engine.model = model.get_output_embeddings().weight.shape[0], model  # for `log_prob_gap`
    return engine, WeightSync(engine, model, World(), probe_ids(engine.vocab_size, 48), 1e-3)


def shaken(model, seed: int, size: float = 0.02):
    """Other weights (of an adapted model: other adapters)."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=draw))
    return model


def test_log_probs_seeds_and_whole_weights(servers, chat):
    """Over two turns with bans and temperature on both servers; then with other weights, again and again."""
    model, _ = load_model("bundled")
    engine, sync = engine_of(servers, chat, model)
    for version in range(3):
        sync(version)
        assert sync.gap <= GAP and log_prob_gap(engine) <= GAP
        engine.reset()
        shaken(model, version)
    engine.reset()
    rows = {(g, m): [40 + g, *range(50, 70)] for g in range(6) for m in range(2)}
    sync(3)
    one, two = (sampled(engine, rows) for _ in range(2))
    assert [t.ids for t in one.values()] == [t.ids for t in two.values()], "a seed is a turn's own"
    assert len({t.ids for t in one.values()}) > 6
    for key, turn in one.items():
        plain = plain_log_probs(model, [*rows[key], *turn.ids], chat.banned_ids, 0.8)[len(rows[key]) - 1 :]
        assert (plain - torch.tensor(turn.logps)).abs().max() <= GAP
        assert not set(turn.ids) & set(chat.banned_ids)
    engine.shutdown()


def sampled(engine, rows, budget=12) -> dict:
    engine.reset()
    for key, ids in rows.items():
        engine.turn(key, ids, (5, *key, 0), budget)
    out = {}
    while done := engine.run():
        out |= dict(done)
    return dict(sorted(out.items()))


def test_weights_that_did_not_reach_every_server_raise_the_alarm(servers, chat):
    model, _ = load_model("bundled")
    engine, sync = engine_of(servers, chat, model)
    sync(0)
    shaken(model, 1)
    engine.servers[1].load_weights, kept = (lambda folder, label, pictures: None), engine.servers[1].load_weights
    with pytest.raises(EngineFailure, match="does not sample from the policy that is trained"):
        sync(1)
    engine.servers[1].load_weights = kept
    sync.delivered = None
    sync(1)
    engine.shutdown()


def test_a_tied_head_that_kept_its_old_matrix_raises_the_alarm(servers, chat):
    """What vLLM does with a tied head, done to these servers: everything arrives but the head."""
    model, _ = load_model("bundled")
    engine, sync = engine_of(servers, chat, model)
    sync(0)
    old = model.lm_head.weight.detach().clone()
    shaken(model, 2)
    new = model.lm_head.weight.detach().clone()
    deliver = engine.deliver

    def without_head(model, version):
        with torch.no_grad():
            model.lm_head.weight.copy_(old)
            deliver(model, version)
            model.lm_head.weight.copy_(new)

    engine.deliver = without_head
    with pytest.raises(EngineFailure, match=r"version 1: log-probs of the probe"):
        sync(1)
    engine.shutdown()


@pytest.mark.parametrize("way", ["adapters", "weights"])
def test_adapters_arrive_alone_or_merged(servers, chat, way):
    base, _ = load_model("bundled")
    whole, sync = engine_of(servers, chat, base)
    sync(0)
    whole.shutdown()
    model, _ = load_model("bundled")
    lora.adapt(model, LoraConfig(rank=8), 0)
    engine, sync = engine_of(servers, chat, model, carries=way)
    for version in range(4):
        sync(version)
        assert sync.gap <= GAP
        engine.reset()
        assert log_prob_gap(engine) <= GAP
        engine.reset()
        shaken(model, version, 0.03)
    assert float((plain_log_probs(model, sync.probe) - plain_log_probs(base, sync.probe)).abs().max()) > 0.1
    engine.shutdown()


def test_an_adapter_that_was_not_delivered_raises_the_alarm(servers, chat):
    base, _ = load_model("bundled")
    whole, sync = engine_of(servers, chat, base)
    sync(0)
    whole.shutdown()
    model, _ = load_model("bundled")
    lora.adapt(model, LoraConfig(rank=4), 0)
    engine, sync = engine_of(servers, chat, model, carries="adapters")
    sync(0)
    shaken(model, 3)
    engine._deliver = lambda model: engine.adapter
    with pytest.raises(EngineFailure, match="an adapter"):
        sync(1)
    engine.shutdown()


def test_a_rank_that_is_too_large_is_the_servers_to_refuse(servers, chat):
    model, _ = load_model("bundled")
    lora.adapt(model, LoraConfig(rank=16), 0)
    engine, sync = engine_of(servers, chat, model, carries="adapters")
    with pytest.raises(EngineFailure, match=r"refuses /v1/load_lora_adapter.*rank"):
        sync(0)
    engine.shutdown()


# ---------------------------------------------------------------------- whole commands


def run(argv: list[str], program=train) -> int:
    """A command in this process; its exit code."""
    old, sys.argv = sys.argv, ["x", *argv]
    try:
        cli.run(program.main, *([train.user_errors] if program is train else []))
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = old
    return 0


def arguments(servers, folder: Path, *more: str) -> list[str]:
    """A run whose every batch has something to learn from: a share of letters is paid."""
    return [
        "--env", SHAPED, "--engine", "vllm", "--run", str(folder), "--plain", "--processes", "1",
        "--steps", "5", "--groups", "4", "--group-size", "4", "--rollout.rows", str(ROWS), "--save.every", "1",
        "--eval.episodes", "8", "--eval.hard-episodes", "0", "--train-tasks", "8", "--rollout.max-new-tokens", "8",
        "--warm.episodes", "8", "--warm.epochs", "1", *(x for s in servers for x in ("--vllm.servers", s.url)), *more,
    ]  # fmt: skip


@pytest.mark.parametrize("how", [(), ("--lora.rank", "8")])
def test_training_over_two_servers(servers, tmp_path, how, chat):
    base, _ = load_model("bundled")
    whole, sync = engine_of(servers, chat, base)
    sync(0)
    whole.shutdown()
    assert run(arguments(servers, tmp_path / "run", *how)) == 0
    metrics = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    assert max(m["logp_gap"] for m in metrics) <= GAP and max(m["sync_gap"] for m in metrics) <= GAP
    assert min(m["grad_norm"] for m in metrics) > 0, "nothing was learnt, so nothing was tested"
    assert max(m["failures"] for m in metrics) == 0
    assert (tmp_path / "run" / "adapter").is_dir() == bool(how)


def test_evaluation_by_tokens_equals_the_model_in_this_process(servers, chat, capsys):
    """Greedy: the same ids, and log-probs to 1e-4; through the command: the same result."""
    base, _ = load_model("bundled")
    whole, sync = engine_of(servers, chat, base)
    sync(0)
    whole.shutdown()
    common = ["--env", "tool_qa", "--episodes", "12", "--temperature", "0", "--json", "--max-context", "512"]
    results = []
    for argv in (["--model", "bundled"], ["--model", servers[0].url, "--tokenizer", "bundled"]):
        assert run([*common, *argv], eval) in (0, 3)
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    for result in results:
        for name in ("seconds", "player"):
            del result[name]
    assert results[0] == results[1]

    command = cli.parse(eval.EvalCommand, [*common], "x")
    command = eval.from_run(command, None)
    played: list[list] = []
    for spec, tokenizer in (("bundled", None), (servers[0].url, "bundled")):
        one = replace(command, tokenizer=tokenizer)
        keep: list = []
        evaluate(eval.build_player(one, spec, eval.env_maker(one)), "tool_qa", episodes=8, keep=keep.extend)
        played.append(keep)
    for ours, theirs in zip(*played, strict=True):
        assert [s.ids for s in ours.ledger.segments] == [s.ids for s in theirs.ledger.segments]
        gaps = [abs(a - b) for x, y in zip(ours.ledger.segments, theirs.ledger.segments, strict=True)
                for a, b in zip(x.logp, y.logp, strict=True)]  # fmt: skip
        assert max(gaps) <= GAP


def test_evaluation_by_text_works_too(servers, capsys):
    assert run(["--env", "tool_qa", "--episodes", "4", "--json", "--model", f"{servers[0].url}/v1#bundled",
                "--no-native-tools", "--max-new-tokens", "24"], eval) in (0, 3)  # fmt: skip
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["episodes"] == 4 and not [name for name in result["failures"] if "connection" in name]


def test_a_server_without_the_log_probs_that_are_needed_is_refused(tmp_path, chat):
    with serving(tmp_path, "--", "--logprobs-mode", "raw_logprobs") as plain:
        ready(plain)
        with pytest.raises(UsageError, match="processed_logprobs"):
            engine_of([plain], chat, load_model("bundled")[0])


def test_a_server_killed_in_a_rollout_ends_the_run_which_goes_on_later(servers, tmp_path, capfd, chat):
    """Last in the file: it costs a server. One line, exit code 1, the command that goes on; and it does."""
    base, _ = load_model("bundled")
    whole, sync = engine_of(servers, chat, base)
    sync(0)
    whole.shutdown()
    folder, victim = tmp_path / "run", servers[1]

    def kill():
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.02)
        time.sleep(0.5)  # the next iteration is being played or learned
        os.killpg(victim.process.pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    argv = arguments(servers, folder, "--warm.when", "never", "--steps", "500", "--vllm.retries", "1")
    assert run(argv) == 1
    said = capfd.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"the server {victim.url} is gone" in errors[0] and "Traceback" not in said
    assert f"--resume {folder}" in said
    before = len((folder / "metrics.jsonl").read_text().splitlines())
    port = victim.url.rpartition(":")[2]
    with serving(tmp_path, "--lora-rank", "8", "--port", port) as again:
        again.url = victim.url
        ready(again)
        assert run(["--resume", str(folder), "--steps", str(before + 1), "--plain"]) == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == before + 1
