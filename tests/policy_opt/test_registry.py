"""Where recipes come from, what is printed of them, and that importing the package costs little."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import policy_opt
from policy_opt import RecipeError
from policy_opt.__main__ import main
from policy_opt.optimizers import METHODS
from policy_opt.registry import plugins, shipped

ROOT = Path(__file__).resolve().parent.parent.parent


def install(folder: Path, name: str, points: str, code: str = "") -> None:
    """A distribution on the path: its metadata, and a module beside it."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    if code:
        (folder / f"{name}.py").write_text(code)


PLUGIN = """
from policy_opt.recipes.grpo import recipe as GRPO
from policy_opt import Part

class Halve(Part):
    stage = "reward"
    overwrites = frozenset({"reward_B"})
    def __call__(self, b, ctx):
        return b.over(reward_B=b["reward_B"] / 2)

recipe = GRPO.replace(slug="half_grpo", reward=(Halve(),))
number = 3
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    install(tmp_path, "half_plugin", "[palaestra.recipes]\nhalf_grpo = half_plugin:recipe\n", PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("half_plugin", None)


def test_a_file_is_a_recipe():
    files = {p.stem for p in (ROOT / "policy_opt" / "recipes").glob("[!_]*.py")}
    assert set(shipped()) == files == {policy_opt.get(slug).slug for slug in files}


def test_an_installed_plugin_joins(plugin):
    assert "half_grpo" in policy_opt.slugs()
    recipe = policy_opt.get("half_grpo")
    recipe.check()
    assert policy_opt.get("half_plugin:recipe") is recipe
    assert policy_opt.get("grpo").set("reward+=half_grpo.halve()").reward[0].stage == "reward"
    with pytest.raises(RecipeError, match="did you mean `half_grpo`"):
        policy_opt.get("haf_grpo")
    with pytest.raises(RecipeError, match=r"is a int, not a policy_opt\.Recipe"):
        policy_opt.get("half_plugin:number")


def test_clashing_plugins_are_named(plugin):
    install(plugin, "other_plugin", "[palaestra.recipes]\nhalf_grpo = other:recipe\n")
    with pytest.raises(
        RecipeError,
        match=r"call a recipe `half_grpo`: (half_plugin|other):recipe and (half_plugin|other):recipe",
    ):
        plugins()


def test_a_plugin_may_not_hide_a_shipped_recipe(plugin):
    install(plugin, "other_plugin", "[palaestra.recipes]\ngrpo = other:recipe\n")
    with pytest.raises(RecipeError, match="plugin other:recipe calls its recipe `grpo`"):
        policy_opt.slugs()


@pytest.mark.parametrize(
    ("name", "said"),
    [("grop", "did you mean `grpo`"), ("no_module:recipe", "cannot load"), ("json:nothing", "cannot load")],
)
def test_unknown_recipes(name, said):
    with pytest.raises(RecipeError, match=said):
        policy_opt.get(name)


def test_the_table(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line.startswith("  ")} == {*shipped(), *METHODS}
    assert main(["--markdown"]) == 0
    assert "| [`grpo`](docs/recipes/grpo.md) |" in capsys.readouterr().out
    assert main(["--json"]) == 0
    rows = {row["slug"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {*shipped(), *METHODS}
    assert rows["ppo"]["models"] == ["critic"] and rows["grpo"]["terms"] == {"policy": "clip"}


def test_one_recipe_with_its_options(capsys):
    assert main(["rloo"]) == 0
    out = capsys.readouterr().out
    assert "terms.clip.loss.sequence_clip.clip_high=0.2" in out and "variants: clip" in out
    assert main(["roo"]) == 2
    assert "did you mean `rloo`" in capsys.readouterr().err


def test_import_is_light():
    """No recipe, no loop, nothing but torch: everything else comes on first use."""
    code = (
        "import sys, policy_opt\n"
        "mine = sorted(m for m in sys.modules if m.startswith('policy_opt'))\n"
        "assert mine == ['policy_opt'], mine\n"
        "policy_opt.Batch, policy_opt.slugs\n"
        "assert 'policy_opt.recipes.grpo' not in sys.modules\n"
        "assert 'Loop' in dir(policy_opt)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
    with pytest.raises(AttributeError, match="nothing"):
        _ = policy_opt.nothing
    assert all(getattr(policy_opt, name) for name in policy_opt.__all__)
