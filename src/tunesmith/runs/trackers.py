"""``train.report_to``: copies of every figure of a run in trackers, through accelerate's tracker classes.

``metrics.jsonl`` is the record of a run; a tracker holds a copy. So no tracker can stop or slow a run: each
has its own thread and queue. A tracker that is down, raises or hangs is reported once and then ignored.
Everything stays on this machine unless the user's environment says otherwise (``WANDB_MODE``,
``WANDB_API_KEY``, ``MLFLOW_TRACKING_URI``, ``TRACKIO_SPACE_ID`` ...).

Resuming a run sends each tracker the records of ``metrics.jsonl`` that it lacks. A tracker may be ahead of
the checkpoint; its figures are not written again, because the resumed run repeats them bit for bit.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tunesmith import __version__
from tunesmith.errors import MissingExtra
from tunesmith.json_types import JsonObject
from tunesmith.runs.figure_format import is_number
from tunesmith.runs.run_folder import flatten

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "tunesmith"
QUEUE = 1000
"""Records that wait for a slow tracker; further ones are dropped and counted."""
CLOSE_SECONDS = 10.0
"""At the end a run waits this long for all trackers together."""
_THREAD = "tunesmith tracker "
_KINDS = {"train": "train", "stop": "train", "eval": "eval", "rollout": "rollout"}
_NOT_SENT = frozenset(("step", "time"))

Scalar = str | int | float | bool


@dataclass(frozen=True)
class TrackedRun:
    """The run as trackers see it. ``config``: its flat recipe. ``before``: the records of a resumed run."""

    folder: Path
    id: str
    config: dict[str, Scalar]
    before: list[JsonObject] = field(default_factory=list)
    resumed: bool = False


@dataclass(frozen=True)
class Sink:
    """An open tracker of accelerate.

    ``last_steps``: the last step that it holds, by kind of record. ``end``: called after the tracker has
    finished.
    """

    tracker: GeneralTracker
    last_steps: dict[str, int] = field(default_factory=dict)
    end: Callable[[], None] = lambda: None


def require(names: Sequence[str]) -> None:
    """Raise MissingExtra for the first tracker whose package is not installed. Imports none of them."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(name, "tracking", f"train.report_to: [{name}]")


def describe_run(
    folder: Path, created: str, recipe: JsonObject, before: list[JsonObject], resumed: bool
) -> TrackedRun:
    """Describe a run for its trackers. A resumed run keeps ``created`` and so its id."""
    run_id = hashlib.sha256(f"{folder}\n{created}".encode()).hexdigest()[:16]
    facts = {"run_folder": str(folder), "run_id": run_id, "tunesmith_version": __version__}
    return TrackedRun(folder, run_id, {**flat_config(recipe), **facts}, before, resumed)


def flat_config(recipe: JsonObject) -> dict[str, Scalar]:
    """``{"train": {"batch_size": 8}}`` -> ``{"train.batch_size": 8}``; lists by index; null as text."""
    flat = flatten(recipe, all_lists=True)
    return {key: value if isinstance(value, Scalar) else json.dumps(value) for key, value in flat.items()}


def figures_of(record: JsonObject) -> dict[str, float]:
    """Return a record's figures under transformers' names (``train/loss``); {} for other kinds."""
    kind = _KINDS.get(record["kind"])
    return {
        f"{kind}/{key.removeprefix('eval_')}": value
        for key, value in record.items()
        if kind and key not in _NOT_SENT and is_number(value)
    }


def any_running() -> bool:
    """Return whether a tracker's thread is alive: one that did not end in time."""
    return any(thread.name.startswith(_THREAD) and thread.is_alive() for thread in threading.enumerate())


class Trackers:
    """All trackers of a run. ``warn`` gets a line for each that fails, is too slow, or does not end in time."""

    def __init__(
        self,
        names: Sequence[str] = (),
        run: TrackedRun | None = None,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._warn = warn
        self._feeds = [_Feed(name, run) for name in dict.fromkeys(names)] if run else []

    def log(self, record: JsonObject) -> None:
        """Queue a record for every tracker; returns at once."""
        for feed in self._feeds:
            feed.put(record)
        self._report_problems()

    def close(self) -> None:
        """Let the trackers write their queues, for at most CLOSE_SECONDS. May be called twice."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for feed in self._feeds:
            feed.stop()
        for feed in self._feeds:
            feed.thread.join(max(0.0, deadline - time.monotonic()))
        self._report_problems(at_end=True)
        self._feeds = []

    def _report_problems(self, at_end: bool = False) -> None:
        for feed in list(self._feeds):
            if feed.problem is not None:
                problem = f"failed and gets no more figures: {feed.problem}. Training continues"
                self._feeds.remove(feed)
            elif at_end and feed.thread.is_alive():
                problem = f"did not end within {CLOSE_SECONDS:.0f} s and was left"
            elif at_end and feed.dropped:
                problem = f"was too slow: {feed.dropped} records were not sent"
            else:
                continue
            self._warn(f"{feed.name} {problem}; metrics.jsonl holds every figure.")


class _Feed:
    """One tracker and its queue. Only the feed's thread calls the tracker."""

    def __init__(self, name: str, run: TrackedRun) -> None:
        self.name = name
        self.problem: str | None = None
        self.dropped = 0
        self._queue: queue.Queue[JsonObject] = queue.Queue(QUEUE)
        self._stopped = threading.Event()
        # A daemon, so that a tracker that hangs cannot keep the process from ending.
        self.thread = threading.Thread(target=self._work, args=(run,), name=_THREAD + name, daemon=True)
        self.thread.start()

    def put(self, record: JsonObject) -> None:
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def stop(self) -> None:
        self._stopped.set()

    def _work(self, run: TrackedRun) -> None:
        try:
            sink = OPEN[self.name](run)
            for record in chain(run.before, self._records()):
                figures = figures_of(record)
                if figures and record["step"] > sink.last_steps.get(record["kind"], -1):
                    sink.tracker.log(figures, step=record["step"])
            sink.tracker.finish()
            sink.end()
        except Exception as error:  # noqa: BLE001 - an error of any tracker is reported and never ends a run
            self.problem = f"{type(error).__name__}: {str(error).strip() or 'no reason given'}"

    def _records(self) -> Iterator[JsonObject]:
        while True:
            try:
                yield self._queue.get(timeout=0.2)
            except queue.Empty:
                if self._stopped.is_set():
                    return


def _tensorboard(run: TrackedRun) -> Sink:
    """Event files in RUN/tensorboard/NAME. ``purge_step`` hides what an interrupted run wrote before."""
    from accelerate.tracking import TensorBoardTracker
    from torch.utils.tensorboard.summary import hparams

    purge_step = 0 if run.resumed else None
    tracker = TensorBoardTracker(run.folder.name, run.folder / "tensorboard", purge_step=purge_step)
    tracker.start()
    # store_init_configuration() would add a second TensorBoard run for the recipe, and another at each
    # resume.
    for summary in hparams(run.config, {}):
        tracker.writer.file_writer.add_summary(summary)
    return Sink(tracker)


def _wandb(run: TrackedRun) -> Sink:
    """Offline in RUN/wandb. W&B ignores a step at or below its last one, so a resumed run doubles nothing."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb
    from accelerate.tracking import WandBTracker

    chosen = "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT), name=run.folder.name, id=run.id, resume="allow", config=run.config,
        mode=None if chosen else "offline", dir=os.environ.get("WANDB_DIR", str(run.folder)),
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, disable_code=True),
    )  # fmt: skip
    tracker.start()
    return Sink(tracker)


def _mlflow(run: TrackedRun) -> Sink:
    """A file store in RUN/mlflow, or the server that the user's environment or program names."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    from accelerate.tracking import MLflowTracker

    is_local = not mlflow.is_tracking_uri_set()
    if is_local:
        # mlflow-skinny lacks the packages of the database store.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_tracking_uri((run.folder / "mlflow").as_uri())
    known = mlflow.search_runs(
        filter_string=f"tags.tunesmith_run = '{run.id}'", search_all_experiments=True, output_format="list"
    )
    run_id = known[0].info.run_id if known else None
    tracker = MLflowTracker(PROJECT, run_id=run_id, run_name=run.folder.name)
    tracker.start()
    mlflow.set_tag("tunesmith_run", run.id)  # the argument ``tags`` would tag the experiment too
    tracker.store_init_configuration(run.config)
    client = mlflow.MlflowClient()
    last_steps = {}
    for kind in set(_KINDS.values()):
        points = client.get_metric_history(run_id, f"{kind}/epoch") if run_id else []
        last_steps[kind] = max((point.step for point in points), default=-1)
    # A tracking URI is global to the process: reset it, so that the next run gets its own folder.
    return Sink(tracker, last_steps, lambda: mlflow.set_tracking_uri(None) if is_local else None)


def _trackio(run: TrackedRun) -> Sink:
    """Trackio's folder on this machine, for ``trackio show --project tunesmith``; starts no dashboard."""
    from accelerate.tracking import TrackioTracker
    from trackio.sqlite_storage import SQLiteStorage

    # A run of another folder may have the same name; then this one becomes a new run, logged from its start.
    last = SQLiteStorage.get_latest_run_record_by_name(PROJECT, run.folder.name) if run.resumed else None
    stored = SQLiteStorage.get_run_config(PROJECT, run_id=last["id"]) or {} if last is not None else {}
    is_ours = stored.get("run_id") == run.id
    tracker = TrackioTracker(
        PROJECT, name=run.folder.name, resume="must" if is_ours else "never", config=run.config, embed=False,
        auto_log_gpu=False, auto_log_cpu=False,
    )  # fmt: skip
    tracker.start()
    last_steps = dict.fromkeys(_KINDS.values(), -1)
    if is_ours:
        for row in SQLiteStorage.get_logs(PROJECT, run.folder.name, run_id=tracker.run.id):
            for kind in last_steps:
                if f"{kind}/epoch" in row:
                    last_steps[kind] = max(last_steps[kind], row["step"])
    return Sink(tracker, last_steps)


OPEN: dict[str, Callable[[TrackedRun], Sink]] = {
    "tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio,
}  # fmt: skip


class _MutedStream:
    """A stream that drops what the trackers' threads print and passes on everything else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith(_THREAD):
            return len(text)
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextmanager
def mute_trackers(names: Sequence[str]) -> Iterator[None]:
    """Drop what the trackers print to stdout and stderr, which belong to the run."""
    if not names:
        yield
        return
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _MutedStream(sys.stdout), _MutedStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
