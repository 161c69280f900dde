"""A server of the OpenAI protocol whose manners depend on the name of the model that is asked for."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from agents.engines import endpoint
from tests.envs.spot import COLOURS
from tools import ToolCall


def structured(call: ToolCall, raw: str | None = None) -> dict:
    """A call in the protocol's form, with arguments of its own or as given."""
    arguments = json.dumps(dict(call.arguments)) if raw is None else raw
    return {"id": "x", "type": "function", "function": {"name": call.name, "arguments": arguments}}


def completion(content="hello", finish="stop", **message):
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"completion_tokens": 7}}


def pictures(messages) -> list[Image.Image]:
    """The images of a conversation as it came in."""
    parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    head = "data:image/png;base64,"
    assert all(url.startswith(head) for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.removeprefix(head)))) for url in urls]


def seeing(messages):
    """Looks at the left half, then names the colour of the first picture's most colourful pixel."""
    seen = pictures(messages)
    if len(seen) < 2:
        return completion(None, "tool_calls", tool_calls=[structured(ToolCall("zoom", {"side": "left"}))])
    pixels_N3 = np.array(seen[0], dtype=int).reshape(-1, 3)
    vivid_3 = pixels_N3[np.ptp(pixels_N3, axis=1).argmax()]
    name = min(COLOURS, key=lambda colour: abs(vivid_3 - COLOURS[colour]).sum())
    return completion(f"<answer>{name}</answer>")


class Behaviour(BaseHTTPRequestHandler):
    """A server whose manners depend on the model's name."""

    protocol_version = "HTTP/1.1"
    seen: list = []  # noqa: RUF012
    attempts: dict = {}  # noqa: RUF012

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer(
            200,
            {
                "object": "list",
                "data": [
                    {"id": m, "object": "model", "created": 0, "owned_by": "x"} for m in self.server.models
                ],
            },
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        manner = body["model"]
        self.seen.append(body)
        self.attempts[manner] = self.attempts.get(manner, 0) + 1
        if manner == "good":
            self.answer(200, completion())
        elif manner == "caller":
            self.answer(
                200,
                completion(None, "tool_calls", tool_calls=[structured(ToolCall("remainder", {"number": 3}))]),
            )
        elif manner == "seeing":
            self.answer(200, seeing(body["messages"]))
        elif manner == "cut":
            self.answer(200, completion("hal", "length"))
        elif manner == "garbage":
            self.raw(200, b"<html>")
        elif manner == "huge":
            self.raw(200, b'"' + b"x" * (endpoint.MAX_REPLY + 10) + b'"')
        elif manner == "flaky" and self.attempts[manner] < 3:
            self.answer(503, {"error": "busy"})
        elif manner == "flaky":
            self.answer(200, completion("at last"))
        elif manner == "refusing":
            self.answer(400, {"error": "no"})
        elif manner == "hanging":
            time.sleep(3)
        elif manner == "trickling":
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
        self.close_connection = True

    def answer(self, status, value):
        self.raw(status, json.dumps(value).encode())

    def raw(self, status, body):
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.send_header("connection", "close")
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:  # the client had enough
            pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    models = ("good",)

    def handle_error(self, request, client_address):
        pass


@contextmanager
def serving(models=("good",)):
    server = Server(("127.0.0.1", 0), Behaviour)
    server.models = models
    Behaviour.seen, Behaviour.attempts = [], {}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
