"""`python -m envs`: list, card, check; exit codes."""

from __future__ import annotations

import json

import pytest

from envs.__main__ import main


def test_list(capsys):
    assert main(["--json", "--episodes", "4"]) == 0
    (card,) = (c for c in json.loads(capsys.readouterr().out) if c["name"] == "tool_qa")
    assert card["tools"] == ["lookup", "search", "calculator"] and card["rewards"]["oracle"] == 1.0
    assert main(["--episodes", "2"]) == 0
    assert "tool_qa" in capsys.readouterr().out


def test_card(capsys):
    assert main(["card", "tool_qa", "level=hard", "--json", "--episodes", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["levels"]
    assert main(["card", "tool_qa", "--episodes", "0"]) == 0
    assert "a chain of two look-ups" in capsys.readouterr().out


def test_check(capsys):
    assert main(["check", "tests.envs.examples:Sound", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"] is True
    assert main(["check", "tests.envs.examples:NoHacks", "--json"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rule"] == "card"
    assert main(["check", "tests.envs.examples:NoHacks"]) == 1
    assert "FAILED [card] no hacks" in capsys.readouterr().out


@pytest.mark.parametrize("argv, said", [
    (["check", "tol_qa"], "did you mean 'tool_qa'"), (["check", "tool_qa", "max_tuns=3"], "did you mean 'max_turns'"),
    (["card", "tool_qa", "level"], "should be KEY=VALUE"), (["card", "tool_qa", "level=hrad"], "did you mean 'hard'"),
])  # fmt: skip
def test_wrong_names_exit_2(argv, said, capsys):
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_a_spec_is_needed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check"])
    assert ended.value.code == 2 and "needs a SPEC" in capsys.readouterr().err
