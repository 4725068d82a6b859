"""``tunesmith launch``: several processes make the run of one. What ends one of them ends all, and is reported once."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import tunesmith
from tests.runs import apart, killed_before, recipe, weights
from tests.train.launching import launched, share_kernels
from tunesmith import errors
from tunesmith.cli.main import main
from tunesmith.runs import metrics_file
from tunesmith.train import distributed, launch, process_watch, stop_signals
from tunesmith.train.process_watch import Note
from tunesmith.train.reproduce import reproduce

FAILED = {"type": "DataError", "message": "row 7 is bad", "exit_code": 2, "time": 5.0}
LOST = {"type": "ProcessLost", "message": "lost another", "exit_code": 3, "time": 4.0}


def test_the_first_failure_is_raised_with_its_own_class():
    later = {**FAILED, "message": "later", "time": 6.0}
    error = launch.find_cause({0: Note(1, failure=later), 1: Note(2, failure=FAILED)}, {0: 2, 1: 2}, {})
    assert type(error) is errors.DataError and str(error) == "row 7 is bad" and error.exit_code == 2


def test_the_loss_of_another_is_never_the_cause():
    error = launch.find_cause({0: Note(1, failure=LOST), 1: Note(2, failure=FAILED)}, {0: 3, 1: 2}, {})
    assert str(error) == "row 7 is bad"


def test_a_killed_process_is_named_with_its_signal():
    error = launch.find_cause({0: Note(1, failure=LOST), 1: Note(2)}, {0: 3, 1: -9}, {1: "brief"})
    assert type(error) is errors.ProcessLost and "process 1 was ended by SIGKILL" in str(error) and "brief" not in str(error)


def test_one_that_was_given_up_is_not_the_cause():
    error = launch.find_cause({0: Note(1), 1: Note(2)}, {0: process_watch.GIVEN_UP, 1: -11}, {1: "a\nsegments at fault"})
    assert "process 1 was ended by SIGSEGV" in str(error) and "segments at fault" in str(error)


def test_a_missing_extra_of_another_process_keeps_its_message():
    error = launch.find_cause({0: Note(1, failure={**FAILED, "type": "MissingExtra"})}, {0: 2}, {})
    assert type(error) is errors.MissingExtra and str(error) == "row 7 is bad"


def test_an_interrupt_before_anything_was_saved_stays_one():
    error = launch.find_cause({0: Note(1, failure={**FAILED, "type": "KeyboardInterrupt", "exit_code": 130})}, {0: 130}, {})
    assert type(error) is KeyboardInterrupt


WAITS = """
import sys, time, pathlib
from tunesmith.train import process_watch
process_watch.GRACE = 0.5
process_watch.start(pathlib.Path(sys.argv[1]), 0)
print("begun", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("fate", ["failed", "gone"])
def test_a_process_that_waits_ends_soon_after_another(fate, tmp_path):
    waiting = subprocess.Popen([sys.executable, "-c", WAITS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert waiting.stdout.readline() == "begun\n"
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    pid = os.getpid() if fate == "failed" else gone.pid
    note = {"pid": pid, "done": False, "failure": FAILED if fate == "failed" else None}
    (tmp_path / "process-1.json").write_text(json.dumps(note))
    assert waiting.wait(timeout=10) == process_watch.GIVEN_UP


def shared_run(tmp_path, **train):
    """Return a recipe with steps of 5, 5 and 2 rows, so that the last step of an epoch has few rows for each process."""
    made = recipe(
        tmp_path, adaptation={"type": "lora", "r": 4, "lora_dropout": 0.3},
        **{"max_steps": 7, "eval_steps": 3, "save_steps": 1, "save_total_limit": 9, **train},
    )  # fmt: skip
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl"), "limit": 3}
    made["samples"] = {"count": 1, "max_new_tokens": 3}
    return made


def evaluations(run):
    return [record["eval_loss"] for record in metrics_file.read(run / "metrics.jsonl") if record["kind"] == "eval"]


def test_a_run_may_go_on_with_another_number_of_processes(tmp_path, monkeypatch):
    """One process to step 2, two to step 5 where a signal stops them, one to the end: the run of one."""
    made = shared_run(tmp_path)
    tunesmith.train(made, out=tmp_path / "straight")
    killed_before(3, made, tmp_path / "run")

    stop = "os.kill(os.getppid(), signal.SIGTERM)"
    code, out, err = launched(made, tmp_path, "--resume", "--json", fault=stop)
    assert code == 130, err
    assert json.loads(out)["error"]["type"] == "Interrupted" and "stopped by SIGTERM after step" in err
    assert "the run used 1 processes, now 2" in err and err.count("error:") == 1
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert "launch --processes 2" in manifest["command"] and manifest["processes"] == 2
    stopped = max(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert 3 <= stopped < 7

    outcome = tunesmith.train(made, out=tmp_path / "run", resume=True)
    assert outcome["steps"] == 7
    assert apart(weights(tmp_path / "straight" / "model"), weights(outcome["model_dir"])) <= 1e-6
    assert evaluations(tmp_path / "run") == pytest.approx(evaluations(tmp_path / "straight"), abs=1e-6)


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    """(folder with the launched run ``run``, its recipe, its output). New interpreters run it, as a user's command does."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(tmp_path_factory.mktemp("home")))
        made = shared_run(folder)
        code, out, err = launched(made, folder, "--json", fresh=True)
    assert code == 0, err
    return folder, made, json.loads(out), err


def test_two_launched_processes_make_the_run_of_one(run_of_two, tmp_path):
    folder, made, outcome, err = run_of_two
    expected = tunesmith.train(made, out=tmp_path / "straight")
    assert outcome["steps"] == 7 and outcome["samples"][0]["before"] == expected["samples"][0]["before"]
    assert err.count("parameters:") == 1 and "step 7/7" in err and "torch" not in err
    assert apart(weights(tmp_path / "straight" / "model"), weights(folder / "run" / "model")) <= 1e-6
    assert evaluations(folder / "run") == pytest.approx(evaluations(tmp_path / "straight"), abs=1e-6)
    assert outcome["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)


def test_a_run_of_two_processes_is_reproduced_with_two(run_of_two, tmp_path):
    folder, *_ = run_of_two
    share_kernels()
    before = dict(os.environ)
    found = reproduce(folder / "run", tmp_path / "again")
    assert dict(os.environ) == before, "the environment of the processes stays theirs"
    assert found["equal"] and json.loads((tmp_path / "again" / "manifest.json").read_text())["processes"] == 2


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        ("raise errors.DataError('row 7 is bad')", 2, "error: row 7 is bad"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 3, "error: process 1 was ended by SIGKILL"),
    ],
)
def test_what_ends_one_process_ends_all_within_ten_seconds_and_is_reported_once(fault, code, told, tmp_path):
    ended, _, err = launched(recipe(tmp_path, max_steps=50), tmp_path, fault=fault)
    seconds = time.time() - float((tmp_path / "fault" / "when").read_text())
    assert ended == code and told in err and err.count("error:") == 1, err
    assert seconds < 10
    pids = [int(file.read_text()) for file in (tmp_path / "fault").glob("pid-*")]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert "Traceback" not in err and "elastic" not in err and "step 2/50" in err


@pytest.mark.parametrize(
    ("made", "told"), [({"batch_size": 5}, "train.batch_size is 5: 1 would"), ({"batch_size": 50}, "training rows are 4: 2")]
)
def test_more_processes_than_rows_of_a_step_are_refused(made, told, tmp_path, monkeypatch):
    here = SimpleNamespace(num_processes=6, device=torch.device("cpu"))
    monkeypatch.setattr(distributed, "state", lambda: here)
    with pytest.raises(errors.RecipeError, match=told):
        tunesmith.check(recipe(tmp_path, count=4, **made))


def test_more_processes_than_rows_of_a_step_are_refused_before_any_is_started(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "launch", None)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(tmp_path)))
    assert main(["launch", "--processes", "50", str(tmp_path / "r.yaml")]) == 2
    assert "50 processes share the rows of a step, and train.batch_size is 5" in capsys.readouterr().err


@pytest.fixture
def listening():
    """A suite in the background is started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_two_signals_end_at_once_whatever_they_are(listening):
    with stop_signals.catch_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == ["SIGTERM"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
