"""A disk that is really full: a file-size limit of the process, and a small file system of its own where one can be mounted.

safetensors and tokenizers write in Rust and raise errors of their own, so that a raised OSError would show nothing.
"""

import json
import resource
import subprocess
from pathlib import Path

import pytest

import tunesmith
from tests.kill_points import in_fork, recipe, summary
from tunesmith import files
from tunesmith.merge import merge_adapter
from tunesmith.runs import run_list
from tunesmith.train import checkpoint


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(recipe, folder of the undisturbed run, its summary, its files by size)."""
    folder = tmp_path_factory.mktemp("straight")
    made = recipe(folder)
    made["train"]["save_total_limit"] = 9
    tunesmith.train(made, out=folder / "run")
    return made, folder / "run", summary(folder / "run")


def limited(size, work):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return work()


def leftovers(folder):
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


def assert_stopped_well(run, code, answer):
    assert code == 3 and answer.startswith("DiskFullError: "), (code, answer)
    assert leftovers(run) == []
    assert all(checkpoint.find_damage(path) is None for path in (run / "checkpoints").glob("*"))
    if (run / "recipe.yaml").exists():
        assert run_list.read(run).state in ("stopped", "killed", "done")


LONG = pytest.mark.long
NAMES = ["manifest.json", "model/tokenizer.json", "model/model.safetensors", "checkpoints/step-3/state.safetensors"]
MORE_NAMES = ["samples.jsonl", "recipe.yaml", "metrics.jsonl", "report.html", "loss.png", "model/tunesmith.json"]


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=LONG) for name in MORE_NAMES)])
def test_a_limit_below_the_size_of_one_file(name, straight, tmp_path):
    """Files of more bytes fail too, so that the first of them ends the run; then it is resumed without a limit."""
    made, before, expected = straight
    size = (before / name).stat().st_size - 1
    run = tmp_path / "run"
    code, answer = in_fork(lambda: limited(size, lambda: tunesmith.train(made, out=run)))
    assert_stopped_well(run, code, answer)
    started = (run / "manifest.json").exists()
    tunesmith.train(made, out=run, resume=started)
    assert summary(run) == expected


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system of so many kB."""
    mounted = []

    def mount(kilobytes):
        folder = tmp_path / f"disk-{kilobytes}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no mounts here: {done.stderr}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("kilobytes", [120, 700, 1400, *(pytest.param(size, marks=LONG) for size in (4, 40, 400, 1000))])
def test_a_disk_that_fills_up(kilobytes, straight, disk, monkeypatch):
    made, _, expected = straight
    monkeypatch.setattr(files, "MARGIN_BYTES", -(10**9))  # what is known to be missing is refused before anything is written
    small = disk(kilobytes)
    run = small / "run"
    code, answer = in_fork(lambda: tunesmith.train(made, out=run))
    assert_stopped_well(run, code, answer)
    subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
    tunesmith.train(made, out=run, resume=(run / "manifest.json").exists())
    assert summary(run) == expected


def test_no_room_for_the_merged_copy_keeps_the_run(straight, tmp_path):
    """merge, too, writes by other libraries."""
    made = {**straight[0], "adaptation": {"type": "lora", "r": 2}}
    tunesmith.train(made, out=tmp_path / "run")
    before = sorted(tmp_path.iterdir())
    code, answer = in_fork(lambda: limited(60_000, lambda: merge_adapter.merge(tmp_path / "run", tmp_path / "merged")))
    assert (code, answer.partition(":")[0]) == (3, "DiskFullError") and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("size", [40, 4_000])
def test_no_room_for_processed_rows_names_the_folder(size, straight, tmp_path):
    made = {**straight[0], "data": {**straight[0]["data"], "cache": True}}
    code, answer = in_fork(lambda: limited(size, lambda: tunesmith.train(made, out=tmp_path / "run")))
    assert code == 3 and "DiskFullError" in answer
    assert not (tmp_path / "run").exists() or leftovers(tmp_path / "run") == []


def test_no_room_for_a_file_of_answers(straight, tmp_path):
    from tunesmith.cli.main import main

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(3)))
    words = ["generate", str(straight[1]), "--data", str(rows), "--out", str(tmp_path / "answers.jsonl"), "--max-new-tokens", "3"]
    code, answer = in_fork(lambda: limited(20, lambda: main(words)))
    assert (code, answer) == (0, 3), "the answers so far are kept"
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["answers.jsonl.partial", "rows.jsonl"]
    assert main(words) == 0 and len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
