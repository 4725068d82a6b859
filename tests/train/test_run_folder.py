"""A run folder after a kill, a power cut or an edit: the run is resumed, restarted, or refused with a list of what is left."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tunesmith
from tests.runs import Killed, history, killed_before, recipe
from tunesmith.errors import DataError, UserError
from tunesmith.runs import run_folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(recipe, folder) of a finished run with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    made = recipe(folder, save_steps=2, eval_steps=2, save_total_limit=9)
    made["data"]["eval"] = {"path": str(folder / "rows.jsonl"), "limit": 2}
    tunesmith.train(made, out=folder / "run")
    return made, folder / "run"


@pytest.fixture
def copy(finished, tmp_path):
    """(recipe, folder) of a copy that a test may damage."""
    shutil.copytree(finished[1], tmp_path / "run")
    return finished[0], tmp_path / "run"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            "flipped",
            r"every checkpoint of .*run is damaged.*\n  step-2: state.json does not match.*\n  step-4: state.json does not",
        ),
        ("deleted", r"checkpoints of .*run are gone, of which the first was of step 2"),
        ("emptied", r"every checkpoint of .*run is damaged.*\n  step-2: manifest.json is missing"),
    ],
)
def test_without_a_good_checkpoint_a_run_stops_and_names_what_is_left(damage, told, copy):
    made, run = copy
    for step in (2, 4):
        folder = run / "checkpoints" / f"step-{step}"
        if damage == "flipped":
            flip(folder / "state.json")
        else:
            shutil.rmtree(folder)
            if damage == "emptied":
                folder.mkdir()
    before = contents(run)
    with pytest.raises(UserError, match=told) as caught:
        tunesmith.train(made, out=run, resume=True)
    assert "What is left: metrics.jsonl (to step 4), model/ (of step 4), report.html. The run had finished." in str(caught.value)
    assert "--restart" in str(caught.value) and contents(run) == before


def test_restart_keeps_what_it_replaces(copy, finished):
    made, run = copy
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    outcome = tunesmith.train(made, out=run, restart=True)
    assert outcome["steps"] == 4 and history(run) == history(finished[1])
    assert contents(run / "replaced-1") == before
    tunesmith.train(made, out=run, restart=True)
    assert (run / "replaced-2" / "model").is_dir() and contents(run / "replaced-1") == before


@pytest.mark.parametrize("number", range(1, 6))
def test_a_kill_while_the_old_files_are_moved_loses_none_of_them(number, tmp_path, monkeypatch):
    run, names = tmp_path / "run", ("recipe.yaml", "manifest.json", "metrics.jsonl", "report.html")
    (run / "checkpoints" / "step-2").mkdir(parents=True)
    for name in names:
        (run / name).write_text(name)
    replace, left = Path.replace, [number]

    def dies(path, to):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return replace(path, to)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", dies)
        run_folder.claim(run, "restart").begin({"model": "m"})
    opened = run_folder.claim(run, "restart")
    opened.begin({"model": "m"})
    opened.close()
    moved = {path.name: path for folder in run.glob("replaced-*") for path in folder.iterdir()}
    assert moved.keys() == {*names, "checkpoints"} and all(moved[name].read_text() == name for name in names)
    assert sorted(path.name for path in run.iterdir() if path.is_file()) == [".lock", "recipe.yaml"]


def test_data_that_cannot_be_read_leave_a_restarted_run_where_it_is(copy):
    made, run = copy
    before = contents(run)
    wrong = {**made, "data": {**made["data"], "train": [{"path": "nowhere.jsonl"}]}}
    with pytest.raises(DataError):
        tunesmith.train(wrong, out=run, restart=True)
    assert contents(run) == before


def test_a_run_killed_before_its_first_checkpoint_starts_again(finished, tmp_path):
    made, straight = finished
    killed_before(2, made, tmp_path / "run")
    assert history(tmp_path / "run")  # there are records, and no checkpoint
    tunesmith.train(made, out=tmp_path / "run", resume=True)
    notes = json.loads((tmp_path / "run" / "manifest.json").read_text())["notes"]
    assert "the run was stopped before it saved a checkpoint: it starts again from step 0" in notes
    assert history(tmp_path / "run") == history(straight)


def test_records_without_a_manifest_are_not_overwritten(finished, tmp_path):
    made, _ = finished
    killed_before(2, made, tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"are gone.*\n.*What is left: metrics.jsonl"):
        tunesmith.train(made, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("left", ["lock", "half of a recipe", "recipe", "base"])
def test_what_a_kill_in_the_first_moments_leaves_is_no_dead_end(left, resume, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").write_text("77")
    if left == "half of a recipe":
        (run / ".recipe.yaml.77-ab.tmp").write_text("mod")
    if left in ("recipe", "base"):
        (run / "recipe.yaml").write_text("model: another\n")
        (run / "metrics.jsonl").write_text("")
    if left == "base":
        (run / "base").mkdir()
    opened = run_folder.claim(run, "resume" if resume else "new")
    opened.begin({"model": "m"})
    assert sorted(path.name for path in run.iterdir()) == [".lock", "recipe.yaml"]
    assert (run / "recipe.yaml").read_text() == "model: m\n"
    opened.close()


def test_a_refused_run_leaves_no_folder(tmp_path):
    made = recipe(tmp_path)
    with pytest.raises(DataError):
        tunesmith.train({**made, "data": {"train": [{"path": "nowhere.jsonl"}]}}, out=tmp_path / "run")
    with pytest.raises(UserError, match="no run to resume"):
        tunesmith.train(made, out=tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="give one of them"):
        tunesmith.train(made, out=tmp_path / "run", resume=True, restart=True)
    assert not (tmp_path / "run").exists()


DAMAGED = {
    "empty": b"",
    "NUL": b"\0" * 64,
    "not UTF-8": b"\xff\xfe{}",
    "a list": b"[]",
    "half": b'{"a": ',
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("name", ["manifest.json", "recipe.yaml"])
def test_a_damaged_file_is_named(name, content, copy):
    made, run = copy
    (run / name).write_bytes(content)
    with pytest.raises((DataError, UserError), match=rf"{name}[\s\S]*--restart"):
        tunesmith.train(made, out=run, resume=True)
    tunesmith.train({**made, "train": {**made["train"], "max_steps": 1}}, out=run, restart=True)
    assert (run / "replaced-1" / name).read_bytes() == content


def test_a_second_process_is_refused_before_torch_is_imported(finished, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(finished[0]))
    code = (
        "import sys, tunesmith.cli.main as cli; code = cli.main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    held = run_folder.claim(tmp_path / "run")
    for verb in (["train"], ["launch", "--processes", "2"]):
        ended = interpreter(sys.executable, "-c", code, *verb, str(file), "--out", str(tmp_path / "run"))
        assert ended.returncode == 2 and "is training in" in ended.stderr, ended.stderr
    held.close()


def interpreter(*command):
    """Run a fresh interpreter: the forks of ``tests.processes`` have torch."""
    path = str(Path(tunesmith.__file__).parents[1])
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


def test_a_disk_that_is_read_only_is_named(tmp_path):
    """A mount of its own in a process of its own, where the system allows one."""
    run = tmp_path / "disk" / "run"
    run.mkdir(parents=True)
    mounted = f"mount -t tmpfs -o size=1m none {tmp_path / 'disk'} && mkdir {run} && touch {run}/.lock && mount -o remount,ro {tmp_path / 'disk'}"
    code = "import sys\nfrom pathlib import Path\nfrom tunesmith.runs import run_folder\nrun_folder.claim(Path(sys.argv[1]))"
    command = f'{mounted} || exit 77; "{sys.executable}" -c "{code}" {run}; "{sys.executable}" -c "{code}" {run}-new'
    ended = interpreter("unshare", "-rm", "sh", "-c", command)
    if ended.returncode == 77:
        pytest.skip(f"no mounts here: {ended.stderr}")
    assert f"UserError: the run folder {run} cannot be written: Read-only file system" in ended.stderr
    assert f"UserError: the folder {run}-new cannot be made: Read-only file system" in ended.stderr
