"""Finding environments: names, ids, module:Class, plugins that clash, names that do not exist."""

from __future__ import annotations

import importlib.metadata
import sys

import gymnasium
import pytest

import envs
from envs import registry, siblings
from envs.tool_qa import ToolQA


@pytest.mark.parametrize("spec", ["tool_qa", "palaestra/ToolQA-v0", "envs:palaestra/ToolQA-v0", "envs.tool_qa:ToolQA",
                                  ToolQA])  # fmt: skip
def test_ways_to_name_an_environment(spec):
    env = envs.make(spec, level=2)
    assert type(env) is ToolQA and env.level == 2
    assert envs.make(env) is env


@pytest.mark.parametrize("spec, said", [
    ("tol_qa", "did you mean 'tool_qa'"), ("palaestra/ToolQA-v9", "did you mean 'palaestra/ToolQA-v0'"),
    ("no.such.module:Env", "no module 'no.such.module'"), ("envs.tool_qa:ToolQu", "did you mean 'ToolQA'"),
    ("envs.core:Task", "not a subclass of envs.ChatEnv"), ("CartPole-v1", "not a subclass of envs.ChatEnv"),
    ("", "no environment ''"),
])  # fmt: skip
def test_unknown_environments_say_what_to_do(spec, said):
    with pytest.raises(envs.UnknownEnv, match=said):
        envs.make(spec)


def test_an_id_registered_elsewhere():
    gymnasium.register("elsewhere/Sound-v0", entry_point="tests.envs.examples:Sound")
    assert envs.make("elsewhere/Sound-v0").name == "sound"
    del gymnasium.registry["elsewhere/Sound-v0"]


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match="did you mean 'max_turns'"):
        envs.make("tool_qa", max_tuns=3)
    with pytest.raises(TypeError, match="did you mean 'format_weight'"):
        envs.make("tool_qa", format_wight=0.1)


def test_a_module_that_cannot_import_something_else_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        envs.make("needs_more:Env")


def test_modules_of_the_current_folder_are_found(tmp_path, monkeypatch):
    (tmp_path / "my_env_here.py").write_text("from tests.envs.examples import Sound\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert envs.make("my_env_here:Sound").name == "sound"


def distribution(folder, name, entry):
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[palaestra.envs]\n{entry}\n")


def test_two_plugins_of_one_name_are_an_error_that_names_both(tmp_path, monkeypatch):
    distribution(tmp_path, "first-plugin", "twice = a:A")
    distribution(tmp_path, "second-plugin", "twice = b:B")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(envs.EnvConflict, match=r"(?s)(first.*second|second.*first)"):
        envs.make("tool_qa")


def test_a_plugin_cannot_take_a_built_in_name(tmp_path, monkeypatch):
    distribution(tmp_path, "usurper", "tool_qa = a:A")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(envs.EnvConflict, match=r"palaestra \(envs.tool_qa:ToolQA\) and usurper \(a:A\)"):
        envs.list_envs()


def test_a_plugin_is_listed_and_made(tmp_path, monkeypatch):
    distribution(tmp_path, "some-plugin", "sound = tests.envs.examples:Sound")
    monkeypatch.syspath_prepend(tmp_path)
    assert "sound" in envs.list_envs() and envs.make("sound").name == "sound"


def test_our_own_entry_point_agrees_with_the_table():
    for entry in importlib.metadata.entry_points(group=registry.GROUP):
        if entry.dist is not None and entry.dist.name == "palaestra":
            assert registry.BUILT_IN[entry.name] == entry.value


def test_a_foreign_package_of_our_name_is_named(tmp_path, monkeypatch):
    (tmp_path / "borrowed").mkdir()
    (tmp_path / "borrowed" / "__init__.py").write_text("")
    info = tmp_path / "lender-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lender\nVersion: 1.0\n")
    (info / "RECORD").write_text("borrowed/__init__.py,,\n")
    (info / "top_level.txt").write_text("borrowed\n")
    monkeypatch.syspath_prepend(tmp_path)
    siblings.verify()
    with pytest.raises(ImportError, match=r"package of lender at .*borrowed.*not Palaestra's"):
        siblings.verify(("borrowed",))
    with pytest.raises(ImportError, match="missing"):
        siblings.verify(("no_such_package_anywhere",))
