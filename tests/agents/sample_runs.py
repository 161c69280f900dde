"""Runs made up for tests of the report: trajectories with real tokens, metrics, evaluations, hostile text."""

from __future__ import annotations

import numpy as np

from agents import stats
from agents.ledger import Ledger
from agents.report import collect
from agents.report.episodes import Entry
from agents.trajectory import Trajectory, TurnInfo
from envs import Verdict
from tests.agents.tokenizers import byte_bpe

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt; \" ' ` ${1} {{ 7 * 7 }} {% raw %}",
    "\x00\x01\x1b[31m\u202egnp.exe\u2066",
    "lone \ud800 surrogate \udfff",
    "<!-- ]]> <![CDATA[",
    "\u2028\u2029\ufeff",
]
FACTS = {"tool_calls": 1, "answer_key": "Toruna"}
QUESTION = "Who is the mentor of Zanvel?"


def episode(
    step=1, group=0, member=0, *, say="<answer>Toruna</answer>", correct=True, level=1, task=None, **more
):
    """A stored trajectory of two turns: a tool call and an answer, tokens by a real tokenizer."""
    tokenizer, rng = byte_bpe(), np.random.default_rng((step, group, member))
    call = (
        '<tool_call>{"name": "lookup", "arguments": {"entity": "Zanvel", "attribute": "mentor"}}</tool_call>'
    )
    ledger = Ledger()

    def encode(text):
        return tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False)

    ledger.observe(encode(QUESTION), 0)
    for turn, text in enumerate((call, say)):
        ids = encode(text)
        ledger.act(ids, (-rng.exponential(0.3, len(ids))).tolist(), turn, step)
        if turn == 0:
            ledger.observe(encode("Toruna"), 1)
    sign = 1.0 if correct else -1.0
    columns = {"adv_BT": [[sign] * len(ledger)], "entropy_BT": [rng.random(len(ledger)).tolist()]}
    trajectory = Trajectory(
        task or f"tool_qa/train/{group}", group, "train", level, group, member, ledger=ledger, version=step,
        messages=[
            {"role": "system", "content": "Use the tools."}, {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": call}, {"role": "tool", "name": "lookup", "content": "Toruna"},
            {"role": "assistant", "content": say},
        ],
        turns=[TurnInfo(call, 0.0, ("lookup",)), TurnInfo(say, float(correct))],
        verdict=Verdict(float(correct), {"correct": float(correct)}, FACTS),
        reward=float(correct), stop_reason="answered",
    )  # fmt: skip
    for name, value in more.items():
        setattr(trajectory, name, value)
    return Entry(step, trajectory, columns)


def run_data(steps=30, **config) -> collect.RunData:
    rng = np.random.default_rng(0)
    metrics = [
        {"step": s + 1, "correct": 0.3 + 0.02 * s, "reward": 0.3 + 0.02 * s, "entropy": 0.3 / (s + 1),
         "grad_norm": float(rng.lognormal()), "logp_gap": 1e-6, "zero_variance_groups": 0.95, "kl": 1e-3,
         "tool_calls": 1.5, "length": 40.0, "clip_frac": 0.01, "truncated": 0.0}
        for s in range(steps)
    ]  # fmt: skip
    evals = [
        evaluation("before", 120, 0),
        evaluation("after", 350, steps),
        evaluation("harder", 90, steps, "hard"),
    ]
    options = {"env": "tool_qa", "algo": "grpo", "seed": 3, "level": None, **config}
    return collect.RunData("a run", options, metrics, evals)


def evaluation(label, right, step, level=None):
    correct = [[1]] * right + [[0]] * (400 - right)
    row = {"level": 1, "success": [0.5, 0.4, 0.6], "tool_calls": 1.0, "productivity": 0.5, "episodes": 200}
    return {
        "label": label, "env": "tool_qa", "split": "eval", "level": level, "step": step, "episodes": 400,
        "success": list(stats.success_interval(correct)), "pass_at": {"1": [0.5, 0.4, 0.6]},
        "tool_calls": [1.5, 1.4, 1.6], "productivity": 0.6, "failure_share": 0.0, "marked": False,
        "levels": [row, row | {"level": 2}], "correct": correct, "tasks_key": str(level),
    }  # fmt: skip


def build(entries, run=None, tokenizer=None, total=None):
    entries = list(entries)
    return collect.page(run or run_data(), entries, total or len(entries), tokenizer or byte_bpe(), "a test")


def thousands() -> list[Entry]:
    """2,000 trajectories of 25 steps, ten groups each; the steps share their episodes' contents."""
    some = [episode(1, group, member) for group in range(10) for member in range(8)]
    return [Entry(step, e.trajectory, e.columns) for step in range(25) for e in some]
