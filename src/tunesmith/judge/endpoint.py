"""A judge behind an address that speaks OpenAI's chat completions protocol, such as a vLLM or Ollama server.

Nothing is sent unless a user names an address. The key comes from an environment variable, never from a
recipe, a flag or a file, and is never printed. A reply counts only if it is one letter, A or B, alone on its
last line; any other reply is a missing verdict.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import urlsplit

from tunesmith import http_json
from tunesmith.errors import JudgeError, UserError
from tunesmith.http_json import NoReply, Send
from tunesmith.json_types import JsonObject
from tunesmith.judge.judges import ENGLISH, KOREAN, Pair, Verdict, question

KEY_VARIABLE = "OPENAI_API_KEY"
_VERDICT = re.compile(r"\**(A|B)\**\.?")


def is_address(judge: str) -> bool:
    return judge.startswith(("http://", "https://"))


def read_verdict(reply: str) -> float | None:
    """Return 1.0 for A, 0.0 for B on the last line of a reply, None for anything else."""
    lines = reply.strip().splitlines()
    found = _VERDICT.fullmatch(lines[-1].strip()) if lines else None
    return None if found is None else float(found[1] == "A")


class Endpoint:
    """A model on a server. ``address``: such as http://127.0.0.1:8000/v1. ``model``: the model's name there.

    ``key_variable``: the environment variable that holds the key; an address on this machine needs none.
    Raises UserError if it is not set, JudgeError if the server does not answer."""

    def __init__(
        self,
        address: str,
        model: str,
        key_variable: str = KEY_VARIABLE,
        send: Send | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        key = os.environ.get(key_variable, "")
        if not key and urlsplit(address).hostname not in ("127.0.0.1", "localhost", "::1"):
            raise UserError(
                f"the judge at {address} needs a key, and {key_variable} is not set.\n"
                f"  Type: export {key_variable}=..., or name another variable with --key-variable"
            )
        self.name = f"{model} at {address}"
        self.address, self.model = address.rstrip("/") + "/chat/completions", model
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.send, self.sleep = send or http_json.sender(), sleep
        self.identity = f"{self.address} {model}"

    def reply(self, question: str) -> tuple[str, int]:
        """Return the text of the reply to ``question``, and the tokens that both cost."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "seed": 0,
        }
        reply = self._ask(body)
        try:
            text = str(reply["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError):
            text = ""
        usage = reply.get("usage")
        tokens = usage.get("total_tokens") if isinstance(usage, dict) else 0
        return text, tokens if isinstance(tokens, int) else 0

    def _ask(self, body: JsonObject) -> JsonObject:
        try:
            return http_json.ask(self.address, body, self.headers, self.send, self.sleep)
        except NoReply as error:
            raise JudgeError(self._refusal(str(error))) from None

    def _refusal(self, failure: str) -> str:
        return (
            f"the judge {self.name} does not answer: {failure}.\n"
            "  Verdicts so far are kept. Run the same command again to go on."
        )


class EndpointJudge:
    """Chooses between two answers by asking a model on a server."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.name = endpoint, endpoint.name
        forms = hashlib.sha256((ENGLISH + KOREAN).encode()).hexdigest()[:8]
        self.identity = f"{endpoint.identity} {forms}"

    def __call__(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Verdict]]:
        for place, pair in enumerate(pairs):
            text, tokens = self.endpoint.reply(question(pair))
            verdict = read_verdict(text)
            reason = "" if verdict is not None else f"the reply is not A or B: {text[-80:]!r}"
            yield place, Verdict(verdict, tokens, reason)
