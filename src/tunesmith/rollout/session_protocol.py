"""The part of a run that an objective and its source may use. ``train.session`` implements it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from tunesmith.data.batch.step import Batch, Step
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from tunesmith.data.store.epochs import Epochs
    from tunesmith.models.generate.running_rows import Answer, Request

T = TypeVar("T")


class Session(Protocol):
    """The parts of a run that an objective may use. ``model`` is set once its weights are loaded."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    device: torch.device
    seed: int
    epochs: Epochs
    """Steps made of the recipe's own rows, in the order of seed and epoch."""
    folder: Path | None
    """Folder for what a resumed run needs in addition to its last checkpoint; None outside of training."""
    evaluation: Mapping[str, float]
    """Figures of the last evaluation; empty before the first."""

    def forward(
        self, run: Callable[[PreTrainedModel, Batch], Sequence[T]], step: Step, as_trained: bool = False
    ) -> dict[int, T]:
        """Call ``run(model, batch)`` without gradients on this process's examples of ``step``, in
        micro-batches that fit into memory. ``run`` returns one value for each example of its batch. Returns
        {index of the example in the step: value}. ``as_trained``: in the micro-batches of a training step, so
        that the values are those of its forward pass to the last bit."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside the block the model has the weights of step 0; needs ``traits.keeps_start``."""
        ...

    def own_layers(self) -> AbstractContextManager[None]:
        """Inside the block the model is in eval mode and computes with its own attention and layers, which take
        padded batches and any adapter that is in use."""
        ...

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes; every process must call it."""
        ...

    def sample(self, requests: Sequence[Request]) -> list[Answer]:
        """Return the policy's answer to each request, in their order; the pairs (prompt, sample) must differ.

        The prompts are shared out over the processes, each of which gets all answers; every process must call
        it. All calls use one ``models.generate.engine.Engine``, which has no memory between them."""
        ...

    def fingerprint(self) -> str:
        """Return the hash of the weights, as in the ``fingerprint`` of an answer."""
        ...

    def gather(self, values: Sequence[T]) -> list[T]:
        """Return the values of all processes, in their order; every process must call it."""
        ...

    def once(self, function: Callable[[], T]) -> T:
        """Call ``function`` in one process. All processes get its value, or its TunesmithError."""
        ...

    def doing(self, activity: str) -> None:
        """Show what takes time between two steps; an empty text ends it."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0, seed: int = 0
    ) -> list[list[int]]:
        """Sample the token ids of one answer of the policy to each prompt (temperature 0 = greedy). An answer
        that stopped ends with its stop token."""
        ...

    def log(self, record: JsonObject) -> None:
        """Append a record to the run's metrics."""
        ...

    def note(self, line: str) -> None:
        """Print a decision that the recipe does not show, once."""
        ...
