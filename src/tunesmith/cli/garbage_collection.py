"""Python's search for unreachable objects, for a program that imports torch and transformers and then trains."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NEW_OBJECTS = 50_000
"""Objects that are made before Python looks for unreachable cycles among them; its default is 700.

A training step leaves no tensors in cycles (``tests/train/test_growth.py``)."""


@contextmanager
def imports() -> Iterator[None]:
    """Import torch and transformers inside the block, without searches: a tenth of the time goes into them.

    Later searches leave out the 680,000 objects that the imports made. In a process that has imported torch
    already, nothing changes.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
