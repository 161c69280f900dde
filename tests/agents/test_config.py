"""Command lines and TOML files: types, did-you-mean, exit code 2, a lossless saved configuration."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import cli
from agents.cli import UsageError
from agents.config import TrainConfig
from agents.sft import SftConfig


def parse(*argv: str) -> TrainConfig:
    return cli.parse(TrainConfig, argv, "train")


def test_defaults_options_and_nested_options():
    config = parse("--env", "x:Y", "--optim.lr", "0.01", "--eval.episodes", "7", "--set", "a=1", "--set", "b=2")
    assert (config.env, config.optim.lr, config.eval.episodes, config.set) == ("x:Y", 0.01, 7, ("a=1", "b=2"))
    back = dataclasses.replace(config, env="tool_qa", set=(), optim=TrainConfig().optim, eval=TrainConfig().eval)
    assert back == TrainConfig() == parse()


@pytest.mark.parametrize("argv, hint", [(["--enw", "x"], "--env"), (["--warm.episode", "3"], "--warm.episodes")])
def test_an_unknown_option_exits_2_with_the_nearest(argv, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    assert hint in capsys.readouterr().err


def test_toml_then_command_line(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('env = "a:B"\nsteps = 3\nset = ["x=1"]\n[optim]\nlr = 1\n[rollout]\nmax-context = 64\n')
    config = parse("--config", str(file), "--steps", "9")
    assert (config.env, config.steps, config.set, config.rollout.max_context) == ("a:B", 9, ("x=1",), 64)
    assert config.optim.lr == 1.0 and type(config.optim.lr) is float


@pytest.mark.parametrize("text, words", [
    ("stepz = 3", "unknown key `stepz`; did you mean `steps`?"),
    ("[optim]\nlearning_rate = 3", "unknown key `learning_rate`"),
    ("steps = 'many'", "steps must be of type int, got 'many'"),
    ("steps = true", "steps must be of type int, got True"),
    ("dtype = 'float31'", "dtype must be one of float32, float64, bfloat16"),
    ("steps = ", "not valid TOML"),
])  # fmt: skip
def test_a_wrong_file_is_named_with_the_reason(tmp_path, text, words):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        parse("--config", str(file))
    assert words in str(error.value) and str(file) in str(error.value)


def test_files_that_are_not_there_and_values_that_do_not_fit(capsys):
    with pytest.raises(UsageError, match=r"cannot read nowhere\.toml"):
        parse("--config", "nowhere.toml")
    with pytest.raises(UsageError, match="needs a file name"):
        parse("--config")
    with pytest.raises(SystemExit) as stop:
        parse("--steps", "many")
    assert stop.value.code == 2
    capsys.readouterr()


values = {
    int: st.integers(-(2**40), 2**40), float: st.floats(allow_nan=False, allow_infinity=False), bool: st.booleans(),
    str: st.text(max_size=8),
}


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_saved_configuration_reads_back_as_it_was(data):
    def drawn(config):
        changes = {}
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            if dataclasses.is_dataclass(value):
                changes[f.name] = drawn(value)
            elif type(value) in values and get_origin(get_type_hints(type(config))[f.name]) is not Literal:
                changes[f.name] = data.draw(values[type(value)])
        return dataclasses.replace(config, **changes)

    config = drawn(TrainConfig(set=("a=b",), level="hard"))
    assert cli.from_mapping(json.loads(json.dumps(cli.as_json(config))), TrainConfig) == config


def test_assignments():
    found = cli.assignments(["level=2", "name=x y", "f=[1, 2]"], "--env-args")
    assert found == {"level": 2, "name": "x y", "f": [1, 2]}
    assert cli.assignments(["x=__import__('os')"], "--env-args") == {"x": "__import__('os')"}
    for bad in (["level"], ["=3"], ["a b=3"], ["a=1", "a=2"]):
        with pytest.raises(UsageError, match="--env-args"):
            cli.assignments(bad, "--env-args")


@pytest.mark.parametrize("config", [TrainConfig, SftConfig])
def test_every_field_says_what_it_is(config, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(config, ["--help"], "x")
    assert stop.value.code == 0
    help_text = capsys.readouterr().out
    for f in dataclasses.fields(config):
        assert f"--{f.name.replace('_', '-')}" in help_text
    assert cli.nearest("gropo", ["grpo", "ppo"]) == "; did you mean `grpo`?"


def test_user_errors_exit_2_with_one_line(capsys, monkeypatch):
    def fail(argv):
        raise UsageError("no such thing; did you mean `thing`?")

    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as stop:
        cli.run(fail)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no such thing; did you mean `thing`?\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--groups", "0"], "--groups is 1 or more, not 0"),
        (["--group-size", "-3"], "--group-size is 1 or more, not -3"),
        (["--optim.lr", "0"], "--optim.lr is above 0, not 0.0"),
        (["--optim.lr", "nan"], "--optim.lr is above 0, not nan"),
        (["--optim.beta1", "1.5"], "--optim.beta1 is between 0 and 1, not 1.5"),
        (["--rollout.max-turns", "0"], "--rollout.max-turns is 1 or more, not 0"),
        (["--rollout.temperature", "inf"], "--rollout.temperature is 0 or more, not inf"),
    ],
)
def test_numbers_outside_their_range_are_named(argv, message):
    with pytest.raises(UsageError) as refused:
        cli.parse(TrainConfig, argv, "train")
    assert str(refused.value) == message


def test_a_file_is_held_to_the_same_ranges(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[warm]\nepochs = 0\n")
    with pytest.raises(UsageError, match=r"--warm\.epochs is 1 or more, not 0"):
        cli.parse(TrainConfig, ["--config", str(file)], "train")
