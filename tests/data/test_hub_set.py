"""Hub data sets as sources: pulled once and verified, or streamed; always at one known commit."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess

import pyarrow as arrow
import pytest
from pyarrow import parquet

import tunesmith
from tests.data.test_prepare import Language
from tests.fake_hub import FakeHub
from tests.hub_server import HubServer
from tests.runs import model_folder
from tests.runs import recipe as tiny_recipe
from tests.tiny import tiny_tokenizer
from tunesmith import files
from tunesmith.cli.main import main
from tunesmith.data.check.lint import lint
from tunesmith.data.data_config import DataConfig, Source
from tunesmith.data.read import hub_set
from tunesmith.data.store.encode_source import content_hash
from tunesmith.data.store.prepare import prepare
from tunesmith.errors import DataError, MissingExtra, RecipeError
from tunesmith.hub import ask, local_store

TRAIN = "hub:some/data"


def made(first, last):
    return [{"prompt": f"question {n}?", "completion": f" answer {n}"} for n in range(first, last)]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows):
    out = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), out)
    return out.getvalue()


SHARDS = {
    "data/train-00000-of-00002.jsonl": jsonl(made(0, 5)),
    "data/train-00001-of-00002.jsonl": jsonl(made(5, 9)),
    "data/test-00000-of-00001.jsonl": jsonl(made(90, 92)),
    "README.md": b"A data set.",
    "run.py": b"raise SystemExit",
}
TABLES = {"train-0.parquet": table(made(0, 5)), "train-1.parquet": table(made(5, 9)), "test-0.parquet": table(made(90, 92))}
TWO_CARDS = b"""---
configs:
- config_name: english
  data_files: [{split: train, path: en.jsonl}]
- config_name: korean
  data_files: [{split: train, path: ko.jsonl}, {split: test, path: en.jsonl}]
---
"""
ODD_CARD = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: odd.csv}]
  sep: ";"
---
"""
CONFIGURED = {"README.md": TWO_CARDS, "en.jsonl": jsonl(made(0, 3)), "ko.jsonl": jsonl(made(50, 54))}
ODD = {"README.md": ODD_CARD, "odd.csv": b"prompt;completion\na; b\n"}


@pytest.fixture(scope="module")
def fake():
    with FakeHub() as fake:
        yield fake


@pytest.fixture(scope="module")
def server(fake):
    with HubServer(fake.url) as server:
        yield server.subprocess


@pytest.fixture
def real_hub(fake, monkeypatch):
    """The Hub, and a real process for each question."""
    monkeypatch.setattr(ask, "offline_by_user", lambda: False)
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    fake.repos.clear()
    fake.asked.clear()
    fake.add("some/data", SHARDS)
    return fake


@pytest.fixture
def hub(real_hub, server, monkeypatch):
    """The Hub, and forks of one process for the questions."""
    for module in (ask, hub_set):
        monkeypatch.setattr(module, "subprocess", server)
    return real_hub


def offline(monkeypatch):
    monkeypatch.setattr(ask, "offline_by_user", lambda: True)


def pull(path=TRAIN, commit=None, **keys):
    said = []
    source = Source(path=path, **keys)
    return source, hub_set.pull(source, said.append, commit), said


def refusal(path=TRAIN, **keys):
    with pytest.raises(DataError) as error:
        pull(path, **keys)
    return str(error.value)


def prompts(source):
    return [(item.row, item.value["prompt"]) for item in hub_set.rows(source)]


def prepared(**source):
    config = DataConfig.model_validate({"train": [{"path": TRAIN, **source}], "eval": {"fraction": 0}})
    return prepare(config, Language(), tiny_tokenizer("chatml"), max_length=None, window=512, seed=0)


def stored():
    folder = files.home() / "datasets"
    return sorted(path.name for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


@pytest.mark.parametrize("files", [SHARDS, TABLES], ids=["jsonl", "parquet"])
def test_a_split_is_pulled_once_and_read_like_local_files(files, hub, monkeypatch):
    hub.add("some/data", files)
    source, folder, _ = pull()
    offline(monkeypatch)
    assert prompts(source) == [(n + 1, f"question {n}?") for n in range(9)]
    shards = sorted(name.rpartition("/")[2] for name in files if "train" in name)
    assert stored() == sorted([local_store.MANIFEST, *shards])
    assert hub_set.commit_of(folder) == "a" * 40
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_split_at_the_newest_commit_is_not_downloaded_again(hub):
    pull()
    hub.asked.clear()
    pull()
    assert hub.asked and not [path for _, path, _ in hub.asked if "/resolve/" in path and path.endswith("jsonl")]


def test_no_request_is_made_for_a_stored_commit(hub, monkeypatch):
    named = f"{TRAIN}@{'a' * 40}"
    pull(named)
    offline(monkeypatch)
    assert len(prompts(pull(named)[0])) == 9


def test_an_interrupted_download_continues_where_it_stopped(hub):
    rows = bytes(range(256)) * 50_000  # nothing opens it here
    repo = hub.add("some/data", {"train.parquet": rows}, cut={"train.parquet": 11_000_000})
    assert "Files that have arrived are kept" in refusal()
    repo.cut = {}
    hub.asked.clear()
    _, folder, said = pull()
    assert (folder / "train.parquet").read_bytes() == rows and "continuing after 10.5 MB" in said[-1]
    assert [wanted for _, path, wanted in hub.asked if path.endswith(".parquet")] == [f"bytes={10 * 2**20}-"]


def test_a_file_of_another_hash_is_refused_and_removed(hub):
    hub.add("some/data", TABLES, listed={"train-1.parquet": "1" * 64})
    assert "expected 111" in refusal()
    assert stored() == []


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"path": "hub:nobody/nothing"}, "no data set nobody/nothing, or it is private"),
        ({"path": f"{TRAIN}@v2"}, "not its revision v2"),
        ({"split": "tran"}, "no split 'tran'. Did you mean `train`? Valid: test, train"),
        ({"name": "english"}, "no configuration 'english'. Valid: default"),
    ],
    ids=["repository", "revision", "split", "configuration"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_the_error_names_what_the_hub_lacks(keys, words, streaming, hub):
    assert words in refusal(streaming=streaming, **keys) and stored() == []


def test_the_error_for_a_gated_set_names_the_token(hub):
    hub.repos["some/data"].gated = True
    assert "set HF_TOKEN" in refusal()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"README.md": b"Nothing here."}, "doesn't contain any data files"),
        ({"data.py": b"exit()", **SHARDS}, "scripts are no longer"),
    ],
    ids=["empty", "script"],
)
def test_a_set_without_rows_or_with_a_script_is_refused(files, words, hub):
    hub.add("some/data", files)
    said = refusal()
    assert "no rows that can be read" in said and words in said


def test_a_configuration_is_chosen_by_name(hub):
    hub.add("some/data", CONFIGURED)
    assert "several configurations; choose one with `name`. Valid: english, korean" in refusal()
    korean, _, _ = pull(name="korean")
    english, _, _ = pull(name="english")
    assert [len(prompts(source)) for source in (korean, english)] == [4, 3]
    assert korean.label == "hub:some/data/korean/train"


@pytest.mark.parametrize(
    ("files", "words"),
    [(ODD, "sep: ';'"), ({"train.jsonl.zip": b"x"}, "train.jsonl.zip")],
    ids=["settings", "compressed"],
)
def test_files_that_only_datasets_can_read_must_be_streamed(files, words, hub):
    hub.add("some/data", files)
    said = refusal()
    assert words in said and "streaming: true" in said and stored() == []


def test_a_stream_uses_the_settings_of_the_configuration(hub):
    hub.add("some/data", ODD)
    (row,) = hub_set.rows(pull(streaming=True)[0])
    assert row.value == {"prompt": "a", "completion": " b"}


def test_the_error_for_a_set_not_pulled_shows_the_command_without_a_request(hub):
    with pytest.raises(DataError, match=r"Type: tunesmith data pull some/data@v1 --name en --split test$"):
        prepared(path="hub:some/data@v1", name="en", split="test")
    assert hub.asked == []


def test_the_missing_library_is_named_with_its_extra(hub, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find_spec(name))
    with pytest.raises(MissingExtra, match=r"pip install 'tunesmith\[hub\]'"):
        pull()
    assert hub.asked == []


def test_no_request_is_made_where_the_user_forbids_it(hub, monkeypatch):
    offline(monkeypatch)
    assert "HF_DATASETS_OFFLINE is set" in refusal()
    with pytest.raises(DataError, match="HF_DATASETS_OFFLINE is set"):
        prepared(streaming=True)
    assert hub.asked == []


def test_the_commit_stays_until_it_is_pulled_again(hub):
    source, _, _ = pull()
    before = content_hash(source)
    hub.add("some/data", {**SHARDS, "data/train-00001-of-00002.jsonl": jsonl(made(5, 7))}, revision="b" * 40)
    assert content_hash(source) == before and len(prompts(source)) == 9
    pull()
    assert content_hash(source) != before and len(prompts(source)) == 7
    hub.add("some/data", SHARDS)
    pull(commit="a" * 40)
    assert content_hash(source) == before


def test_a_damaged_file_is_noticed(hub):
    source, folder, _ = pull()
    file = folder / "data" / "train-00000-of-00002.jsonl"
    file.write_bytes(file.read_bytes().replace(b"question 0", b"question 9"))
    with pytest.raises(DataError, match=r"another sha256.\n  Type: tunesmith data pull some/data$"):
        prepared()
    pull()
    assert content_hash(source)


def test_a_bad_row_is_counted_over_all_files_of_the_split(hub):
    hub.add("some/data", {**SHARDS, "data/train-00001-of-00002.jsonl": jsonl([*made(5, 6), {"prompt": 3, "completion": "x"}])})
    source, _, _ = pull()
    (problem,) = lint([source]).problems
    assert problem.where == "hub:some/data/train:7:prompt"


@pytest.mark.parametrize("files", [SHARDS, TABLES], ids=["jsonl", "parquet"])
def test_a_stream_gives_the_rows_of_the_files(files, hub):
    hub.add("some/data", files)
    streamed, pulled = pull(streaming=True)[0], pull()[0]
    assert prompts(streamed) == prompts(pulled)
    assert prompts(streamed.model_copy(update={"limit": 3})) == prompts(pulled)[:3]


def test_a_second_start_of_a_stream_needs_no_network_and_no_file(hub, monkeypatch):
    first = prepared(streaming=True, limit=7)
    assert len(first.train) == 7 and not first.report.cached
    assert [name for name in stored() if not name.startswith("seen-")] == [local_store.MANIFEST]
    hub.add("some/data", TABLES, revision="b" * 40)  # whatever happened there meanwhile
    hub.asked.clear()
    offline(monkeypatch)
    again = prepared(streaming=True, limit=7)
    assert again.report.cached and hub.asked == []
    assert [list(one["input_ids"]) for one in again.train] == [list(one["input_ids"]) for one in first.train]
    assert again.report.sources[0].revision == "a" * 40 == first.report.sources[0].revision


def test_a_broken_stream_names_its_last_row_and_leaves_no_cache(hub):
    hub.repos["some/data"].closed = {"data/train-00001-of-00002.jsonl"}
    with pytest.raises(DataError) as error:
        prepared(streaming=True)
    assert "broke off after row 5: " in str(error.value) and "403" in str(error.value)
    assert str(error.value).endswith("Type: tunesmith data pull some/data")
    hub.repos["some/data"].closed = set()
    assert len(prepared(streaming=True).train) == 9


def test_a_stream_that_is_closed_ends_its_process_and_the_libraries_leave_no_files(real_hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **keys: started.append(popen(*args, **keys)) or started[-1])
    real_hub.add("some/data", {"train.jsonl": jsonl(made(0, 20_000))})
    rows = hub_set.rows(pull(streaming=True)[0])
    assert next(rows).row == 1
    rows.close()
    assert started[-1].poll() not in (None, 0)  # it had far more to say than a pipe holds
    pull()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_values_that_json_lacks_do_not_break_a_stream(hub):
    rows = [{"text": "a", "picture": b"\x00", "when": arrow.scalar(0, arrow.timestamp("s")).as_py(), "score": float("nan")}]
    hub.add("some/data", {"train.parquet": table(rows)})
    (row,) = hub_set.rows(pull(streaming=True)[0])
    assert row.value["text"] == "a" and row.value["picture"] is None and row.value["when"] == "1970-01-01T00:00:00"


def test_a_run_on_a_pulled_set(hub, tmp_path, monkeypatch, capsys):
    for split in ("train", "test"):
        assert main(["data", "pull", "some/data", "--split", split, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["revision"] == "a" * 40 and facts["data_files"] == ["data/test-00000-of-00001.jsonl"]
    offline(monkeypatch)
    recipe = tiny_recipe(tmp_path, save_steps=2)
    recipe["data"] = {"train": [{"path": TRAIN}], "eval": {"sets": {"held": {"path": TRAIN, "split": "test"}}}}
    outcome = tunesmith.train(recipe, out=tmp_path / "run")
    assert outcome["steps"] == 4
    sources = json.loads((tmp_path / "run" / "manifest.json").read_text())["data"]["sources"]
    assert [(one["path"], one["revision"], one["rows_kept"]) for one in sources] == [
        ("hub:some/data/train", "a" * 40, 9),
        ("hub:some/data/test", "a" * 40, 2),
    ]
    monkeypatch.setattr(ask, "offline_by_user", lambda: False)
    hub.add("some/data", {**SHARDS, "data/train-00001-of-00002.jsonl": jsonl(made(5, 7))}, revision="b" * 40)
    pull()
    with pytest.raises(RecipeError, match=f"hub:some/data/train changed .*\n.*--commit {'a' * 40}"):
        tunesmith.train(recipe, out=tmp_path / "run", resume=True)


def test_a_run_on_a_stream(hub, tmp_path):
    recipe = tiny_recipe(tmp_path)
    recipe["data"] = {"train": [{"path": TRAIN, "streaming": True, "limit": 6}], "eval": {"fraction": 0}}
    assert tunesmith.train(recipe, out=tmp_path / "run")["steps"] == 4
    (source,) = json.loads((tmp_path / "run" / "manifest.json").read_text())["data"]["sources"]
    assert source["rows_read"] == 6 and source["revision"] == "a" * 40


def test_lint_preview_and_evaluate_take_a_split(hub, tmp_path, capsys):
    pull(split="test")
    model = str(model_folder(tmp_path, "llama"))
    assert main(["data", "lint", TRAIN, "--split", "test"]) == 0
    assert main(["data", "preview", TRAIN, "--split", "test", "--model", model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["sources"][0]["path"] == "hub:some/data/test"
    assert tunesmith.evaluate(model, TRAIN, split="test")["rows"] == 2
    assert main(["evaluate", model, "--data", TRAIN]) == 2
    assert "Type: tunesmith data pull some/data\n" in capsys.readouterr().err
    assert main(["evaluate", model, "--data", "rows.json", "--split", "test"]) == 2
    assert "split would do nothing" in capsys.readouterr().err
