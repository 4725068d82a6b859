"""Greedy answers of a language model to some prompts of a file, for the metrics of generated text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data.data_config import Source
from tunesmith.data.read import prompts
from tunesmith.data.read.prompts import AskedPrompt, ChosenPrompts
from tunesmith.evaluate.answer_file import AnswerFile, read_lines
from tunesmith.evaluate.answer_prompts import Queue
from tunesmith.json_types import JsonObject
from tunesmith.metrics.answer_metrics import Answered
from tunesmith.models.generate.decode_step import DecodeWeights
from tunesmith.models.generate.row_adapters import ACTIVE
from tunesmith.models.generate.sampling import SamplingParams

if TYPE_CHECKING:
    from tunesmith.models.generate.decode import Loaded
    from tunesmith.models.generate.vllm_backend import Vllm

Advance = Callable[[int], None]
"""Called with the number of answers done just now."""


def chosen_prompts(source: Source, trained: JsonObject, count: int) -> ChosenPrompts:
    """Return ``count`` prompts of ``source``, which every model answers.

    ``trained``: facts that were saved with the model (``trained_reading.trained_with``). Raises DataError for a
    file without prompts, and for rows that cannot be read."""
    file = prompts.open_prompts(source, trained.get("rows") or ())
    file.check()
    return prompts.choose(file, count)


@dataclass
class GreedyAnswers:
    """Answers of ``loaded`` to ``asked``, in the order of rows, in blocks: only one block is in memory.

    ``adapter``: as in ``Request``; None = the base model under an adapter. ``folder``: keeps the answers, in a
    file that an interrupted run continues. ``vllm`` and ``decode_weights``: as in ``Queue``.
    """

    loaded: Loaded
    asked: Collection[AskedPrompt]
    max_new_tokens: int
    folder: Path | None = None
    adapter: str | None = ACTIVE
    advance: Advance = lambda count: None
    vllm: Vllm | None = None
    decode_weights: DecodeWeights = "stored"

    def __post_init__(self) -> None:
        params = SamplingParams(max_new_tokens=self.max_new_tokens)
        self.queue = Queue(
            self.loaded, self.asked, len(self.asked), params, adapter=self.adapter, vllm=self.vllm,
            decode_weights=self.decode_weights,
        )  # fmt: skip

    def check(self) -> None:
        """Raise UserError for a prompt that the template refuses, that is empty, or that fills the window."""
        self.queue.check()

    def blocks(self) -> Iterator[list[Answered]]:
        """Yield the answers. ``check`` must be called before."""
        kept = self._as_they_end() if self.folder is None else self._from_file(self.folder)
        block: list[Answered] = []
        for line in kept:
            block.append(_answered(line))
            if len(block) == self.queue.block_prompts:
                yield block
                block = []
        if block:
            yield block

    def _as_they_end(self) -> Iterator[JsonObject]:
        """Yield the lines in order. The queue ends the answers of one block before it begins the next."""
        waiting: dict[int, JsonObject] = {}
        following = 0
        for index, line in self.queue.run():
            self.advance(1)
            waiting[index] = line
            while following in waiting:
                yield waiting.pop(following)
                following += 1

    def _from_file(self, folder: Path) -> Iterator[JsonObject]:
        digest = hashlib.sha256()
        for asked in self.asked:
            digest.update(repr(asked.as_dict()).encode("utf-8", "replace"))
        made_with = {
            **self.queue.describe(),
            "max_new_tokens": self.max_new_tokens,
            "data": digest.hexdigest(),
        }
        name = hashlib.sha256(repr(sorted(made_with.items())).encode()).hexdigest()[:12]
        out, block = folder / f"answers-{name}.jsonl", self.queue.block_prompts
        with AnswerFile(out, made_with, len(self.asked), block, self.queue.is_exact) as answers:
            self.advance(answers.done)
            if not answers.complete:
                for index, line in self.queue.run(answers.has):
                    answers.add(index, line)
                    self.advance(1)
                answers.finish()
        return read_lines(out)


def _answered(line: JsonObject) -> Answered:
    """Return the answer of a line of ``generate --out``."""
    reference = _text(line.get("reference") or "")
    references = (reference,) if reference.strip() else ()  # an empty one is none
    stopped = line["reason"] == "stop"
    return Answered(line["answer"], references, line["tokens"], stopped, _text(line["prompt"]), line["row"])


def _text(value: str | Sequence[JsonObject]) -> str:
    return value if isinstance(value, str) else prompts.joined_turns(value)
