"""Extractive question answering: find the span of a text that answers a question, or that there is none."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from tunesmith import objectives
from tunesmith.data.batch import pack
from tunesmith.data.encode import questions
from tunesmith.data.rows import Question
from tunesmith.errors import DataError
from tunesmith.metrics import squad, token_mean
from tunesmith.metrics.intervals import RowFigure
from tunesmith.objectives import Baseline, Batch, Example, JsonObject, Layout, Metrics, Traits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

N_BEST = 20
"""Answers kept for each question; their probabilities sum to 1."""


class Config(objectives.Config):
    window: int = Field(
        384,
        ge=16,
        description="tokens of question and context together; a longer context is split into windows",
    )
    stride: int = Field(
        128, ge=0, description="tokens that windows share; more where an answer of max_answer_tokens needs it"
    )
    max_answer_tokens: int = Field(30, ge=1, description="longer spans are never predicted")


class Objective(objectives.TaskHead):
    config: Config
    traits = Traits(
        rows=(Question,),
        head="span",
        best=("eval_f1", "max"),
        figures=("eval_loss", "eval_f1", "eval_exact_match", "eval_has_answer_f1", "eval_no_answer_f1"),
        starter={"path": "builtin:qa"},
        assumed=True,
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.threshold: float | None = None
        """The answer is empty when "no answer" scores higher than the best span by more; None = never."""
        self._settings = config.model_dump()
        self._template = questions.TEMPLATE
        self._limit: int | None = None

    def bind(self, config: PreTrainedConfig, tokenizer: Tokenizer, max_length: int | None) -> None:
        super().bind(config, tokenizer, max_length)
        if self.has_head:
            self.threshold = self.saved.get("null_threshold")
            self._template = self.saved.get("pair_template", self._template)
        self._limit = max_length
        self._set_windows(self._settings)

    def restore_labels(self) -> None:
        """Take windows and threshold from the bound model. Raises DataError when it has no trained head."""
        super().restore_labels()
        self._set_windows({name: self.saved.get(name, value) for name, value in self._settings.items()})

    def _set_windows(self, settings: dict[str, int]) -> None:
        self._settings = settings
        self.max_length = min(settings["window"], self._limit or settings["window"])
        self.facts |= {
            **settings,
            "causal": self.causal,
            "max_length": self.max_length,
            "template": self._template,
        }

    def scan(self, rows: Iterable[object]) -> None:
        """Predict "no answer" only if some training question has none. Raises DataError when none has one."""
        if self.restored:
            return
        counts = [len(row.answers) for row in rows if isinstance(row, Question) and row.answers is not None]
        unanswered = counts.count(0)
        if counts and unanswered == len(counts):
            raise DataError(
                f"none of the {len(counts)} questions has an answer: there is nothing to learn.\n"
                "  Add the answers, or name their column with data.train.0.columns={answers: COLUMN}."
            )
        self.threshold = (self.threshold or 0.0) if unanswered else None
        effect = "the model may predict that there is none" if unanswered else "the model always predicts one"
        self.notes.append(f"questions: {len(counts)}, {unanswered} of them without an answer: {effect}")

    def head_config(self) -> JsonObject:
        saved = {
            "pair_template": self._template,
            "null_threshold": self.threshold,
            **self._settings,
            "window": self.max_length,
            "null": "last token" if self.causal else "first token",
        }
        return self.label_config(["LABEL_0", "LABEL_1"], saved)  # transformers' names for start and end

    def encode(self, rows: Sequence[Question], tokenizer: Tokenizer) -> list[list[Example]]:
        return questions.encode(
            rows, tokenizer, template=self._template, causal=self.causal, stride=self._settings["stride"],
            max_length=self.max_length or self._settings["window"], longest_answer=self._settings["max_answer_tokens"],
        )  # fmt: skip

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        """Every token is read. ``spans`` (rows, 2): first and last token of the answer in its window, -1
        where it is not known.

        ``cells`` (tokens,): the index of each token's logit in a table (rows, longest), flattened.
        """
        import torch

        lengths = [len(example["input_ids"]) for example in examples]
        positions = [np.arange(length) for length in lengths]
        cells = np.concatenate([row * max(lengths) + tokens for row, tokens in enumerate(positions)])
        spans = np.stack([example["span"] for example in examples]).astype(np.int64)
        kept = ("offsets", "null", "context", "golds")
        return {
            **pack.with_positions(examples, layout, positions),
            "cells": torch.from_numpy(cells),
            "spans": torch.from_numpy(spans),
            "windows": [{name: example[name] for name in kept} for example in examples],
        }

    def count(self, batch: Batch) -> int:
        """Windows whose answer is known."""
        return int(np.count_nonzero(batch["spans"][:, 0].numpy() >= 0))

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over windows of the mean cross-entropy of the answer's first and last token."""
        from tunesmith.models.heads import task_heads

        return _losses(*task_heads.span_logits(model, batch), batch).sum(), {}

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> JsonObject:
        """For each window: row, best spans, score of "no answer", gold answers, (loss, 1 if known)."""
        import torch

        from tunesmith.models.heads import task_heads

        with torch.no_grad():
            start, end = task_heads.span_logits(model, batch)
            losses = _losses(start, end, batch).cpu().double().tolist()
        known = (batch["spans"][:, 0] >= 0).tolist()
        starts, ends = (torch.split(logits.float().cpu(), batch["places"]) for logits in (start, end))
        longest = self._settings["max_answer_tokens"]
        windows = []
        for number, (row, window) in enumerate(zip(batch["rows"], batch["windows"], strict=True)):
            first, last, null = starts[number], ends[number], int(window["null"][0])
            windows.append({
                "row": row,
                "best": best_spans(first, last, window["offsets"], window["context"], N_BEST, longest),
                "null": float(first[null] + last[null]),
                "golds": json.loads(window["golds"].tobytes()) if len(window["golds"]) else None,
                "loss": (losses[number], int(known[number])),
            })  # fmt: skip
        return {"windows": windows}

    def _join_windows(self, records: Sequence[JsonObject]) -> list[JsonObject]:
        """The windows of each row as one, in order; "no answer" has its lowest score in any window."""
        rows = []
        for row, windows in token_mean.windows_by_row(records):
            best: dict[str, tuple[float, int, int]] = {}
            spans = (span for window in windows for span in window["best"])
            for score, start, end, text in sorted(spans, key=lambda span: (-span[0], span[1])):
                best.setdefault(text, (score, start, end))
            rows.append({
                "row": row,
                "best": [(text, *span) for text, span in best.items()][:N_BEST],
                "null": min(window["null"] for window in windows),
                "golds": next((window["golds"] for window in windows if window["golds"] is not None), None),
                "loss": tuple(sum(column) for column in zip(*(window["loss"] for window in windows))),
            })  # fmt: skip
        return rows

    def answers(self, records: Sequence[JsonObject]) -> list[JsonObject]:
        return [self._answer(row) for row in self._join_windows(records)]

    def _answer(self, row: JsonObject) -> JsonObject:
        candidates: list[JsonObject] = [
            {"text": text, "score": score, "start": start, "end": end}
            for text, score, start, end in row["best"]
        ]
        null_minus_best = row["null"] - candidates[0]["score"] if candidates else None
        empty: JsonObject = {"text": "", "score": row["null"], "start": None, "end": None}
        answer = candidates[0] if candidates else {**empty, "score": 0.0}
        if self.threshold is not None:
            if null_minus_best is not None and null_minus_best > self.threshold:
                answer = empty
            candidates = sorted([*candidates, empty], key=lambda candidate: -candidate["score"])
        if candidates:
            powers = np.exp(
                np.array([candidate["score"] for candidate in candidates]) - candidates[0]["score"]
            )
            for candidate, probability in zip(candidates, powers / powers.sum()):
                candidate["score"] = float(probability)
        text, golds, (loss, known) = str(answer["text"]), row["golds"], row["loss"]
        return {
            "row": list(row["row"]),
            "prediction": answer["text"],
            "start": answer["start"],
            "end": answer["end"],
            "score": answer["score"],
            "n_best": candidates,
            "null_minus_best": null_minus_best,
            "gold": golds,
            "f1": None if golds is None else squad.f1(text, golds),
            "right": golds is not None and squad.exact_match(text, golds) == 1.0,
            "loss": loss / known if known else None,
        }

    def summarise(self, records: Sequence[JsonObject]) -> dict[str, float]:
        """eval_loss by window; SQuAD's exact match and F1, also by kind where some have no answer."""
        loss = objectives.mean_loss([row["loss"] for row in self._join_windows(records)])
        details = self.details(records)
        both_kinds = details["has_answer_total"] and details["no_answer_total"]
        names = ["exact_match", "f1", *(["has_answer_f1", "no_answer_f1"] if both_kinds else [])]
        return loss | {f"eval_{name}": details[name] for name in names}

    def row_figures(self, records: Sequence[JsonObject]) -> dict[str, RowFigure]:
        rows = self._join_windows(records)
        loss = {row["row"]: (float(row["loss"][0]), float(row["loss"][1])) for row in rows}
        return {
            "eval_loss": RowFigure(loss),
            **_ratios([(one, one["prediction"]) for one in self._known(records)]),
        }

    def _known(self, records: Sequence[JsonObject]) -> list[JsonObject]:
        return [answer for answer in self.answers(records) if answer["gold"] is not None]

    def baselines(self, records: Sequence[JsonObject]) -> dict[str, Baseline]:
        """Return the figures of always predicting no answer."""
        ratios = _ratios([(answer, "") for answer in self._known(records)])
        return {name: Baseline.of_rows("always no answer", rows) for name, rows in ratios.items()}

    def remarks(self, records: Sequence[JsonObject]) -> list[str]:
        known = self._known(records)
        silent = known and not any(answer["prediction"] for answer in known)
        missed = any(squad.has_answer(answer["gold"]) for answer in known)
        return [f"it answers none of the {len(known):,} questions"] if silent and missed else []

    def choose_threshold(self, records: Sequence[JsonObject]) -> None:
        """Choose the threshold with the highest F1, if questions may have no answer."""
        known = [
            answer
            for answer in self.answers(records)
            if answer["gold"] is not None and answer["null_minus_best"] is not None
        ]
        if self.threshold is None or all(answer["gold"] for answer in known):
            return
        spans = [next(span["text"] for span in answer["n_best"] if span["text"]) for answer in known]
        self.threshold, _ = squad.best_null_threshold(
            [answer["null_minus_best"] for answer in known],
            [squad.f1(span, answer["gold"]) for span, answer in zip(spans, known)],
            [squad.has_answer(answer["gold"]) for answer in known],
        )

    def details(self, records: Sequence[JsonObject]) -> JsonObject:
        """:func:`tunesmith.metrics.squad.score` over questions with known answers, and the threshold."""
        known = {
            str(tuple(answer["row"])): answer
            for answer in self.answers(records)
            if answer["gold"] is not None
        }
        predictions = {key: answer["prediction"] for key, answer in known.items()}
        figures = squad.score(predictions, {key: answer["gold"] for key, answer in known.items()})
        return {**figures, "null_threshold": self.threshold}

    def present(self, row: Question, answer: JsonObject) -> JsonObject:
        """``answer`` ("" = none), its ``start`` and ``end`` in characters, its probability, the n best."""
        shown = {name: answer[name] for name in ("start", "end", "score", "n_best")}
        return {**({} if row.id is None else {"id": row.id}), "answer": answer["prediction"], **shown}


def _ratios(pairs: Sequence[tuple[JsonObject, str]]) -> dict[str, RowFigure]:
    """Return exact match and F1 by row. ``pairs``: (record with the gold answers, predicted text)."""
    measures = {"eval_exact_match": squad.exact_match, "eval_f1": squad.f1}
    return {
        name: RowFigure(
            {
                (answer["row"][0], answer["row"][1]): (measure(text, answer["gold"]), 1.0)
                for answer, text in pairs
            }
        )
        for name, measure in measures.items()
    }


def best_spans(
    start: Tensor, end: Tensor, offsets: np.ndarray, context: np.ndarray, count: int, longest: int
) -> list[tuple[float, int, int, str]]:
    """(score, first character, last + 1, text) of a window's ``count`` best spans, the best first.

    ``start`` and ``end``: (tokens,) on the CPU. A span begins and ends at tokens of the context and has at
    most ``longest`` tokens; all such spans are compared, with score = start + end.
    """
    import torch

    outside = torch.from_numpy(offsets[::2] < 0)
    starts, ends = (values.masked_fill(outside, -torch.inf) for values in (start, end))
    padded = torch.cat([ends, ends.new_full((longest - 1,), -torch.inf)])
    ends_ahead = padded.unfold(0, longest, 1)  # (tokens, longest)
    scores, indices = (starts[:, None] + ends_ahead).flatten().topk(min(count, ends_ahead.numel()))
    spans = []
    for score, index in zip(scores.tolist(), indices.tolist()):
        if score == -np.inf:
            break
        token, more = divmod(index, longest)
        first, last = int(offsets[2 * token]), int(offsets[2 * (token + more) + 1])
        spans.append((score, first, last, questions.answer_text(context, offsets, first, last)))
    return spans


def _losses(start: Tensor, end: Tensor, batch: Batch) -> Tensor:
    """(windows,): mean cross-entropy of the answer's first and last token; 0 where it is not known."""
    import torch
    from torch.nn import functional

    spans, cells = batch["spans"].to(start.device), batch["cells"].to(start.device)
    rows, longest = len(spans), max(batch["places"])

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        table = logits.new_full((rows * longest,), -torch.inf).scatter(0, cells, logits).view(rows, longest)
        return functional.cross_entropy(table, target, ignore_index=-1, reduction="none")

    return (cross_entropy(start, spans[:, 0]) + cross_entropy(end, spans[:, 1])) / 2
