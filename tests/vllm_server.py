"""A server on this machine that speaks as much of vLLM's completions protocol as is used, and answers by tunesmith's engine.

The format is that of vLLM 0.10: ``token_ids`` where ``return_token_ids`` asks for them, ``logprobs`` with tokens called
``token_id:NUMBER``, and the sampled token among the likeliest ones.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tunesmith.models.generate.engine import Engine
from tunesmith.models.generate.running_rows import Answer, Request
from tunesmith.models.generate.sampling import SamplingParams

SAME = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
)  # fmt: skip
"""Settings that have one name in both."""


def answer(engine: Engine, ids: list[int], asked: dict[str, Any]) -> Answer:
    """What vLLM would sample under its settings ``asked``."""
    assert asked["ignore_eos"], "else vLLM ends at a token that the caller does not know of"
    params = SamplingParams(
        max_new_tokens=asked["max_tokens"], min_new_tokens=asked["min_tokens"], top_k=max(asked["top_k"], 0),
        stop=frozenset(asked["stop_token_ids"]), stop_strings=tuple(asked["stop"]), top_logprobs=asked["logprobs"] or 1,
        logit_bias={int(token): bias for token, bias in (asked["logit_bias"] or {}).items()}, **{name: asked[name] for name in SAME},
    )  # fmt: skip
    ((found),) = engine.run([Request(tuple(ids), params)])
    return found


def places(found: Answer, most: int) -> list[dict[int, float]]:
    """The likeliest tokens of each position and the sampled one, as vLLM gives them."""
    sampled = zip(found.ids, found.logprobs, strict=True)
    return [dict([one, *top[:most]]) for one, top in zip(sampled, found.top, strict=True)]


def finish(found: Answer) -> str:
    return "stop" if found.reason in ("stop", "stop_string") else "length"


class VllmServer:
    """``asked``: the bodies of all completions so far. ``failures``: statuses of the next replies to them. ``key``: needed."""

    def __init__(self, engine: Engine, name: str = "tiny", window: int = 10_000) -> None:
        self.engine, self.name, self.window = engine, name, window
        self.asked: list[dict[str, Any]] = []
        self.failures: list[int] = []
        self.key, self.gives_ids, self.dies_after = "", True, 10**9
        self.keys: set[str] = set()
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send({"data": [{"id": server.name, "max_model_len": server.window}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.keys.add(self.headers.get("Authorization", ""))
                with server._lock:
                    server.asked.append(body)
                    failure = server.failures.pop(0) if server.failures else 0
                    failure = 500 if len(server.asked) > server.dies_after else failure
                    if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                        failure = 401
                    reply = {"error": {"message": "not now"}} if failure else server.complete(body)
                self.send(reply, failure or 200)

            def send(self, reply: dict[str, Any], status: int = 200) -> None:
                content = json.dumps(reply).encode()
                self.send_response(status)
                if status in (301, 302, 307):
                    self.send_header("Location", "http://127.0.0.1:1/")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *words: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        found = answer(self.engine, body["prompt"], body)

        def named(place: dict[int, float]) -> dict[str, float]:
            return {f"token_id:{token}": value for token, value in place.items()}

        logprobs = {
            "tokens": [f"token_id:{token}" for token in found.ids],
            "token_logprobs": found.logprobs,
            "top_logprobs": [named(place) for place in places(found, body["logprobs"])],
        }
        choice = {"index": 0, "text": found.text, "finish_reason": finish(found), "logprobs": logprobs}
        if self.gives_ids and body["return_token_ids"]:
            choice["token_ids"] = found.ids
        return {"choices": [choice]}

    def __enter__(self) -> VllmServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.shutdown()
        self._server.server_close()
