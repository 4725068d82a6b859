"""Greedy answers of a language model to some prompts of a file, for the metrics of generated text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.data.read import prompts
from tunesmith.evaluate import trained_reading
from tunesmith.evaluate.answer_file import AnswerFile, read_first
from tunesmith.evaluate.answer_prompts import Queue
from tunesmith.json_types import JsonObject
from tunesmith.metrics.answer_metrics import Answered
from tunesmith.models.generate.sampling import SamplingParams

if TYPE_CHECKING:
    from tunesmith.models.generate.decode import Loaded


@dataclass(frozen=True)
class PromptAnswer:
    """The answer to the prompt of a row."""

    row: int
    prompt: str
    answered: Answered


def greedy_answers(
    loaded: Loaded,
    trained: JsonObject,
    data: str | Path,
    count: int,
    max_new_tokens: int,
    limit: int | None = None,
    folder: Path | None = None,
) -> list[PromptAnswer]:
    """Return the answers of ``loaded`` to ``count`` prompts, in the order of rows.

    Which prompts is decided by a hash of their row, so every model answers the same. ``trained``: facts that were
    saved with the model (``trained_reading.trained_with``). ``folder``: keeps the answers, in a file that an
    interrupted run continues.
    """
    source = trained_reading.source_as_trained(
        trained, data, prompts.ROWS, {}, {"limit": limit}, prompts=True
    )
    file = prompts.open_prompts(source, trained.get("rows") or ())
    file.check()
    asked = sorted(file, key=lambda one: hashlib.sha256(str(one.row).encode()).digest())[:count]
    asked.sort(key=lambda one: one.row)
    params = SamplingParams(max_new_tokens=max_new_tokens)
    queue = Queue(loaded, asked, len(asked), params)
    queue.check()
    if folder is None:
        return [_sampled(line) for _, line in sorted(queue.run(), key=lambda answer: answer[0])]
    made_with = {
        **queue.describe(),
        "max_new_tokens": max_new_tokens,
        "data": hashlib.sha256(repr([one.as_dict() for one in asked]).encode()).hexdigest(),
    }
    name = hashlib.sha256(repr(sorted(made_with.items())).encode()).hexdigest()[:12]
    block = queue.block_prompts * queue.samples
    with AnswerFile(
        folder / f"answers-{name}.jsonl", made_with, len(asked), block, queue.is_exact
    ) as answers:
        if not answers.complete:
            for index, line in queue.run(answers.has):
                answers.add(index, line)
            answers.finish()
    return [_sampled(line) for line in read_first(answers.out, len(asked))]


def _sampled(line: JsonObject) -> PromptAnswer:
    """Return the answer of a line of ``generate --out``."""
    reference = line.get("reference")
    references = () if reference is None else (_text(reference),)
    answered = Answered(line["answer"], references, line["tokens"], line["reason"] == "stop")
    return PromptAnswer(line["row"], _text(line["prompt"]), answered)


def _text(value: str | Sequence[JsonObject]) -> str:
    return value if isinstance(value, str) else "\n\n".join(str(turn.get("content") or "") for turn in value)
