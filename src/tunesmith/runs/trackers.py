"""``train.report_to``: every figure of a run also goes to trackers, through accelerate's classes for them.

``metrics.jsonl`` is what a run is judged by; a tracker is a copy. So none of them can stop or slow a run: each has a thread and a
queue of its own. What is down, raises or hangs is said once and left behind. Everything stays on this machine unless the
user's environment says otherwise (``WANDB_MODE``, ``WANDB_API_KEY``, ``MLFLOW_TRACKING_URI``, ``TRACKIO_SPACE_ID`` ...).

A resumed run is brought up to its ``metrics.jsonl`` in each tracker. What the tracker holds already is not written again, also
where it is ahead of the checkpoint: the run goes on bit for bit, so these figures are what it would write.
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
from typing import Any

from tunesmith import __version__
from tunesmith.errors import MissingExtra
from tunesmith.runs import figure_format

PROJECT = "tunesmith"
QUEUE = 1000
"""Records that wait for a slow tracker; further ones are dropped and counted."""
CLOSE_SECONDS = 10.0
"""How long the end of a run waits for all trackers together."""
_THREAD = "tunesmith tracker "
_KINDS = {"train": "train", "stop": "train", "eval": "eval"}
_NOT_SENT = frozenset(("step", "time"))


@dataclass(frozen=True)
class Subject:
    """The run that is told of. ``config``: its recipe, flat. ``before``: its records so far, when it is resumed."""

    folder: Path
    id: str
    config: dict[str, str | int | float | bool]
    before: list[dict[str, Any]] = field(default_factory=list)
    resumed: bool = False


@dataclass(frozen=True)
class Sink:
    """An open tracker of accelerate. ``holds``: the last step it has of a kind of record. ``end``: after it has finished."""

    tracker: Any
    holds: dict[str, int] = field(default_factory=dict)
    end: Callable[[], None] = lambda: None


def require(names: Sequence[str]) -> None:
    """Raise MissingExtra for the first tracker whose package is not installed. Imports none of them."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(name, "tracking", f"train.report_to: [{name}]")


def subject(
    folder: Path, created: str, recipe: dict[str, Any], before: list[dict[str, Any]], resumed: bool
) -> Subject:
    """``created`` stays the same when a run is resumed, so that a tracker knows it again."""
    identity = hashlib.sha256(f"{folder}\n{created}".encode()).hexdigest()[:16]
    config = {**flat(recipe), "run_folder": str(folder), "run_id": identity, "tunesmith_version": __version__}
    return Subject(folder, identity, config, before, resumed)


def flat(tree: Any, key: str = "") -> dict[str, str | int | float | bool]:
    """``{"train": {"batch_size": 8}}`` -> ``{"train.batch_size": 8}``; lists by position; null as the text ``null``."""
    if isinstance(tree, dict | list) and tree:
        parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
        found: dict[str, str | int | float | bool] = {}
        for name, value in parts:
            found.update(flat(value, f"{key}.{name}" if key else str(name)))
        return found
    return {key: tree if isinstance(tree, bool | int | float | str) else json.dumps(tree)}


def sent(record: dict[str, Any]) -> dict[str, float]:
    """The figures of a record under transformers' names: ``train/loss``, ``eval/loss``. None of a record of another kind."""
    kind = _KINDS.get(record["kind"])
    return {
        f"{kind}/{key.removeprefix('eval_')}": value
        for key, value in record.items()
        if kind and key not in _NOT_SENT and figure_format.is_number(value)
    }


def left() -> bool:
    """Whether a tracker that did not end in time is still at it."""
    return any(thread.name.startswith(_THREAD) and thread.is_alive() for thread in threading.enumerate())


class Trackers:
    """All trackers of a run. ``say`` gets one line for each that failed, was too slow, or did not end in time."""

    def __init__(
        self,
        names: Sequence[str] = (),
        about: Subject | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._say = say
        self._feeds = [_Feed(name, about) for name in dict.fromkeys(names)] if about else []

    def log(self, record: dict[str, Any]) -> None:
        """Hand a record on; returns at once."""
        for feed in self._feeds:
            feed.put(record)
        self._complain()

    def close(self) -> None:
        """Let them write what waits, for at most CLOSE_SECONDS. May be called twice."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for feed in self._feeds:
            feed.stop()
        for feed in self._feeds:
            feed.thread.join(max(0.0, deadline - time.monotonic()))
        self._complain(at_end=True)
        self._feeds = []

    def _complain(self, at_end: bool = False) -> None:
        for feed in list(self._feeds):
            if feed.problem is not None:
                self._say(
                    f"{feed.name} gets no more figures: {feed.problem}. Training goes on; metrics.jsonl holds all of them."
                )
                self._feeds.remove(feed)
            elif at_end and feed.thread.is_alive():
                self._say(
                    f"{feed.name} did not end within {CLOSE_SECONDS:.0f} s and was left; metrics.jsonl holds every figure."
                )
            elif at_end and feed.dropped:
                self._say(
                    f"{feed.name} was too slow: {feed.dropped} records were not sent; metrics.jsonl holds all of them."
                )


class _Feed:
    """One tracker, its queue and the thread that is the only one to touch it."""

    def __init__(self, name: str, about: Subject) -> None:
        self.name = name
        self.problem: str | None = None
        self.dropped = 0
        self._waiting: queue.Queue[dict[str, Any]] = queue.Queue(QUEUE)
        self._stopped = threading.Event()
        # A daemon, so that a tracker that hangs cannot keep the process from ending.
        self.thread = threading.Thread(target=self._work, args=(about,), name=_THREAD + name, daemon=True)
        self.thread.start()

    def put(self, record: dict[str, Any]) -> None:
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def stop(self) -> None:
        self._stopped.set()

    def _work(self, about: Subject) -> None:
        try:
            sink = OPEN[self.name](about)
            for record in chain(about.before, self._records()):
                values = sent(record)
                if values and record["step"] > sink.holds.get(record["kind"], -1):
                    sink.tracker.log(values, step=record["step"])
            sink.tracker.finish()
            sink.end()
        except Exception as error:  # noqa: BLE001 - whatever somebody's tracker raises is told, and never ends a run
            self.problem = f"{type(error).__name__}: {str(error).strip() or 'no reason given'}"

    def _records(self) -> Iterator[dict[str, Any]]:
        while True:
            try:
                yield self._waiting.get(timeout=0.2)
            except queue.Empty:
                if self._stopped.is_set():
                    return


# ------------------------------------------------------------------------------------------------------ one opener each


def _tensorboard(about: Subject) -> Sink:
    """Event files in RUN/tensorboard/NAME. ``purge_step`` makes TensorBoard forget what an interrupted run wrote before."""
    from accelerate.tracking import TensorBoardTracker
    from torch.utils.tensorboard.summary import hparams

    tracker = TensorBoardTracker(
        about.folder.name, about.folder / "tensorboard", purge_step=0 if about.resumed else None
    )
    tracker.start()
    # store_init_configuration() would put the recipe into a run of its own beside this one, a new one at each resume.
    for summary in hparams(about.config, {}):
        tracker.writer.file_writer.add_summary(summary)
    return Sink(tracker)


def _wandb(about: Subject) -> Sink:
    """Offline in RUN/wandb. A step at or below the last one is ignored by W&B, so a resumed run doubles nothing."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb
    from accelerate.tracking import WandBTracker

    chosen = "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT), name=about.folder.name, id=about.id, resume="allow", config=about.config,
        mode=None if chosen else "offline", dir=os.environ.get("WANDB_DIR", str(about.folder)),
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True, disable_code=True),
    )  # fmt: skip
    tracker.start()
    return Sink(tracker)


def _mlflow(about: Subject) -> Sink:
    """A file store in RUN/mlflow, or the server that the user's environment or program names."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    from accelerate.tracking import MLflowTracker

    local = not mlflow.is_tracking_uri_set()
    if local:
        os.environ.setdefault(
            "MLFLOW_ALLOW_FILE_STORE", "true"
        )  # the database store needs more than mlflow-skinny brings
        mlflow.set_tracking_uri((about.folder / "mlflow").as_uri())
    known = mlflow.search_runs(
        filter_string=f"tags.tunesmith_run = '{about.id}'", search_all_experiments=True, output_format="list"
    )
    id = known[0].info.run_id if known else None
    tracker = MLflowTracker(PROJECT, run_id=id, run_name=about.folder.name)
    tracker.start()
    mlflow.set_tag("tunesmith_run", about.id)  # as ``tags`` it would be put on the experiment too
    tracker.store_init_configuration(about.config)
    client = mlflow.MlflowClient()
    holds = {}
    for kind in ("train", "eval"):
        points = client.get_metric_history(id, f"{kind}/epoch") if id else []
        holds[kind] = max((point.step for point in points), default=-1)
    # A tracking URI is the process's own: it is given back, so that the next run gets its own folder.
    return Sink(tracker, holds, lambda: mlflow.set_tracking_uri(None) if local else None)


def _trackio(about: Subject) -> Sink:
    """Trackio's own folder on this machine, where ``trackio show --project tunesmith`` looks; no dashboard is started."""
    from accelerate.tracking import TrackioTracker
    from trackio.sqlite_storage import SQLiteStorage

    # Another folder's run may have the same name: then this one is told of from its start, as a run of its own.
    last = SQLiteStorage.get_latest_run_record_by_name(PROJECT, about.folder.name) if about.resumed else None
    ours = (
        last is not None
        and (SQLiteStorage.get_run_config(PROJECT, run_id=last["id"]) or {}).get("run_id") == about.id
    )
    tracker = TrackioTracker(
        PROJECT, name=about.folder.name, resume="must" if ours else "never", config=about.config, embed=False,
        auto_log_gpu=False, auto_log_cpu=False,
    )  # fmt: skip
    tracker.start()
    holds = {"train": -1, "eval": -1}
    if ours:
        for row in SQLiteStorage.get_logs(PROJECT, about.folder.name, run_id=tracker.run.id):
            for kind in holds:
                if f"{kind}/epoch" in row:
                    holds[kind] = max(holds[kind], row["step"])
    return Sink(tracker, holds)


OPEN: dict[str, Callable[[Subject], Sink]] = {
    "tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio,
}  # fmt: skip


# ------------------------------------------------------------------------------------------- nothing on the terminal


class _Hushed:
    """A stream that drops what trackers' threads print and passes on everything else."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith(_THREAD):
            return len(text)
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def hushed(names: Sequence[str]) -> Iterator[None]:
    """Keep the trackers' own chatter off stdout and stderr, which belong to the run."""
    if not names:
        yield
        return
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Hushed(sys.stdout), _Hushed(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
