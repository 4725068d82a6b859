"""Pages are tested without drawing: one test of each page looks at its pictures, ``test_charts`` at every chart."""

from __future__ import annotations

import struct

import pytest

from tunesmith.report import charts

PNG = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 640, 480)
"""The beginning of a PNG: what a page reads of one."""
_draw = charts.png


@pytest.fixture
def not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are made as figures, but not drawn."""
    monkeypatch.setattr(charts, "png", lambda figure: PNG)


@pytest.fixture
def drawn(not_drawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are drawn after all."""
    monkeypatch.setattr(charts, "png", _draw)
