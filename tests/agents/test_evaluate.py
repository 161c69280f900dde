"""Evaluation with a real environment and scripted policies: numbers that can be counted by hand."""

from __future__ import annotations

import itertools
import json

import pytest

from agents import stats
from agents.engines.base import Said
from agents.engines.scripted import Scripted
from agents.evaluate import EvalResult, TextPlayer, evaluate, summarise
from agents.recording import store
from agents.rollout import Limits
from agents.runfolder import plain
from agents.store import TrajectoryReader
from agents.view import write_report
from tests.agents.parity import Parity
from tests.envs.spot import Spot

ENV = "tests.agents.parity:Parity"


class Mixed:
    """Plays one script on the first sample of a task and another one on the rest."""

    def __init__(self, *scripts: str):
        self.scripts = [Scripted(s) for s in scripts]

    def begin(self, env, seed):
        return self.scripts[min(seed[-1], len(self.scripts) - 1)].begin(env, seed)


def run(speaker, episodes=20, **options) -> EvalResult:
    level = options.pop("env_level", None)
    player = TextPlayer(lambda: Parity(level=level, split="eval"), speaker, Limits())
    return evaluate(player, ENV, episodes=episodes, name="test", **options)


def test_the_oracle_is_always_right_and_counts_its_calls():
    result = run(Scripted("oracle"), label="before", step=0)
    assert result.success == stats.wilson(20, 20)
    assert result.tool_calls.mean == 0.5 and result.productivity == 2.0
    assert [(r.level, r.episodes, r.tool_calls, r.minimal_calls) for r in result.levels] == [
        (1, 10, 0, 0),
        (2, 10, 1, 1),
    ]
    assert result.levels[0].productivity is None and result.levels[1].productivity == 1.0
    assert result.stop_reasons == {"answered": 20}
    assert result.failures == {} and not result.marked
    assert (result.label, result.step, result.env, result.player) == ("before", 0, ENV, "test")


def test_pass_at_k_counts_a_task_as_solved_by_any_sample():
    result = run(Mixed("silent", "oracle"), episodes=40, k=(1, 2))
    assert result.samples == 2 and len(result.correct) == 20
    assert result.success.mean == 0.5 and result.pass_at[2].mean == 1.0
    assert result.pass_at[1].mean == 0.5
    assert set(result.correct) == {(0, 1)}


def test_tool_errors_are_counted_by_kind():
    result = run(Scripted("clumsy"))
    assert result.tool_errors == {"invalid_json": 20, "unknown_tool": 20}
    assert not result.marked, "what the model writes badly is no failure of the verifier"


def test_a_verifier_that_raises_marks_the_evaluation():
    result = run(Mixed("breaks_the_verifier"), env_level=1)
    assert result.success.mean == 0.0 and result.failure_share == 1.0 and result.marked
    assert list(result.failures.values()) == [20] and "RuntimeError" in next(iter(result.failures))


class Failing:
    """A server that is not there for every tenth task."""

    def begin(self, env, seed):
        oracle = Scripted("oracle").begin(env, seed)
        return lambda *turn: Said("", "error:timeout") if seed[1] % 10 == 0 else oracle(*turn)


def test_a_failing_engine_is_counted_and_marks_the_evaluation():
    result = run(Failing())
    assert result.failures == {"error:timeout": 2} and result.marked
    assert result.success.mean == 0.9 and result.stop_reasons["error:timeout"] == 2


def test_one_failure_in_a_hundred_does_not_mark():
    player = TextPlayer(lambda: Parity(), Scripted("oracle"), Limits())
    kept = []
    evaluate(player, ENV, episodes=100, split="train", keep=kept.extend)
    kept[0].stop_reason = "error:timeout"
    from agents.evaluate import Subject

    assert not summarise(kept, 1, (1,), Subject(ENV, "x")).marked
    kept[1].stop_reason = "error:timeout"
    assert summarise(kept, 1, (1,), Subject(ENV, "x")).marked


def test_fewer_tasks_than_asked_for_is_said():
    result = run(Scripted("oracle"), episodes=50)
    assert result.episodes == 20 and "20 tasks" in result.note
    assert run(Scripted("oracle"), episodes=20).note == ""


def test_evaluations_are_paired_over_the_same_tasks_only():
    oracle, random = run(Scripted("oracle")), run(Scripted("random"))
    gain = oracle.paired(random)
    assert gain.mean == pytest.approx(1 - random.success.mean) and gain.low > 0
    assert random.paired(oracle).mean == -gain.mean
    with pytest.raises(ValueError, match="cannot be paired"):
        oracle.paired(run(Scripted("oracle"), level=1))
    with pytest.raises(ValueError, match="above 0"):
        oracle.paired_calls(random)
    assert random.paired_calls(oracle).mean == 0.0


def test_the_same_seed_gives_the_same_evaluation():
    one, two, other = (run(Scripted("random"), seed=s) for s in (3, 3, 4))
    assert one.correct == two.correct != other.correct
    assert one.tasks_key == two.tasks_key == other.tasks_key


def test_levels_restrict_the_tasks():
    result = run(Scripted("oracle"), level=2)
    assert [r.level for r in result.levels] == [2] and result.level == 2


def test_the_record_is_plain_json_and_complete():
    result = run(Mixed("oracle", "random"), episodes=40, k=(1, 2), label="after")
    record = json.loads(json.dumps(plain(result.as_dict()), allow_nan=False))
    assert record["success"] == list(result.success)
    assert record["pass_at"]["2"] == list(result.pass_at[2])
    assert record["levels"][1]["level"] == 2 and len(record["levels"][1]["success"]) == 3
    assert list(itertools.chain(*record["correct"])) == list(itertools.chain(*result.correct))


def test_episodes_with_images_are_evaluated_stored_and_reported(tmp_path):
    kept = []
    player = TextPlayer(lambda: Spot(split="eval"), Scripted("oracle"), Limits())
    result = evaluate(player, "tests.envs.spot:Spot", episodes=6, keep=kept.extend)
    json.dumps(plain(result.as_dict()), allow_nan=False)
    assert result.success == stats.wilson(6, 6) and result.tool_calls.mean == 1.0
    store(tmp_path / "trajectories", kept, label="eval")
    back = list(TrajectoryReader(tmp_path / "trajectories"))
    assert [t.messages for t in back] == [t.messages for t in kept]
    page = write_report(tmp_path).read_text()
    distinct = {p["image"].tobytes() for t in kept for m in t.messages if m["role"] != "assistant" for p in m["content"]
                if p["type"] == "image"}  # fmt: skip
    assert page.count(' data-kind="image/png">') == len(distinct) == 12


@pytest.mark.parametrize("options", [{"episodes": 0}, {"k": ()}, {"k": (0, 2)}])
def test_impossible_requests_are_refused(options):
    with pytest.raises(ValueError, match="at least"):
        run(Scripted("oracle"), **options)
