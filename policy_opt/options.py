"""Settings on the command line: `--set PATH=VALUE`, `STAGE+=PART`, `STAGE-=PART`, `variant=NAME`.

    advantage=group_centre()              another part at a stage; also none, or several: (gae(lam=1), whiten())
    credit+=tis(cap=2.0)                  one more part at a stage
    credit-=tis                           one part less
    terms.clip_high=0.28                  an option of the one part that has it
    terms.kl.coef=annealed(0.1, 0, 50)    the same where several have it: name the term or the part
    terms.policy.agg=token_mean           a part inside a part
    curriculum.accept=mixed()             likewise; also schedule.epochs=4, sampler.temperature=0.9,
                                          optimizer=sgd(lr=0.1), bank.critic.optimizer.lr_scale=5, ...
    reward+=some_recipe.some_part(x=4)    a part that stands in a recipe's own file
    variant=baseline                      a form of the method that the recipe names

A path starts with the stage and ends with the option; what stands between may be left out where the option is
told apart without it. Values are Python literals, names of parts, or parts with options; nothing is
evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from policy_opt.catalog import find, part_name
from policy_opt.errors import RecipeError, unknown
from policy_opt.part import Part
from policy_opt.recipe import STAGES, Recipe
from policy_opt.schedule import Step
from policy_opt.terms import Term

LISTS = (*STAGES, "terms")
"""Roots that hold several parts."""
ROOTS = (*LISTS, "curriculum", "sampler", "schedule", "optimizer", "bank")
_PART_FIELDS = {
    "agg": "agg",
    "coef": "coef",
    "fraction": "coef",
    "gate": "gate",
    "accept": "accept",
    "order": "order",
    "source": "source",
    "loss": "surrogate",
    "optimizer": "optimizer",
    "curriculum": "curriculum",
    "kappa": "kappa",
    "direction": "optimizer",
}
"""Fields that hold a part of that stage."""
_SEQUENCES = {"steps": "step", "terms": "terms", "each": "advantage"}
"""Fields that hold several parts of that stage."""
_PLAIN: dict[str, Any] = {"coef": float, "accept": None, "optimizer": None, "kappa": None}
"""What such a field takes besides a part."""
_SPEC = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(\+=|-=|=)\s*(.+?)\s*", re.DOTALL)


def apply(recipe: Recipe, spec: str) -> Recipe:
    """The recipe with one setting changed; RecipeError says what is wrong and what is near."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise RecipeError(f"cannot read the setting {spec!r}; write path=value, e.g. terms.clip_high=0.28")
    path, operator, text = match.groups()
    names = path.split(".")
    if names[0] == "variant":
        return _variant(recipe, text)
    if names[0] not in ROOTS:
        raise RecipeError(unknown("stage", names[0], (*ROOTS, "variant")))
    if operator == "-=":
        return _without(recipe, names, text)
    try:
        node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise RecipeError(f"cannot read the value {text!r} of {path}: {error}") from None
    if names[0] in LISTS and len(names) == 1:
        parts = _sequence(names[0], node)
        before = getattr(recipe, names[0]) if operator == "+=" else ()
        return recipe.replace(**{names[0]: (*before, *parts)})
    if operator == "+=":
        raise RecipeError(f"`{path}` holds one value; += is for {', '.join(LISTS)}")
    return assign(recipe, path, node)


def part(stage: str, text: str) -> Any:
    """The part that `name` or `name(option=value)` stands for at a stage; RecipeError as in `apply`."""
    try:
        return _part(stage, ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"cannot read the {stage} {text!r}: {error}") from None


def assign(recipe: Recipe, path: str, value: Any) -> Recipe:
    """The recipe with the option at `path` set; value is a Python value, or the syntax tree of one."""
    address = _address(recipe, path)
    if isinstance(value, ast.AST):
        value = _value(value, address.hint, _PART_FIELDS.get(address.names[-1]), path)
    else:
        value = _fit(value, address.hint, path)
    try:
        return address.rebuild(value)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """Types of a class's fields, by name."""
    return typing.get_type_hints(kind)


# -- addresses ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Address:
    """An option that can be set."""

    names: tuple[str, ...]
    """Everything that may stand in its path: stage, position, part or term, ..., option."""
    hint: Any
    """Its type."""
    value: Any
    """What it is now."""
    rebuild: Callable[[Any], Recipe]
    """The recipe with another value there."""
    owner: type | None = None
    """The dataclass whose field it is; None: the recipe itself."""

    @property
    def full(self) -> str:
        """The path without positions."""
        return ".".join(name for name in self.names if not name.isdigit())


def addresses(recipe: Recipe) -> Iterator[Address]:
    """Every option of a recipe."""
    for root in ROOTS:
        if root == "bank":
            for name, spec in recipe.models.items():

                def put(value: Any, name: str = name) -> Recipe:
                    return recipe.replace(bank={**recipe.models, name: value})

                yield from _inside(spec, ("bank", name), put)
            continue

        def set_root(value: Any, root: str = root) -> Recipe:
            return recipe.replace(**{root: value})

        value = getattr(recipe, root)
        if root in _PART_FIELDS:
            yield Address((root,), object, value, set_root)
        yield from _inside(value, (root,), set_root)


def _inside(value: Any, names: tuple[str, ...], rebuild: Callable[[Any], Recipe]) -> Iterator[Address]:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            if not dataclasses.is_dataclass(item):
                continue

            def replaced(new: Any, i: int = i) -> Recipe:
                return rebuild((*value[:i], new, *value[i + 1 :]))

            yield from _inside(item, (*names, str(i), _own_name(item)), replaced)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = hints_of(type(value))
        for f in dataclasses.fields(value):

            def changed(new: Any, name: str = f.name) -> Recipe:
                return rebuild(dataclasses.replace(value, **{name: new}))

            inner = getattr(value, f.name)
            yield Address((*names, f.name), hints[f.name], inner, changed, type(value))
            kind = (part_name(type(inner)),) if isinstance(inner, Part) else ()
            yield from _inside(inner, (*names, f.name, *kind), changed)


def _own_name(item: Any) -> str:
    """What one of several is called: a term by its name, a step of the schedule by its source."""
    if isinstance(item, Term):
        return item.name
    return part_name(type(item.source if isinstance(item, Step) else item))


def knows(recipe: Recipe, path: str) -> bool:
    """Has the recipe an option at that path, or several?"""
    return bool(_fitting(addresses(recipe), path))


def _fitting(found: Iterable[Address], path: str) -> list[Address]:
    """The options that a path may stand for."""
    names = tuple(path.split("."))
    return [a for a in found if a.names[-1] == names[-1] and _subsequence(names, a.names)]


def _address(recipe: Recipe, path: str) -> Address:
    found = list(addresses(recipe))
    fitting = _fitting(found, path)
    if len(fitting) == 1:
        return fitting[0]
    exact = [a for a in fitting if a.full == path]
    if len(exact) == 1:
        return exact[0]
    if fitting:
        raise RecipeError(f"`{path}` could be {' or '.join(f'`{a.full}`' for a in fitting)}; name one")
    here = [a for a in found if a.names[0] == path.partition(".")[0] and len(a.names) > 1]
    known = {a.full for a in here} | {f"{a.names[0]}.{a.names[-1]}" for a in here}
    raise RecipeError(f"{recipe.slug}: {unknown('option', path, known)}")


def _subsequence(short: tuple[str, ...], long: tuple[str, ...]) -> bool:
    rest = iter(long)
    return short[0] == long[0] and all(name in rest for name in short)


def _variant(recipe: Recipe, name: str) -> Recipe:
    name = name.strip("'\"")
    if name not in recipe.variants:
        raise RecipeError(f"{recipe.slug}: {unknown('variant', name, recipe.variants)}")
    return recipe.set(*recipe.variants[name])


def _without(recipe: Recipe, names: list[str], text: str) -> Recipe:
    root = names[0]
    if root not in LISTS or len(names) > 1:
        raise RecipeError(f"-= is for {', '.join(LISTS)}")
    before = getattr(recipe, root)
    own = [item.name if isinstance(item, Term) else part_name(type(item)) for item in before]
    if text not in own:
        raise RecipeError(f"{recipe.slug}: {unknown(f'{root} part', text, own)}")
    return recipe.replace(**{root: tuple(x for x, name in zip(before, own, strict=True) if name != text)})


# -- values ---------------------------------------------------------------------------------------------


def _sequence(stage: str, node: ast.AST) -> tuple[Any, ...]:
    """`part`, `part(...)`, `(part, part(...))` or `none`."""
    if (isinstance(node, ast.Constant) and node.value is None) or (
        isinstance(node, ast.Name) and node.id == "none"
    ):
        return ()
    nodes = node.elts if isinstance(node, ast.Tuple | ast.List) else [node]
    return tuple(_part(stage, item) for item in nodes)


def _part(stage: str, node: ast.AST) -> Any:
    """A part from `name` or `name(value, option=value)`."""
    call = node if isinstance(node, ast.Call) else None
    name = _dotted(call.func if call else node)
    if name is None:
        raise RecipeError(f"expected a part at `{stage}`, found {ast.unparse(node)!r}")
    kind = find(stage, name)
    target = getattr(kind, "func", kind)
    assert isinstance(target, type)
    # A part without options need not be a dataclass; an optimizer's name is fixed already.
    known = dataclasses.fields(target) if dataclasses.is_dataclass(target) else ()
    hints = {f.name: hints_of(target)[f.name] for f in known[len(getattr(kind, "args", ())) :]}
    given: dict[str, ast.AST] = {}
    if call:
        if len(call.args) > len(hints) or any(isinstance(arg, ast.Starred) for arg in call.args):
            raise RecipeError(f"{name} takes at most {len(hints)} options: {', '.join(hints)}")
        given = dict(zip(hints, call.args, strict=False))
        for keyword in call.keywords:
            if keyword.arg not in hints:
                raise RecipeError(unknown(f"option of {name}", str(keyword.arg), hints))
            given[keyword.arg] = keyword.value
    options = {
        key: _value(value, hints[key], _PART_FIELDS.get(key), f"{name}.{key}") for key, value in given.items()
    }
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{name}: {error}") from None


def _dotted(node: ast.AST) -> str | None:
    try:
        text = ast.unparse(node)
    except (ValueError, RecursionError):
        return None
    return text if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", text) else None


def _value(node: ast.AST, hint: Any, stage: str | None, path: str) -> Any:
    """A part where the field holds one, a bare word where text is expected, or a literal that fits."""
    field = path.rpartition(".")[2]
    if field in _SEQUENCES and any(isinstance(n, ast.Name | ast.Call) for n in ast.walk(node)):
        return _sequence(_SEQUENCES[field], node)
    if stage and (isinstance(node, ast.Call) or _dotted(node) not in (None, "None", "none")):
        return _part(stage, node)
    if stage:
        hint = _PLAIN[stage] if stage in _PLAIN else Part
        node = ast.Constant(None) if _dotted(node) == "none" else node
    if isinstance(node, ast.Name) and _fits(node.id, hint):
        return node.id
    try:
        literal = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise RecipeError(f"`{path}` takes {_describe(hint)}, not {ast.unparse(node)!r}") from None
    return _fit(literal, hint, path)


def _fit(value: Any, hint: Any, path: str) -> Any:
    """The value as the hint wants it (2 and 2.0 may stand for each other, in tuples too); RecipeError where it does
    not fit.
    """
    for form in (value, _retyped(value, float), _retyped(value, int)):
        if _fits(form, hint):
            return form
    raise RecipeError(f"`{path}` takes {_describe(hint)}, not {value!r}")


def _retyped(value: Any, kind: type) -> Any:
    """A number as a float or a whole number where that is the same number, or a tuple of such; others as they are."""
    if isinstance(value, tuple):
        return tuple(_retyped(v, kind) for v in value)
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300
    return kind(value) if number and kind(value) == value else value


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint in (Any, object):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if origin is tuple:
        inner = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if len(inner) == 2 and inner[1] is ...:
            return all(_fits(v, inner[0]) for v in value)
        return len(value) == len(inner) and all(_fits(v, h) for v, h in zip(value, inner, strict=True))
    kind = origin or hint
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(v) for v in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
