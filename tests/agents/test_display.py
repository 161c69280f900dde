"""What the user reads: plain lines, the live table, the final table."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from agents.display import LiveTable, Plain, Silent, choose, interval, results_table, spark
from agents.doctor import diagnose

RECORD = {
    "step": 3, "seconds": 2.0, "reward": 0.25, "correct": 0.25, "tool_calls": 2.5, "length": 80.0, "entropy": 0.4,
    "kl": 1e-5, "clip_frac": 0.0, "grad_norm": 0.3, "logp_gap": 7e-5, "tokens_per_second": 4000.0,
    "zero_variance_groups": 0.95, "trained_tokens": 9,
}  # fmt: skip
LEVELS = [
    {"level": 1, "success": [0.5, 0.4, 0.6], "episodes": 50},
    {"level": 2, "success": [0.1, 0.0, 0.2], "episodes": 50},
]
EVAL = {"label": "before", "success": [0.31, 0.27, 0.35], "episodes": 100, "levels": LEVELS, "level": None}


def test_plain_lines_hold_every_number_and_each_trouble_once():
    out = io.StringIO()
    plain = Plain(10, out)
    for step in (3, 4):
        plain.step({**RECORD, "step": step}, diagnose([RECORD] * 10))
    plain.evaluation("before", EVAL)
    text = out.getvalue()
    for part in ("step 3/10", "reward 0.250", "tool calls 2.50", "KL 1.0e-05", "gap 7e-05", "ETA", "tokens/s 4000"):
        assert part in text
    assert text.count("doctor [bad] zero_variance") == 1
    assert "before: success 0.310 [0.270, 0.350] on 100 tasks" in text
    assert "nan" not in text


def test_progress_is_told_now_and_then_and_never_for_rollouts():
    out = io.StringIO()
    plain = Plain(10, out, every=0.0)
    plain.progress("rollout", 1, 2, "")
    assert out.getvalue() == ""
    plain.progress("warm start", 1, 2, "0.5 nats/token")
    assert "warm start 1/2 0.5 nats/token" in out.getvalue()


def test_the_live_table_draws_itself_from_start_to_end():
    out = io.StringIO()
    display = LiveTable(10, Console(file=out, force_terminal=True, width=110))
    with display.live:
        display.phase("warm start", "imitating")
        display.progress("warm start", 5, 50, "0.5 nats/token")
        display.live.refresh()
        for step in range(1, 5):
            display.step({**RECORD, "step": step, "reward": step / 10}, diagnose([RECORD] * 10))
        display.evaluation("during", EVAL)
        display.note("a note [with brackets]")
        display.live.refresh()
    text = out.getvalue()
    for part in ("warm start: imitating", "5/50", "step 4/10", "log-prob gap", "▁▃▆█", "zero_variance_groups", "during",
                 "a note [with brackets]"):  # fmt: skip
        assert part in text


def test_missing_and_odd_numbers_do_not_stop_it():
    display = LiveTable(10, Console(file=io.StringIO(), force_terminal=True))
    display.step({"step": 1, "seconds": 0.1, "reward": float("nan"), "kl": None}, [])
    Console(file=io.StringIO()).print(display.render())
    display.step({"step": 2, "seconds": 0.1, "reward": 1.0}, [])
    Console(file=io.StringIO()).print(display.render())


def test_the_eta_follows_the_pace(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("agents.display.time.monotonic", lambda: now[0])
    clock = Plain(10, io.StringIO()).clock
    now[0] = 106.0
    assert clock.left({"step": 1, "seconds": 2.0}) == pytest.approx(18.0)
    now[0] = 110.0
    assert clock.left({"step": 2, "seconds": 4.0}) == pytest.approx(24.0)


def test_the_final_table():
    out = io.StringIO()
    after = {**EVAL, "label": "after", "success": [0.85, 0.82, 0.88]}
    harder = {**EVAL, "label": "harder", "success": [0.05, 0.02, 0.09], "level": "hard", "episodes": 64}
    summary = {"run": "runs/x", "report": "runs/x/report.html"}
    results_table(summary, [EVAL, after, harder], Console(file=out, width=120))
    text = out.getvalue()
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "0.310 [0.270, 0.350]" in rows["all"] and "0.850 [0.820, 0.880]" in rows["all"]
    assert "0.500" in rows["level 1"] and "0.050 [0.020, 0.090]" in rows["harder (hard)"]
    assert "run: runs/x" in text and "report: runs/x/report.html" in text


def test_which_display(capsys):
    with choose(3, plain=False, silent=True) as display:
        assert isinstance(display, Silent)
    with choose(3, plain=False, silent=False) as display:
        assert isinstance(display, Plain), "no terminal here"
    assert spark([1, 1]) == "▄▄" and interval([0.5, 0.4, 0.6]) == "0.500 [0.400, 0.600]"
