"""Extractive question answering: where in a text the answer begins and ends, or that the text does not say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from tunesmith import objectives
from tunesmith.data.batch import pack
from tunesmith.data.encode import questions
from tunesmith.data.rows import Question
from tunesmith.errors import DataError
from tunesmith.metrics import token_mean
from tunesmith.models import network
from tunesmith.models.heads import head_types
from tunesmith.objectives import Batch, Example, Layout, Metrics, Traits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

N_BEST = 20
"""Answers kept for each question; their probabilities sum to 1."""


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    window: int = Field(
        384, ge=16, description="tokens of question and context together; a longer context slides through"
    )
    stride: int = Field(
        128, ge=0, description="tokens that windows share; more where an answer of max_answer_tokens needs it"
    )
    max_answer_tokens: int = Field(30, ge=1, description="answers of more tokens are not considered")


class Objective(objectives.TaskHead):
    traits = Traits(
        rows=(Question,), head="span", best=("eval_f1", "max"), starter={"path": "builtin:qa"}, assumed=True
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.threshold: float | None = None
        """No answer is said where its score is more than this above the best answer's; None = there always is one."""
        self._causal = False
        self._settings = {
            "window": config.window,
            "stride": config.stride,
            "max_answer_tokens": config.max_answer_tokens,
        }
        self._template = questions.TEMPLATE
        self._saved: dict[str, Any] | None = None
        self._limit: int | None = None
        self._fixed = False

    # ------------------------------------------------------------------------------------------------ before encoding

    def bind(self, config: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        self._causal = network.is_causal(config)
        ours = getattr(config, "tunesmith", None) or {}
        if ours.get("objective") == "qa" or head_types.kind_of((config.architectures or [""])[0]) == "span":
            self._saved = ours
            self.threshold = ours.get("null_threshold")
            self._template = ours.get("pair_template", self._template)
        if tokenizer.pad_token is None:  # only for whoever pads; padding is masked by its place
            tokenizer.pad_token = tokenizer.eos_token
        self._limit = max_length
        self._decide()

    def restore_labels(self) -> None:
        """Take windows and threshold from the model that was adopted, as it was saved. Raises DataError without such a head."""
        if self._saved is None:
            raise DataError("this model has no head that finds answers: train one with objective: qa")
        self._settings |= {name: self._saved[name] for name in self._settings if name in self._saved}
        self._decide()
        self._fixed = True

    def _decide(self) -> None:
        self.max_length = min(self._settings["window"], self._limit or self._settings["window"])
        self.facts |= {
            **self._settings,
            "causal": self._causal,
            "max_length": self.max_length,
            "template": self._template,
        }

    def scan(self, rows: Iterable[Any]) -> None:
        """Whether there are questions without an answer: only then the model may say so."""
        if self._fixed:
            return
        asked = silent = 0
        for row in rows:
            if isinstance(row, Question) and row.answers is not None:
                asked += 1
                silent += not row.answers
        if asked and asked == silent:
            raise DataError(
                f"none of the {asked} questions has an answer: there is nothing to find.\n"
                "  Give the answers, or name their column with data.train.0.columns={answers: COLUMN}."
            )
        self.threshold = (self.threshold or 0.0) if silent else None
        says = "the model may say that there is none" if silent else "so there always is one"
        self.notes.append(f"questions: {asked}, {silent} of them without an answer: {says}")

    def head_config(self) -> dict[str, Any]:
        ours = {"objective": "qa", "pair_template": self._template, "null_threshold": self.threshold}
        names = {
            0: "LABEL_0",
            1: "LABEL_1",
        }  # transformers' span heads have two outputs, and these names for them
        return {
            "num_labels": 2,
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
            "tunesmith": {
                **ours,
                **self._settings,
                "window": self.max_length,
                "null": "last token" if self._causal else "first token",
            },
        }

    # ------------------------------------------------------------------------------------------------------- examples

    def encode(self, rows: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
        return questions.encode(
            rows, tokenizer, template=self._template, causal=self._causal, stride=self._settings["stride"],
            max_length=self.max_length or self._settings["window"], longest_answer=self._settings["max_answer_tokens"],
        )  # fmt: skip

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        """All tokens are read. ``spans`` (rows, 2): first and last token of the answer in its window, -1 where it is not known.

        ``cells`` (tokens,): where each token's logit goes in a table (rows, longest).
        """
        import torch

        lengths = [len(example["input_ids"]) for example in examples]
        batch = pack.with_positions(examples, layout, [np.arange(length) for length in lengths])
        cells = np.concatenate([row * max(lengths) + np.arange(length) for row, length in enumerate(lengths)])
        return {
            **batch,
            "cells": torch.from_numpy(cells),
            "spans": torch.from_numpy(np.stack([example["span"] for example in examples]).astype(np.int64)),
            "windows": [
                {name: example[name] for name in ("offsets", "null", "context", "golds")}
                for example in examples
            ],
        }

    # ----------------------------------------------------------------------------------------------------------- loss

    def count(self, batch: Batch) -> int:
        """Windows whose answer is known."""
        return int(np.count_nonzero(batch["spans"][:, 0].numpy() >= 0))

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Any, Metrics]:
        """Sum over windows of the mean of two cross-entropies over all their tokens: of the answer's first, and of its last."""
        from tunesmith.models.heads import task_heads

        return _losses(*task_heads.span_logits(model, batch), batch).sum(), {}

    # ----------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
        """Of each window: its row, the best answers in it, the score of no answer, the true answers, and its loss."""
        import torch

        from tunesmith.models.heads import task_heads

        with torch.no_grad():
            start, end = task_heads.span_logits(model, batch)
            losses = _losses(start, end, batch).cpu().double().numpy()
        known = (batch["spans"][:, 0] >= 0).cpu().numpy()
        first, last = start.float().cpu(), end.float().cpu()
        out, at = [], 0
        for row, window, length, loss, gold in zip(
            batch["rows"], batch["windows"], batch["places"], losses, known
        ):
            scores = first[at : at + length], last[at : at + length]
            null = int(window["null"][0])
            out.append(
                {
                    "row": row,
                    "best": best_spans(
                        *scores,
                        window["offsets"],
                        window["context"],
                        N_BEST,
                        self._settings["max_answer_tokens"],
                    ),
                    "null": float(scores[0][null] + scores[1][null]),
                    "golds": json.loads(window["golds"].tobytes()) if len(window["golds"]) else None,
                    "loss": (float(loss), int(gold)),
                }
            )
            at += length
        return {"windows": out}

    def _joined(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The windows of each row as one; the rows in order. No answer is what the window says that believes in it least."""
        out = []
        for row, parts in token_mean.windows_by_row(records):
            best: dict[str, tuple[float, int, int]] = {}
            for score, begin, end, text in sorted(
                (one for part in parts for one in part["best"]), key=lambda one: (-one[0], one[1])
            ):
                best.setdefault(text, (score, begin, end))
            out.append({
                "row": row,
                "best": [(text, *place) for text, place in best.items()][: N_BEST],
                "null": min(part["null"] for part in parts),
                "golds": next((part["golds"] for part in parts if part["golds"] is not None), None),
                "loss": tuple(sum(column) for column in zip(*(part["loss"] for part in parts))),
            })  # fmt: skip
        return out

    def answers(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self._answer(one) for one in self._joined(records)]

    def _answer(self, one: dict[str, Any]) -> dict[str, Any]:
        from tunesmith.metrics import squad

        listed: list[dict[str, Any]] = [
            {"text": text, "score": score, "start": start, "end": end}
            for text, score, start, end in one["best"]
        ]
        above = one["null"] - listed[0]["score"] if listed else None
        said = listed[0] if listed else {"text": "", "start": None, "end": None}
        if self.threshold is not None:
            silence = {"text": "", "score": one["null"], "start": None, "end": None}
            if above is not None and above > self.threshold:
                said = silence
            listed = sorted([*listed, silence], key=lambda answer: -answer["score"])
        if listed:
            powers = np.exp(np.array([answer["score"] for answer in listed]) - listed[0]["score"])
            for answer, chance in zip(listed, powers / powers.sum()):
                answer["score"] = float(chance)
        return {
            "row": list(one["row"]),
            "prediction": said["text"],
            "start": said["start"],
            "end": said["end"],
            "score": said.get("score", 0.0),
            "n_best": listed,
            "null_minus_best": above,
            "gold": one["golds"],
            "f1": squad.f1(str(said["text"]), one["golds"]) if one["golds"] is not None else None,
            "right": one["golds"] is not None and squad.exact_match(str(said["text"]), one["golds"]) == 1.0,
            "loss": one["loss"][0] / one["loss"][1] if one["loss"][1] else None,
        }

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """eval_loss, a mean over windows; SQuAD's eval_exact_match and eval_f1, where some have no answer also of each kind."""
        loss = token_mean.token_mean([{"rows": [one["loss"] for one in self._joined(records)]}])
        found = self.details(records)
        both = found["has_answer_total"] and found["no_answer_total"]
        names = ["exact_match", "f1", *(["has_answer_f1", "no_answer_f1"] if both else [])]
        return {name: value for name, value in loss.items() if name != "perplexity"} | {
            f"eval_{name}": found[name] for name in names
        }

    def choose_threshold(self, records: Sequence[dict[str, Any]]) -> None:
        """Where questions may have no answer: the threshold of the highest F1."""
        from tunesmith.metrics import squad

        known = [
            one
            for one in self.answers(records)
            if one["gold"] is not None and one["null_minus_best"] is not None
        ]
        if self.threshold is None or all(one["gold"] for one in known):
            return
        texts = [next(answer["text"] for answer in one["n_best"] if answer["text"]) for one in known]
        self.threshold, _ = squad.best_null_threshold(
            [one["null_minus_best"] for one in known],
            [squad.f1(text, one["gold"]) for text, one in zip(texts, known)],
            [squad.has_answer(one["gold"]) for one in known],
        )

    def details(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """:func:`tunesmith.metrics.squad.score` over the questions whose answers are known, and the threshold."""
        from tunesmith.metrics import squad

        known = {str(tuple(one["row"])): one for one in self.answers(records) if one["gold"] is not None}
        golds = {key: one["gold"] for key, one in known.items()}
        return {
            **squad.score({key: one["prediction"] for key, one in known.items()}, golds),
            "null_threshold": self.threshold,
        }

    def present(self, row: Question, answer: dict[str, Any]) -> dict[str, Any]:
        """``answer`` ("" = the context does not say), where its characters ``start`` and ``end``, its probability, the n best."""
        called = {} if row.id is None else {"id": row.id}
        return {
            **called,
            "answer": answer["prediction"],
            **{name: answer[name] for name in ("start", "end", "score", "n_best")},
        }


def best_spans(
    start: Any, end: Any, offsets: np.ndarray, context: np.ndarray, count: int, longest: int
) -> list[tuple[float, int, int, str]]:
    """(score, first character, last + 1, text) of a window's ``count`` best answers, the best first.

    ``start`` and ``end``: (tokens,) on the CPU. An answer begins and ends at tokens of the context and has at most ``longest``;
    all of them are compared: score = start + end.
    """
    import torch

    outside = torch.from_numpy(offsets[::2] < 0)
    begins, ends = (values.masked_fill(outside, -torch.inf) for values in (start, end))
    ahead = torch.cat([ends, ends.new_full((longest - 1,), -torch.inf)]).unfold(
        0, longest, 1
    )  # (tokens, longest)
    scores, places = (begins[:, None] + ahead).flatten().topk(min(count, ahead.numel()))
    out = []
    for score, place in zip(scores.tolist(), places.tolist()):
        if score == -np.inf:
            break
        token, more = divmod(place, longest)
        first, last = int(offsets[2 * token]), int(offsets[2 * (token + more) + 1])
        out.append((score, first, last, questions.answer_text(context, offsets, first, last)))
    return out


def _losses(start: Any, end: Any, batch: Batch) -> Any:
    """(windows,): 0 where the answer is not known."""
    import torch
    from torch.nn import functional

    spans = batch["spans"].to(start.device)
    rows, longest = len(spans), max(batch["places"])
    parts = []
    for logits, target in zip((start, end), spans.T):
        table = logits.new_full((rows * longest,), -torch.inf).scatter(
            0, batch["cells"].to(start.device), logits
        )
        parts.append(
            functional.cross_entropy(table.view(rows, longest), target, ignore_index=-1, reduction="none")
        )
    return (parts[0] + parts[1]) / 2
