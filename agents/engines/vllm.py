"""Samples with vLLM, in a process of its own on this process' device (`agents.engines.vllm_core`).

The engine has its own copy of the weights: `agents.sync` delivers the policy's after each update and verifies it.
Every turn is one request with all of the row's ids as prompt; vLLM keeps keys and values by prefix, so that only what
is new is computed. Pictures go along as images of the model's own size, one placeholder each in the prompt; vLLM
expands them, and must come to the row's ids.

Log-probs are exactly the convention's (`SampleParams`): vLLM's `processed_logprobs` are those of the softmax after
bans and temperature, and bans are a bias of minus infinity. They are also *after* top-k and top-p, which vLLM offers
no way around: with these (in evaluation only, training refuses them) the log-probs that are recorded are those among
the ids that were kept.

What is sampled is a function of the calls: seeds belong to (run seed, group, member, turn), and vLLM does not run on
while nobody waits for it. What is not promised is that it is the same whatever else is in the batch: rounding depends
on the batch's size, and a draw that falls on the edge between two ids can change with it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents import lora
from agents.cli import UsageError
from agents.config import VllmConfig
from agents.engines.base import EngineFailure, Key, Sampled, SampleParams, stream
from agents.engines.vllm_core import Convention, Turn
from agents.pictures import Picture, PictureFormat, placed
from agents.sync import write_model
from policy_opt.protocols import Sampler

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, that vLLM makes room for
MOST_RANK = _RANKS[-1]
"""Highest rank of an adapter that it takes."""
_MOST_BANNED = 1024  # ids that vLLM can bias per request on a GPU
_FED_TOKENS = 4096  # per step, where prompts are fed whole
_COLDEST = 0.01  # vLLM silently raises temperatures below this one, zero apart


@dataclass(eq=False)
class _Row:
    """An open episode."""

    key: Key
    ids: list[int] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    """Those whose placeholders stand in `ids`, in order."""
    request: str = ""
    """Name of the request under way; empty between turns."""


class VllmEngine:
    """`agents.engines.base.Engine` and `agents.sync.Receiver` over vLLM.

    The process starts when weights are first delivered.

    Args:
        settings: memory, GPUs, eagerness.
        stop_ids: sampled ids that end a turn.
        banned_ids: ids that get probability 0.
        params: temperature, top-k, top-p and the longest turn.
        rows: turns that are sampled at the same time; more wait.
        max_context: tokens per row at most.
        dtype: of the engine's weights and computation.
        device: where it runs.
        pictures: how the model reads pictures; None where rows have none.
        tokenizer: the model's; vLLM's image processor asks for one.

    Attributes:
        hooks: sampler rules that it serves: none, because they change every token's temperature.
    """

    hooks: frozenset[str] = frozenset()

    def __init__(
        self,
        settings: VllmConfig,
        *,
        stop_ids: Sequence[int],
        banned_ids: Sequence[int] = (),
        params: SampleParams | None = None,
        rows: int = 128,
        max_context: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        pictures: PictureFormat | None = None,
        tokenizer: Any = None,
    ):
        if not stop_ids:
            raise ValueError("an engine needs at least one stop id, or no turn could end")
        if pictures is not None and tokenizer is None:
            raise ValueError("an engine for pictures needs the model's tokenizer")
        self.pictures, self.tokenizer = pictures, tokenizer
        self.settings, self.rows, self.max_context, self.dtype = settings, rows, max_context, dtype
        self.params, self.device = params or SampleParams(), device or torch.device("cpu")
        self.stop_ids, self.banned_ids = tuple(stop_ids), tuple(banned_ids)
        self.version = -1
        refuse(self)
        self.process: CoreProcess | None = None
        self._numbers = self._adapters = 0
        self._open: dict[Key, _Row] = {}
        self._busy: dict[str, _Row] = {}
        self._full: list[_Row] = []
        self._asked: list[Turn] = []
        self._dropped: list[str] = []
        self._shown: set[int] = set()

    # ------------------------------------------------------------------ Engine

    def turn(
        self,
        key: Key,
        ids: Sequence[int],
        seed: Key,
        max_new_tokens: int,
        sampler: Sampler | None = None,
        pictures: Sequence[Picture] = (),
    ) -> None:
        """Feed ids to row `key`, then sample one turn; see `Engine.turn`.

        Raises:
            ValueError: the row is in the middle of a turn, or a new row is fed nothing, or a rule is asked for.
            PictureError: the placeholders among the ids are not the pictures'.
        """
        check_pictures(self.pictures, ids, pictures)
        row = self._open.setdefault(key, _Row(key))
        if row.request:
            raise ValueError(f"row {key} has not finished its turn")
        if not row.ids and not len(ids):
            raise ValueError(f"row {key} is new and was fed no tokens")
        if sampler is not None and sampler.hook is not None:
            raise ValueError(f"the engine vllm has no sampler rule `{sampler.hook}`")
        row.ids.extend(map(int, ids))
        row.pictures.extend(pictures)
        budget = min(max_new_tokens, self.max_context - len(row.ids))
        self._numbers += 1
        row.request = str(self._numbers)
        if budget <= 0:
            self._full.append(row)
            return
        temperature = self.params.temperature if sampler is None else sampler.temperature
        refuse_cold(temperature)
        number = int(stream(seed).generate_state(1, np.uint64)[0]) >> 1
        prompt, names = folded(self.pictures, row.ids), tuple(picture.key for picture in row.pictures)
        self._asked.append(Turn(row.request, prompt, number, budget, temperature, names))
        self._busy[row.request] = row

    def run(self) -> list[tuple[Key, Sampled]]:
        """Advance until at least one row finished its turn. Ordered by key; [] if none has a turn to finish.

        Raises:
            EngineFailure: the engine's process is gone, or expands a row's pictures to other placeholders.
            FloatingPointError: the model's logits are not finite.
        """
        done: list[tuple[_Row, Sampled]] = []
        if self._full:
            done = [(row, Sampled((), (), "context")) for row in self._full]
            self._full = []
        elif self._busy:
            asked, dropped, self._asked, self._dropped = self._asked, self._dropped, [], []
            self._show(picture for turn in asked for picture in self._busy[turn.name].pictures)
            done = [self._finish(*over) for over in self._core().call("turns", asked, dropped)]
        for row, _ in done:
            row.request = ""
        return sorted(((row.key, sampled) for row, sampled in done), key=lambda pair: pair[0])

    def _show(self, pictures: Iterable[Picture]) -> None:
        """Bring the process the pictures that it does not have yet."""
        new = {picture.key: picture.image for picture in pictures if picture.key not in self._shown}
        if new:
            self._core().call("show", new)
            self._shown |= new.keys()

    def _finish(self, name: str, ids: list[int], logps: list[float], fed: list[int]) -> tuple[_Row, Sampled]:
        row = self._busy.pop(name)
        check_expansion(row.key, row.ids, fed)
        if not math.isfinite(sum(logps)):
            raise FloatingPointError(f"row {row.key}: the model's logits are not finite (version {self.version})")
        row.ids.extend(ids)
        full = len(row.ids) >= self.max_context
        return row, Sampled(
            tuple(ids), tuple(logps), "stop" if ids[-1] in self.stop_ids else "context" if full else "length"
        )

    def close(self, key: Key) -> None:
        """Drop a row; unknown keys are ignored."""
        row = self._open.pop(key, None)
        if row is None or not row.request:
            return
        self._full = [other for other in self._full if other is not row]
        if self._busy.pop(row.request, None) is not None:
            waiting = [turn for turn in self._asked if turn.name != row.request]
            if len(waiting) == len(self._asked):
                self._dropped.append(row.request)
            self._asked = waiting

    def reset(self) -> None:
        """Drop all rows and all keys and values, so that what comes does not depend on what was."""
        self._open, self._busy, self._full, self._asked, self._dropped = {}, {}, [], [], []
        self._shown = set()
        if self.process is not None:
            self.process.call("forget")

    # ------------------------------------------------------------------ Receiver

    def deliver(self, model: Any, version: int) -> None:
        """Take over the model's weights. Of a model with adapters the base is taken once, then the adapters only,
        unless they are to be merged.
        """
        adapted = self._takes_adapters(model)
        if self.process is None:
            self.process = self._start(model)
        elif not adapted:
            write_model(lora.merged(model) if lora.layers(model) else model, self.process.folder / "model", self.dtype)
            self.process.call("load", str(self.process.folder / "model"))
        if adapted:
            self._adapters += 1  # vLLM keeps adapters by number
            lora.save(model, self.process.folder / "adapter")
            self.process.call("adapt", str(self.process.folder / "adapter"), self._adapters)
        self._shown = set()  # what was kept for older weights is gone
        self.version = version

    def _takes_adapters(self, model: Any) -> bool:
        return bool(lora.layers(model)) and not self.settings.merge

    def log_probs(self, ids: Sequence[int], pictures: Sequence[Picture] = ()) -> list[float]:
        """Log-prob of each id given those before it, all but the first."""
        check_pictures(self.pictures, ids, pictures)
        self._show(pictures)
        names = tuple(picture.key for picture in pictures)
        return self._core().call("log_probs", folded(self.pictures, ids), names)

    def shutdown(self) -> None:
        """End the process; the next delivery starts another one."""
        if self.process is not None:
            self.process.end()
            self.process, self._shown = None, set()

    # ------------------------------------------------------------------ the process

    def _core(self) -> CoreProcess:
        if self.process is None:
            raise EngineFailure("the engine vllm has no weights yet: deliver them first")
        return self.process

    def _start(self, model: Any) -> CoreProcess:
        process = CoreProcess(environment(self.device, self.settings.tensor_parallel))
        adapted = self._takes_adapters(model)
        plain = lora.without(model) if adapted else lora.merged(model) if lora.layers(model) else model
        write_model(plain, process.folder / "model", self.dtype)
        if self.pictures is not None:
            self.pictures.save(process.folder / "model")
            self.tokenizer.save_pretrained(process.folder / "model")
        options = self._options(str(process.folder / "model"), model)
        process.call("start", options, Convention(
            self.params.top_k, self.params.top_p, self.stop_ids, self.banned_ids
        ))  # fmt: skip
        return process

    def _options(self, folder: str, model: Any) -> dict[str, Any]:
        """Arguments of `vllm.LLM`."""
        cuda = self.device.type == "cuda"
        options: dict[str, Any] = {
            "model": folder, "skip_tokenizer_init": self.pictures is None, "generation_config": "vllm", "seed": 0,
            "dtype": str(self.dtype).removeprefix("torch."), "max_model_len": self.max_context,
            "max_num_seqs": self.rows, "logprobs_mode": "processed_logprobs", "enable_prefix_caching": True,
            "enforce_eager": self.settings.eager or not cuda, "use_tqdm_on_load": False,
            "tensor_parallel_size": self.settings.tensor_parallel,
        }  # fmt: skip
        if cuda:
            options["gpu_memory_utilization"] = self.settings.memory
        else:
            options["kv_cache_memory_bytes"] = int(self.settings.kv_gib * 2**30)
            # Without a GPU vLLM cannot take back the draw of a seeded request whose prompt is fed in parts.
            options["enable_chunked_prefill"] = False
            options["max_num_batched_tokens"] = max(_FED_TOKENS, self.max_context, self.rows)
        if self.pictures is not None:
            options["limit_mm_per_prompt"] = most_pictures(self.max_context)
        if self._takes_adapters(model):
            rank = max(layer.r[lora.ADAPTER] for layer in lora.layers(model).values())
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(r for r in _RANKS if r >= rank)}
        return options


def check_pictures(form: PictureFormat | None, ids: Sequence[int], pictures: Sequence[Picture]) -> None:
    """ValueError (PictureError) where what a row is fed does not fit its pictures, or the engine reads none."""
    if form is not None:
        placed(ids, pictures, form.pad_id)
    elif pictures:
        raise ValueError("this engine was built without `pictures`, and a row has some")


def folded(form: PictureFormat | None, ids: Sequence[int]) -> tuple[int, ...]:
    """Ids as vLLM is fed them: with one placeholder per picture, which it expands."""
    return tuple(map(int, ids if form is None else form.folded(ids)))


def check_expansion(key: Key, ids: Sequence[int], fed: Sequence[int]) -> None:
    """EngineFailure where vLLM made other ids of a prompt than the row has."""
    if list(ids) != list(fed):
        raise EngineFailure(
            f"row {key}: vLLM expands its pictures to a prompt of {len(fed)} tokens, the row has {len(ids)}: the "
            f"engine's image processor is not the run's. Does it have the same model and settings?"
        )


def most_pictures(max_context: int) -> dict[str, int]:
    """Pictures that fit a row at most, each of three tokens or more; no videos."""
    return {"image": max(1, max_context // 3), "video": 0}


def refuse(engine: VllmEngine) -> None:
    """UsageError where vLLM is missing or cannot do what is asked."""
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "the engine vllm needs vLLM: pip install 'palaestra[vllm]' (without a GPU: make test-engines shows how)"
        )
    if engine.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"the engine vllm cannot compute in {engine.dtype}: take --dtype float32, or --engine hf")
    if engine.device.type != "cuda" and engine.settings.tensor_parallel > 1:
        raise UsageError("--vllm.tensor-parallel spreads the engine over GPUs, and there is none")
    if len(engine.banned_ids) > _MOST_BANNED:
        raise UsageError(f"the engine vllm can ban {_MOST_BANNED} ids, this tokenizer has {len(engine.banned_ids)}")
    refuse_cold(engine.params.temperature)


def refuse_cold(temperature: float) -> None:
    """UsageError for temperatures that vLLM would replace."""
    if 0 < temperature < _COLDEST:
        raise UsageError(f"the engine vllm takes temperature 0 or at least {_COLDEST}, not {temperature:g}")


def environment(device: torch.device, gpus: int) -> dict[str, str]:
    """Variables of the engine's process: its own devices, no process group of the trainer, nothing sent home."""
    ours = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    root = str(Path(__file__).parents[2])
    env |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
    }  # fmt: skip
    if device.type == "cuda":
        first = device.index or 0
        known = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        names = known or [str(i) for i in range(first + gpus)]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + gpus])
    else:
        env |= {
            "CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }  # fmt: skip
    return env


class CoreProcess:
    """The process behind the engine, its folder, and calls to it. Ended with this object, or with this program."""

    def __init__(self, env: dict[str, str]):
        self.folder = Path(tempfile.mkdtemp(prefix="palaestra-vllm-"))
        self.log = self.folder / "log"
        self.connection, theirs = Pipe()
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "agents.engines.vllm_core", str(theirs.fileno())],
                env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # a Ctrl-C is for the trainer, which finishes its iteration
            )  # fmt: skip
        theirs.close()
        self._end = weakref.finalize(self, _end, self.popen, self.connection, self.folder)

    def call(self, method: str, *arguments: Any) -> Any:
        """A method's result. Raises EngineFailure where it failed, or where the process is gone."""
        try:
            self.connection.send((method, arguments))
            fine, result = self.connection.recv()
        except (EOFError, OSError) as error:
            raise EngineFailure(self._lost()) from error
        if not fine:
            raise EngineFailure(f"vLLM: {result} (its log: {self._kept_log()})")
        return result

    def end(self) -> None:
        """End the process and delete its folder."""
        self._end()

    def _lost(self) -> str:
        try:
            code = self.popen.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return f"the engine vllm does not answer (its log: {self._kept_log()})"
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the engine vllm is gone: its process ended ({how}; its log: {self._kept_log()})"

    def _kept_log(self) -> Path:
        """The log, in a place that outlives this program."""
        kept = self.folder.with_suffix(".log")
        shutil.copyfile(self.log, kept)
        return kept


def _end(popen: subprocess.Popen, connection: Connection, folder: Path) -> None:
    connection.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(popen.pid, signal.SIGKILL)  # vLLM's workers with it; there is nothing to save
    popen.wait()
    shutil.rmtree(folder, ignore_errors=True)
