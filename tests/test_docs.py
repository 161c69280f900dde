"""What README and CONTRIBUTING show is what the project does: their code runs, their tables are fresh."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md")
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<lang>\w*)\n(?P<code>.*?)```", re.DOTALL)
TABLE = re.compile(r"<!-- generated: (?P<command>[^>]*?) -->\n(?P<table>.*?)<!-- end -->", re.DOTALL)


def blocks(page: str, lang: str) -> list[tuple[str, str]]:
    """(mark in the comment above, code) of a page's blocks in a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [(m["mark"] or "", m["code"]) for m in BLOCK.finditer(text) if m["lang"] == lang]


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(arguments, capture_output=True, text=True, cwd=folder, env=env, timeout=600)


def python_blocks() -> list[tuple[str, str]]:
    return [(page, code) for page in PAGES for _, code in blocks(page, "python")]


@pytest.mark.parametrize(("page", "code"), python_blocks(), ids=lambda x: x if x in PAGES else "code")
def test_python_blocks_run(page, code, tmp_path):
    (tmp_path / "block.py").write_text(code, encoding="utf-8")
    done = run([sys.executable, "block.py"], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_generated_tables_are_up_to_date(page, tmp_path):
    for found in TABLE.finditer((ROOT / page).read_text(encoding="utf-8")):
        command = found["command"].split()
        done = run([sys.executable, *command[1:]], tmp_path)
        assert done.returncode == 0, done.stderr
        stale = f"{page}: paste the output of `{found['command']}`"
        assert found["table"].strip() == done.stdout.strip(), stale


def test_the_flat_loop_trains_on_what_was_sampled():
    done = run([sys.executable, str(ROOT / "docs" / "flat_loop.py"), "1"], ROOT)
    assert done.returncode == 0, done.stderr
    gap = float(done.stdout.split()[-1])
    assert gap < 1e-3  # the bundled model before its warm start, in float32


@pytest.mark.full
@pytest.mark.parametrize("name", ["locker.py", "half_grpo.py"])
def test_commands_beside_a_file_run(name, tmp_path):
    code = dict(blocks("CONTRIBUTING.md", "python"))[f"file: {name}"]
    (tmp_path / name).write_text(code, encoding="utf-8")
    lines = dict(blocks("CONTRIBUTING.md", "bash"))[f"run beside: {name}"].splitlines()
    assert lines
    for line in lines:
        done = run([sys.executable, *line.split()[1:]], tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
