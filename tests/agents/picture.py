"""Pictures of a report for the README: `python -m tests.agents.picture runs/NAME/report.html docs/images`.

Writes report.png (numbers, evaluations, curves) and trajectory.png (one solved episode of several tool calls).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.agents.chromium import Chromium

TOP = 1120
"""Height of the first picture, in CSS pixels."""
CHOOSE = """(() => {
  const t = report.data.table, last = Math.max(...t.step.filter(s => s !== null));
  const good = [...t.step.keys()].filter(i => t.correct[i] === 1 && t.calls[i] >= 2 && t.split[i] === 'train');
  const i = good.find(i => t.step[i] >= 0.5 * last) ?? good[0] ?? 0;
  report.table.pick(i);
  report.table.window.scrollTop = Math.max(0, report.table.order.indexOf(i) - 6) * 30;
  return report.data.table.task[i];
})()"""


def main(report: str, folder: str) -> None:
    """Write both pictures."""
    out = Path(folder)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        Chromium(Path(profile), 1280, TOP) as page,
    ):
        page.emulate("light")
        page.open(Path(report), "document.documentElement.dataset.ready === 'yes'")
        page.wait("document.querySelector('.verdict')")
        page.screenshot(out / "report.png")
        task = page.value(CHOOSE)
        page.wait(f"document.querySelector('.episode h3').innerText === {task!r}")
        page.value("window.scrollTo(0, document.querySelector('.filters').offsetTop - 12)")
        height = int(page.value("document.querySelector('.browser').offsetHeight")) + 70
        size = {"width": 1280, "height": min(1100, max(760, height)), "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        page.value("window.scrollTo(0, document.querySelector('.filters').offsetTop - 12)")
        page.screenshot(out / "trajectory.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
