"""Comparisons: a real one, stopped and gone on with; its statistics; what is refused; what the page shows."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from agents.cli import UsageError
from agents.compare import cells, command, page, picture
from agents.compare.queue import CellFailed, run_all
from agents.compare.statistics import band, draws, iqm, iqm_interval, running_mean
from agents.runfolder import read_json, read_jsonl
from policy_opt import RecipeError
from tests.agents import chromium

STEPS = 14
SMALL = (
    "env_args=profile=tiny", f"steps={STEPS}", "groups=2", "group_size=2", "train_tasks=8", "warm.when=never",
    "rollout.max_new_tokens=6", "eval.episodes=4", "save.every=100", "save.trajectories=0", "optim.lr=0.001",
)  # fmt: skip


def arguments(out: Path, *more: str) -> list[str]:
    train = [part for item in SMALL for part in ("--train", item)]
    what = ["--env", "tool_qa", "--algos", "grpo,rloo", "--seeds", "1", "--episodes", "6", "--out", str(out)]
    return [*what, *train, *more]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of two recipes, one seed each: stopped in the middle of the training, then gone on with."""
    out = tmp_path_factory.mktemp("compare") / "out"
    run = [sys.executable, "-m", "agents.compare", *arguments(out, "--jobs", "2")]
    first = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not any(read_jsonl(out / name / "metrics.jsonl") for name in ("grpo-s0", "rloo-s0")):
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()[0]
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    stopped = first.communicate(timeout=60)[0]
    reached = {name: len(read_jsonl(out / name / "metrics.jsonl")) for name in ("grpo-s0", "rloo-s0")}
    again = subprocess.run([*run, "--json"], capture_output=True, text=True, timeout=240)
    return out, (first.returncode, stopped), reached, again


def test_a_signal_stops_it_and_the_same_command_goes_on(compared):
    out, (code, stopped), reached, again = compared
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in stopped and "Go on with" in stopped
    assert 0 < max(reached.values()) < STEPS
    assert again.returncode == 0, again.stdout + again.stderr
    for name in reached:
        steps = [m["step"] for m in read_jsonl(out / name / "metrics.jsonl")]
        assert steps == list(range(1, STEPS + 1)), "gone on with, not started anew or counted twice"
    first = max(reached, key=lambda name: reached[name])
    assert "SIGTERM" in (out / f"{first}.log").read_text()


def test_what_it_writes(compared):
    out, _, _, again = compared
    printed = json.loads(again.stdout.splitlines()[-1])
    written = read_json(out / "comparison.json")
    assert written == {**printed, "command": written["command"]}
    assert written["command"].startswith("python -m agents.compare --env tool_qa")
    assert [row["algo"] for row in printed["rows"]] == ["grpo", "rloo"] and printed["baseline"] == "grpo"
    assert printed["tasks"] == 6 and printed["steps"] == STEPS and printed["seeds"] == 1
    for row in printed["rows"]:
        mean, low, high = row["success"]
        assert 0 <= low <= mean <= high <= 1 and row["by_seed"] == [mean]
        assert row["spent"]["episodes"] == STEPS * 4, "the same budget"
        curve = row["curves"]["correct"]
        assert curve["x"][-1] == STEPS * 4 and len(curve["x"]) == len(curve["mean"]) == STEPS
    assert printed["rows"][1]["difference"][0] == printed["rows"][1]["success"][0] - printed["rows"][0]["success"][0]
    assert printed["rows"][0]["iqm"][1:] == [None, None], "one seed says nothing about other seeds"
    assert "rloo" in again.stderr and "done" in again.stderr, "progress goes beside the JSON"
    html = (out / "comparison.html").read_text()
    assert "rloo" in html and "<script" not in html and "grpo-s0/report.html" in html
    with Image.open(out / "comparison.png") as image:
        assert image.format == "PNG" and image.size[0] > 2 * picture.WIDTH


def test_the_runs_differ_in_nothing_but_recipe_and_seed(compared):
    out = compared[0]
    one, other = (read_json(out / name / "config.json") for name in ("grpo-s0", "rloo-s0"))
    assert {key for key in one if one[key] != other[key]} == {"algo"}
    keys = {read_json(out / f"{name}.json")["tasks_key"] for name in ("grpo-s0", "rloo-s0")}
    assert len(keys) == 1


def test_what_is_done_is_not_run_again(compared, capsys, monkeypatch):
    out = compared[0]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.parent != out}
    monkeypatch.setattr("subprocess.Popen", None)
    assert command.main(arguments(out)) == 0
    assert "2 of 2 runs are done already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.parent != out} == before


def test_more_seeds_or_tasks_run_only_what_is_new(compared):
    out = compared[0]

    def left(seeds, episodes, *algos):
        planned = cells.plan("tool_qa", algos, seeds, episodes, SMALL, out)
        return [(cell.name, cell.command()[0]) for cell in planned if not cell.done]

    assert left(1, 6, "grpo", "rloo") == []
    assert left(2, 6, "grpo", "rloo") == [("grpo-s1", "training"), ("rloo-s1", "training")]
    assert left(1, 6, "grpo", "dapo") == [("dapo-s0", "training")]
    assert left(1, 8, "grpo", "rloo") == [("grpo-s0", "evaluating"), ("rloo-s0", "evaluating")]


def test_another_training_in_the_folder_is_refused(compared):
    out = compared[0]
    with pytest.raises(UsageError, match=r"grpo-s0 was trained with steps = 14, not 15: name another folder"):
        cells.plan("tool_qa", ["grpo", "rloo"], 1, 6, [x.replace("steps=14", "steps=15") for x in SMALL], out)
    lock = command.RunFolder(out)
    with pytest.raises(UsageError, match="in use by another process"):
        command.main(arguments(out))
    lock.close()


@pytest.mark.parametrize(("code", "kind"), [(2, UsageError), (1, CellFailed)])
def test_a_failing_run_is_told_with_the_end_of_its_log_and_the_others_are_stopped(tmp_path, monkeypatch, code, kind):
    def fails(cell):
        program = f"import sys; print('no room', file=sys.stderr); sys.exit({code})"
        waits = "import time; time.sleep(100)"
        (tmp_path / f"cell_{cell.algo}.py").write_text(program if cell.algo == "a" else waits)
        return "training", [f"cell_{cell.algo}"]

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(cells.Cell, "command", fails)
    both = [cells.Cell(algo, 0, tmp_path, cells.TrainConfig(), (), 5) for algo in "ba"]
    said = io.StringIO()
    began = time.monotonic()
    with pytest.raises(kind, match=rf"(?s)a-s0: training ended with exit code {code}; .*a-s0.log ends with:\nno room"):
        run_all(both, 2, Console(file=said))
    assert time.monotonic() - began < 60 and "b-s0: training" in said.getvalue()


# -- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--algos", "grpo,gprpo"], "did you mean"),
        (["--algos", "grpo"], "two recipes or more"),
        (["--algos", "grpo,grpo"], "each once"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--episodes", "-3"], "--episodes must be at least 1"),
        (["--jobs", "-1"], "--jobs must be at least 0"),
        (["--env", "tool_qq"], "did you mean"),
        (["--train", "steps"], "takes NAME=VALUE"),
        (["--train", "algo=ppo"], "sets `algo` itself"),
        (["--train", "run=x"], "sets `run` itself"),
        (["--train", "set=advantage=group_nrm()"], "did you mean `group_norm`"),
        (["--train", "set=advantage=gae()"], "which nothing before it writes"),
        (["--train", "env_args=profile=tyni"], "unknown profile 'tyni' (known: default, tiny)"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, given, said):
    with pytest.raises((UsageError, RecipeError)) as error:
        command.main(["--out", str(tmp_path / "out"), *given])
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--seed", "3"], "--seeds"),
        (["--train", "stepz=3"], "--steps"),
        (["--train", "steps=many"], "steps"),
    ],
)
def test_unknown_options_exit_with_2(tmp_path, capsys, given, said):
    with pytest.raises(SystemExit) as stop:
        command.main(["--out", str(tmp_path / "out"), *given])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


def test_it_is_a_command_of_palaestra():
    done = subprocess.run(
        [sys.executable, "-m", "palaestra.cli", "compare", "--algos", "grpo,gprpo"], capture_output=True, text=True,
        env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown recipe `gprpo`") and "did you mean" in done.stderr


# -- statistics -----------------------------------------------------------------------------------------

scores = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@given(scores)
def test_iqm_is_the_mean_of_the_middle_half(values):
    cut = len(values) // 4
    middle = sorted(values)[cut : len(values) - cut]
    assert iqm(values) == pytest.approx(math.fsum(middle) / len(middle), abs=1e-12)
    assert min(values) <= iqm(values) + 1e-12 and iqm(values) <= max(values) + 1e-12


@given(scores, st.randoms(use_true_random=False), st.floats(-5, 5), st.floats(0.01, 5))
def test_iqm_moves_with_the_scores_and_not_with_their_order(values, order, shift, scale):
    shuffled = list(values)
    order.shuffle(shuffled)
    assert iqm(shuffled) == iqm(values)
    assert iqm([scale * v + shift for v in values]) == pytest.approx(scale * iqm(values) + shift, abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=8, max_size=40), st.floats(1, 1e9))
def test_iqm_does_not_see_outliers(values, far):
    """A quarter at either end may be anything."""
    inside = sorted(values)
    inside[0], inside[-1] = -far, far
    assert iqm(inside) == pytest.approx(iqm(values), abs=1e-12)


def test_iqm_interval():
    score_SK = np.array([[0.9, 0.5], [0.8, 0.6], [0.7, 0.4]])
    found = iqm_interval(score_SK)
    assert found.mean == iqm(score_SK) and found.low <= found.mean <= found.high and found.high - found.low > 0.02
    assert found == iqm_interval(score_SK)
    one = iqm_interval(score_SK[:1])
    assert one.mean == 0.7 and math.isnan(one.low) and math.isnan(one.high)
    with pytest.raises(ValueError, match="at least one score"):
        iqm([])


def outcomes(seed: int, recipes: int, seeds: int, tasks: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    skill_AST = rng.uniform(0.1, 0.9, (recipes, seeds, 1)) + rng.normal(0, 0.1, tasks)
    return (rng.random((recipes, seeds, tasks)) < skill_AST).astype(float)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 60))
def test_differences_mirror_and_vanish_for_equals(seed, seeds, tasks):
    value_AST = outcomes(seed, 2, seeds, tasks)
    found = draws(np.concatenate([value_AST, value_AST[:1]]))
    there, back = found.difference(0, 1), found.difference(1, 0)
    assert there.mean == pytest.approx(value_AST[0].mean() - value_AST[1].mean(), abs=1e-12)
    assert back.mean == pytest.approx(-there.mean)
    width = there.high - there.low
    assert back.high - back.low == pytest.approx(width, abs=0.05 * width + 1e-12)
    assert found.difference(0, 2) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12), "paired: the same draws for both"
    assert there.low <= there.mean <= there.high


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_estimates_do_not_depend_on_the_order_of_seeds_and_tasks(seed, order):
    value_AST = outcomes(seed, 3, 4, 50)
    rows, columns = list(range(4)), list(range(50))
    order.shuffle(rows), order.shuffle(columns)
    one, other = draws(value_AST), draws(value_AST[:, rows][:, :, columns])
    for a in range(3):
        assert other.mean(a).mean == pytest.approx(one.mean(a).mean, abs=1e-12)
        width = one.mean(a).high - one.mean(a).low
        assert other.mean(a).high - other.mean(a).low == pytest.approx(width, rel=0.12), "up to the resampling"


def test_intervals_cover_at_their_level_with_few_seeds():
    """Seeds of a recipe differ (spread 0.05 around its skill), tasks differ: the interval holds the skill itself."""
    rng, trials = np.random.default_rng(7), 100
    for seeds in (2, 3, 6):
        hits = np.zeros(2)
        for trial in range(trials):
            task_T = rng.normal(0, 0.15, 150)
            run_AS = rng.normal(0, 0.05, (2, seeds))
            skill_AST = np.clip(np.array([0.6, 0.5])[:, None, None] + run_AS[..., None] + task_T, 0, 1)
            found = draws((rng.random(skill_AST.shape) < skill_AST).astype(float), seed=trial)
            mean, difference = found.mean(0), found.difference(0, 1)
            hits += [mean.low <= 0.6 <= mean.high, difference.low <= 0.1 <= difference.high]
        assert (hits / trials >= 0.91).all(), (seeds, hits / trials)


def test_more_of_either_narrows_the_interval():
    few, seeds, tasks = (draws(outcomes(3, 1, s, t)).mean(0) for s, t in ((3, 100), (20, 100), (3, 1000)))
    assert seeds.high - seeds.low < few.high - few.low and tasks.high - tasks.low < 1.2 * (few.high - few.low)


def test_ratios():
    value_AST = np.array([[[2.0, 4.0, 6.0] * 20], [[1.0, 2.0, 3.0] * 20], [[0.0] * 60]])
    found = draws(value_AST)
    assert found.ratio(1, 0) == pytest.approx((0.5, 0.5, 0.5))
    assert found.ratio(2, 0) == pytest.approx((0, 0, 0)) and found.ratio(0, 2) is None


@pytest.mark.parametrize("bad", [np.zeros((2, 0, 3)), np.zeros((2, 3)), np.full((1, 1, 2), np.nan)])
def test_impossible_draws_are_refused(bad):
    with pytest.raises(ValueError, match="draws need"):
        draws(bad)


curve = st.lists(st.floats(0, 1), min_size=1, max_size=50)


@given(st.lists(curve, min_size=1, max_size=4), st.integers(1, 200))
def test_a_band_holds_its_mean_and_ends_where_the_shortest_run_ends(runs, batch):
    found = band([([batch * (i + 1) for i in range(len(y))], y) for y in runs])
    assert found is not None
    for mean, low, high in zip(found.mean, found.low, found.high, strict=True):
        assert low - 1e-12 <= mean <= high + 1e-12
    assert found.x[0] == batch and found.x[-1] == batch * min(map(len, runs))
    assert list(found.x) == sorted(found.x) and len(found.x) <= 120
    if len(runs) == 1:
        assert found.low == found.mean == found.high


def test_a_band_of_nothing_is_none():
    assert band([]) is None and band([([], [])]) is None


@given(st.floats(-10, 10), st.integers(1, 40))
def test_a_running_mean_starts_without_bias(value, n):
    assert running_mean([value] * n) == pytest.approx([value] * n)


@given(st.floats(-100, 100), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_few_and_inside(low, span, count):
    found = picture.ticks(low, low + span, count)
    assert len(found) <= count + 1
    assert all(low - 1e-6 * span <= t <= low + span * (1 + 1e-6) for t in found)


# -- the page -------------------------------------------------------------------------------------------


def summary(recipes: int = 3, seeds: int = 3, name: str = "recipe"):
    """A comparison made up: learning curves that rise, calls that fall."""
    from dataclasses import asdict

    rng, rows = np.random.default_rng(1), []
    correct_AST = np.stack([rng.random((seeds, 300)) < 0.7 + 0.05 * a for a in range(recipes)]).astype(float)
    found = draws(correct_AST)
    names = [f"{name}{a}" for a in range(recipes)]
    for a, algo in enumerate(names):
        x_T = 128.0 * np.arange(1, 31)
        curves = [(x_T, 0.8 - 0.3 * np.exp(-x_T / 1200) + 0.02 * rng.normal(size=30)) for _ in range(seeds)]
        family_SK = correct_AST[a].reshape(seeds, 3, 100).mean(2)
        row = {
            "algo": algo, "success": list(found.mean(a)), "iqm": list(iqm_interval(family_SK)),
            "by_seed": correct_AST[a].mean(1).tolist(), "by_level": [0.9, 0.7, 0.5], "tool_calls": [2.0, 1.9, 2.1],
            "productivity": 0.4, "spent": {"episodes": 3840.0, "tokens": 2.5e6, "seconds": 90.0}, "marked": a == 1,
            "curves": {"correct": asdict(band(curves)), "reward": asdict(band(curves))},
        }  # fmt: skip
        if a:
            row |= {"difference": list(found.difference(a, 0)), "calls_ratio": [0.8, 0.7, math.inf] if a == 1 else None}
        rows.append(row)
    pairs = [[list(found.difference(a, b)) for b in range(recipes)] for a in range(recipes)]
    runs = [{"name": f"{n}-s0", "algo": n, "seed": 0, "success": [0.5, 0.4, 0.6], "report": None} for n in names]
    return {
        "env": "tool_qa", "algos": names, "baseline": names[0], "seeds": seeds, "tasks": 300, "steps": 30, "note": "",
        "levels": [1, 2, 3], "warm_start": {"success": 0.5, "tool_calls": 2.5}, "rows": rows, "pairs": pairs,
        "options": ["--env", "tool_qa"], "runs": runs,
    }  # fmt: skip


def test_names_from_outside_never_become_markup():
    text = page.render(summary(2, name="<b onload='x'>"), "python -m agents.compare '<i>'")
    assert "<b onload" not in text and "<i>" not in text and "&lt;b onload" in text


@pytest.mark.parametrize(("recipes", "seeds"), [(2, 1), (3, 3), (11, 2)])
def test_the_picture_has_every_recipe(recipes, seeds):
    made = summary(recipes, seeds)
    text = picture.svg(made)
    assert all(f">recipe{a}<" in text for a in range(recipes)) and text.count("<svg") == 1
    with Image.open(io.BytesIO(picture.png(made))) as image:
        shares = sorted(n for n, _ in image.convert("RGB").getcolors(1 << 24))
    assert shares[-1] < 0.9 * image.size[0] * image.size[1], "something is drawn"


def test_a_comparison_without_warm_start_or_curves_is_shown():
    made = summary(2)
    made = {**made, "warm_start": None, "rows": [{**row, "curves": {}} for row in made["rows"]]}
    assert "before training" not in page.render(made, "x") and picture.png(made)


@pytest.mark.full
def test_a_browser_shows_the_page_and_asks_the_network_for_nothing(tmp_path):
    if chromium.find() is None:
        pytest.skip("no Chromium on this machine")
    file = tmp_path / "comparison.html"
    file.write_text(page.render(summary(4), "x"), encoding="utf-8")
    with chromium.Chromium(tmp_path / "profile") as browser:
        for scheme in ("light", "dark"):
            browser.emulate(scheme)
            browser.open(file, "document.readyState === 'complete'")
            ground = browser.value("getComputedStyle(document.body).backgroundColor")
            line = browser.value("getComputedStyle(document.querySelector('.picture polyline[stroke*=s1]')).stroke")
            assert (ground, line) == {
                "light": ("rgb(246, 245, 241)", "rgb(194, 87, 31)"), "dark": ("rgb(20, 23, 26)", "rgb(240, 140, 85)"),
            }[scheme]  # fmt: skip
        assert browser.value("document.documentElement.scrollWidth <= innerWidth")
        assert browser.value("document.querySelectorAll('.results tbody tr').length") == 4
        assert browser.value("document.querySelectorAll('.matrix').length") == 2
        assert browser.value("document.querySelectorAll('.problem').length") == 1, "the marked recipe"
        assert browser.errors == [] and all(r.startswith("file:") for r in browser.requests)


def test_a_recipe_of_ones_own_gets_a_folder_of_its_own(tmp_path):
    cell = cells.Cell("my.module:recipe", 2, tmp_path, replace(cells.TrainConfig()), (), 5)
    assert cell.name == "my.module.recipe-s2" and cell.run.parent == tmp_path
