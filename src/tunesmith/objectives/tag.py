"""Tagging: a tag for each word, trained at one of its tokens; entities are measured as whole spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, model_validator

from tunesmith import objectives
from tunesmith.data.batch import pack
from tunesmith.data.encode import labels as label_names
from tunesmith.data.encode import tagging
from tunesmith.data.encode.labels import Names
from tunesmith.data.row_problems import shorten
from tunesmith.data.rows import Tagged
from tunesmith.errors import DataError, ReadOnceError
from tunesmith.metrics import entities, tag_figures, token_mean
from tunesmith.metrics.class_problems import FREQUENCIES
from tunesmith.metrics.intervals import RowFigure
from tunesmith.objectives import Baseline, Batch, Example, JsonObject, Layout, Metrics, Traits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

MOST_TYPES = 400
"""Most entity types, or tags without types, of a data set. Fine-grained sets have 100 to 150 types."""


class Config(objectives.Config):
    labels: Names | None = Field(
        None,
        min_length=2,
        description="names of the tags, by id; default: those of the training rows, O first",
    )
    label_all: bool = Field(
        False, description="train on every token of a word, not only on the one that predicts its tag"
    )
    stride: int = Field(
        64, ge=0, description="tokens that the windows of a sentence above max_length share, at most"
    )

    @model_validator(mode="after")
    def _check_labels(self) -> Config:
        label_names.refuse_repeats(self.labels)
        return self


class Objective(objectives.TaskHead):
    config: Config
    traits = Traits(
        rows=(Tagged,),
        head="token",
        figures=("eval_loss", "eval_f1", "eval_precision", "eval_recall", "eval_accuracy"),
        starter={"path": "builtin:tag"},
        assumed=True,
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._saved_labels: list[str] = []
        self._stride = config.stride
        self._words_touch = False
        """Most rows have no space between their first two words, as in Chinese."""
        self._set_labels(config.labels)

    @property
    def labels(self) -> list[str]:
        return list(self.facts["labels"] or [])

    @property
    def scheme(self) -> str | None:
        """The tagging scheme, such as BIO; None where the tags are no entities."""
        return entities.scheme_of(self.labels)

    def _set_labels(self, names: list[str] | None) -> None:
        """Set the tags; entities choose the best model by F1, other tags by accuracy."""
        self.facts |= {"labels": names}
        self.traits = replace(self.traits, best=("eval_f1" if self.scheme else "eval_accuracy", "max"))

    def bind(self, config: PreTrainedConfig, tokenizer: Tokenizer, max_length: int | None) -> None:
        super().bind(config, tokenizer, max_length)
        if self.has_head:
            self._saved_labels = [config.id2label[number] for number in range(config.num_labels)]
            self._words_touch = bool(self.saved.get("characters"))
        self.facts |= {"causal": self.causal, "max_length": max_length}

    def restore_labels(self) -> None:
        """Take tags and windows from the bound model. Raises DataError when it has no trained head."""
        super().restore_labels()
        limits = [length for length in (self.max_length, self.saved.get("max_length")) if length]
        self.max_length, self._stride = min(limits, default=None), self.saved.get("stride", self._stride)
        self.facts |= {"max_length": self.max_length, "stride": self._stride}
        self._set_iob1(bool(self.saved.get("iob1")))
        self._set_labels(self._saved_labels)

    def _set_iob1(self, converts: bool) -> None:
        """Let ``encode`` convert tags from IOB1 to IOB2, or not: then the fact is absent, and caches stay valid."""
        self.facts = {name: fact for name, fact in self.facts.items() if name != "iob1"}
        self.facts |= {"iob1": True} if converts else {}

    def scan(self, rows: Iterable[object]) -> None:
        """Collect the tags unless the recipe names them, and note where rows break their tagging scheme."""
        if self.restored:
            return
        sequences: Counter[tuple[str, ...]] = Counter()
        touching = several = 0
        try:
            for row in rows:
                if isinstance(row, Tagged) and row.tags:
                    sequences[row.tags] += 1
                    several += len(row.words) > 1
                    touching += len(row.words) > 1 and row.words[0][1] == row.words[1][0]
        except ReadOnceError:
            if self.config.labels:
                return
            raise
        self._words_touch = 2 * touching > several
        if entities.is_iob1(sequences) and (not self.config.labels or self._names_all_begins()):
            self._set_iob1(True)
            self.notes.append(
                "tags: IOB1 (an entity begins with I-, and with B- only after another of its type), converted to IOB2 (every "
                "entity begins with B-)"
            )
            converted: Counter[tuple[str, ...]] = Counter()
            for tags, times in sequences.items():
                converted[entities.to_iob2(tags)] += times
            sequences = converted
        counts: Counter[str] = Counter()
        for tags, times in sequences.items():
            counts.update({tag: number * times for tag, number in Counter(tags).items()})
        if not self.config.labels:
            self._set_labels(self._choose_labels(counts))
        if counts:
            self._note_tags(counts, sequences)

    def _names_all_begins(self) -> bool:
        """Return whether ``objective.labels`` has a B- tag for every type."""
        return set(self.labels) >= {"B" + name[1:] for name in self.labels if name != "O"}

    def _choose_labels(self, counts: Counter[str]) -> list[str]:
        """The tags of the rows, by id, O first. Raises DataError without two named tags."""
        names = _sort_tags(counts)
        if len(names) < 2:
            found = f"only the tag {names[0]!r}" if names else "no tag at all"
            raise DataError(
                f"the training rows have {found}: a tagger needs two.\n"
                "  Look at them with `tunesmith data preview`, or name the column with data.train.0.columns={tags: COLUMN}."
            )
        if all(map(label_names.is_whole, names)):
            raise DataError(
                f"the tags are numbers without names, such as {names[0]!r}, so predictions would be unreadable.\n"
                "  Write the names (B-person, O) from the data set's description, or set objective.labels=[...] to these numbers."
            )
        _check_kinds(counts)
        if set(names) <= set(self._saved_labels):
            return self._saved_labels  # the run continues with a trained head, whose ids must stay
        return _sort_tags(entities.complete(names))

    def _note_tags(self, counts: Counter[str], sequences: Counter[tuple[str, ...]]) -> None:
        words, scheme = counts.total(), self.scheme
        types = {name.partition("-")[2] for name in self.labels} - {""}
        common, count = counts.most_common(1)[0]
        kind = f"{scheme}, {len(types) or 1} types of entities" if scheme else "no entities, single tags"
        self.notes.append(
            f"tags: {len(self.labels)} ({kind}); the most frequent is {common!r} ({count / words:.1%} of the words)"
        )
        if odd := _odd_tags(counts):
            self.notes.append(f"tags: {odd}, so no tag is read as an entity; correct them for entity figures")
        problems = Counter[str]()
        for tags, times in sequences.items():
            for problem, number in entities.problems(tags, scheme).items():
                problems[problem] += number * times
        self.notes += [
            f"tags: {number} times {entities.PROBLEMS[problem]}: kept, and read as the begin of an entity"
            for problem, number in problems.items()
        ]

    def head_config(self) -> JsonObject:
        saved = {
            "scheme": self.scheme,
            "word": "last token" if self.causal else "first token",
            "max_length": self.max_length,
            "stride": self._stride,
        }
        saved |= {"characters": True} if self._words_touch else {}
        return self.label_config(self.labels, saved | ({"iob1": True} if self.facts.get("iob1") else {}))

    def encode(self, rows: Sequence[Tagged], tokenizer: Tokenizer) -> list[list[Example]]:
        return self._encode(rows, tokenizer, unseen=self.restored)

    def encode_held_out(self, rows: Sequence[Tagged], tokenizer: Tokenizer) -> list[list[Example]]:
        """Tokenise held-out rows. A tag that the model does not have counts as a mistake."""
        return self._encode(rows, tokenizer, unseen=True)

    def check_labels(self, row: Tagged, held_out: bool) -> None:
        numbers = {name: number for number, name in enumerate(self.labels)}
        tagging.targets_of(self._in_scheme([row])[0], 0, numbers, held_out)

    def _in_scheme(self, rows: Sequence[Tagged]) -> Sequence[Tagged]:
        """Return the rows, with their tags converted from IOB1 to IOB2 if the training rows are IOB1."""
        if not self.facts.get("iob1"):
            return rows
        return [replace(row, tags=row.tags and entities.to_iob2(row.tags)) for row in rows]

    def _encode(self, rows: Sequence[Tagged], tokenizer: Tokenizer, unseen: bool) -> list[list[Example]]:
        return tagging.encode(
            self._in_scheme(rows), tokenizer, self.labels, causal=self.causal, max_length=self.max_length, stride=self._stride,
            label_all=self.config.label_all, unseen=unseen,
        )  # fmt: skip

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        """Make a batch. ``targets`` (places,): tag ids at ``positions``; -1 = unknown, below -1 = a tag that
        the model does not have. ``words``: indices of the words of each window."""
        import torch

        batch = pack.with_positions(examples, layout, [example["places"] for example in examples])
        targets = np.concatenate([example["target"] for example in examples]).astype(np.int64)
        return {
            **batch,
            "targets": torch.from_numpy(targets),
            "words": [example["words"] for example in examples],
        }

    def count(self, batch: Batch) -> int:
        """Tokens whose tag is known."""
        return int(np.count_nonzero(batch["targets"].numpy() >= 0))

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over the tokens whose tag is known of its cross-entropy."""
        from tunesmith.models.heads import task_heads

        logits = task_heads.token_logits(model, batch)
        return _losses(logits, batch["targets"].to(logits.device)).sum(), {}

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> JsonObject:
        """For each window: its row, its words, the predicted tag of each with its probability, the true tag,
        and (sum of losses, number of known tags)."""
        import torch

        from tunesmith.models.heads import task_heads

        with torch.no_grad():
            logits = task_heads.token_logits(model, batch)
            scores, predicted = logits.softmax(-1).max(-1)
            targets = batch["targets"].to(logits.device)
            losses = _losses(logits, targets)
        columns = [
            value.cpu().numpy() for value in (predicted, scores.float(), targets, losses.cpu().double())
        ]
        windows, start = [], 0
        for row, words in zip(batch["rows"], batch["words"]):
            spoken = tagging.representing_tokens(words, self.causal)
            tags, sure, gold, loss = (column[start : start + len(words)][spoken] for column in columns)
            windows.append({
                "row": row,
                "words": np.array(words[spoken]),
                "predicted": tags.astype(np.int32),
                "scores": sure,
                "targets": gold.astype(np.int32),
                "loss": (float(loss.sum()), int((gold >= 0).sum())),
            })  # fmt: skip
            start += len(words)
        return {"windows": windows}

    def _join_windows(self, records: Sequence[JsonObject]) -> list[JsonObject]:
        """The windows of each row as one, its words in order; the rows in order."""
        rows = []
        for row, windows in token_mean.windows_by_row(records):
            order = np.argsort(np.concatenate([window["words"] for window in windows]))
            joined = {
                name: np.concatenate([window[name] for window in windows])[order]
                for name in ("predicted", "scores", "targets")
            }
            loss = tuple(sum(column) for column in zip(*(window["loss"] for window in windows)))
            rows.append({"row": row, **joined, "loss": loss})
        return rows

    def answers(self, records: Sequence[JsonObject]) -> list[JsonObject]:
        labels, in_entities = self.labels, self.scheme is not None

        def names(numbers: np.ndarray) -> list[str]:
            return [
                labels[number] if number >= 0 else tagging.unseen_name(int(number), in_entities)
                for number in numbers
            ]

        return [
            {
                "row": list(row["row"]),
                "prediction": names(row["predicted"]),
                "scores": [float(score) for score in row["scores"]],
                "gold": None if (row["targets"] == -1).any() else names(row["targets"]),
                "loss": row["loss"][0] / row["loss"][1] if row["loss"][1] else None,
            }
            for row in self._join_windows(records)
        ]

    def summarise(self, records: Sequence[JsonObject]) -> dict[str, float]:
        """eval_loss by word; F1, precision and recall of entities; accuracy of tags."""
        loss = objectives.mean_loss([row["loss"] for row in self._join_windows(records)])
        details = self.details(records)
        keys = {"f1": "f1", "precision": "precision", "recall": "recall", "accuracy": "token_accuracy"}
        return loss | {f"eval_{name}": details[key] for name, key in keys.items() if details[key] is not None}

    def row_figures(self, records: Sequence[JsonObject]) -> dict[str, RowFigure]:
        rows = self._join_windows(records)
        loss = {row["row"]: (float(row["loss"][0]), float(row["loss"][1])) for row in rows}
        return {"eval_loss": RowFigure(loss), **tag_figures.ratios(self._known(records), self.scheme)}

    def _known(self, records: Sequence[JsonObject]) -> list[JsonObject]:
        return [answer for answer in self.answers(records) if answer["gold"] is not None]

    def group_figures(self, records: Sequence[JsonObject]) -> dict[str, RowFigure]:
        return tag_figures.f1_by_type(self._known(records)) if self.scheme else {}

    def baselines(self, records: Sequence[JsonObject]) -> dict[str, Baseline]:
        """Return the figures of always O, or without O of always the most frequent tag; the loss of frequencies."""
        known = self._known(records)
        counts = Counter(tag for answer in known for tag in answer["gold"])
        if not counts:
            return {}
        always = "O" if "O" in self.labels else counts.most_common(1)[0][0]
        ratios = tag_figures.ratios(known, self.scheme, always)
        loss = tag_figures.frequency_loss({row["row"]: row["targets"] for row in self._join_windows(records)})
        found = {name: Baseline.of_rows(f"always {always}", figure) for name, figure in ratios.items()}
        return {"eval_loss": Baseline.of_rows(FREQUENCIES, loss), **found}

    def remarks(self, records: Sequence[JsonObject]) -> list[str]:
        known = self._known(records)
        predicted = {tag for answer in known for tag in answer["prediction"]}
        gold = {tag for answer in known for tag in answer["gold"]}
        return [f"it predicts one tag only: {predicted.pop()}"] if len(predicted) == 1 < len(gold) else []

    def details(self, records: Sequence[JsonObject]) -> JsonObject:
        """Return :func:`tunesmith.metrics.entities.score` over the rows with gold tags, and two counts.

        ``broken_tags``: how often gold tags break the scheme. ``unseen``: words whose gold tag the model does
        not have."""
        known = [answer for answer in self.answers(records) if answer["gold"] is not None]
        golds = [answer["gold"] for answer in known]
        found = entities.score(golds, [answer["prediction"] for answer in known], self.scheme)
        unseen = sum(int((row["targets"] < -1).sum()) for row in self._join_windows(records))
        broken = sum(entities.problems(gold, self.scheme).total() for gold in golds)
        return {**found, "broken_tags": broken, "unseen": unseen}

    def present(self, row: Tagged, answer: JsonObject) -> JsonObject:
        """``entities``: type, characters, text, mean score over its words; ``tags`` of all words."""
        tags, scores = answer["prediction"], answer["scores"]
        if not self.scheme:
            return {"tags": tags, "scores": scores}
        spans = []
        for kind, first, end in entities.spans(tags):
            start, stop = row.words[first][0], row.words[end - 1][1]
            score = sum(scores[first:end]) / (end - first)
            text = row.text[start:stop]
            spans.append({"type": kind, "start": start, "end": stop, "text": text, "score": score})
        return {"entities": spans, "tags": tags}


def _sort_tags(names: Iterable[str]) -> list[str]:
    """O first, the others in alphabetical order."""
    return sorted(set(names), key=lambda name: (name != "O", name))


def _check_kinds(counts: Counter[str]) -> None:
    """Raise DataError if the tags are probably not tags: more than MOST_TYPES, or some outside the scheme."""
    types = {tag.partition("-")[2] or tag for tag in counts}
    if len(types) > MOST_TYPES:
        rarest = shorten(min(counts, key=counts.__getitem__))
        raise DataError(
            f"the training rows have {len(counts):,} different tags, such as {rarest}: a text column may be read as tags.\n"
            "  Name the column with data.train.0.columns={tags: COLUMN}, or set objective.labels=[...] to the tags."
        )
    if odd := _odd_tags(counts):
        raise DataError(
            f"tags: {odd}, so no tag could be read as an entity.\n  Correct them; or set objective.labels=[...] to all tags, to "
            "train them as single tags without entity figures."
        )


def _odd_tags(counts: Counter[str]) -> str | None:
    """Return words on the tags that do not follow the entity scheme of the others; None if all follow it."""
    scheme, odd = entities.odd_tags(counts)
    named = ", ".join(f"{shorten(tag)} ({counts[tag]})" for tag in odd[:5])
    return f"{named} do not follow {scheme}" if odd else None


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy (places,); 0 where the target is unknown or not a tag of the model."""
    from torch.nn import functional

    return functional.cross_entropy(logits, targets.clamp(min=-1), ignore_index=-1, reduction="none")
