"""Golden numbers against the shipped recipes: `python -m policy_opt.conformance FILE.json ...`.

Every case of a vector file is driven through the recipe's own parts and compared elementwise, |a - b| <= 1e-6
|b| + 1e-9 (what is no number: equal). Prints the largest error per output and exits 1 on a miss. Outputs that a
specification declares to be sentences, not results, are shown instead. An optimizer is driven over the case's
gradients. Any other method is looked up in the entry-point group `palaestra.conformance`: a function (inputs,
params) -> outputs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from policy_opt.errors import BatchError, RecipeError, unknown
from policy_opt.optimizers import METHODS
from policy_opt.recipe import Recipe
from policy_opt.registry import get, plugins, shipped
from policy_opt.vectors import OUTPUTS, Trace, Vectors, configure

GROUP = "palaestra.conformance"
RELATIVE, ABSOLUTE = 1e-6, 1e-9
Subject = Callable[[Mapping[str, Any], Mapping[str, Any], Sequence[str]], dict[str, Any]]
"""(inputs, params, names of the outputs wanted) -> outputs."""


class Miss(NamedTuple):
    """An output that is not what the file says."""

    case: str
    output: str
    reason: str


class Comparison(NamedTuple):
    """A file's largest error per output, its misses, and what it says in words."""

    method: str
    cases: int
    errors: dict[str, float]
    misses: list[Miss]
    said: list[tuple[str, str, str]]
    """(case, output, sentence): not compared."""


def subject(method: str) -> Subject:
    """What computes a method's outputs; RecipeError with a suggestion where nothing does."""
    recipes = recipes_of(method)
    if recipes:
        return lambda inputs, params, wanted: drive(recipes, inputs, params, wanted)
    if method in METHODS:
        return lambda inputs, params, wanted: METHODS[method].golden(inputs, params)
    others = {point.name: point for point in entry_points(group=GROUP)}
    if method not in others:
        raise RecipeError(unknown("method", method, (*shipped(), *plugins(), *METHODS, *others)))
    function = others[method].load()
    return lambda inputs, params, wanted: function(inputs, params)


def recipes_of(method: str) -> list[Recipe]:
    """The recipe of that slug, or those that share the file: `<method>_*` with vectors.method = method."""
    slugs = (*shipped(), *plugins())
    if method in slugs:
        return [get(method)]
    near = [get(slug) for slug in slugs if slug.startswith(f"{method}_")]
    return [recipe for recipe in near if recipe.vectors and recipe.vectors.method == method]


def drive(
    recipes: Sequence[Recipe], inputs: Mapping[str, Any], params: Mapping[str, Any], wanted: Sequence[str]
) -> dict[str, Any]:
    """Outputs of one case: each from the first recipe that maps it; those that none maps are left out."""
    found: dict[str, Any] = {}
    for recipe in recipes:
        trace = Trace(configure(recipe, params), inputs, params)
        own = (recipe.vectors or Vectors()).outputs
        mapping = own if recipe.vectors and recipe.vectors.method else {**OUTPUTS, **own}
        found.update(
            {name: plain(mapping[name](trace)) for name in wanted if name in mapping and name not in found}
        )
    return found


def sentences(method: str) -> frozenset[str]:
    """Outputs that the method's specification declares to be sentences."""
    return frozenset(name for recipe in recipes_of(method) if recipe.vectors for name in recipe.vectors.sentences)


def plain(value: Any) -> Any:
    """Tensors as lists and numbers (their truth values as 1 and 0)."""
    if isinstance(value, Tensor):
        return value.double().tolist()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def difference(found: Any, expected: Any) -> tuple[float, str]:
    """(largest error, reason of a miss or "")."""
    if isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            return 0.0, f"has another shape: {_short(found)}, not {_short(expected)}"
        pairs = list(zip(found, expected, strict=True))
    elif isinstance(expected, Mapping):
        if not isinstance(found, Mapping) or found.keys() != expected.keys():
            return 0.0, f"has other keys: {_short(found)}, not {_short(expected)}"
        pairs = [(found[key], expected[key]) for key in expected]
    elif _number(expected) and _number(found):
        gap = abs(found - expected)
        # `not <=` also catches NaN.
        return gap, f"is {found!r}, not {expected!r}" if not gap <= RELATIVE * abs(
            expected
        ) + ABSOLUTE else ""
    else:
        same = type(found) is type(expected) and found == expected
        return 0.0, "" if same else f"is {_short(found)}, not {_short(expected)}"
    inner = [difference(a, b) for a, b in pairs]
    misses = [reason for _, reason in inner if reason]
    return max((gap for gap, _ in inner), default=0.0), misses[0] if misses else ""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def compare(content: Mapping[str, Any]) -> Comparison:
    """A vector file's content against its subject."""
    method = content["method"]
    compute = subject(method)
    errors: dict[str, float] = {}
    misses: list[Miss] = []
    said: list[tuple[str, str, str]] = []
    declared = sentences(method)
    for case in content["cases"]:
        words = {k: v for k, v in case["outputs"].items() if k in declared and isinstance(v, str)}
        said += [(case["name"], output, text) for output, text in words.items()]
        expected = {k: v for k, v in case["outputs"].items() if k not in words}
        try:
            found = compute(case["inputs"], case.get("params", {}), tuple(expected))
        except Exception as error:
            # A case that is not of the method's form is its own miss, the file's other cases are still compared.
            kind = "" if isinstance(error, RecipeError | BatchError) else f"{type(error).__name__}: "
            misses.append(Miss(case["name"], "the case", f"{kind}{error}"))
            continue
        for name, value in expected.items():
            if name not in found:
                misses.append(Miss(case["name"], name, "is not computed"))
                continue
            gap, reason = difference(found[name], value)
            errors[name] = max(errors.get(name, 0.0), gap)
            if reason:
                misses.append(Miss(case["name"], name, reason))
    return Comparison(method, len(content["cases"]), errors, misses, said)


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 where every output of every file is met."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    status = 0
    for name in arguments:
        try:
            result = compare(json.loads(Path(name).read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError, KeyError, TypeError, RecipeError) as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            status = 1
            continue
        verdict = "MISSED" if result.misses else "met"
        print(f"{Path(name).name}: {result.method}, {result.cases} cases, {verdict}")
        for output, gap in result.errors.items():
            print(f"  {output:<28} largest error {gap:.1e}")
        for case, output, text in result.said:
            print(f"  not compared {case}: {output} says {text!r}")
        for miss in result.misses:
            print(f"  MISS {miss.case}: {miss.output} {miss.reason}")
        status |= bool(result.misses)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
