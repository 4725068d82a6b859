"""The parts of a run's report with answers: the sample prompts, and those of held-out rows (``data.eval.generate``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.json_types import JsonObject
from tunesmith.report.language import recorded, t
from tunesmith.report.pages import interval
from tunesmith.runs.assessment import ANSWERS
from tunesmith.runs.figure_format import is_number, label, number, signed

_WORDS = {True: "better", False: "worse", None: "no difference seen"}


def answer_rows(result: Mapping[str, object], figures: Mapping[str, JsonObject]) -> list[JsonObject]:
    """Return a row of the table for each figure of answers in an assessment.

    ``result``: of the run, with the figures before training. ``figures``: as ``runs.assessment.assess`` returns
    them."""
    rows = []
    for name, one in figures.items():
        if not name.startswith(ANSWERS) or "value" not in one:
            continue
        before, change, baseline = result.get(f"{name}_before"), one.get("change"), one.get("baseline")
        row: JsonObject = {"figure": recorded(label(name.removeprefix(ANSWERS)))}
        row["before"] = number(before) if isinstance(before, float) else "-"
        row |= {"after": number(one["value"]), "95% interval": interval(one)}
        row["change"] = (
            f"{signed(change['value'])} ({interval(change, signed)})" if change else interval({"rows": 0})
        )
        row[""] = t(_WORDS[change["better"]]) if change else ""
        if baseline:
            known = baseline.get("change")
            word = t(_WORDS[known["better"] if known else None])
            row[recorded(baseline["words"])] = f"{number(baseline['value'])}: {word}"
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Answer:
    """``kind``: before, after, reference, between or first."""

    kind: str
    label: str
    text: str


@dataclass(frozen=True)
class Prompt:
    """A prompt with the answers shown side by side, and those ``between``, which are folded away."""

    text: str
    compared: list[Answer]
    between: list[Answer]


def sample_prompts(samples: Sequence[JsonObject], best_step: float | None) -> list[Prompt]:
    """Return the sample prompts of a run with their answers. ``samples``: the records of samples.jsonl."""
    by_prompt: dict[str, list[JsonObject]] = {}
    for sample in samples:
        by_prompt.setdefault(str(sample.get("prompt", "")), []).append(sample)
    return [_prompt(text, records, best_step) for text, records in by_prompt.items()]


def _prompt(text: str, samples: Sequence[JsonObject], best_step: float | None) -> Prompt:
    """Compare the answers before training and after (at the best step, if it is known) with the reference."""
    first = samples[0]
    last = next((one for one in reversed(samples) if one.get("step") == best_step), samples[-1])
    compared = [_answer("before" if first.get("step") == 0 else "first", first)]
    if last is not first:
        compared.append(_answer("after", last))
    reference = next((one["reference"] for one in samples if one.get("reference")), None)
    if reference is not None:
        compared.append(Answer("reference", t("reference, from the data"), str(reference)))
    between = [_answer("between", one) for one in samples if one is not first and one is not last]
    return Prompt(text, compared, between)


def worst_prompts(worst: Sequence[JsonObject]) -> list[Prompt]:
    """Return the worst answers to held-out prompts, each next to the answer in the data."""
    shown = []
    for one in worst:
        sides = [Answer("after", t("answer, row {row}", row=one["row"]), str(one["answer"]))]
        sides += [Answer("reference", t("reference, from the data"), text) for text in one["references"]]
        shown.append(Prompt(str(one["prompt"]), sides, []))
    return shown


def _answer(kind: str, sample: JsonObject) -> Answer:
    step, text = sample.get("step"), sample.get("answer")
    at = [t("step {step}", step=f"{step:,}")] if is_number(step) else []
    cut = [t("cut at {count} tokens", count=sample["cut"])] if is_number(sample.get("cut")) else []
    label = ", ".join([*(() if kind == "between" and at else (t(kind),)), *at, *cut])
    return Answer(kind, label, "" if text is None or not str(text).strip() else str(text))
