"""Rollouts one iteration ahead on vLLM: it samples in its own process while the trainer learns."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.agents.test_resume import final, same
from tests.engines.test_train import ALSO, SMALL, core_of, metrics, started  # noqa: F401  (a fixture)

pytestmark = pytest.mark.engines
AHEAD = (*SMALL, "--ahead.on", "--optim.lr", "0.01", "--eval.every", "2", "--eval.every-episodes", "8")


def test_five_iterations_ahead_and_the_same_after_a_kill(started):  # noqa: F811
    """One behind, corrected, counted; an engine killed while the trainer learns ends the run, which goes on exactly."""
    process, whole, log = started("ahead", *AHEAD)
    assert process.wait() == 0, log.read_text()
    lines = metrics(whole)
    assert [m["stale_max"] for m in lines] == [0, 1, 1, 1, 1]
    assert [m["total_trained"] for m in lines] == [16, 32, 48, 64, 80] == [m["total_played"] for m in lines]
    assert max(m["logp_gap"] for m in lines) <= 1e-4, "that of the weights that played"
    assert max(m["stale_kl"] for m in lines) > 1e-4 and "importance_capped" in lines[1]

    process, run, log = started("ahead-killed", *AHEAD)
    while len(metrics(run)) < 3 and process.poll() is None:
        time.sleep(0.02)
    core = core_of(process.pid)
    assert core is not None, log.read_text()
    os.kill(core, signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    said = [line for line in log.read_text().splitlines() if line.startswith(("error", "go on"))]
    assert said[0].startswith("error: ") and "vllm is gone" in said[0]
    assert said[1] == f"go on with: python -m agents.train --resume {run}" and len(said) == 2

    process, _, log = started("ahead-resumed", "--resume", str(run))
    assert process.wait() == 0, log.read_text()
    a, b = final(whole), final(run)
    for state in (a, b):
        state.pop("files")
    same(a, b)
    same(*[[{k: v for k, v in m.items() if k not in ALSO} for m in metrics(r)] for r in (whole, run)])
