"""The ``objectives.Session`` of a run: what an objective and its source may use, and nothing else of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.data.batch.pack import to_device
from tunesmith.data.batch.step import Batch, Source, Step
from tunesmith.models.generate import decode
from tunesmith.train import distributed, fast_path, forward_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class RunSession:
    """``bind`` completes it once the weights are loaded; a source is made of it before, because its plan is needed earlier."""

    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    seed: int
    epochs: Source
    model: PreTrainedModel = None
    route: fast_path.Route | None = None
    budget: int = 0
    """Tokens of a micro-batch."""
    append: Callable[[dict[str, Any]], None] = lambda record: None

    def forward(self, run: Callable[[Any, Batch], Sequence[Any]], step: Step) -> dict[int, Any]:
        assert self.route is not None, "the network is not loaded yet"
        layout, training = self.route.layout, self.model.training
        self.model.eval()

        @torch.no_grad()
        def measured(places: Sequence[int]) -> Sequence[Any]:
            return run(self.model, to_device(step.collate(step.examples(places), layout), self.device))

        found = forward_batches.over_step(measured, step, self.budget, layout, self.device, "the reference")
        self.model.train(training)
        return {place: value for places, values in found for place, value in zip(places, values, strict=True)}

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        return distributed.add_tensor(values)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 1.0, seed: int = 0
    ) -> list[list[int]]:
        assert self.route is not None, "the network is not loaded yet"
        training = self.model.training
        settings = decode.Settings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        with fast_path.plain_attention(self.model, self.route):
            answers = decode.generate_ids(self.model, self.tokenizer, prompts, settings)
        self.model.train(training)
        return answers

    def log(self, record: dict[str, Any]) -> None:
        self.append(record)
