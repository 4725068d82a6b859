"""The ``objectives.Session`` of a run: the part of the run that an objective and its source may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from tunesmith.data.batch.pack import to_device
from tunesmith.data.batch.step import Batch, Source, Step
from tunesmith.json_types import JsonObject
from tunesmith.models.generate.engine import Engine
from tunesmith.models.generate.running_rows import Answer, Request
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.train import distributed, forward_batches
from tunesmith.train.fast_path import FastPath, plain_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Value = TypeVar("Value")


@dataclass
class RunSession:
    """``model`` and ``fast_path`` are set once the weights are loaded; a source is made earlier."""

    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    seed: int
    epochs: Source
    model: PreTrainedModel = None
    fast_path: FastPath | None = None
    budget: int = 0
    """Tokens of a micro-batch."""
    append: Callable[[JsonObject], None] = lambda record: None
    _engine: Engine | None = None

    def forward(
        self, run: Callable[[PreTrainedModel, Batch], Sequence[Value]], step: Step
    ) -> dict[int, Value]:
        layout, training = self._loaded().layout, self.model.training
        self.model.eval()

        @torch.no_grad()
        def measured(places: Sequence[int]) -> Sequence[Value]:
            return run(self.model, to_device(step.collate(step.examples(places), layout), self.device))

        results = forward_batches.run_step(measured, step, self.budget, layout, self.device, "the reference")
        self.model.train(training)
        return {
            place: value for places, values in results for place, value in zip(places, values, strict=True)
        }

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        return distributed.add_tensor(values)

    def sample(self, requests: Sequence[Request]) -> list[Answer]:
        training = self.model.training
        if self._engine is None or self._engine.model is not self.model:
            self._engine = Engine(self.model, self.tokenizer)
        with plain_attention(self.model, self._loaded()):
            answers = self._engine.answers(requests)
        self._engine.release()
        self.model.train(training)
        return answers

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
