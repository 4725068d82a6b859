"""Shared fixtures: no network, one thread, shared data where it is present."""

from __future__ import annotations

import base64
import gc
import importlib.metadata
import inspect
import os
import re
import socket
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs in as many processes as there are cores
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # an installed DeepSpeed looks for one aloud, on stdout

import pytest

from tunesmith.report import charts

SHARED = Path(os.environ.get("TUNESMITH_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach another machine fails the test."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family == socket.AF_UNIX or (isinstance(address, tuple) and address[0] in ("127.0.0.1", "localhost", "::1")):
            return connect(self, address)
        _refuse(address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def _refuse(address: Any) -> NoReturn:
    raise AssertionError(f"a test tried to reach the network: {address}")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small files are synced by the suite; what a power cut would leave is not what it tests."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """A garbage collection passes over what was made since, not over 700,000 objects of imported libraries: half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes empty folders that begin with a name. ``mktemp`` lists all folders that there are before it makes one more: with
    the two folders of each of 8,000 tests that takes a minute."""
    base, numbers = tmp_path_factory.mktemp("folders"), count()

    def make(name: str) -> Path:
        folder = base / f"{name}-{next(numbers)}"
        folder.mkdir()
        return folder

    return make


@pytest.fixture
def tmp_path(new_folder: Callable[[str], Path], request: pytest.FixtureRequest) -> Path:
    return new_folder(re.sub(r"\W", "_", request.node.name)[:30])


@pytest.fixture(scope="session")
def new_home(tmp_path_factory: pytest.TempPathFactory, new_folder: Callable[[str], Path]) -> Callable[[], Path]:
    """Makes empty home folders that share one folder of compiled kernels: the C compiler runs once in the whole suite."""
    base = tmp_path_factory.getbasetemp()
    kernels = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    kernels.mkdir(exist_ok=True)

    def make() -> Path:
        home = new_folder("home")
        (home / "kernels").symlink_to(kernels, target_is_directory=True)
        return home

    return make


@pytest.fixture(scope="session", autouse=True)
def home_of_the_session(new_home: Callable[[], Path]) -> Iterator[None]:
    """Fixtures of a module train before any test has a home of its own."""
    if "TUNESMITH_TEST_HOME" in os.environ:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(new_home()))
        yield


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, new_home: Callable[[], Path]) -> None:
    """Caches and models of a test never touch the user's own."""
    if "TUNESMITH_TEST_HOME" not in os.environ:
        monkeypatch.setenv("TUNESMITH_HOME", str(new_home()))


@pytest.fixture(scope="session", autouse=True)
def versions_are_read_once() -> Iterator[None]:
    """Each run records the versions of four packages; reading one parses a file of hundreds of lines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "version", cache(importlib.metadata.version))
        yield


CHARTS = [
    name for name, made in vars(charts).items() if inspect.isfunction(made) and made.__annotations__.get("return") == "Figure"
]
BLANK = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==")


@pytest.fixture(autouse=True)
def no_drawing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of a tiny run is matplotlib; a chart is one blank pixel where no test looks at it."""
    if "report" not in request.path.parts and not request.node.get_closest_marker("draws"):
        for name in CHARTS:
            monkeypatch.setattr(charts, name, lambda *given: None)
        monkeypatch.setattr(charts, "png", lambda figure: BLANK)


@pytest.fixture
def shared() -> Path:
    """The folder of real data sets, or a skip that says what is missing."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"real data sets are not at {SHARED} (set TUNESMITH_SHARED)")
    return SHARED
