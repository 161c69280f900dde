"""The house's rules that are about files: which package may import which, and what a file may be called."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "scenarios": set(),
    "tools": {"scenarios"},
    "envs": {"scenarios", "tools"},
    "policy_opt": set(),
    "agents": {"scenarios", "tools", "envs", "policy_opt"},
}
OURS = {*MAY_IMPORT, "tests", "palaestra"}
POLICY_OPT_NEEDS = {"torch"}


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports anywhere, also inside functions; relative imports are its own package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_imports_point_one_way(package):
    allowed = MAY_IMPORT[package] | {package}
    for path in (ROOT / package).rglob("*.py"):
        wrong = (imported(path) & OURS) - allowed
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}; `{package}` may not"


def test_policy_opt_stands_on_torch_alone():
    """Its recipes can be used inside another trainer, so nothing but torch and the standard library."""
    import sys

    for path in (ROOT / "policy_opt").rglob("*.py"):
        foreign = imported(path) - set(sys.stdlib_module_names) - {"policy_opt"} - POLICY_OPT_NEEDS
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


def hidden(path: Path) -> bool:
    """Under a folder such as .venv."""
    return any(part.startswith(".") for part in path.relative_to(ROOT).parts)


def test_no_file_is_a_bag_of_helpers():
    bags = [p for p in ROOT.rglob("*.py") if p.stem in {"utils", "helpers", "misc"} and not hidden(p)]
    assert bags == []
