"""The caller's functions during a run: ``tunesmith.train(recipe, on_log=f, on_eval=f, on_save=f)``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tunesmith.json_types import JsonObject


@dataclass
class Callbacks:
    """The caller's functions; only the main process calls them.

    ``on_log`` and ``on_eval`` receive a copy of the record that goes into ``metrics.jsonl``; ``on_save``
    receives the checkpoint folder and its step. A function that returns ``True`` sets ``ending``: the run
    ends after this step as after its last one. A function that raises sets ``failure``: the run finishes the
    step, saves a checkpoint, calls no callback again and raises the error to the caller of ``train``.
    """

    on_log: Callable[[JsonObject], object] | None = None
    on_eval: Callable[[JsonObject], object] | None = None
    on_save: Callable[[Path, int], object] | None = None
    ending: str | None = None
    failure: Exception | None = None

    def call(self, name: str, *arguments: object) -> None:
        function: Callable[..., object] | None = vars(self)[name]
        if function is None or self.failure is not None:
            return
        try:
            if function(*copy.deepcopy(arguments)) is True:
                self.ending = self.ending or f"{name} returned True"
        except Exception as error:  # noqa: BLE001 - raised again after the checkpoint is saved
            error.add_note(
                f"raised by {name}, which stopped the run after its step; resume=True continues it"
            )
            self.failure = error

    def stop_requests(self) -> tuple[str | None, str | None]:
        """Return (why to end the run normally, why to stop it with an error), each None without a reason."""
        failed = self.failure
        return self.ending, None if failed is None else f"{type(failed).__name__} in a callback"

    @property
    def any_given(self) -> bool:
        return any((self.on_log, self.on_eval, self.on_save))

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure
