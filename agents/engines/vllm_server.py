"""Samples from `vllm serve` processes, on other GPUs or machines: token ids in, token ids and log-probs out.

Each turn is one request with all of the row's ids as its prompt; the server keeps keys and values by prefix. Rows are
dealt to servers by group, so that its members find each other's prefix. Seeds belong to (run seed, group, member,
turn), so a request may be sent again.

Log-probs are those of the softmax after bans and temperature, which is what `--logprobs-mode processed_logprobs`
makes a server give; that it does is tried at the start. Bans are a bias of -100, the least that the protocol knows:
such an id is drawn once in e^100 tokens. What is sampled can depend on what else is in a server's batch, by rounding.

Rows with pictures go through vLLM's own route for token ids (`/inference/v1/generate`), which takes images along; the
server expands their placeholders and must come to the row's ids.

Weights travel as files in a folder that the servers see, too (`--vllm.exchange`): a whole model, or of a policy with
adapters the base model once and then only adapters. `agents.sync` verifies that they arrived.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from agents import lora
from agents.cli import UsageError
from agents.config import VllmConfig
from agents.dist import World
from agents.engines.base import EngineFailure, Key, Sampled, SampleParams, stream
from agents.engines.server import HOW, Lost, Server, Unreadable
from agents.engines.vllm import check_expansion, check_pictures, folded, refuse_cold
from agents.pictures import Picture, PictureFormat
from agents.png import address
from agents.sync import write_model
from policy_opt.protocols import Sampler

Carries = Literal["weights", "adapters", "nothing"]
"""What is delivered to servers."""
MOST_BANNED = 1024
"""Ids that vLLM can bias per request on a GPU."""
_BAN = -100.0
_COMPLETE = "/v1/completions"
_GENERATE = "/inference/v1/generate"


@dataclass(eq=False)
class _Row:
    """An open episode."""

    key: Key
    ids: list[int] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    """Those whose placeholders stand in `ids`, in order."""
    turn: Future | None = None
    """The turn under way; None between turns."""


@dataclass(frozen=True)
class _Prompt:
    """What a request is about."""

    key: Key
    """The row."""
    ids: tuple[int, ...]
    """All of it so far, placeholders expanded."""
    pictures: tuple[Picture, ...] = ()
    """Those whose placeholders stand in `ids`, in order."""


class ServerEngine:
    """`agents.engines.base.Engine` and `agents.sync.Receiver` over vLLM servers.

    Args:
        settings: addresses, time-out, retries, exchange folder.
        carries: what will be delivered; the servers are asked whether they can take it.
        stop_ids: sampled ids that end a turn.
        banned_ids: ids that are not sampled.
        params: temperature, top-k, top-p and the longest turn.
        rows: turns that are asked for at the same time, over all servers.
        max_context: tokens per row at most; None: what the servers hold.
        dtype: that weights are written in.
        world: the run's processes; the main one delivers for all.
        pictures: how the model reads pictures; None where rows have none.

    Attributes:
        hooks: sampler rules that it serves: none, because they change every token's temperature.

    Raises:
        UsageError: a server does not answer, or was not started for this.
    """

    hooks: frozenset[str] = frozenset()

    def __init__(
        self,
        settings: VllmConfig,
        *,
        carries: Carries,
        stop_ids: Sequence[int],
        banned_ids: Sequence[int] = (),
        params: SampleParams | None = None,
        rows: int = 128,
        max_context: int | None = None,
        dtype: torch.dtype = torch.float32,
        world: World | None = None,
        pictures: PictureFormat | None = None,
    ):
        if not stop_ids:
            raise ValueError("an engine needs at least one stop id, or no turn could end")
        self.pictures = pictures
        self.params, self.rows, self.dtype, self.world = params or SampleParams(), rows, dtype, world or World()
        self.stop_ids, self.banned_ids, self.carries, self.version = tuple(stop_ids), tuple(banned_ids), carries, -1
        if len(self.banned_ids) > MOST_BANNED:
            raise UsageError(f"a server can ban {MOST_BANNED} ids, this tokenizer has {len(self.banned_ids)}")
        refuse_cold(self.params.temperature)
        self.servers = [
            Server(address, timeout_s=settings.timeout_s, retries=settings.retries, most=rows)
            for address in dict.fromkeys(settings.servers)
        ]
        shortest = min(server.max_context for server in self.servers)
        if max_context is not None and max_context > shortest:
            raise UsageError(
                f"a server holds {shortest} tokens per episode, the run may need {max_context}: start it with "
                f"--max-model-len {max_context}, or give --rollout.max-context {shortest}"
            )
        self.max_context = max_context or shortest
        for server in self.servers:
            self._try(server)
        self.exchange = Exchange(settings.exchange)
        self.adapter = ""
        self._threads = ThreadPoolExecutor(max(rows, len(self.servers)), thread_name_prefix="vllm-server")
        self._open: dict[Key, _Row] = {}
        self._full: list[_Row] = []

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
        if row.turn is not None or row in self._full:
            raise ValueError(f"row {key} has not finished its turn")
        if not row.ids and not len(ids):
            raise ValueError(f"row {key} is new and was fed no tokens")
        if sampler is not None and sampler.hook is not None:
            raise ValueError(f"the engine vllm has no sampler rule `{sampler.hook}`")
        row.ids.extend(map(int, ids))
        row.pictures.extend(pictures)
        budget = min(max_new_tokens, self.max_context - len(row.ids))
        if budget <= 0:
            self._full.append(row)
            return
        temperature = self.params.temperature if sampler is None else sampler.temperature
        refuse_cold(temperature)
        number = int(stream(seed).generate_state(1, np.uint64)[0]) >> 1
        server = self.servers[key[0] % len(self.servers)]
        prompt = _Prompt(key, tuple(row.ids), tuple(row.pictures))
        row.turn = self._threads.submit(self._sample, server, prompt, number, budget, temperature)

    def run(self) -> list[tuple[Key, Sampled]]:
        """Wait until at least one row finished its turn. Ordered by key; [] if none has a turn to finish.

        Raises:
            EngineFailure: a server is gone, or came back without the weights it was given, or expands a row's
                pictures to other placeholders.
        """
        done: list[tuple[Key, Sampled]] = []
        if self._full:
            done = [(row.key, Sampled((), (), "context")) for row in self._full]
            self._full = []
        elif busy := {row.turn: row for row in self._open.values() if row.turn is not None}:
            for turn in wait(busy, return_when=FIRST_COMPLETED).done:
                row, row_turn = busy[turn], turn.result()
                row.turn = None
                row.ids.extend(row_turn.ids)
                done.append((row.key, row_turn))
        return sorted(done, key=lambda pair: pair[0])

    def close(self, key: Key) -> None:
        """Drop a row; unknown keys are ignored."""
        row = self._open.pop(key, None)
        if row is None:
            return
        self._full = [other for other in self._full if other is not row]
        if row.turn is not None:
            row.turn.cancel()  # one that is under way comes to its end, and nobody hears of it

    def reset(self) -> None:
        """Drop all rows."""
        for key in list(self._open):
            self.close(key)

    # ------------------------------------------------------------------ one turn

    def _sample(self, server: Server, prompt: _Prompt, seed: int, budget: int, temperature: float) -> Sampled:
        """One request; what could not be had from a living server is an outcome."""
        drawn = {"seed": seed, "temperature": temperature, "top_p": self.params.top_p, "top_k": self.params.top_k}
        reply = self._ask(server, self.adapter or server.model, prompt, budget, drawn)
        if isinstance(reply, Lost):
            return Sampled((), (), reply.reason)
        try:
            said, logps, ended = self._read(reply, prompt, budget)
        except Unreadable:
            return Sampled((), (), "error:reply")
        full = len(prompt.ids) + len(said) >= self.max_context
        return Sampled(said, logps, "stop" if ended else "context" if full else "length")

    def _ask(self, server: Server, model: str, prompt: _Prompt, budget: int, drawn: Mapping[str, Any]) -> Any:
        """Sample after a prompt; nothing but our own settings counts. `drawn`: how."""
        how: dict[str, Any] = {
            "max_tokens": budget, "logprobs": 0, "stop_token_ids": list(self.stop_ids), "ignore_eos": True,
            "skip_special_tokens": False, "logit_bias": {str(i): _BAN for i in self.banned_ids} or None,
            "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, **drawn,
        }  # fmt: skip
        return self._post(server, model, prompt, how, budget)

    def _post(self, server: Server, model: str, prompt: _Prompt, how: dict[str, Any], budget: int) -> Any:
        """A request by the route that can take what the model reads."""
        tokens = len(prompt.ids) + budget
        if self.pictures is None:
            body = {"model": model, "prompt": list(prompt.ids), "return_token_ids": True, "add_special_tokens": False}
            return server.ask(_COMPLETE, body | how, tokens)
        body = {
            "model": model, "token_ids": list(folded(self.pictures, prompt.ids)), "return_token_ids": True,
            "content_parts": [_part(picture) for picture in prompt.pictures] or None,
            "sampling_params": how | {"detokenize": False},
        }  # fmt: skip
        return server.ask(_GENERATE, body, tokens)

    def _read(self, reply: Any, prompt: _Prompt, budget: int) -> tuple[tuple[int, ...], tuple[float, ...], bool]:
        """As `read`; EngineFailure where the server's prompt was another one than the row."""
        if self.pictures is None:
            return read(reply, budget, self.stop_ids)
        fed, reply = _as_completion(reply)
        check_expansion(prompt.key, prompt.ids, fed)
        return read(reply, budget, self.stop_ids)

    def _try(self, server: Server) -> None:
        """UsageError where a server was not started for this, or does not give the log-probs that are needed."""
        only, prompt = self.stop_ids[0], self._trial()
        drawn = {"allowed_token_ids": [only], "temperature": 1.0}
        try:
            reply = self._ask(server, server.model, prompt, 1, drawn)
            if isinstance(reply, Lost):
                raise UsageError(f"{server.url} does not complete token ids ({reply.reason}); {HOW}")
            said, logps, _ = self._read(reply, prompt, 1)
        except Unreadable as error:
            raise UsageError(f"{server.url} does not return token ids and log-probs ({error}): is it vLLM?") from error
        except EngineFailure as error:
            more = "" if self.pictures is None else f". A run with pictures needs --enable-scale-out; {HOW}"
            raise UsageError(f"{error}{more}") from error
        if said != (only,) or abs(logps[0]) > 1e-6:
            raise UsageError(
                f"{server.url} gives log-probs from before bans and temperature: start it with "
                f"--logprobs-mode processed_logprobs; {HOW}"
            )
        needed = {"/collective_rpc": "VLLM_SERVER_DEV_MODE=1"} if self.carries != "nothing" else {}
        if self.carries == "adapters":
            how = "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 (or give --vllm.merge)"
            needed["/v1/load_lora_adapter"] = how
        for route, how in needed.items():
            if not server.knows(route):
                raise UsageError(f"{server.url} takes no {self.carries}: start it with {how}; {HOW}")

    def _trial(self) -> _Prompt:
        """A stop id, after a picture where the model reads some."""
        if self.pictures is None:
            return _Prompt((), self.stop_ids[:1])
        picture = self.pictures.read(Image.new("RGB", (self.pictures.side, self.pictures.side), "grey"))
        return _Prompt((), (*self.pictures.ids(picture), self.stop_ids[0]), (picture,))

    # ------------------------------------------------------------------ Receiver

    def deliver(self, model: Any, version: int) -> None:
        """Take over the model's weights, or its adapters, on every server. All processes call it together."""
        problem, name = "", ""
        if self.world.main:
            try:
                name = self._deliver(model)
            except (EngineFailure, OSError) as error:
                problem = str(error)
        problem, name = self.world.from_main((problem, name))
        if problem:
            raise EngineFailure(problem)
        if self.carries == "adapters":
            self.adapter = name
        self.version = version

    def _deliver(self, model: Any) -> str:
        """Write, have all servers read, delete what they read before; the name of what they have now."""
        folder = self.exchange.next()
        name = f"palaestra-{folder.name}"
        if self.carries == "adapters":
            if not self.adapter:  # what the adapters stand on, once
                write_model(lora.without(model), folder / "base", self.dtype)
                self._load(folder / "base", name)
            lora.save(model, folder)
            self._everywhere(lambda server: server.load_adapter(str(folder), name, self.adapter))
        else:
            write_model(lora.merged(model) if lora.layers(model) else model, folder, self.dtype)
            self._load(folder, name)
        self.exchange.clear(folder)
        return name

    def _load(self, folder: Path, name: str) -> None:
        self._everywhere(lambda server: server.load_weights(str(folder), name, self.pictures is not None))

    def _everywhere(self, what: Callable[[Server], None]) -> None:
        for done in [self._threads.submit(what, server) for server in self.servers]:
            done.result()

    def log_probs(self, ids: Sequence[int], pictures: Sequence[Picture] = ()) -> list[float]:
        """Log-prob of each id given those before it, all but the first, by every server in turn."""
        check_pictures(self.pictures, ids, pictures)
        prompt = _Prompt((), tuple(map(int, ids)), tuple(pictures))
        return [logp for server in self.servers for logp in self._score(server, prompt)]

    def _score(self, server: Server, prompt: _Prompt) -> list[float]:
        how = {"max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
        reply = self._post(server, self.adapter or server.model, prompt, how, 0)
        try:
            listed = (reply["choices"][0] if self.pictures is None else reply)["prompt_logprobs"]
            scored = [
                float(entry[str(i)]["logprob"]) for i, entry in zip(prompt.ids[1:], listed[1:], strict=True)
            ]  # fmt: skip
        except (KeyError, IndexError, TypeError, ValueError) as error:
            lost = reply.reason if isinstance(reply, Lost) else "error:reply"
            raise EngineFailure(f"the server {server.url} does not score the probe ({lost})") from error
        return scored

    def shutdown(self) -> None:
        """Close connections and delete what was exchanged; the servers go on."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for server in self.servers:
            server.close()
        self.exchange.close()


class Exchange:
    """Folders that servers read weights from, one after the other."""

    def __init__(self, root: str | None):
        parent = Path(root or tempfile.gettempdir())
        self.folder = parent.absolute() / f"palaestra-exchange-{uuid.uuid4().hex[:12]}"
        self._close = weakref.finalize(self, shutil.rmtree, self.folder, True)
        self._count = 0

    def next(self) -> Path:
        """A new folder; its name was never used before, by any run."""
        self._count += 1
        folder = self.folder / f"{self.folder.name.rpartition('-')[2]}-{self._count}"
        folder.mkdir(parents=True)
        return folder

    def clear(self, but: Path) -> None:
        """Delete all folders but one."""
        for other in self.folder.iterdir():
            if other != but:
                shutil.rmtree(other, ignore_errors=True)

    def close(self) -> None:
        """Delete everything."""
        self._close()


def read(reply: Any, budget: int, stop_ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[float, ...], bool]:
    """Ids, log-probs and whether a stop id ended them, of a completion; Unreadable where it is none of ours."""
    try:
        choice = reply["choices"][0]
        ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    except (KeyError, IndexError, TypeError) as error:
        raise Unreadable("no token_ids or logprobs") from error
    if not (isinstance(ids, list) and isinstance(logps, list) and 0 < len(ids) == len(logps) <= budget):
        raise Unreadable("token_ids and logprobs do not match what was asked for")
    if not all(type(i) is int and i >= 0 for i in ids):
        raise Unreadable("token_ids are no ids")
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in logps):
        raise Unreadable("logprobs are no finite numbers")
    ended = ids[-1] in stop_ids
    if any(i in stop_ids for i in ids[:-1]) or not (ended or len(ids) == budget):
        raise Unreadable("the turn ends neither with a stop id nor with its budget")
    return tuple(ids), tuple(map(float, logps)), ended


def _part(picture: Picture) -> dict[str, Any]:
    """A picture as the server's route takes it, under its name."""
    return {"type": "image_url", "url": address(picture.image), "uuid": str(picture.key)}


def _as_completion(reply: Any) -> tuple[list[int], dict[str, Any]]:
    """The prompt that the server saw, and its reply as a completion; Unreadable where it is none of ours."""
    try:
        choice = reply["choices"][0]
        logps = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        fed = [int(i) for i in reply["prompt_token_ids"]]
        completion = {"token_ids": choice["token_ids"], "logprobs": {"token_logprobs": logps}}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Unreadable("no prompt_token_ids, token_ids or logprobs") from error
    return fed, {"choices": [completion]}


def carries(settings: VllmConfig, model: Any) -> Carries:
    """What servers are to be given: whole weights, or adapters where the policy has some and they are not merged."""
    return "adapters" if lora.layers(model) and not settings.merge else "weights"


def refuse_options(settings: VllmConfig) -> None:
    """UsageError for options that say how a colocated engine works."""
    default = VllmConfig()
    for name in ("memory", "kv_gib", "tensor_parallel", "eager"):
        if getattr(settings, name) != getattr(default, name):
            raise UsageError(
                f"--vllm.{name.replace('_', '-')} is for an engine in this process; servers have their own "
                f"command line ({HOW})"
            )


def refuse_server_options(settings: VllmConfig) -> None:
    """UsageError for options that say how servers are talked to, where there are none."""
    default = VllmConfig()
    for name in ("exchange", "timeout_s", "retries"):
        if getattr(settings, name) != getattr(default, name):
            raise UsageError(f"--vllm.{name.replace('_', '-')} is for servers: name some with --vllm.servers")
