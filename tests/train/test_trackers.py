import importlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

import tunesmith
from tests.runs import recipe
from tunesmith.errors import MissingExtra
from tunesmith.runs import metrics_file, trackers

NAMES = list(trackers.OPEN)


@pytest.fixture(autouse=True)
def nothing_of_the_users(monkeypatch, tmp_path):
    """The surroundings of a user who has set up nothing."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")):
            monkeypatch.delenv(name)
    for name in ("WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, {"WANDB_ERROR_REPORTING": "false"}.get(name, "true"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))


def trained(folder, names, resume=False, **train):
    """A run of six steps with an evaluation at every second one."""
    made = recipe(folder, report_to=names, **{"max_steps": 6, "eval_steps": 2.0, "save_steps": 2.0, **train})
    made["data"]["eval"] = {"fraction": 0.25}
    return tunesmith.train(made, out=folder / "run-a", resume=resume)


def expected(folder):
    """{figure: [(step, value)]} of metrics.jsonl."""
    points = {}
    for record in metrics_file.read(folder / "run-a" / "metrics.jsonl"):
        for name, value in trackers.figures_of(record).items():
            points.setdefault(name, []).append((record["step"], value))
    return points


# ----------------------------------------------------------------------------------- what each tracker wrote, read back


def from_tensorboard(run, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(run / "tensorboard" / run.name), size_guidance={reader.SCALARS: 0})
    found.Reload()
    held = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content.decode("latin-1")
    points = {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}
    return points, "train.batch_size" in held and run.name == "run-a"


def from_wandb(run, monkeypatch):
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    points, config = {}, {}
    *_, file = sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    for record in finished_records(file, messages):
        if record.WhichOneof("record_type") == "run":
            assert (record.run.project, record.run.display_name) == ("tunesmith", "run-a")
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                if not name.startswith("_"):
                    points.setdefault(name, []).append((row["_step"], value))
    return points, config.get("train.batch_size") == 5


def finished_records(file, messages):
    """All records of a run. A process of W&B writes them with a delay; an "exit" record is the last one."""
    deadline = time.monotonic() + 20
    while True:
        records = [messages.Record.FromString(content) for content in leveldb_records(file.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in records) or time.monotonic() > deadline:
            return records
        time.sleep(0.05)


def leveldb_records(content):
    """The records of a .wandb file: LevelDB's log format in blocks of 32 KiB behind a header of 7 bytes."""
    at, part = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


def from_mlflow(run, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient((run / "mlflow").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("tunesmith").experiment_id])
    assert (found.info.run_name, found.info.status) == ("run-a", "FINISHED")
    points = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    return {name: sorted((one.step, one.value) for one in many) for name, many in points.items()}, (
        found.data.params["train.batch_size"] == "5"
    )


def from_trackio(run, monkeypatch):
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    (found,) = storage.get_run_records("tunesmith")
    points = {}
    for row in storage.get_logs("tunesmith", "run-a", run_id=found["id"]):
        for name, value in row.items():
            if "/" in name:
                points.setdefault(name, []).append((row["step"], value))
    config = storage.get_run_config("tunesmith", run_id=found["id"])
    return points, config["train.batch_size"] == 5


READ = {"tensorboard": from_tensorboard, "wandb": from_wandb, "mlflow": from_mlflow, "trackio": from_trackio}


@pytest.fixture(params=NAMES)
def tracker(request, monkeypatch, tmp_path):
    pytest.importorskip(request.param)
    if request.param == "trackio":  # it takes its folder from the environment when it is imported
        for module in ("trackio.utils", "trackio.sqlite_storage"):
            if hasattr(importlib.import_module(module), "TRACKIO_DIR"):
                monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio")
    return request.param


def test_a_tracker_holds_every_figure_and_the_recipe(tracker, tmp_path, monkeypatch, capfd):
    trained(tmp_path, [tracker])
    points, has_recipe = READ[tracker](tmp_path / "run-a", monkeypatch)
    wanted = expected(tmp_path)
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss", "eval/loss_stderr"} <= wanted.keys()
    assert points.keys() == wanted.keys()
    for name, line in wanted.items():
        assert [step for step, _ in points[name]] == [step for step, _ in line], name
        assert [value for _, value in points[name]] == pytest.approx([value for _, value in line], rel=1e-6), name
    assert has_recipe
    said = capfd.readouterr()
    assert tracker not in said.out + said.err


def test_a_resumed_run_leaves_no_gap_and_no_point_twice(tracker, tmp_path, monkeypatch):
    """Stopped after step 3 with a tracker that lost what was sent last, and gone on from step 2."""

    def stop(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    made = recipe(tmp_path, report_to=[tracker], max_steps=6, eval_steps=2.0, save_steps=2.0)
    made["data"]["eval"] = {"fraction": 0.25}
    with pytest.raises(KeyboardInterrupt):
        tunesmith.train(made, out=tmp_path / "run-a", on_log=stop)
    trained(tmp_path, [tracker], resume=True)
    points, _ = READ[tracker](tmp_path / "run-a", monkeypatch)
    for name, line in expected(tmp_path).items():
        assert [step for step, _ in points[name]] == [step for step, _ in line], name


def test_what_is_not_finite_arrives_as_it_is(tracker, tmp_path, monkeypatch):
    about = trackers.describe_run(tmp_path / "run-a", "now", {"train": {"batch_size": 5}}, [], False)
    about.folder.mkdir()
    with trackers.mute_trackers([tracker]):
        said = []
        told = trackers.Trackers([tracker], about, said.append)
        told.log({"kind": "train", "step": 1, "epoch": 0.1, "loss": math.nan, "grad_norm": math.inf})
        told.close()
    points, _ = READ[tracker](about.folder, monkeypatch)
    assert said == []
    assert math.isnan(float(points["train/loss"][0][1]))
    assert float(points["train/grad_norm"][0][1]) >= 1.7e308


# ---------------------------------------------------------------------------------- a tracker that is down, slow or hangs


class Fake:
    """A replacement of accelerate's tracker."""

    def __init__(self, log=lambda values, step: None, finish=lambda: None):
        self.log, self.finish = log, finish


def use(monkeypatch, fake, name="tensorboard"):
    def opened(about):
        return trackers.Sink(fake() if callable(fake) else fake)

    monkeypatch.setitem(trackers.OPEN, name, opened)


def raises(*given, **named):
    raise ConnectionError("no route to the server")


@pytest.mark.parametrize("fake", [raises, Fake(log=raises), Fake(finish=raises)], ids=["opening", "logging", "finishing"])
def test_a_tracker_that_fails_is_reported_once_and_the_run_completes(tmp_path, monkeypatch, fake):
    pytest.importorskip("tensorboard")
    use(monkeypatch, fake)
    result = trained(tmp_path, ["tensorboard"])
    assert result["steps"] == 6
    notes = json.loads((tmp_path / "run-a" / "manifest.json").read_text())["notes"]
    (line,) = [note for note in notes if "tensorboard" in note]
    assert "gets no more figures: ConnectionError: no route to the server" in line and "metrics.jsonl" in line


def test_a_tracker_that_hangs_holds_up_nothing_but_the_end_and_that_for_a_moment(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    never = threading.Event()
    use(monkeypatch, Fake(log=lambda values, step: never.wait()))
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.05)
    said = []
    told = trackers.Trackers(["tensorboard"], SimpleNamespace(before=[]), said.append)
    started = time.perf_counter()
    for step in range(trackers.QUEUE + 50):
        told.log({"kind": "train", "step": step, "loss": 1.0})
    assert time.perf_counter() - started < 1
    told.close()
    never.set()
    assert said == ["tensorboard did not end within 0 s and was left; metrics.jsonl holds every figure."]


HANGS = """
import threading, time
from tunesmith.cli.main import exit_program
from tunesmith.runs import trackers
threading.Thread(target=time.sleep, args=(60,), name="tunesmith tracker wandb").start()
print("the result")
exit_program(3)
"""


def test_a_tracker_that_hangs_does_not_keep_the_program_from_ending():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (3, "the result\n")


def test_records_that_a_slow_tracker_has_no_room_for_are_counted(monkeypatch):
    ready = threading.Event()
    seen = []

    def log(values, step):
        ready.wait()
        seen.append(step)

    use(monkeypatch, Fake(log=log))
    monkeypatch.setattr(trackers, "QUEUE", 10)
    said = []
    told = trackers.Trackers(["tensorboard"], SimpleNamespace(before=[]), said.append)
    for step in range(100):
        told.log({"kind": "train", "step": step, "loss": 1.0})
    ready.set()
    told.close()
    assert len(seen) in (10, 11) and seen == sorted(seen)
    assert said == [f"tensorboard was too slow: {100 - len(seen)} records were not sent; metrics.jsonl holds every figure."]


def test_trackers_do_not_wait_for_each_other(monkeypatch):
    never, seen = threading.Event(), []
    use(monkeypatch, Fake(log=lambda values, step: never.wait()), "wandb")
    use(monkeypatch, Fake(log=lambda values, step: seen.append(step)), "mlflow")
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.3)
    told = trackers.Trackers(["wandb", "mlflow"], SimpleNamespace(before=[]), lambda line: None)
    told.log({"kind": "train", "step": 7, "loss": 1.0})
    told.close()
    never.set()
    assert seen == [7]


def test_nothing_but_a_trackers_own_thread_is_hushed(capsys, monkeypatch):
    def chatter():
        print("wandb: hello")
        print("wandb: hello", file=sys.stderr)
        return Fake()

    use(monkeypatch, chatter)
    with trackers.mute_trackers(["tensorboard"]):
        told = trackers.Trackers(["tensorboard"], SimpleNamespace(before=[]), print)
        told.close()
        print("mine")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("mine\n", "")


# ------------------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("name", NAMES)
def test_a_package_that_is_missing_is_named_before_anything_is_started(tmp_path, monkeypatch, name):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *rest: None if wanted == name else real(wanted, *rest))
    made = recipe(tmp_path, report_to=[name])
    with pytest.raises(MissingExtra, match=rf"{name}.*\n.*tunesmith\[tracking\]"):
        tunesmith.train(made, out=tmp_path / "run-a")
    with pytest.raises(MissingExtra):
        tunesmith.check(made)
    assert not (tmp_path / "run-a").exists()


def test_by_default_there_is_no_tracker_and_no_thread(tmp_path):
    names = set()
    tunesmith.train(
        recipe(tmp_path), out=tmp_path / "run-a", on_log=lambda record: names.update(one.name for one in threading.enumerate())
    )
    assert names and not [name for name in names if "tracker" in name]


def test_a_recipe_is_flat_and_plain_for_trackers():
    tree = {"model": "m", "train": {"batch_size": 8, "max_steps": None, "columns": {}}, "data": {"train": [{"path": "a"}]}}
    assert trackers.flat_config(tree) == {
        "model": "m", "train.batch_size": 8, "train.max_steps": "null", "train.columns": "{}", "data.train.0.path": "a",
    }  # fmt: skip


def test_figures_have_the_names_of_transformers():
    record = {"kind": "eval", "step": 4, "epoch": 0.5, "eval_loss": 1.5, "perplexity": 4.5, "best": True, "time": 1.0}
    assert trackers.figures_of(record) == {"eval/epoch": 0.5, "eval/loss": 1.5, "eval/perplexity": 4.5}
    assert trackers.figures_of({"kind": "memory", "step": 5, "micro_batch_tokens": 512}) == {}
    assert trackers.figures_of({"kind": "stop", "step": 5, "loss": 2.0, "rows": ["a:1"]}) == {"train/loss": 2.0}
