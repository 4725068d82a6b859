"""The ``objectives.Session`` of a run: the part of the run that an objective and its source may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from tunesmith.data.batch.pack import to_device
from tunesmith.data.batch.step import Batch, Step
from tunesmith.data.store.epochs import Epochs
from tunesmith.errors import TunesmithError
from tunesmith.json_types import JsonObject
from tunesmith.models.generate.engine import Engine, fingerprint
from tunesmith.models.generate.running_rows import Answer, Request
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.train import distributed, forward_batches
from tunesmith.train.fast_path import FastPath, plain_attention
from tunesmith.train.weights_at_start import WeightsAtStart

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Value = TypeVar("Value")


@dataclass
class RunSession:
    """``model`` and ``fast_path`` are set once the weights are loaded; a source is made earlier."""

    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    seed: int
    epochs: Epochs
    model: PreTrainedModel = None
    fast_path: FastPath | None = None
    budget: int = 0
    """Tokens of a micro-batch."""
    folder: Path | None = None
    evaluation: Mapping[str, float] = field(default_factory=dict)
    append: Callable[[JsonObject], None] = lambda record: None
    doing: Callable[[str], None] = lambda activity: None
    note: Callable[[str], None] = lambda line: None
    weights_at_start: WeightsAtStart | None = None
    """Set with ``traits.keeps_start``."""
    _engine: Engine | None = None

    def forward(
        self,
        run: Callable[[PreTrainedModel, Batch], Sequence[Value]],
        step: Step,
        as_trained: bool = False,
    ) -> dict[int, Value]:
        layout, training = self._loaded().layout, self.model.training
        self.model.eval()

        @torch.no_grad()
        def measured(places: Sequence[int]) -> Sequence[Value]:
            return run(self.model, to_device(step.collate(step.examples(places), layout), self.device))

        run_step = forward_batches.run_micro_batches if as_trained else forward_batches.run_step
        results = run_step(measured, step, self.budget, layout, self.device, "log-probabilities")
        self.model.train(training)
        return {
            place: value for places, values in results for place, value in zip(places, values, strict=True)
        }

    @property
    def engine(self) -> Engine:
        """The engine of the run, which chooses and checks its forward pass once."""
        if self._engine is None or self._engine.model is not self.model:
            self._engine = Engine(self.model, self.tokenizer)
        return self._engine

    @contextmanager
    def own_layers(self) -> Iterator[None]:
        fast, training = self._loaded(), self.model.training
        try:
            with plain_attention(self.model, fast), fast.fused.disabled():
                yield
        finally:
            self.model.train(training)

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        return distributed.add_tensor(values)

    def gather(self, values: Sequence[Value]) -> list[Value]:
        return distributed.gather(list(values))

    def once(self, function: Callable[[], Value]) -> Value:
        outcome: tuple[Value | None, TunesmithError | None] = None, None
        if distributed.state().is_main_process:
            try:
                outcome = function(), None
            except TunesmithError as error:  # the other processes must not wait for a value
                outcome = None, error
        value, failure = distributed.broadcast(outcome)
        if failure is not None:
            raise failure
        return value  # type: ignore[return-value]  # None only where the function returned it

    def sample(self, requests: Sequence[Request]) -> list[Answer]:
        training, state = self.model.training, distributed.state()
        # by prompt: the answers to one prompt share its prefix in the engine
        mine = [one for one in requests if one.prompt % state.num_processes == state.process_index]
        with plain_attention(self.model, self._loaded()):
            answers = self.engine.answers(mine)
        self.engine.release()
        self.model.train(training)
        found = {(one.prompt, one.sample): one for one in distributed.gather(answers)}
        return [found[one.prompt, one.sample] for one in requests]

    def fingerprint(self) -> str:
        return fingerprint(self.model)

    def reference(self) -> AbstractContextManager[None]:
        assert self.weights_at_start is not None, "traits.keeps_start is not set"
        return self.weights_at_start.installed()

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0, seed: int = 0
    ) -> list[list[int]]:
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        requests = [Request(tuple(prompt), params, number) for number, prompt in enumerate(prompts)]
        return [answer.ids for answer in self.sample(requests)]

    def log(self, record: JsonObject) -> None:
        self.append(record)

    def _loaded(self) -> FastPath:
        assert self.fast_path is not None, "the network is not loaded yet"
        return self.fast_path
