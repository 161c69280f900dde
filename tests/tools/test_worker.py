"""Tools with a time limit: killed when late, whatever they do, and the next call works."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tools import slow_tools
from tools import Tool, Toolbox, ToolCall, worker

ROOT = Path(__file__).resolve().parent.parent.parent


def box(fn, limit: float = 30.0, **options) -> Toolbox:
    return Toolbox([Tool.from_function(fn, timeout_s=limit)], **options)


def test_result_comes_from_another_process_that_is_used_again():
    tools = box(slow_tools.whoami)
    first, second = (tools.call(ToolCall("whoami", {})).text for _ in range(2))
    assert first == second != str(os.getpid())


@pytest.mark.parametrize("fn, arguments", [(slow_tools.hang, {"seconds": 600.0}), (slow_tools.spin, {})])
def test_a_tool_that_hangs_is_killed(fn, arguments):
    tools = box(fn, 0.2)
    result = tools.call(ToolCall(fn.__name__, arguments))
    assert result.error == "timeout" and "0.2 s" in result.text
    assert box(slow_tools.add).call(ToolCall("add", {"a": 1, "b": 1})).text == "2"


def test_a_tool_that_raises_or_dies_leaves_a_text():
    tools = box(slow_tools.explode)
    assert tools.call(ToolCall("explode", {"kind": "value"})).text == "error: ValueError: boom"
    assert tools.call(ToolCall("explode", {"kind": "tool"})).error == "tool_error"
    assert tools.call(ToolCall("explode", {"kind": "exit"})).error == "exception"
    died = box(slow_tools.die).call(ToolCall("die", {}))
    assert died.error == "exception" and "exit code 7" in died.text


def test_ten_megabytes_are_cut_before_they_travel():
    result = box(slow_tools.flood, max_output_chars=500).call(ToolCall("flood", {"size": 10_000_000}))
    assert result.truncated and len(result.text) == 500


def test_what_a_tool_prints_does_not_mix_with_its_reply():
    assert box(slow_tools.chatter).call(ToolCall("chatter", {})).text == "quiet"


def test_a_limit_for_the_whole_toolbox():
    tools = Toolbox([Tool.from_function(slow_tools.hang)], timeout_s=0.2)
    assert tools.call(ToolCall("hang", {"seconds": 60.0})).error == "timeout"


def test_functions_that_cannot_travel_are_refused_at_once():
    def local(x: str) -> str:
        """not importable"""
        return x

    with pytest.raises(ValueError, match="must be importable"):
        box(local)


def test_workers_end_with_the_interpreter():
    tools = box(slow_tools.whoami)
    pid = int(tools.call(ToolCall("whoami", {})).text)
    worker.shutdown()
    assert not runs(pid)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_does_not_outlive_a_killed_parent():
    code = (
        "from tests.tools import slow_tools\n"
        "from tools import worker\n"
        "print(worker.run(slow_tools.whoami, {}, 30, 100).text, flush=True)\n"
        "worker.run(slow_tools.hang, {'seconds': 600.0}, 600, 100)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(600):
        if not runs(pid):
            return
        time.sleep(0.05)
    raise AssertionError(f"worker {pid} is still there")
