"""What a user's program does while its run goes on: ``tunesmith.train(recipe, on_log=f, on_eval=f, on_save=f)``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Hooks:
    """The user's functions, called in the main process only.

    ``on_log`` and ``on_eval`` get a copy of the record that goes into ``metrics.jsonl``, ``on_save`` the folder of the checkpoint
    and its step. Whoever returns ``True`` ends the run after this step, as if it had been the last one: ``ending`` says so.
    What is raised stops it as a signal does: the step is finished, a checkpoint saved, no function called again, and
    ``failure`` raised to the caller of ``train``.
    """

    on_log: Callable[[dict[str, Any]], Any] | None = None
    on_eval: Callable[[dict[str, Any]], Any] | None = None
    on_save: Callable[[Path, int], Any] | None = None
    ending: str | None = None
    failure: Exception | None = None

    def call(self, name: str, *given: Any) -> None:
        function = getattr(self, name)
        if function is None or self.failure is not None:
            return
        try:
            if function(*copy.deepcopy(given)) is True:
                self.ending = self.ending or f"{name} returned True"
        except Exception as error:  # noqa: BLE001 - the user's own: kept until a checkpoint is saved, then raised
            error.add_note(
                f"raised by {name}, which stopped the run after its step; it can go on with resume=True"
            )
            self.failure = error

    def wants(self) -> tuple[str | None, str | None]:
        """(why the run is to end, why it is to stop), None for each that is not so."""
        failed = self.failure
        return self.ending, None if failed is None else f"{type(failed).__name__} in a function of yours"

    @property
    def given(self) -> bool:
        """Whether there is a function to wait for."""
        return any((self.on_log, self.on_eval, self.on_save))

    def again(self) -> None:
        """Raise what a function raised."""
        if self.failure is not None:
            raise self.failure
