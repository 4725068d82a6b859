"""The figures of a model's generated answers next to baselines: its base model, the prompt copied, the majority answer."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith import files
from tunesmith.data.data_config import Source
from tunesmith.data.read.prompts import ChosenPrompts
from tunesmith.errors import UserError
from tunesmith.evaluate import base_answers
from tunesmith.evaluate.prompt_answers import Advance, GreedyAnswers, chosen_prompts
from tunesmith.evaluate.trained_reading import ModelArgument
from tunesmith.json_types import JsonObject
from tunesmith.metrics import answer_figures
from tunesmith.metrics.answer_figures import AnswerTerms, ModelAnswers
from tunesmith.metrics.answer_metrics import AnswerMetric
from tunesmith.runs import metrics_file

if TYPE_CHECKING:
    from tunesmith.models.generate.decode import Loaded
    from tunesmith.models.generate.decode_step import DecodeWeights
    from tunesmith.models.generate.vllm_backend import Vllm

MAJORITY = "the most frequent answer"


def generated_figures(
    model: ModelArgument,
    loaded: Loaded,
    trained: JsonObject,
    source: Source,
    count: int,
    metrics: Mapping[str, AnswerMetric],
    *,
    max_new_tokens: int,
    folder: Path | None,
    with_base: bool,
    advance: Advance = lambda count: None,
    vllm: Vllm | None = None,
    decode_weights: DecodeWeights = "stored",
) -> JsonObject:
    """Return ``answer_figures`` of the answers of ``loaded`` to ``count`` prompts of ``source``, with baselines.

    ``model``: what the user named, as it was loaded. ``folder``: keeps the answers; an interrupted evaluation goes
    on from it. ``with_base``: the base model answers, too. ``vllm`` answers instead of ``loaded``.
    ``decode_weights``: as in ``Engine``, also of the base model. The result has ``cautions``: sentences on what was
    not compared. Raises UserError for prompts that cannot be answered, and for a named metric without references.
    """
    asked = chosen_prompts(source, trained, count)
    own = GreedyAnswers(
        loaded, asked, max_new_tokens, folder, advance=advance, vllm=vllm, decode_weights=decode_weights
    )
    own.check()
    cautions = missing_references(asked, metrics, source.label)
    other = base_answers.base_of(model, loaded, trained) if with_base else None
    if isinstance(other, str):
        cautions, other = [*cautions, other], None
    terms, texts = ModelAnswers(metrics), answer_figures.metrics_of_texts(metrics)
    rules = {answer_figures.COPIED: AnswerTerms(texts)}
    majority = _majority_answer(asked)
    if majority is not None:
        rules[MAJORITY] = AnswerTerms(texts)
    for block in own.blocks():
        terms.add(block)
        rules[answer_figures.COPIED].add(answer_figures.rewritten(block, None))
        if majority is not None:
            rules[MAJORITY].add(answer_figures.rewritten(block, majority))
    baselines = dict(rules)
    if other is not None:
        baselines = {base_answers.WORDS: AnswerTerms(metrics), **rules}
        before = GreedyAnswers(
            other.loaded, asked, max_new_tokens, folder, other.adapter, advance, decode_weights=decode_weights
        )
        for block in before.blocks():
            baselines[base_answers.WORDS].add(block)
    found = answer_figures.answer_figures(terms, baselines)
    own_engine = {} if vllm is not None else {"decode_weights": decode_weights}
    return {**found, **own_engine, "cautions": cautions}


def save(figures: JsonObject, folder: Path) -> Path:
    """Write an evaluation to figures.json in ``folder``, without what differs between two equal ones."""
    kept = {key: value for key, value in figures.items() if key not in metrics_file.TIMING_KEYS}
    files.make_folder(folder)
    path = folder / "figures.json"
    text = json.dumps(metrics_file.to_json(kept, lambda number: None), ensure_ascii=False, indent=1)
    files.replace_file(path, text.encode("utf-8", "replace"))
    return path


def missing_references(asked: ChosenPrompts, metrics: Mapping[str, AnswerMetric], label: str) -> list[str]:
    """Return a sentence if some of the prompts have no answer in the data. Raises UserError if none of them has one
    and every metric needs it."""
    missing = sum(one.reference_text() is None for one in asked)
    if missing == len(asked) and all(metric.needs_reference for metric in metrics.values()):
        raise UserError(
            f"{', '.join(metrics)}: {label} has no answers to compare with.\n"
            "  Name a file with answers, or metrics that need none: --metric length --metric repetition"
        )
    if not missing:
        return []
    return [
        f"{missing:,} of {len(asked):,} prompts have no answer in the data: overlap is that of the others"
    ]


def _majority_answer(asked: ChosenPrompts) -> str | None:
    """Return the reference that most prompts have; None if no two are the same."""
    counts = Counter(_digest(text) for one in asked if (text := one.reference_text()) is not None)
    if not counts or max(counts.values()) < 2:
        return None
    chosen, _ = counts.most_common(1)[0]
    texts = (text for one in asked if (text := one.reference_text()) is not None)
    return next(text for text in texts if _digest(text) == chosen)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
