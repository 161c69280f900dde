"""Cells on all cores, as processes of their own, shown live. Stopped at any time, the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agents.cli import UsageError
from agents.compare.cells import Cell

POLL_S = 0.2
"""Seconds between two looks at the processes."""
SAY_S = 60.0
"""Seconds between two lines where there is no terminal."""


class Stopped(Exception):
    """A signal asked the comparison to stop; what is done stays done."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class CellFailed(Exception):
    """The training or evaluation of a cell ended with an error."""


@dataclass
class Running:
    """A process of a cell."""

    cell: Cell
    what: str
    """training | evaluating"""
    process: subprocess.Popen[str]
    device: int | None
    printed: IO[str]
    """Its standard output."""
    at: int = 0
    """Bytes of metrics.jsonl that were read."""
    steps: int = 0
    last: dict[str, Any] = field(default_factory=dict)

    def look(self) -> None:
        """Read what the run has written since."""
        path = self.cell.run / "metrics.jsonl"
        if self.what != "training" or not path.is_file():
            return
        size = path.stat().st_size
        if size == self.at:
            return
        records = self.cell.metrics
        self.at, self.steps = size, len(records)
        self.last = records[-1] if records else {}

    def say(self) -> str:
        """Where it is."""
        if self.what != "training":
            return f"playing {self.cell.episodes} tasks"
        if not self.steps:
            return "starting"
        return f"step {self.steps}/{self.cell.config.steps}, success {self.last.get('correct', 0.0):.2f}"


def devices() -> list[int | None]:
    """The accelerators that cells may be given, one each; [None] where they share the cores."""
    import torch

    return [*range(torch.cuda.device_count())] or [None]


def run_all(cells: Sequence[Cell], jobs: int, console: Console) -> None:
    """Run what is not done yet.

    Args:
        cells: in the order in which they start.
        jobs: processes at a time; 0: one per accelerator, or one per core where there is none.
        console: where progress is shown.

    Raises:
        Stopped: by SIGINT, SIGTERM or SIGHUP; the processes have saved what they had.
        UsageError: a process ended with exit code 2, the user's mistake.
        CellFailed: a process failed otherwise. The others are stopped and have saved what they had.
    """
    waiting = [cell for cell in cells if not cell.done]
    if len(waiting) < len(cells):
        console.print(f"{len(cells) - len(waiting)} of {len(cells)} runs are done already")
    if not waiting:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    places = devices()
    if jobs == 0:
        jobs = cores if places == [None] else len(places)
    jobs = min(jobs, len(waiting))
    free = [places[i % len(places)] for i in range(jobs)]
    queue = Queue(waiting, free, max(1, cores // jobs), Board(cells, console))
    with queue.board.shown(), _signals(queue):
        queue.run()


class Queue:
    """Starts cells where there is room, and waits for them."""

    def __init__(self, waiting: list[Cell], free: list[int | None], threads: int, board: Board):
        self.waiting, self.free, self.threads, self.board = waiting, free, threads, board
        self.running: list[Running] = []
        self.signal: int | None = None

    def run(self) -> None:
        """Until all are done; see `run_all`."""
        try:
            while self.waiting or self.running:
                while self.waiting and self.free:
                    self.start(self.waiting.pop(0), self.free.pop())
                time.sleep(POLL_S)
                if self.signal is not None:
                    raise Stopped(self.signal)
                for job in list(self.running):
                    job.look()
                    if job.process.poll() is not None:
                        self.end(job)
                self.board.update(self.running)
        except BaseException:
            self.stop()
            raise

    def start(self, cell: Cell, device: int | None) -> None:
        """Start the next thing that a cell has to do."""
        what, arguments = cell.command()
        surroundings = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        if device is not None:
            surroundings["CUDA_VISIBLE_DEVICES"] = str(device)
        printed = cell.log.with_suffix(".out").open("w+", encoding="utf-8", errors="replace")
        with cell.log.open("a", encoding="utf-8") as log:
            # A session of its own: Ctrl-C on the terminal reaches this process alone, which tells the others once.
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments], stdout=printed, stderr=log, stdin=subprocess.DEVNULL, text=True,
                env=surroundings, start_new_session=True,
            )  # fmt: skip
        job = Running(cell, what, process, device, printed)
        self.running.append(job)
        self.board.began(job)

    def end(self, job: Running) -> None:
        """A process has ended: keep what it made, or say why it failed."""
        self.running.remove(job)
        printed, code = self.collect(job), job.process.returncode
        # 3: too many episodes without a verdict. The evaluation is kept, and marked wherever it is shown.
        if code not in ((0,) if job.what == "training" else (0, 3)):
            said = job.cell.log.read_text(encoding="utf-8", errors="replace")[-1500:].strip()
            message = f"{job.cell.name}: {job.what} ended with exit code {code}; {job.cell.log} ends with:\n{said}"
            raise UsageError(message) if code == 2 else CellFailed(message)
        if job.what == "evaluating":
            job.cell.store(printed)
        self.board.ended(job)
        if job.cell.done:
            self.free.append(job.device)
        else:
            self.start(job.cell, job.device)

    def collect(self, job: Running) -> str:
        """What a process printed; moved to the end of the cell's log."""
        job.printed.seek(0)
        printed = job.printed.read()
        job.printed.close()
        job.cell.log.with_suffix(".out").unlink()
        with job.cell.log.open("a", encoding="utf-8") as log:
            log.write(printed)
        return printed

    def stop(self) -> None:
        """Ask every process to save and end, and wait for it; a second signal ends them at once."""
        for job in self.running:
            job.process.terminate()
        self.signal = None
        for job in self.running:
            while job.process.poll() is None:
                time.sleep(POLL_S)
                if self.signal is not None:
                    job.process.kill()
            self.collect(job)


@contextmanager
def _signals(queue: Queue) -> Iterator[None]:
    """Turn signals into a stop."""

    def note(number: int, frame: Any) -> None:
        queue.signal = number

    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    old = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Board:
    """What is shown: bars on a terminal, else a line for each event and one a minute."""

    def __init__(self, cells: Sequence[Cell], console: Console):
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[say]}"))
        self.progress = Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
        )
        self.count, self.finished = len(cells), sum(cell.done for cell in cells)
        self.weight = {cell.name: cell.config.steps + 1 for cell in cells}
        total = sum(self.weight.values())
        self.base = sum(self.weight[cell.name] for cell in cells if cell.done)
        self.all = self.progress.add_task("[bold]all runs", total=total, completed=self.base, say=self.done_text())
        self.bars: dict[str, TaskID] = {}
        self.said = time.monotonic()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While the cells run."""
        with self.progress:
            yield

    def done_text(self) -> str:
        """How many runs are done."""
        return f"{self.finished} of {self.count} done"

    def began(self, job: Running) -> None:
        """A process has started."""
        name = job.cell.name
        if name not in self.bars:
            self.bars[name] = self.progress.add_task(name, total=self.weight[name], say=job.say())
        if not self.console.is_terminal:
            self.console.print(f"{name}: {job.what}")

    def ended(self, job: Running) -> None:
        """A process has ended well."""
        if not job.cell.done:
            return
        name = job.cell.name
        self.finished += 1
        self.base += self.weight[name]
        self.progress.remove_task(self.bars.pop(name))
        success = job.cell.after["success"][0]
        self.console.print(f"{name}: success {success:.3f} on {job.cell.episodes} tasks ({self.done_text()})")

    def update(self, running: Sequence[Running]) -> None:
        """Where all of them are."""
        completed = self.base
        for job in running:
            done = job.steps if job.what == "training" else job.cell.config.steps
            completed += done
            self.progress.update(self.bars[job.cell.name], completed=done, say=job.say())
        self.progress.update(self.all, completed=completed, say=self.done_text())
        if not self.console.is_terminal and time.monotonic() - self.said > SAY_S:
            self.said = time.monotonic()
            self.console.print("; ".join(f"{job.cell.name}: {job.say()}" for job in running))
