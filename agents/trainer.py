"""A run from start to end: warm start, evaluation, iterations, evaluation, export, report. Knows no algorithm."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from agents import checkpoint, demonstrate, lora, recording, warm
from agents.actor import facts_mean
from agents.cli import UsageError, as_json
from agents.config import TrainConfig
from agents.display import Display
from agents.doctor import diagnose
from agents.environment import losses, news
from agents.evaluate import EvalResult, evaluate, failure_of
from agents.imitate import record
from agents.models import export, load_model, locate
from agents.rollout import Progress
from agents.runfolder import RunFolder, plain, write_json
from agents.session import Session, derived, env_arguments
from agents.trajectory import Trajectory
from policy_opt.batch import Batch
from policy_opt.errors import RecipeError

Metrics = dict[str, float]
BASE = "base"
"""Of a run with adapters and a warm start: the folder of the model under the adapters, which checkpoints leave out."""


class Interrupted(Exception):
    """A signal asked the run to stop; what is needed to go on is on disk."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Trainer:
    """Runs a session in a run folder. All processes make the same calls; only the first one writes."""

    def __init__(self, session: Session, folder: RunFolder | None, display: Display):
        self.session, self.folder, self.display = session, folder, display
        self.config = session.config
        self.history: list[dict[str, Any]] = folder.records("metrics.jsonl") if folder else []
        self.evals: list[dict[str, Any]] = folder.records("eval.jsonl") if folder else []
        self.started_fresh = True
        self.signal: int | None = None
        self.started = time.monotonic()

    # ------------------------------------------------------------------ the run

    def run(self) -> dict[str, Any]:
        """Everything that is still to do; returns the summary. Raises Interrupted after a signal."""
        with self._listening(), self._ahead():
            if self.started_fresh:
                self.warm_start()
                self._stop_if_asked()
                self.evaluate("before")
                self.save()
                self._stop_if_asked()
            while self.session.loop.step < self.config.steps:
                self.iterate()
                self._stop_if_asked(save=True)
            self.evaluate("after")
            self._stop_if_asked()
            if self.config.eval.hard_episodes and self._has_hard_level():
                self.evaluate("harder")
            return self.finish()

    def warm_start(self) -> None:
        """Imitate the environment's demonstrators, if the configuration and the environment say so."""
        s, c = self.session, self.config
        weights = demonstrate.demonstrator_weights(s.make_env, c.warm.scripts) if c.warm.when != "never" else {}
        if not weights and c.warm.when == "always":
            raise UsageError(f"{c.env} has no demonstrators, so there is nothing to warm-start on (--warm.when never)")
        if not weights or (c.warm.when == "auto" and c.model != "bundled"):
            return
        self.display.phase("warm start", f"imitating up to {c.warm.episodes} scripted episodes")
        began = time.monotonic()
        tasks = warm.demo_tasks(c.warm, s.tasks, c.seed)
        demos = demonstrate.demonstrations(s.make_env, weights, tasks, c.seed, s.player.limits.max_turns)
        room = s.player.limits.max_context
        ledgers, dropped = warm.fitting([record(s.chat, demo) for demo in demos], room)
        if dropped:
            self.display.note(f"{dropped} demonstrations do not fit {room} tokens and are left out")
        with lora.beneath(s.model, s.world.sharding) as model:
            how = warm.warm_start(
                model, ledgers, c.warm, s.convention, seed=c.seed, micro_tokens=s.learner.micro_tokens, world=s.world,
                packing=c.packing, recompute=c.recompute, on_step=self._on_warm_step,
            )  # fmt: skip
        if lora.layers(s.model):
            with s.learner.bank.policy.whole("cpu") as model:  # split weights: all processes take part
                if self.folder is not None:
                    card = [f"# {c.model} after its warm start"]
                    export(lora.without(model), s.tokenizer, self.folder.path / BASE, card, s.chat.pictures)
        self.display.note(f"warm start: {how}, {len(ledgers)} demonstrations, {time.monotonic() - began:.0f} s")

    def _on_warm_step(self, step: int, steps: int, nll: float) -> None:
        self.display.progress("warm start", step, steps, f"{nll:.3f} nats/token")
        self._stop_if_alone()

    def iterate(self) -> None:
        """One iteration, its numbers, and what is due after it."""
        s = self.session
        s.actor.begin()
        began = time.monotonic()
        s.actor.on_progress = lambda p: self.display.progress("rollout", p.done, p.total, "")
        batch, metrics = s.loop.iterate(more=s.loop.step + 1 < self.config.steps)
        record = self._record(batch, metrics, time.monotonic() - began)
        if self.folder:
            self.folder.log("metrics.jsonl", record)
            self._store(batch)
        self.history.append(record)
        for line in news(s.make_env):
            self.display.note(line)
        self.display.step(record, diagnose(self.history, self.evals))
        c, step = self.config, s.loop.step
        if c.eval.every and step % c.eval.every == 0 and step < c.steps:
            self.evaluate("during", c.eval.every_episodes)
        if step == c.steps or step % c.save.every == 0:
            self.save()

    def _record(self, batch: Batch, metrics: Mapping[str, float], seconds: float) -> dict[str, Any]:
        played = self.session.actor.played
        extra: dict[str, Any] = {"step": self.session.loop.step, "seconds": round(seconds, 3)}
        for fact in ("tool_calls", "tool_errors"):
            mean = facts_mean(played, fact)
            if mean is not None:
                extra[fact] = mean
        sampled = sum(t.length for t in played)
        extra["episodes"] = len(played)
        finished = [t for t in played if not t.unfinished]
        extra["failures"] = sum(failure_of(t) is not None for t in finished) / max(1, len(played))
        if lost := losses(self.session.make_env):
            extra["workers_lost"] = lost
        if len(finished) < len(played):
            extra["unfinished"] = 1 - len(finished) / len(played)
        extra["trained_tokens"] = int(batch.real_BT.sum())
        extra["tokens_per_second"] = round(sampled / max(seconds, 1e-9), 1)
        extra["lr"] = self.session.learner.lr
        extra["oom_splits"] = self.session.learner.count_splits()
        if (ahead := self.session.actor.ahead) is not None:
            extra["wait_seconds"] = round(ahead.waited, 3)
        if self.session.player.sync is not None:
            extra |= self.session.player.sync.metrics()
        return {**extra, **metrics}

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, name: str, episodes: int | None = None) -> EvalResult:
        """Play held-out tasks and record the result under a name: before, during, after, harder."""
        s, c = self.session, self.config
        hard = name == "harder"
        s.actor.free()
        n = episodes or (c.eval.hard_episodes if hard else c.eval.episodes)
        self.display.phase(f"evaluation ({name})", f"{n} held-out tasks")
        played: list[Trajectory] = []
        result = evaluate(
            s.player, c.env, episodes=n, level=c.eval.hard_level if hard else None, env_kwargs=env_arguments(c),
            seed=derived(c.seed, "evaluation"), label=name, step=s.loop.step, name=c.model, on_progress=self._on_eval,
            keep=played.extend,
        )  # fmt: skip
        record = plain(result.as_dict())
        self.evals.append(record)
        if self.folder:
            self.folder.log("eval.jsonl", record)
            if c.save.trajectories:
                self._append(played[: c.save.eval_trajectories], step=s.loop.step, label=name)
        self.display.evaluation(name, record)
        return result

    def _on_eval(self, p: Progress) -> None:
        self.display.progress("evaluation", p.done, p.total, "")
        self._stop_if_alone()

    def _has_hard_level(self) -> bool:
        env = self.session.make_env()
        try:
            env.reset(seed=0, options={"index": 0, "split": "eval", "level": self.config.eval.hard_level})
        except (ValueError, KeyError, TypeError):
            return False
        finally:
            env.close()
        return True

    # ------------------------------------------------------------------ disk

    def save(self) -> None:
        """A checkpoint of everything that the next iteration depends on. A full disk is reported, not fatal."""
        self.session.actor.settle()
        s = self.session
        learner = s.learner.state_dict() if self.folder or s.world.sharding else {}  # split weights: all take part
        if self.folder is None:
            return
        try:
            state = {
                "loop": s.loop.state_dict(), "actor": s.actor.state_dict(), "learner": learner,
                "files": self.folder.mark(), "processes": s.world.size,
            }  # fmt: skip
            checkpoint.save(self.folder.path / "checkpoints", s.loop.step, state, self.config.save.keep)
        except OSError as error:
            self.display.note(f"no checkpoint at step {s.loop.step}: {error}. Older ones are untouched.")

    def _store(self, batch: Batch) -> None:
        """Keep this iteration's episodes, if they are due."""
        every, step = self.config.save.trajectories, self.session.loop.step
        if self.folder is None or not every or not (step == 1 or step % every == 0 or step == self.config.steps):
            return
        columns = recording.token_columns(batch, self.session.learner.streams)
        self._append(self.session.actor.played, columns, step=step)

    def _append(self, played: Sequence[Trajectory], columns: Any = None, **extra: Any) -> None:
        assert self.folder is not None
        try:
            recording.store(self.folder.path / "trajectories", played, columns, **extra)
        except OSError as error:
            self.display.note(f"episodes of step {self.session.loop.step} are not stored: {error}")

    def restore(self, path: Path | None) -> None:
        """Go on exactly where a checkpoint stands; without one, from the beginning."""
        saved = checkpoint.load(path) if path is not None else None
        if saved is not None:
            restore(self.session, saved)
            before, now = saved.state.get("processes", self.session.world.size), self.session.world.size
            if before != now:
                self.display.note(
                    f"the run had {before} process(es) and now has {now}: it goes on as it would have but for rounding"
                )
        if self.folder is not None:
            self.folder.rewind(saved.state["files"] if saved is not None else {})
            self.history = self.folder.records("metrics.jsonl")
            self.evals = self.folder.records("eval.jsonl")
        self.started_fresh = saved is None

    def finish(self) -> dict[str, Any]:
        """Export, report, summary."""
        s = self.session
        summary: dict[str, Any] = {}
        for entry in self.evals:
            if entry["label"] in ("before", "after", "harder"):
                summary[f"success_{entry['label']}"] = entry["success"]
        with s.learner.bank.policy.whole("cpu") as model:  # split weights: all processes take part
            if self.folder is not None:
                export(model, s.tokenizer, self.folder.path / "model", self._card(summary), s.chat.pictures)
                if lora.layers(model):
                    base = self.folder.path / BASE
                    under = str(base) if base.is_dir() else locate(self.config.model)
                    lora.save(model, self.folder.path / "adapter", under)
        if self.folder is None:
            return summary
        summary["run"] = str(self.folder.path)
        summary["seconds"] = round(time.monotonic() - self.started, 1)
        summary["report"] = self._report()
        write_json(self.folder.path / "summary.json", summary)
        return summary

    def _report(self) -> str | None:
        """The HTML page; a run is not lost over it."""
        from agents.view import write_report

        assert self.folder is not None
        self.display.phase("report", "writing one HTML page")
        try:
            return str(write_report(self.folder.path))
        except Exception as error:
            self.display.note(f"no report: {type(error).__name__}: {error}")
            return None

    def _card(self, summary: Mapping[str, Any]) -> list[str]:
        c = self.config
        lines = [f"# {c.model} trained on {c.env} with {c.algo}", "", f"{c.steps} iterations, seed {c.seed}."]
        for name in ("before", "after", "harder"):
            if f"success_{name}" in summary:
                mean, low, high = summary[f"success_{name}"]
                lines.append(f"- success {name}: {mean:.3f} [{low:.3f}, {high:.3f}]")
        return lines

    # ------------------------------------------------------------------ signals

    @contextmanager
    def _ahead(self):
        """What plays ahead is there while the run goes on."""
        ahead = self.session.actor.ahead
        if ahead is None:
            yield
            return
        try:
            ahead.open()
            yield
        finally:
            ahead.close()

    @contextmanager
    def _listening(self):
        """Turn SIGINT and SIGTERM into a stop at the next safe point; a second one ends the process at once."""
        def note(number: int, frame: Any) -> None:
            if self.signal is not None:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.signal = number
            self.display.note(f"{signal.Signals(number).name}: stopping after this iteration (again: at once)")

        old: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except RuntimeError:
            if self.session.world.size > 1:  # a launcher ends those that are left; which one was lost is said first
                old[signal.SIGTERM] = signal.SIG_IGN
            raise
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _stop_if_asked(self, save: bool = False) -> None:
        """Stop where a signal came to any process; all of them call this. `save`: with a checkpoint of this step."""
        numbers = [n for n in self.session.world.gather(self.signal) if n is not None]
        if not numbers:
            return
        if save:
            self.save()
        raise Interrupted(numbers[0])

    def _stop_if_alone(self) -> None:
        """Stop at once where no other process would wait; what was not saved is played again on resume."""
        if self.session.world.size == 1:
            self._stop_if_asked()


def restore(session: Session, saved: checkpoint.Checkpoint) -> None:
    """Loop, actor, bank, weights and optimizers as of a checkpoint."""
    loop, learner, state = session.loop, session.learner, saved.state
    try:
        base = saved.path.parents[1] / BASE
        if lora.layers(session.model) and base.is_dir():
            # first of all: models that are built from the policy take its base weights over
            plain, _ = load_model(str(base), session.model.dtype)
            checkpoint.load_tensors(lora.base_state(session.model), plain.state_dict(), base)
        loop.load_state_dict(state["loop"])
        session.actor.load_state_dict(state["actor"])
        recipe, _ = loop.enter()
        every = (session.recipe, *(phase.recipe for phase in session.recipe.phases))
        known = {name: spec for r in every for name, spec in r.models.items()}
        built = {name: spec for name, spec in known.items() if name in state["learner"]["members"]}
        learner.prepare(built, (), recipe.optimizer)
        learner.load_state_dict(state["learner"])
    except (KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{saved.path} is not a training checkpoint: {error!r}") from error
    except (checkpoint.CheckpointError, RecipeError, UsageError) as error:
        raise checkpoint.CheckpointError(f"{saved.path}: {error}") from error


def save_config(folder: RunFolder, config: TrainConfig) -> None:
    """The resolved configuration, as `--resume` reads it."""
    kept = replace(config, resume=None, from_step=None, dry_run=False, json=False, run=None)
    write_json(folder.path / "config.json", as_json(kept))
