"""Any OpenAI-compatible server as a policy, for evaluation: chat completions with tools.

The environment speaks text with tool calls inside, the server structured messages. `to_wire` turns a
conversation into the server's form (calls with ids, tool results that name them); `to_text` writes a reply in
the environment's own call format, so that one parser and one verifier judge every policy.

Images go out as PNG in `data:` addresses (`image_url` parts), in user messages only: the protocol has none in
system and tool messages. What a system message shows follows it as a user message; what tool messages show follows
the last result of the turn, because results must stand together.

The `openai` client does the talking: it is the reference for the protocol's errors, for retries with back-off
and Retry-After, proxies and OPENAI_API_KEY. It is an extra, imported when an endpoint is opened. What goes
wrong (time-outs, refusals, unreadable or oversized replies) is an outcome, never an exception.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agents.cli import UsageError
from agents.engines.base import Key, Said, SampleParams, Voice, stream
from agents.png import address
from tools import strict_json
from tools.calls import CallFormat, ToolCall, get_format
from tools.images import is_image

MAX_REPLY = 4_000_000
"""Bytes read of one reply."""
MAX_TEXT = 200_000
"""Characters kept of one reply."""
_STOPS = {"length": "length", "max_tokens": "length"}


@dataclass(frozen=True)
class EndpointConfig:
    """Where a server is and how it is asked."""

    url: str
    """Base address, for instance http://localhost:8000/v1."""
    model: str = ""
    """The server's name of the model; empty takes the only one it lists."""
    params: SampleParams = field(default_factory=SampleParams)
    """Temperature, top-p, tokens per turn; top-k is sent only where it is set: OpenAI's own API lacks it."""
    timeout_s: float = 120.0
    """Seconds for one request, from sending to the last byte."""
    retries: int = 2
    """Further attempts after a time-out, a lost connection, or status 408, 409, 429 and 5xx."""
    native_tools: bool = True
    """Offer tools in the request; False describes them in the system message, for servers that take none."""

    @classmethod
    def from_spec(cls, spec: str, **options: Any) -> EndpointConfig:
        """From `URL` or `URL#MODEL`."""
        url, _, model = spec.partition("#")
        if not url.startswith(("http://", "https://")):
            raise UsageError(
                f"an endpoint is an address such as http://localhost:8000/v1#MODEL, not {spec!r}"
            )
        return cls(url=url.rstrip("/"), model=model, **options)


class Endpoint:
    """A speaker that is one server's model; episodes may run in several threads at once."""

    def __init__(self, config: EndpointConfig):
        self.config = config
        self._openai = _import_openai()
        self._client = self._openai.OpenAI(
            base_url=config.url,
            # Local servers ask for no key, but the client insists on one.
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=config.timeout_s,
            max_retries=config.retries,
        )
        self.model = config.model or self._only_model()

    @property
    def name(self) -> str:
        """Address and model."""
        return f"{self.config.url}#{self.model}"

    def begin(self, env: Any, seed: Key) -> Voice:
        """A voice for one episode, in the environment's own call format."""
        own = getattr(getattr(env, "unwrapped", env), "call_format", "hermes")
        fmt = get_format(own) if isinstance(own, str) else own
        tools: Sequence[Mapping[str, Any]] = ()
        turn = 0

        def voice(messages: Sequence[Mapping[str, Any]], obs: Mapping[str, Any], max_new_tokens: int) -> Said:
            nonlocal tools, turn
            tools = obs.get("tools", tools)
            turn += 1
            hint = int(stream((*seed, turn)).generate_state(1)[0])
            return self.complete(messages, tools, fmt, hint, max_new_tokens)

        return voice

    def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        fmt: CallFormat,
        seed: int,
        max_new_tokens: int,
    ) -> Said:
        """One turn, or `error:timeout`, `error:connection`, `error:http_STATUS`, `error:reply`.

        `seed` is a hint that servers may ignore.
        """
        params = self.config.params
        native = self.config.native_tools and bool(tools)
        request: dict[str, Any] = {
            "model": self.model,
            "messages": to_wire(messages, fmt) if native else to_plain(messages, tools),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": min(max_new_tokens, params.max_new_tokens),
            "seed": seed % 2**31,
        }
        if native:
            request["tools"] = list(tools)
        if params.top_k:
            request["extra_body"] = {"top_k": params.top_k}
        body = self._post(request)
        return body if isinstance(body, Said) else read_reply(body, fmt)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _post(self, request: dict[str, Any]) -> bytes | Said:
        """The reply's body, at most MAX_REPLY bytes, within the time-out also for a server that trickles."""
        openai, deadline = self._openai, time.monotonic() + self.config.timeout_s * (self.config.retries + 1)
        try:
            with self._client.chat.completions.with_streaming_response.create(**request) as response:
                return _read_bounded(response.iter_bytes(), deadline)
        except openai.APITimeoutError:
            return Said("", "error:timeout")
        except openai.APIStatusError as error:
            return Said("", f"error:http_{error.status_code}")
        except Exception as error:  # the transport beneath the client has error types of its own
            return Said(
                "", "error:timeout" if "timeout" in type(error).__name__.lower() else "error:connection"
            )

    def _only_model(self) -> str:
        try:
            names = [model.id for model in self._client.models.list().data]
        except Exception as error:
            raise UsageError(f"{self.config.url} does not answer: {error}") from error
        if len(names) != 1:
            listed = f"it lists {', '.join(names[:8])}" if names else "it lists none"
            raise UsageError(f"name the server's model: {self.config.url}#MODEL ({listed})")
        return names[0]


def to_wire(messages: Sequence[Mapping[str, Any]], fmt: CallFormat) -> list[dict[str, Any]]:
    """A conversation in the protocol's form: calls carry ids, tool messages name the call they answer.

    A tool message that answers no readable call (the model wrote a malformed one) becomes a user message,
    since servers refuse tool messages without a call. Images of tool messages follow the last of them as a user
    message that names the tools; those of a system message follow it, too.
    """
    out: list[dict[str, Any]] = []
    open_ids: list[str | None] = []
    seen: list[dict[str, Any]] = []  # parts of the user message that is owed
    for i, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if seen and role != "tool":
            out.append({"role": "user", "content": seen})
            seen = []
        if role == "assistant":
            wire, open_ids = _assistant(_text(content), fmt, f"call_{i}")
            out.append(wire)
        elif role == "user":
            out.append({"role": role, "content": _content(content)})
        elif role == "tool":
            call_id = open_ids.pop(0) if open_ids else None
            answer = {"role": "tool", "tool_call_id": call_id, "content": _text(content)}
            out.append(answer if call_id else {"role": "user", "content": f"Tool: {_text(content)}"})
            seen += _shown(content, f"Shown by {message.get('name') or 'the tool'}:")
        else:
            out.append({"role": role, "content": _text(content)})
            seen += _shown(content, "Shown before:")
    return [*out, {"role": "user", "content": seen}] if seen else out


def to_plain(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A conversation without structure: tools described in the system message, results as user messages.

    Images stand in the user messages; those of a system message follow it as one.
    """
    out: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message.get("content")
        if role == "tool":
            out.append({"role": "user", "content": _content(content, "<tool_response>\n", "\n</tool_response>")})
            continue
        out.append({"role": role, "content": _content(content) if role == "user" else _text(content)})
        if role == "system" and (seen := _shown(content, "Shown before:")):
            out.append({"role": "user", "content": seen})
    if tools:
        listed = "\n".join(json.dumps(tool.get("function", tool)) for tool in tools)
        text = (
            f"You may call these tools:\n{listed}\nTo call one, write "
            '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'
        )
        if out and out[0]["role"] == "system":
            out[0]["content"] = f"{out[0]['content']}\n\n{text}"
        else:
            out.insert(0, {"role": "system", "content": text})
    return out


def read_reply(body: bytes, fmt: CallFormat) -> Said:
    """The first choice of a chat completion in the environment's call format; `error:reply` if it is none."""
    try:
        data = json.loads(body)
        choice = data["choices"][0]
        message = choice["message"]
        text = to_text(message.get("content"), message.get("tool_calls") or (), fmt)
        usage = data.get("usage") or {}
        tokens = usage.get("completion_tokens") if isinstance(usage, Mapping) else 0
        stop = _STOPS.get(str(choice.get("finish_reason")), "stop")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return Said("", "error:reply")
    return Said(text[:MAX_TEXT], stop, tokens if isinstance(tokens, int) else 0)


def to_text(content: Any, calls: Iterable[Mapping[str, Any]], fmt: CallFormat) -> str:
    """Content and structured calls as one text in the call format.

    Arguments that are no JSON object are passed on as they came, for the environment's parser to reject.
    """
    text = _text(content)
    for call in calls:
        function = call["function"]
        name, arguments = str(function["name"]), function.get("arguments", "{}")
        text += _one_call(name, arguments, fmt)
    return text


def _one_call(name: str, arguments: Any, fmt: CallFormat) -> str:
    raw = arguments if isinstance(arguments, str) else json.dumps(arguments)
    try:
        value = strict_json.loads(raw or "{}")
    except strict_json.JsonError:
        value = None
    if isinstance(value, dict):
        return fmt.render("", [ToolCall(name, value, raw)])
    # An empty call, in whatever format, with the unreadable arguments in place of its {}.
    return raw.join(fmt.render("", [ToolCall(name, {})]).rsplit("{}", 1))


def _assistant(text: str, fmt: CallFormat, prefix: str) -> tuple[dict[str, Any], list[str | None]]:
    """An assistant message with its readable calls as structure; ids of all calls, None if unreadable."""
    turn = fmt.parse(text)
    ids = [f"{prefix}_{n}" if isinstance(call, ToolCall) else None for n, call in enumerate(turn.calls)]
    structured = [
        {
            "id": call_id,
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }
        for call_id, call in zip(ids, turn.calls, strict=True)
        if call_id and isinstance(call, ToolCall)
    ]
    if not structured:
        return {"role": "assistant", "content": text}, ids
    return {"role": "assistant", "content": turn.content, "tool_calls": structured}, ids


def _text(content: Any) -> str:
    """Text that UTF-8 can carry: text parts joined, others named, lone surrogates replaced."""
    if not isinstance(content, str):
        parts = (p if isinstance(p, Mapping) else {"type": "text", "text": p} for p in content or ())
        content = "".join(
            str(p.get("text", "")) if p.get("type") == "text" else f"[{p.get('type')}]" for p in parts
        )
    return content.encode("utf-8", "replace").decode("utf-8")


def _content(content: Any, before: str = "", after: str = "") -> str | list[dict[str, Any]]:
    """Content of a user message: text, or texts and images in order where there are images."""
    if isinstance(content, str) or not any(_is_image(part) for part in content or ()):
        return f"{before}{_text(content)}{after}"
    parts = [_image(part) if _is_image(part) else _words(_text([part])) for part in content]
    return [*([_words(before)] if before else []), *parts, *([_words(after)] if after else [])]


def _shown(content: Any, words: str) -> list[dict[str, Any]]:
    """The images of a message that may hold none, after some words; empty where there are none."""
    images = [] if isinstance(content, str) else [_image(part) for part in content or () if _is_image(part)]
    return [_words(_text(words)), *images] if images else []


def _is_image(part: Any) -> bool:
    image: Any = part.get("image") if isinstance(part, Mapping) else None
    return is_image(image) and 0 not in image.size


def _words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(part: Mapping[str, Any]) -> dict[str, Any]:
    """An image part as a PNG of RGB pixels inside its address."""
    return {"type": "image_url", "image_url": {"url": address(part["image"])}}


def _read_bounded(chunks: Iterable[bytes], deadline: float) -> bytes | Said:
    out = bytearray()
    for chunk in chunks:
        out += chunk
        if len(out) > MAX_REPLY:
            return Said("", "error:reply")
        if time.monotonic() > deadline:
            return Said("", "error:timeout")
    return bytes(out)


def _import_openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise UsageError(
            "evaluating an endpoint needs the openai client: pip install 'palaestra[endpoint]'"
        ) from error
    return openai
