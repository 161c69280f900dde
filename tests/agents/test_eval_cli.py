"""`python -m agents.eval`: policies by their spec, tables, JSON, pairing, and what the user gets wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from agents import eval as eval_command
from agents.cli import UsageError

PARITY = ["--env", "tests.agents.parity:Parity"]


def run(capsys, *argv: str) -> tuple[int, str]:
    code = eval_command.main([*PARITY, *argv])
    return code, capsys.readouterr().out


def last_json(capsys, *argv: str) -> dict:
    code, out = run(capsys, *argv, "--json")
    assert code == 0 and len(out.strip().splitlines()) == 1
    return json.loads(out)


def test_json_holds_the_whole_result(capsys):
    result = last_json(capsys, "--model", "scripted:oracle", "--episodes", "20", "--k", "1,2")
    assert result["success"][0] == 1.0 and result["pass_at"]["2"][0] == 1.0
    assert result["episodes"] == 20 and result["samples"] == 2 and result["split"] == "eval"
    assert result["player"] == "scripted:oracle" and len(result["levels"]) == 2


def test_two_policies_are_paired(capsys):
    argv = ("--model", "scripted:oracle", "--against", "scripted:random", "--episodes", "20")
    result = last_json(capsys, *argv)
    low_success = result["against"]["success"][0]
    assert result["paired_difference"][0] == pytest.approx(1 - low_success)
    code, out = run(capsys, *argv)
    assert code == 0 and "success difference" in out and "paired over 20 tasks" in out


def test_the_table_shows_every_number(capsys):
    code, out = run(capsys, "--model", "scripted:clumsy", "--episodes", "20", "--k", "1,4")
    assert code == 0
    for text in (
        "success",
        "pass@4",
        "productivity",
        "invalid_json 20",
        "unknown_tool 20",
        "answered 20",
        "level",
    ):
        assert text in out, text


def test_an_evaluation_without_verdicts_exits_with_3(capsys):
    code, out = run(capsys, "--model", "scripted:breaks_the_verifier", "--level", "1")
    assert code == 3 and "RuntimeError" in out and "says little" in out


def test_levels_by_name_or_number(capsys):
    result = last_json(capsys, "--model", "scripted:oracle", "--level", "2", "--episodes", "10")
    assert [row["level"] for row in result["levels"]] == [2] and result["level"] == "2"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "scripted:orcle"], "did you mean `oracle`"),
        (["--env", "tol_qa"], "did you mean 'tool_qa'"),
        (["--env-args", "sice=3"], "sice"),
        (["--level", "7"], "unknown level"),
        (["--split", "evl"], "did you mean 'eval'"),
        (["--k", "0"], "--k must lie"),
        (["--k", "a"], "whole numbers"),
        (["--model", "./nowhere"], "no folder"),
        (["--model", "http://127.0.0.1:9/v1", "--retries", "0"], "does not answer"),
    ],
)
def test_mistakes_are_named(argv, message):
    with pytest.raises(UsageError) as caught:
        eval_command.main([*PARITY, "--model", "scripted:oracle", *argv])
    assert message in str(caught.value)


def test_an_environment_must_be_named():
    with pytest.raises(UsageError, match="python -m envs"):
        eval_command.main(["--model", "scripted:oracle"])


@pytest.mark.parametrize(
    ("env", "message"), [("tol_qa", "did you mean"), ("tests.envs.spot:Spot", "this model reads text only")]
)
def test_a_mistake_exits_with_2_and_one_line(env, message):
    command = [sys.executable, "-m", "agents.eval", "--env", env, "--episodes", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout.strip() == ""
    assert done.stderr.count("\n") == 1 and message in done.stderr


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run as training leaves it: configuration, metrics, exported model."""
    from agents import bundled

    folder = tmp_path_factory.mktemp("runs") / "one"
    folder.mkdir()
    model, tokenizer = bundled.load()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    config = {
        "env": PARITY[1], "level": "1", "env_args": [], "reward": None,
        "rollout": {"max_new_tokens": 8, "max_context": 256},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def test_a_run_brings_its_environment_and_limits_and_keeps_the_result(run_folder, capsys):
    argv = ["--model", str(run_folder), "--episodes", "10", "--label", "again", "--json"]
    code = eval_command.main(argv)
    result = json.loads(capsys.readouterr().out)
    assert code == 0 and result["env"] == PARITY[1] and result["level"] == "1"
    assert 0 < result["length"] <= 8 * result["turns"]
    kept = (run_folder / "eval.jsonl").read_text().splitlines()
    assert len(kept) == 1 and json.loads(kept[0])["success"] == result["success"]
    assert json.loads(kept[0])["label"] == "again"
    eval_command.main([*argv, "--no-record", "--level", "2"])
    assert len((run_folder / "eval.jsonl").read_text().splitlines()) == 1
    assert json.loads(capsys.readouterr().out)["level"] == "2"


def test_tokens_and_seeds_decide_the_result(run_folder, capsys):
    def correct(seed):
        eval_command.main(
            ["--model", str(run_folder / "model"), *PARITY, "--seed", seed, "--json", "--episodes", "8"]
        )
        result = json.loads(capsys.readouterr().out)
        return result["correct"], result["length"], result["tool_errors"]

    assert correct("1") == correct("1") != correct("2")
