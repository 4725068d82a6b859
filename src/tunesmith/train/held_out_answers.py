"""Answers to held-out prompts at every evaluation (``data.eval.generate``), with the figures of ``evaluate --generate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.data.read import prompts
from tunesmith.data.read.prompts import AskedPrompt
from tunesmith.data.read.source import eval_sources
from tunesmith.data.store.prepare import Prepared
from tunesmith.errors import DataError, RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.metrics import answer_figures, metric_names
from tunesmith.metrics.answer_figures import AnswerTerms, ModelAnswers
from tunesmith.metrics.answer_metrics import Answered, AnswerMetric
from tunesmith.metrics.intervals import Place, RowFigure
from tunesmith.models.generate import decode
from tunesmith.models.generate.running_rows import Request
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.objectives import Session
from tunesmith.recipe import Recipe
from tunesmith.runs.assessment import ANSWERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "data.eval.generate"


@dataclass(frozen=True)
class HeldOutPrompts:
    """The prompts of some held-out rows, their places and requests, and the metrics of their answers."""

    asked: tuple[AskedPrompt, ...]
    places: tuple[Place, ...]
    requests: tuple[Request, ...]
    metrics: dict[str, AnswerMetric]
    left_out: int = 0
    """Prompts that fill the model's window."""

    @property
    def notes(self) -> list[str]:
        """Decisions that the recipe does not show, to be printed once."""
        if not self.left_out:
            return []
        return [f"{KEY}: {self.left_out:,} held-out prompts fill the model's window and are not answered"]


@dataclass(frozen=True)
class AnswerEvaluation:
    """The terms of the answers to ``places``, and those of the copied prompts."""

    places: tuple[Place, ...]
    terms: ModelAnswers
    copied: AnswerTerms

    @property
    def figures(self) -> dict[str, float]:
        return {f"{ANSWERS}{name}": self.terms.value(name) for name in self.terms.measured}

    def row_figures(self) -> dict[str, RowFigure]:
        """Return the terms of each metric by row."""
        return {f"{ANSWERS}{name}": self._by_row(self.terms, name) for name in self.terms.measured}

    def baselines(self) -> dict[str, JsonObject]:
        """Return the figures of the copied prompts."""
        return {
            f"{ANSWERS}{name}": {
                "words": answer_figures.COPIED,
                "value": self.copied.value(name),
                "rows": self._by_row(self.copied, name),
            }
            for name in self.copied.measured
        }

    @property
    def worst(self) -> list[JsonObject]:
        return answer_figures.worst(self.terms)

    def _by_row(self, of: AnswerTerms, name: str) -> RowFigure:
        places = (self.places[place] for place in of.places(name))
        rows = dict(zip(places, map(tuple, of.terms(name).tolist()), strict=True))
        return RowFigure(rows, of.metrics[name].function)


def choose(
    recipe: Recipe, data: Prepared, tokenizer: PreTrainedTokenizerBase, window: int | None
) -> HeldOutPrompts | None:
    """Choose the prompts by a hash of their rows, as ``evaluate`` does, and read them from the files again.

    None if the recipe asks for no answers. Prompts that fill the ``window`` are left out. Raises UserError for a
    metric that cannot be used, for rows without a prompt, and if no prompt has room for an answer.
    """
    config, held_out = recipe.generate, data.eval
    if config is None or held_out is None:
        return None
    metrics = metric_names.of_names(recipe.answer_metrics, f"{KEY}.metrics", config.folder)
    sources = list(eval_sources(recipe.data).values()) or recipe.data.train
    rows = (held_out.stored(index)["row"].tolist() for index in range(len(held_out)))
    places = sorted(
        {(int(source), int(row)) for source, row in rows}, key=lambda one: (prompts.order_of(one[1]), one)
    )
    wanted = set(places[: config.rows])
    found: list[tuple[Place, AskedPrompt]] = []
    for number, source in enumerate(sources):
        of_source = frozenset(row for index, row in wanted if index == number)
        if of_source:
            file = prompts.open_prompts(source, data.kinds)
            found += [((number, one.row), one) for one in prompts.ChosenPrompts(file, of_source)]
    params = SamplingParams(max_new_tokens=config.max_new_tokens)
    answerable: list[tuple[Place, AskedPrompt]] = []
    requests: list[Request] = []
    for place, one in found:
        ids = decode.prompt_ids(one.prompt, tokenizer, None, False)
        if ids and (window is None or len(ids) < window):
            requests.append(Request(tuple(ids), params, len(requests)))
            answerable.append((place, one))
    if found and not answerable:
        raise DataError(
            f"{KEY}: all {len(found)} held-out prompts fill the model's window of {window} tokens: there is no room for an "
            f"answer.\n  Shorten the rows, or leave {KEY} out."
        )
    _check_references([one for _, one in answerable], metrics)
    asked, chosen = tuple(one for _, one in answerable), tuple(place for place, _ in answerable)
    return HeldOutPrompts(asked, chosen, tuple(requests), metrics, len(found) - len(answerable))


def _check_references(asked: Sequence[AskedPrompt], metrics: Mapping[str, AnswerMetric]) -> None:
    """Raise RecipeError if no prompt can be measured by any of the metrics."""
    if not asked:
        raise RecipeError(f"{KEY}: the held-out rows have no prompts to answer. Leave it out.")
    if all(metric.needs_reference for metric in metrics.values()) and not any(
        one.reference_text() for one in asked
    ):
        raise RecipeError(
            f"{KEY}.metrics: {', '.join(metrics)} compare with the answers in the data, and the held-out rows have none.\n"
            "  Name metrics that need none, such as [length, repetition]"
        )


def evaluate(session: Session, held_out: HeldOutPrompts) -> AnswerEvaluation:
    """Answer the prompts greedily and measure the answers. Every process calls it, and gets all answers."""
    answers = session.sample(held_out.requests)
    answered = [
        Answered(
            answer.text, _references(asked), len(answer.ids), answer.reason == "stop", asked.text(), asked.row
        )
        for asked, answer in zip(held_out.asked, answers, strict=True)
    ]
    terms = ModelAnswers(held_out.metrics)
    copied = AnswerTerms(answer_figures.metrics_of_texts(held_out.metrics))
    terms.add(answered)
    copied.add(answer_figures.rewritten(answered, None))
    return AnswerEvaluation(held_out.places, terms, copied)


def _references(asked: AskedPrompt) -> tuple[str, ...]:
    text = asked.reference_text()
    return () if text is None else (text,)
