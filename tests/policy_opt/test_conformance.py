"""Golden numbers: met by the shipped parts, and by the loop's own step; missed by anything perturbed."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

import policy_opt
from policy_opt import conformance
from policy_opt.part import Part
from policy_opt.recipe import STAGES
from policy_opt.vectors import Trace, configure
from tests.policy_opt import fixed

FOLDER = Path(__file__).resolve().parent.parent / "vectors"
FILES = sorted(FOLDER.glob("*.json"))
CONTENT = {path.stem: json.loads(path.read_text()) for path in FILES}
OURS = sorted(name for name in CONTENT if conformance.recipes_of(name))
WITH_LOSS = sorted(n for n in OURS if "grad_logp_new" in CONTENT[n]["cases"][0]["outputs"])


@pytest.mark.parametrize("method", OURS)
def test_golden_numbers(method):
    result = conformance.compare(CONTENT[method])
    assert result.misses == []
    wanted = {name for case in CONTENT[method]["cases"] for name in case["outputs"]}
    assert result.errors.keys() == wanted


def test_every_recipe_has_golden_numbers():
    covered = {recipe.slug for name in OURS for recipe in conformance.recipes_of(name)}
    assert covered == set(policy_opt.registry.shipped())


def parts_called(method: str) -> list[type[Part]]:
    """Classes of the parts that a method's cases run: stages, accept rule, surrogates, aggregations."""
    found: dict[type[Part], None] = {}
    for recipe in conformance.recipes_of(method):
        for case in CONTENT[method]["cases"]:
            recipe_now = configure(recipe, case.get("params", {}))
            trace = Trace(recipe_now, case["inputs"])
            recipe_now = trace.recipe
            found.update(dict.fromkeys(type(part) for part, _ in trace.after_part))
            if recipe_now.curriculum.accept:
                found[type(recipe_now.curriculum.accept)] = None
            if trace.streams:
                on = [term for term in recipe_now.terms if term.on]
                found.update(dict.fromkeys(type(term.loss) for term in on))
                # A loss that is one number is not aggregated.
                found.update(dict.fromkeys(type(term.agg) for term in on if term.loss.gives))
    return list(found)


PAIRS = [(method, kind) for method in OURS for kind in parts_called(method)]


def perturbed(kind: type[Part]):
    """The class's call with every number that it gives moved by 1e-3."""
    if kind.stage == "agg":
        inner = kind.tokens, kind.rows
        return {
            "tokens": lambda self, n, d: inner[0](self, n, d) * 1.001,
            "rows": lambda self, n, d: inner[1](self, n, d) * 1.001,
        }
    call = kind.__call__
    if kind.stage == "surrogate":
        return {"__call__": lambda self, s, b: call(self, s, b) * 1.001}
    if kind.stage == "accept":
        return {"__call__": lambda self, b, ctx: ~call(self, b, ctx)}

    def moved(self, b, ctx):
        after = call(self, b, ctx)
        names = [n for n in after.cols if n not in b.cols or after.cols[n] is not b.cols[n]] or ["reward_B"]
        # Ids are not moved where there are numbers.
        names = [n for n in names if after[n].dtype != torch.long] or names
        return after.over(**{n: shifted(after[n]) for n in names})

    return {"__call__": moved}


def shifted(value: torch.Tensor) -> torch.Tensor:
    """Moved by 1e-3 or 2e-3 in turn along the first axis: a method may be free of a common shift of rewards."""
    step = 1e-3 * (1 + torch.arange(value.shape[0], dtype=torch.float64) % 2)
    return value + step.reshape(-1, *[1] * (value.ndim - 1))


@pytest.mark.parametrize(("method", "kind"), PAIRS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_perturbed_part_is_noticed(method, kind, monkeypatch):
    if method == "otc" and kind.__module__ == "policy_opt.rewards":
        pytest.skip("the file holds no token rewards; ppo.json does")
    for name, function in perturbed(kind).items():
        monkeypatch.setattr(kind, name, function)
    assert conformance.compare(CONTENT[method]).misses


@pytest.mark.parametrize("method", WITH_LOSS)
def test_the_loop_pulls_the_golden_cotangents(method):
    """What training pushes through the model is d loss / d logp of the file, also split into single rows."""
    (recipe,) = conformance.recipes_of(method)
    for case in CONTENT[method]["cases"]:
        if "grad_logp_new" not in case["outputs"]:
            continue
        trace = Trace(configure(recipe, case["params"]), case["inputs"])
        # What the file gives in place of a stage's result is not computed again.
        now = trace.recipe.replace(**{stage: () for stage in STAGES if stage not in recipe.vectors.stages})
        if "token_advantages" in trace.inputs:
            now = now.replace(advantage=(Given(),))
        b = as_played(trace, {need.name for need in now.needs})
        now = now.replace(
            curriculum=policy_opt.curriculum.Curriculum(accept=now.curriculum.accept, max_rounds=1)
        )
        kept = now.curriculum.screen(b, policy_opt.Ctx())
        given = {k: torch.tensor(v, dtype=torch.float64) for k, v in trace.inputs.items() if nested(v)}
        given |= {k: v for k, v in trace.start().cols.items() if "_BT" in k}
        given = {k: v[kept] for k, v in given.items() if v.shape[0] == b.B}
        for micro_rows in (1, 100):
            # Running the case has moved its state.
            trace.ctx.states.clear()
            if recipe.vectors.prime:
                recipe.vectors.prime(trace)
            states = {"": copy.deepcopy(trace.ctx.states)} if recipe.vectors.prime else {}
            learner = fixed.run(fixed.whole(now), b, given, states, micro_rows=micro_rows)[2]
            expected = torch.tensor(case["outputs"]["grad_logp_new"], dtype=torch.float64)
            if expected.shape[0] != b.B:
                # The file's rows are no trajectories; its numbers are those of the trace, as test_golden_numbers says.
                expected = trace.gradient(trace.total)
            expected = expected[kept]
            # At the first step a loss over several rows takes logp_old for the live log-probs, so its last one counts;
            # elsewhere the first does, since a step may move the case's state or a coefficient.
            first = opening(b.mask_BT) - opening(torch.tensor(trace.given["mask"]))
            across = not states and any(term.loss.scope == "batch" for term in now.terms if term.on)
            found = learner.cotangents[-1 if across else 0]["logp_BT"]
            found = found[:, first : first + expected.shape[1]]
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def opening(mask_BT: torch.Tensor) -> int:
    """Columns before the first in which any row has a policy token."""
    return int((mask_BT.sum(0).cumsum(0) == 0).sum())


def nested(value) -> bool:
    return isinstance(value, list) and isinstance(value[0], list)


def as_played(trace: Trace, scored: set[str]) -> policy_opt.Batch:
    """The case's start with the columns that every actor delivers, without those that the learner scores."""
    b = trace.start()
    given = {k: v for k, v in b.cols.items() if k not in scored}
    if "adv_BT" in given:
        given["given_BT"] = given.pop("adv_BT")
    units = {k: v for k, v in b.units.items() if k != "group_B"}
    units |= {"version_BT": b.version_BT, "real_BT": b.real_BT, "tokens_BT": b.tokens_BT}
    pairs = {} if b.pairs_P2 is None else {"pairs_P2": b.pairs_P2}
    zeros = [0.0] * b.B
    return fixed.batch(zeros, b["group_B"].tolist(), b.mask_BT.int().tolist(), **units, **given, **pairs)


class Given(Part):
    """Advantages that come with the batch."""

    stage = "advantage"
    facts = frozenset({"given_BT"})
    writes = frozenset({"adv_BT"})

    def __call__(self, b, ctx):
        return b.put(adv_BT=b["given_BT"])


# -- the command ----------------------------------------------------------------------------------------


def test_command_prints_errors_and_succeeds(capsys):
    assert conformance.main([str(path) for path in FILES if path.stem in OURS]) == 0
    out = capsys.readouterr().out
    assert "grpo.json: grpo, 2 cases, met" in out and "grad_logp_new" in out


def altered(tmp_path, change) -> str:
    content = json.loads(json.dumps(CONTENT["grpo"]))
    change(content)
    path = tmp_path / "altered.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["cases"][0]["outputs"].update(loss=1.0), "MISS no_kl: loss is"),
        (lambda c: c["cases"][0]["outputs"].update(loss=None), "not None"),
        (lambda c: c["cases"][0]["outputs"].update(loss=[1.0]), "has another shape"),
        (lambda c: c["cases"][0]["outputs"].update(loss={"a": 1.0}), "has other keys"),
        (lambda c: c["cases"][0]["outputs"].update(lost=1.0), "lost is not computed"),
        (lambda c: c["cases"][0]["params"].update(clip_epz=1.0), "did you mean `clip_eps`"),
        (lambda c: c["cases"][0]["params"].update(loss_agg="sum"), "none of seq-mean-token-mean"),
        (lambda c: c["cases"][0]["params"].update(clip_eps=-1.0), "widths >= 0"),
        (lambda c: c["cases"][0]["inputs"].update(rewards=None), "MISS no_kl: the case"),
        (lambda c: c["cases"][0]["inputs"].update(mask=[[1]]), "MISS no_kl: the case"),
    ],
)
def test_command_names_a_miss_and_exits_1(tmp_path, capsys, change, said):
    assert conformance.main([altered(tmp_path, change)]) == 1
    assert said in capsys.readouterr().out


def test_a_declared_sentence_is_shown_and_nothing_else_escapes(capsys, tmp_path):
    """vas: `required_behaviour` is a sentence. A number there, or a sentence elsewhere, is a miss."""
    flat = {"vps": [0.2] * 4, "previous_weights": None}
    params = {"momentum": 0.0, "minmax_eps": 1e-8}
    none = [0.0] * 4
    uniform = {"paper_sampling_probability": [0.25] * 4, "weights_minmax": none, "weights_after_momentum": none}

    def said(**words) -> int:
        case = {"name": "flat", "inputs": flat, "params": params, "outputs": {**uniform, **words}}
        path = tmp_path / "vas.json"
        path.write_text(json.dumps({"method": "vas", "cases": [case]}))
        return conformance.main([str(path)])

    assert said(required_behaviour="draw uniformly") == 0
    out = capsys.readouterr().out
    assert "not compared flat: required_behaviour says 'draw uniformly'" in out
    assert "required_behaviour  " not in out
    assert said(required_behaviour=1.0) == 1 and said(other="draw uniformly") == 1
    assert "other is not computed" in capsys.readouterr().out


def test_command_on_unusable_files(tmp_path, capsys):
    unknown = altered(tmp_path, lambda c: c.update(method="grop"))
    assert conformance.main([unknown]) == 1
    assert "did you mean `grpo`" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{")
    assert conformance.main([str(tmp_path / "bad.json"), str(tmp_path / "none.json")]) == 1
    err = capsys.readouterr().err
    assert "JSONDecodeError" in err and "FileNotFoundError" in err
    assert conformance.main([]) == 2 and conformance.main(["--help"]) == 0


def test_a_method_outside_policy_opt_is_found_by_entry_point(tmp_path, monkeypatch, capsys):
    """A real distribution on the path declares a subject in the group palaestra.conformance."""
    (tmp_path / "subject_of_ours.py").write_text(
        "def double(inputs, params):\n    return {'y': [2 * x for x in inputs['x']]}\n"
    )
    info = tmp_path / "subject_of_ours-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: subject-of-ours\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[palaestra.conformance]\ndoubling = subject_of_ours:double\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "doubling.json"
    case = {"name": "a", "inputs": {"x": [1, 2.5]}, "outputs": {"y": [2.0, 5.0]}}
    path.write_text(json.dumps({"method": "doubling", "cases": [case]}))
    assert conformance.main([str(path)]) == 0
    assert "doubling, 1 cases, met" in capsys.readouterr().out
    sys.modules.pop("subject_of_ours", None)
