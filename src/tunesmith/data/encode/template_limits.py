"""Limits on chat templates, which are untrusted programs: size, nesting, processor time and memory.

Jinja's sandbox refuses access to Python's internals. It does not stop a template that never ends or that
builds gigabytes. ``check_syntax`` checks the source of a template. ``render`` is the only caller of
templates: a watching thread interrupts a call that exceeds a limit, at a cost of about a microsecond a call.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import jinja2
from jinja2 import nodes

from tunesmith.data.rows import Message
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

LARGEST_TEMPLATE = 2**17
"""Characters of a template. Published ones have at most 30,000."""

LARGEST_NUMBER = 10**6
"""The largest integer literal that a template may have. It is a width or a count."""

SECONDS = 2.0
"""Seconds of processor time for one conversation."""

MEMORY_BYTES = 2**29
"""Bytes by which memory may grow while one conversation is rendered."""

LARGEST_GROWTH, LEAST_CHARACTERS = 100, 2**20
"""A rendering may have LARGEST_GROWTH times the characters of its conversation, and LEAST_CHARACTERS more."""

_POLL_SECONDS = 0.05
_IDLE_SECONDS = 2.0

ADVICE = "Correct the template (chat_template.jinja of the model, or data.template), or choose another, such as chatml."


class TemplateLimit(DataError):
    """A chat template exceeds a limit. This is no fault of a row, so reading stops at once."""


class _Interrupt(BaseException):
    """The exception by which the watching thread interrupts a rendering. A template cannot catch it."""


@dataclass(slots=True, eq=False)
class _Rendering:
    """A running call of a template.

    ``seconds``: processor time of its thread when the call began. ``bytes``: resident memory when the
    watching thread first saw the call. ``exceeded``: the limit that it exceeded, in words.
    """

    seconds: float
    bytes: int | None = None
    exceeded: str = ""


_running: dict[int, _Rendering] = {}
"""Thread id -> the call that it runs."""

_lock = threading.Lock()
_watching = False


def parse(template: str) -> nodes.Template:
    """Parse a template. Raises DataError for a text that is not valid Jinja or exceeds a limit."""

    def plain_tag(found: re.Match[str]) -> str:
        return found[1] + ("endif" if found[2] else "if true") + found[3]

    if len(template) > LARGEST_TEMPLATE:
        raise TemplateLimit(
            f"the chat template has more than {LARGEST_TEMPLATE:,} characters, the most that is read. {ADVICE}"
        )
    # transformers' ``{% generation %}`` tag is unknown to Jinja
    template = re.sub(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})", plain_tag, template)
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return _run(environment.parse, template)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
        ) from None
    except ValueError as error:  # a number with thousands of digits
        raise TemplateLimit(f"the chat template is not valid Jinja: {error}. {ADVICE}") from None


def check_syntax(template: str) -> None:
    """Raise DataError as ``parse`` does, and for access to a name like ``__class__``.

    The sandbox refuses such a name only when the code runs, and a trial rendering may not reach that branch.
    """
    _run(_check_expressions, parse(template))


def _check_expressions(tree: nodes.Template) -> None:
    for node in tree.find_all(nodes.Expr):
        _check_expression(node)


def _check_expression(node: nodes.Expr) -> None:
    match node:
        case (
            nodes.Getattr(attr=str(name))
            | nodes.Getitem(arg=nodes.Const(value=str(name)))
            | nodes.Filter(name="attr", args=[nodes.Const(value=str(name)), *_])
        ) if name.startswith("__"):
            raise DataError(
                f"the chat template reaches outside its sandbox: line {node.lineno}: {name!r}. A template may only read data."
            )
        # x * x in a loop soon has so many digits that one product takes minutes, and nothing can interrupt it
        case (
            nodes.Pow() | nodes.Mul(left=nodes.Name() | nodes.Getattr(), right=nodes.Name() | nodes.Getattr())
        ):
            raise TemplateLimit(
                f"the chat template multiplies two variables or uses **: line {node.lineno}. Neither is allowed. {ADVICE}"
            )
        case nodes.Const(value=int(number)) if abs(number) > LARGEST_NUMBER:
            raise TemplateLimit(
                f"the chat template has a number above {LARGEST_NUMBER:,}: line {node.lineno}. {ADVICE}"
            )


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: object) -> str:
    """Return the conversation as text. ``options`` are those of ``apply_chat_template``.

    Raises TemplateLimit, and the template's own errors.
    """
    text = str(_run(tokenizer.apply_chat_template, list(messages), tokenize=False, **options))
    if len(text) > LEAST_CHARACTERS:
        given = len(str(messages)) + len(str(options))
        if len(text) > LEAST_CHARACTERS + LARGEST_GROWTH * given:
            raise TemplateLimit(
                f"the chat template makes {len(text):,} characters of a conversation of {given:,}. {ADVICE}"
            )
    return text


@contextmanager
def limited_memory() -> Iterator[None]:
    """Make one huge allocation fail inside the ``with`` block (Linux only).

    Other threads must not allocate then.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _memory_pages(0) * resource.getpagesize() + MEMORY_BYTES
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _run(call: Callable[..., T], *arguments: object, **options: object) -> T:
    """Return ``call(*arguments, **options)``. Raises TemplateLimit for too much time, memory or nesting."""
    thread = threading.get_ident()
    rendering = _running[thread] = _Rendering(_thread_seconds())
    if not _watching:
        _start_watching()
    try:
        try:
            return call(*arguments, **options)
        finally:
            _running.pop(thread, None)
            if rendering.exceeded:  # cancel a pending interrupt
                with _lock:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)
    except _Interrupt:
        raise TemplateLimit(f"the chat template {rendering.exceeded}. {ADVICE}") from None
    except MemoryError:
        raise TemplateLimit(
            f"the chat template needs too much memory, or is nested too deep. {ADVICE}"
        ) from None
    except (RecursionError, SyntaxError):  # Python's compiler has limits for nested blocks
        raise TemplateLimit(f"the chat template is nested too deep. {ADVICE}") from None


def _start_watching() -> None:
    global _watching
    with _lock:
        if not _watching:
            _watching = True
            threading.Thread(target=_watch, name="chat-template-limits", daemon=True).start()


def _watch() -> None:
    global _watching
    idle_since = time.monotonic()
    while True:
        time.sleep(_POLL_SECONDS)
        with _lock:
            if _running:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > _IDLE_SECONDS:
                _watching = False
                return
            for thread, rendering in list(_running.items()):
                _interrupt_excess(thread, rendering)


def _interrupt_excess(thread: int, rendering: _Rendering) -> None:
    """Interrupt a thread that has exceeded a limit. The caller holds the lock.

    This function sets ``exceeded`` before it looks the thread up in ``_running``. ``_run`` reads ``exceeded``
    after it has removed the thread. So a late interrupt is either not sent, or ``_run`` sees and cancels it.
    """
    if rendering.exceeded:
        return
    memory = _resident_bytes()
    if rendering.bytes is None:
        rendering.bytes = memory
    if _thread_seconds(thread) - rendering.seconds > SECONDS:
        rendering.exceeded = f"takes too long: it was stopped after {SECONDS:g} seconds of processor time"
    elif memory - rendering.bytes > MEMORY_BYTES:
        rendering.exceeded = f"needs more than {MEMORY_BYTES >> 20} MB for one conversation"
    if rendering.exceeded and _running.get(thread) is rendering:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Interrupt))


def _thread_seconds(thread: int | None = None) -> float:
    """Return the processor time of a thread (None: this one) in seconds; wall-clock time if not on Linux."""
    if sys.platform != "linux":
        return time.monotonic()
    return time.thread_time() if thread is None else time.clock_gettime(time.pthread_getcpuclockid(thread))


def _memory_pages(field: int) -> int:
    """Return the address space (field 0) or the resident memory (field 1) of this process, in pages."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[field])


def _resident_bytes() -> int:
    if sys.platform != "linux":
        return 0
    import resource

    return _memory_pages(1) * resource.getpagesize()
