"""Ask a server in JSON over HTTP: with time limits and new tries, and never at another address than the given one."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from tunesmith.json_types import JsonObject

TIMEOUT = 60.0
TRIES = 4
WAIT = 2.0
"""Seconds before the second try; each further one doubles them."""
_SHOWN = 300
"""Characters of a server's own message that an error shows."""

Send = Callable[[str, JsonObject | None, dict[str, str]], JsonObject]
"""(address, body, headers) -> parsed reply. Raises OSError or ValueError."""


class NoReply(Exception):
    """The server refused, or did not answer. The caller says what that means. ``status``: of HTTP, 0 without one."""

    def __init__(self, reason: str, status: int = 0) -> None:
        super().__init__(reason)
        self.status = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: object) -> None:
        """A redirect is an error: urllib would send the key to the other address."""


def sender(timeout: float = TIMEOUT) -> Send:
    """Return the function that sends ``body`` as JSON (without one: asks by GET) and returns the JSON reply."""

    def send(address: str, body: JsonObject | None, headers: dict[str, str]) -> JsonObject:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address, content, {"Content-Type": "application/json", **headers})
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as reply:
            found: JsonObject = json.load(reply)
        return found

    return send


def ask(
    address: str,
    body: JsonObject | None,
    headers: dict[str, str],
    send: Send,
    sleep: Callable[[float], None] = time.sleep,
) -> JsonObject:
    """Return the server's reply; try again when it is busy or silent. Raises NoReply."""
    for attempt in range(TRIES):
        try:
            reply = send(address, body, headers)
        except urllib.error.HTTPError as error:
            failure = f"HTTP {error.code} {error.reason}{_message(error)}"
            if error.code not in (408, 429) and error.code < 500:
                raise NoReply(failure, error.code) from None
        except (OSError, ValueError) as error:  # no connection, a timeout, or no JSON
            failure = str(error) or type(error).__name__
        else:
            if isinstance(reply, dict):
                return reply
            failure = "the reply is no JSON object"
        if attempt + 1 < TRIES:
            sleep(WAIT * 2**attempt)
    raise NoReply(f"{failure}, {TRIES} times")


def _message(error: urllib.error.HTTPError) -> str:
    """Return the server's own words on an error, after a colon; empty if it has none."""
    try:
        content: JsonObject = json.loads(error.read())
        words = str((content.get("error") or content).get("message") or "")
    except (OSError, ValueError, AttributeError):
        return ""
    return f": {words[:_SHOWN]}" if words else ""
