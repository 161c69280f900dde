"""One `vllm serve` process over HTTP: requests with bounded retries, replies read with suspicion.

What a server says is data: sizes are bounded, shapes are checked, and a turn that cannot be had is an outcome
(`Lost`) as long as the server lives. A server that is gone, or that came back without the weights it was given, is an
`EngineFailure`: it ends the run, which can be resumed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agents.cli import UsageError
from agents.engines.base import EngineFailure

HOW = "docs/engines.md says how servers are started"
_MARGIN = 1 << 20  # bytes that any reply may have
_PER_TOKEN = 4096  # and so many more per token asked for
_NO_ORDER = f"Does it see the folder of --vllm.exchange, and was it not restarted? {HOW}"
_BUSY = (408, 409, 425, 429)  # states that pass
_GREETING_S = 10.0  # for a server's first answer


@dataclass(frozen=True)
class Lost:
    """A reply that could not be had from a server that lives."""

    reason: str
    """`error:timeout`, `error:reply` (unreadable, malformed or oversized), or `error:http_STATUS`."""


class Unreadable(ValueError):
    """A reply that is not what was asked for."""


class Server:
    """A server and its one base model.

    Args:
        address: http://HOST:PORT, and #MODEL where it serves several.
        timeout_s: for one request, from sending to the last byte.
        retries: further attempts after a lost connection, a time-out or a passing refusal.
        most: requests at the same time.

    Attributes:
        model: the server's name of its base model.
        max_context: tokens that a row may hold.
        label: what the weights that were last delivered are called there; empty: none were delivered, None: it is a
            vLLM that keeps no such name.
    """

    def __init__(self, address: str, *, timeout_s: float, retries: int, most: int):
        import httpx2

        url, _, model = address.partition("#")
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"a server's address is like http://HOST:PORT, not {address!r}")
        self.url, self.retries, self.timeout_s = url.rstrip("/").removesuffix("/v1"), retries, timeout_s
        self.label: str | None = ""
        self._httpx = httpx2
        key = os.environ.get("OPENAI_API_KEY")
        self._client = httpx2.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx2.Limits(max_connections=most, max_keepalive_connections=most),
            timeout=httpx2.Timeout(timeout_s, connect=min(timeout_s, _GREETING_S), pool=None),
        )  # fmt: skip
        self.model, self.max_context = self._greet(model)

    def _greet(self, wanted: str) -> tuple[str, int]:
        """Name and context of the served model; UsageError where there is no such server."""
        try:
            reply = self._client.get("/v1/models", timeout=_GREETING_S)
            reply.raise_for_status()
            cards = {str(card["id"]): card for card in reply.json()["data"]}
        except self._httpx.HTTPStatusError as error:
            raise UsageError(f"{self.url} refuses to list its models: HTTP {error.response.status_code}") from error
        except self._httpx.HTTPError as error:
            raise UsageError(f"no server answers at {self.url} ({_said(error)}); {HOW}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.url} is no OpenAI-compatible server: its list of models is unreadable") from error
        names = [name for name, card in cards.items() if not card.get("parent")]
        if wanted and wanted not in cards:
            raise UsageError(f"{self.url} does not serve {wanted!r}; it serves {', '.join(cards) or 'nothing'}")
        if not wanted and len(names) != 1:
            raise UsageError(f"name one of the models of {self.url}: {self.url}#MODEL ({', '.join(names) or 'none'})")
        name = wanted or names[0]
        context = cards[name].get("max_model_len")
        return name, context if isinstance(context, int) else 1 << 30

    # ------------------------------------------------------------------ requests

    def ask(self, path: str, body: Mapping[str, Any], tokens: int = 0) -> Any:
        """The JSON of a reply, or `Lost`. EngineFailure where the server is gone, restarted, or refuses the request."""
        problem, gone = "", False
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(8.0, 2.0 ** (attempt - 1)))
            try:
                status, data = self._send(path, body, tokens)
            except self._httpx.TimeoutException as error:
                gone = isinstance(error, self._httpx.ConnectTimeout)
                problem = "error:timeout"
                continue
            except self._httpx.TransportError as error:
                problem, gone = _said(error), True
                continue
            if gone:
                self._recognise()
            gone = False
            if status == 200:
                try:
                    return json.loads(data) if data else None
                except (ValueError, RecursionError):
                    problem = "error:reply"
                    continue
            problem = f"error:http_{status}"
            if status < 500 and status not in _BUSY:
                raise EngineFailure(f"the server {self.url} refuses {path}: HTTP {status}: {_message(data)}")
        if gone or not self.healthy():
            raise EngineFailure(f"the server {self.url} is gone ({problem}; {self.retries + 1} attempts)")
        return Lost(problem)

    def _send(self, path: str, body: Mapping[str, Any], tokens: int) -> tuple[int, bytes]:
        """Status and body of one attempt; an oversized body is cut, hence unreadable."""
        deadline, most = time.monotonic() + self.timeout_s, _MARGIN + _PER_TOKEN * tokens
        out = bytearray()
        with self._client.stream("POST", path, json=body) as reply:
            for piece in reply.iter_bytes():
                out += piece
                if len(out) > most:
                    return reply.status_code, b"{"
                if time.monotonic() > deadline:
                    raise self._httpx.ReadTimeout(f"no whole reply in {self.timeout_s:g} s")
            return reply.status_code, bytes(out)

    def healthy(self) -> bool:
        """Whether the server answers and its engine lives."""
        try:
            return self._client.get("/health", timeout=_GREETING_S).status_code == 200
        except self._httpx.HTTPError:
            return False

    def knows(self, path: str) -> bool:
        """Whether the server has a route, whatever it expects there."""
        try:
            return self._client.post(path, json={}, timeout=_GREETING_S).status_code != 404
        except self._httpx.HTTPError:
            return False

    def _recognise(self) -> None:
        """After a lost connection: EngineFailure where the server has not the weights that were delivered to it."""
        if self.label == "":
            return
        reply = self._client.get("/weight_info", timeout=_GREETING_S)
        try:
            there = str(reply.json()["weight_version"]) if reply.status_code == 200 else ""
        except (ValueError, KeyError, TypeError):
            there = ""
        if self.label is None:
            raise EngineFailure(f"the server {self.url} was away and cannot tell whether it still has the weights")
        if there != self.label:
            raise EngineFailure(f"the server {self.url} was restarted and has lost the weights of this run")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    # ------------------------------------------------------------------ weights

    def load_weights(self, folder: str, label: str, pictures: bool = False) -> None:
        """Take over the weights of a model folder that the server sees, too, and forget what was computed before.

        pictures: also what was made of pictures.
        """
        self.order("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        emptied = self.order("/reset_prefix_cache", {})
        if not (isinstance(emptied, Mapping) and emptied.get("success")):
            raise EngineFailure(f"the server {self.url} is at work for somebody else: a run needs it alone")
        if pictures:
            self.order("/reset_encoder_cache", {}, plain=True)
        self.label = label if self.knows("/update_weight_version") else None
        if self.label is not None:
            self.order("/update_weight_version", {"new_version": label})

    def load_adapter(self, folder: str, name: str, old: str) -> None:
        """Take over the adapter of a folder that the server sees, too, under a new name, and drop an old one."""
        if old:  # first, so that there is room
            self.order("/v1/unload_lora_adapter", {"lora_name": old}, plain=True)
        self.order("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}, plain=True)

    def order(self, path: str, body: Mapping[str, Any], plain: bool = False) -> Any:
        """A request that must succeed, once: EngineFailure otherwise. plain: the reply is a text, not JSON."""
        try:
            status, data = self._send(path, body, 0)
        except self._httpx.HTTPError as error:
            raise EngineFailure(f"the server {self.url} is gone ({path}: {_said(error)})") from error
        if status != 200:
            raise EngineFailure(f"the server {self.url} refuses {path}: HTTP {status}: {_message(data)}. {_NO_ORDER}")
        try:
            return None if plain or not data else json.loads(data)
        except ValueError as error:
            raise EngineFailure(f"the server {self.url} answers {path} unreadably") from error


def _said(error: Exception) -> str:
    """What an error of the transport says, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _message(data: bytes) -> str:
    """The message in a refusal, bounded."""
    try:
        value = json.loads(data)
        inner = value.get("error", value)
        text = str(inner.get("message", inner))
    except (ValueError, AttributeError, RecursionError):
        text = data.decode("utf-8", "replace")
    return " ".join(text.split())[:300]
