"""The distribution beside a wheel that uses the same import name, as a user's environment would hold both."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FOREIGN = {
    "agents/__init__.py": "NAME = 'openai-agents'\n",
    "agents/run.py": "",
    "openai_agents-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: openai-agents\nVersion: 1.0\n",
    "openai_agents-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "openai_agents-1.0.dist-info/RECORD": "agents/__init__.py,,\nagents/run.py,,\n",
}


def python(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter whose first site folder is `site` (its .pth files are honoured)."""
    boot = f"import site; site.addsitedir({str(site)!r}); import sys; sys.path = " + (
        f"[{str(site)!r}] + [p for p in sys.path if p != {str(ROOT)!r}]\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-P", "-c", boot + code], capture_output=True, text=True, cwd=site, env=env, timeout=120
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    command = [*pip, "-w", str(out), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    (path,) = out.glob("palaestra-*.whl")
    return path


@pytest.fixture(scope="module")
def crowded(wheel, tmp_path_factory) -> Path:
    """A site folder that holds our wheel and a foreign distribution with a package `agents`."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for name, text in FOREIGN.items():
        path = site / name
        assert not path.exists(), f"our wheel would overwrite {name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return site


@pytest.mark.full
def test_wheel_leaves_out_tests_and_holds_the_model(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if "tests/" in n]
    assert [n for n in names if n.endswith("model.safetensors")]
    assert "palaestra.pth" in names


@pytest.mark.full
def test_alias_gives_the_same_module_objects_beside_a_foreign_agents(crowded):
    code = (
        "import palaestra.agents.stats, palaestra.envs, agents.stats, envs\n"
        "assert palaestra.agents.stats is agents.stats and palaestra.envs is envs\n"
        "print(agents.__file__)"
    )
    done = python(crowded, code)
    assert done.returncode == 0, done.stderr
    assert "_packages" in done.stdout


@pytest.mark.full
def test_foreign_agents_stays_usable_and_a_clash_is_named(crowded):
    done = python(crowded, "import agents; print(agents.NAME)")
    assert done.stdout.strip() == "openai-agents", done.stderr
    clash = python(crowded, "import agents, palaestra")
    assert clash.returncode != 0 and "not Palaestra's" in clash.stderr


@pytest.mark.full
def test_console_script_lists_commands_and_suggests(crowded):
    done = python(crowded, "import sys; sys.argv = ['palaestra', 'trian']; from palaestra.cli import main; main()")
    assert done.returncode == 2 and "did you mean `train`" in done.stderr


def test_agents_names_a_foreign_package_of_a_needed_name(tmp_path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import agents"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode != 0
    assert "needs its own package `tools`" in done.stderr and "import palaestra" in done.stderr
