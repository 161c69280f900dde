"""What stands in the source: docstrings of modules, classes and fields, and parts in the grammar of --set."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
from functools import cache
from typing import Any

from policy_opt.bank import Optim
from policy_opt.catalog import part_name
from policy_opt.part import Part
from policy_opt.terms import Term


@cache
def _docs_of(module: str) -> dict[tuple[str, str], str]:
    """{(class, field): the string below the field} of a module."""
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in zip(node.body, node.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[node.name, field.target.id] = one_line(str(below.value.value))
    return found


def field_doc(owner: type | None, name: str) -> str:
    """The docstring under a dataclass' field, also an inherited one; empty where there is none."""
    for kind in owner.__mro__ if owner else ():
        if kind.__module__ in sys.modules and kind is not object:
            text = _docs_of(kind.__module__).get((kind.__name__, name))
            if text:
                return text
    return ""


def class_doc(kind: type) -> str:
    """First paragraph of a class' own docstring, in one line; empty for what dataclass writes by itself."""
    text = (kind.__doc__ or "").strip()
    return "" if text.startswith(f"{kind.__name__}(") else one_line(text.split("\n\n")[0])


def one_line(text: str) -> str:
    """Without line breaks."""
    return " ".join(text.split())


def spelled(value: Any) -> str:
    """A part as --set reads it, with every option that is not its default: `group_norm(eps=1e-06)`."""
    if isinstance(value, tuple):
        inner = [spelled(item) for item in value]
        return f"({', '.join(inner)}{',' if len(inner) == 1 else ''})"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    name = value.name if isinstance(value, Optim) else full_name(type(value))
    given = []
    for f in dataclasses.fields(value):
        now = getattr(value, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if (now != default or type(now) is not type(default)) and not (isinstance(value, Optim) and f.name == "name"):
            given.append(f"{f.name}={spelled(now)}")
    return f"{name}({', '.join(given)})" if given or not isinstance(value, Part | Term) else name


def full_name(kind: type) -> str:
    """`group_norm`; `slug.part` for a part that stands in a recipe's own file; other classes by their name."""
    if not issubclass(kind, Part | Term):
        return kind.__name__
    package, _, module = kind.__module__.rpartition(".")
    return f"{module}.{part_name(kind)}" if package == "policy_opt.recipes" else part_name(kind)


def blocks(docstring: str) -> list[tuple[bool, str]]:
    """(is it indented, text) of a docstring's stretches, in order: prose, and equations or commands."""
    found: list[tuple[bool, list[str]]] = []
    for line in inspect.cleandoc(docstring).splitlines():
        if not line.strip():
            if found:
                found[-1][1].append("")
            continue
        indented = line.startswith("    ")
        if not found or found[-1][0] != indented:
            found.append((indented, []))
        found[-1][1].append(line)
    return [(indented, textwrap.dedent("\n".join(lines)).strip("\n")) for indented, lines in found]
