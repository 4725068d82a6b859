"""SIGINT and SIGTERM during training: the run saves a checkpoint before it stops."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def catch_signals() -> Iterator[list[str]]:
    """Yield a list that collects SIGINT and SIGTERM by name; a second signal has its usual effect."""
    received: list[str] = []
    before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        for caught, handler in before.items():
            signal.signal(caught, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            before[number] = signal.signal(number, note)
        except ValueError:  # not the main thread: the caller handles signals there
            break
    try:
        yield received
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
