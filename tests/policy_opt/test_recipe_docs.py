"""The pages under docs/recipes are what the recipes say of themselves now; and how they are made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import policy_opt
from policy_opt import Optim, RecipeError
from policy_opt.__main__ import main, marked, optimizer_row, plain_table, row
from policy_opt.curriculum import Mixed
from policy_opt.docs import CURVES, pages, write
from policy_opt.docs.curve import curve, drawn
from policy_opt.docs.page import prose, table
from policy_opt.docs.source import blocks, class_doc, field_doc, spelled
from policy_opt.optimizers import METHODS
from policy_opt.optimizers.kappa import Huber
from policy_opt.recipe import STAGES
from policy_opt.registry import shipped
from policy_opt.surrogates import Clip
from policy_opt.terms import Term

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "recipes"
STALE = "run `python -m policy_opt docs`"


def test_pages_are_up_to_date():
    recipes = [policy_opt.get(slug) for slug in shipped()]
    expected = pages(recipes)
    assert {path.name for path in FOLDER.glob("*.md")} == expected.keys(), STALE
    stale = [name for name, text in expected.items() if (FOLDER / name).read_text(encoding="utf-8") != text]
    assert stale == [], STALE


def test_every_smoke_task_has_its_picture():
    drawn_ones = {path.stem for path in (FOLDER / CURVES).glob("*.svg")}
    assert drawn_ones == {slug for slug in shipped() if not policy_opt.get(slug).learns.startswith("none")}, STALE


def test_links_of_all_pages_lead_somewhere():
    for page in FOLDER.glob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (FOLDER / target).is_file(), f"{page.name} links {target}"


def test_a_page_says_everything():
    text = pages([policy_opt.get("reinforce_pp")])["reinforce_pp.md"]
    for words in (
        "[arXiv 2501.03262](https://arxiv.org/abs/2501.03262)",
        "```text\nr_t = R [t is the last policy token]",
        "python -m agents.train --algo reinforce_pp --set variant=baseline",
        "tests/vectors/reinforce_pp.json",
        "![share of right answers by iteration](curves/reinforce_pp.svg)",
        "| `advantage.reward_to_go.gamma` | `1.0` |",
        "| `logp_BT` | `LogProb()` | policy | same text | loss |",
        "1 * clip, token_mean",
    ):
        assert words in text
    assert "tests/vectors/otc.json" in pages([policy_opt.get("otc_ppo")])["otc_ppo.md"]
    quiet = policy_opt.get("grpo").replace(learns="none: it is a thought", reconstructed=True)
    page, index = pages([quiet])["grpo.md"], pages([quiet])["index.md"]
    assert "It has none: it is a thought." in page and "**reconstructed**" in page
    assert "reconstructed; no smoke task: it is a thought; KL coefficient 0" in index
    huber = pages([])["lion_k.md"]
    assert "`huber(e=0.01)`" in huber and "`kappa`" in huber and "`forget`" not in huber


@pytest.mark.parametrize("slug", shipped())
def test_parts_are_spelled_as_set_reads_them(slug):
    """Every part of every stage, and every surrogate, goes through --set and comes back equal."""
    recipe = policy_opt.get(slug)
    for stage in STAGES:
        parts = getattr(recipe, stage)
        if parts:
            assert getattr(recipe.set(f"{stage}={spelled(parts)}"), stage) == parts
    for term in recipe.terms:
        found = recipe.set(f"terms.{term.name}.loss={spelled(term.loss)}", f"terms.{term.name}.agg={spelled(term.agg)}")
        assert found.terms == recipe.terms


def test_spelling():
    assert spelled(Clip(0.2, 0.3)) == "clip(clip_high=0.3)" and spelled(Mixed()) == "mixed"
    assert spelled((Clip(),)) == "(clip,)" and spelled(Term(Clip())) == "term(loss=clip)"
    assert spelled(Optim("lion_k", kappa=Huber(0.5))) == "lion_k(kappa=huber(e=0.5))"


def test_docstrings_of_fields_and_classes():
    assert field_doc(Clip, "clip_high").startswith("Width above 1")
    assert field_doc(Clip, "nothing") == "" and field_doc(None, "lr") == ""

    @dataclass
    class Bare:
        x: int = 0

    assert class_doc(Bare) == "" and class_doc(Clip).startswith("PPO's clipped surrogate")


def test_blocks_of_a_docstring():
    text = "One.\n\n    a = b\n\n    c\nTwo\nthree."
    assert blocks(text) == [(False, "One."), (True, "a = b\n\nc"), (False, "Two\nthree.")]
    assert prose("K* of x_B <- `a*b_` _c") == r"K\* of x_B &lt;- `a*b_` \_c"
    assert table(("a",), [("x|y\nz",)]) == "| a |\n| --- |\n| x\\|y z |"


def test_a_curve():
    points = curve(policy_opt.get("grpo"), seeds=2, iterations=25)
    assert len(points) == 2 and all(len(seed) == 25 for seed in points)
    assert all(seed[0] < 0.4 and seed[-1] > 0.7 for seed in points)
    svg = drawn(points, "grpo")
    assert svg.startswith("<svg") and svg.count("<polyline") == 1 and "grpo" in svg
    assert drawn([[0.0, 1.0]], "x").count("polygon") == 1
    with pytest.raises(RecipeError, match="no curve to draw"):
        drawn([], "x")
    assert curve(policy_opt.get("grpo").replace(learns="none: x")) is None


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("policy_opt.docs.shipped", lambda: ("grpo", "rloo", "grop"))
    monkeypatch.setattr("policy_opt.docs.curve", lambda recipe: [[0.0, 1.0]] if recipe.slug == "grpo" else None)
    (tmp_path / "gone.md").write_text("a recipe that is no more")
    assert main(["docs", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "grop: left out" in said.err and "6 pages" in said.out
    assert {p.name for p in tmp_path.iterdir()} == {
        "grpo.md", "rloo.md", "lion.md", "lion_k.md", "stosignsgd.md", "index.md", CURVES,
    }  # fmt: skip
    picture = tmp_path / CURVES / "grpo.svg"
    picture.write_text("kept")
    write(tmp_path, curves=False)
    assert picture.read_text() == "kept"
    write(tmp_path, curves=True)
    assert picture.read_text().startswith("<svg")


# -- the table ------------------------------------------------------------------------------------------


def test_optimizers_have_rows_and_cards(capsys):
    for name in METHODS:
        assert main([name]) == 0
        out = capsys.readouterr().out
        assert "optimizer.weight_decay=0.0" in out and METHODS[name].card.cite in out
    assert "(reconstructed)" in out
    assert main(["lionk"]) == 2
    assert "did you mean `lion_k`" in capsys.readouterr().err
    assert {optimizer_row(name)["kind"] for name in METHODS} == {"optimizer"}


def test_the_plain_table_fits_a_terminal():
    lines = [*(row(policy_opt.get(slug)) for slug in shipped()), *(optimizer_row(name) for name in METHODS)]
    whole, narrow = plain_table(lines), plain_table(lines, 110)
    assert max(map(len, narrow.splitlines())) <= 110 and "…" in narrow
    for line in lines:
        assert line["slug"] in narrow and line["cite"] in narrow and marked(line) in whole
