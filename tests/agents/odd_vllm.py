"""A server of vLLM's protocol without a model, whose manners can be changed while it runs."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ROUTES = ("/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/v1/load_lora_adapter",
          "/v1/unload_lora_adapter", "/inference/v1/generate", "/reset_encoder_cache")  # fmt: skip
GENERATE = "/inference/v1/generate"


def choice(ids: Any, logps: Any) -> dict:
    return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logps}, "finish_reason": "stop"}]}


def generated(ids: Any, logps: Any, prompt: Any) -> dict:
    """A reply of the route that takes images."""
    content = [{"token_id": i, "logprob": x} for i, x in zip(ids, logps, strict=True)]
    return {"choices": [{"token_ids": ids, "logprobs": {"content": content}}], "prompt_token_ids": prompt}


class Odd(ThreadingHTTPServer):
    """Attributes may be set by tests: `manner`, a function of (body, attempt) to (status, bytes) or None for a usual
    reply; `routes` that exist; `context`; `weights`, the label of the weights; `raw` log-probs; `spans`, what the
    placeholder with an id grows to.
    """

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.manner: Any = lambda body, attempt: None
        self.spans: tuple[int, int] = (0, 1)
        self.routes, self.context, self.weights, self.raw, self.alive = ROUTES, 512, "default", False, True
        self.seen: list[tuple[str, Any]] = []
        self.attempts: Counter[str] = Counter()

    def handle_error(self, request, client_address):
        pass

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Odd

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path == "/v1/models":
            self.reply(200, {"data": [{"id": "odd", "max_model_len": self.server.context}]})
        elif self.path == "/weight_info":
            self.reply(200, {"weight_version": self.server.weights})
        else:
            self.reply(200 if self.server.alive else 503, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        server.seen.append((self.path, body))
        if self.path == GENERATE and GENERATE in server.routes and body:
            self.generate(body)
            return
        if self.path != "/v1/completions":
            known = self.path in server.routes
            if self.path == "/update_weight_version" and body:
                server.weights = body["new_version"]
            self.reply(200 if known else 404, {"success": True})
            return
        if "allowed_token_ids" in body:
            self.reply(200, choice(body["allowed_token_ids"], [-3.0 if server.raw else 0.0]))
            return
        name = str(body["prompt"])
        server.attempts[name] += 1
        odd = server.manner(body, server.attempts[name])
        if odd is None:
            self.reply(200, choice([body["prompt"][0], *body["stop_token_ids"][:1]], [-1.0, -0.5]))
        elif odd == "hang up":
            self.close_connection = True
            self.connection.close()
        else:
            self.send(*odd)

    def generate(self, body):
        """As a server that expands placeholders, and says so."""
        pad, length = self.server.spans
        fed = [i for at in body["token_ids"] for i in [at] * (length if at == pad else 1)]
        how = body["sampling_params"]
        if "prompt_logprobs" in how:
            listed = [None, *({str(i): {"logprob": -0.25}} for i in fed[1:])]
            self.reply(200, {"prompt_logprobs": listed})
        elif "allowed_token_ids" in how:
            self.reply(200, generated(how["allowed_token_ids"], [-3.0 if self.server.raw else 0.0], fed))
        else:
            odd = self.server.manner(body, 1)
            if odd is None:
                self.reply(200, generated([fed[0], *how["stop_token_ids"][:1]], [-1.0, -0.5], fed))
            else:
                self.send(*odd)

    def reply(self, status, value):
        self.send(status, json.dumps(value).encode())

    def send(self, status, body):
        try:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client had enough
            pass


def slowly(seconds: float):
    """A reply that takes its time."""
    time.sleep(seconds)
    return 200, b"{}"


@contextmanager
def serving(port: int = 0):
    """The server, on a port of its own."""
    server = Odd(port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.manner = lambda body, attempt: "hang up"  # connections outlive the socket that listens
        server.shutdown()
        server.server_close()
