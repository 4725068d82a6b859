"""Tagging: what each word of a sentence names. Learnt at one token of each word, measured by whole entities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunesmith import objectives
from tunesmith.data.batch import pack
from tunesmith.data.encode import labels as label_names
from tunesmith.data.encode import tagging
from tunesmith.data.rows import Tagged
from tunesmith.errors import DataError, ReadOnceError
from tunesmith.metrics import token_mean
from tunesmith.models import network
from tunesmith.models.heads import head_types
from tunesmith.objectives import Batch, Example, Layout, Metrics, Traits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = tuple[int, int]


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    labels: list[str] | None = Field(
        None, min_length=2, description="names of the tags, by id; default: found, O first"
    )
    label_all: bool = Field(
        False, description="learn at every token of a word, not only at the one that it is read at"
    )
    stride: int = Field(
        64, ge=0, description="tokens that the windows of a sentence above max_length share, at most"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        label_names.refuse_repeats(self.labels)
        return self


class Objective(objectives.TaskHead):
    traits = Traits(rows=(Tagged,), head="token", starter={"path": "builtin:tag"}, assumed=True)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.facts = {"labels": config.labels}
        self._causal = False
        self._saved: list[str] = []
        self._ours: dict[str, Any] = {}
        self._stride = config.stride
        self._characters = False
        self._fixed = False
        self._choose_best()

    @property
    def labels(self) -> list[str]:
        return list(self.facts["labels"] or [])

    @property
    def scheme(self) -> str | None:
        """What the tags are written in, None where they are no entities."""
        from tunesmith.metrics import entities

        return entities.scheme_of(self.labels)

    def _choose_best(self) -> None:
        """Entities are judged by F1, other tags by accuracy."""
        self.traits = replace(self.traits, best=("eval_f1" if self.scheme else "eval_accuracy", "max"))

    # ------------------------------------------------------------------------------------------------ before encoding

    def bind(self, config: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
        self._causal, self.max_length = network.is_causal(config), max_length
        self._ours = getattr(config, "tunesmith", None) or {}
        if (
            self._ours.get("objective") == "tag"
            or head_types.kind_of((config.architectures or [""])[0]) == "token"
        ):
            self._saved = [config.id2label[number] for number in range(config.num_labels)]
            self._characters = bool(self._ours.get("characters"))
        if tokenizer.pad_token is None:  # only for whoever pads; padding is masked by its place
            tokenizer.pad_token = tokenizer.eos_token
        self.facts |= {"causal": self._causal, "max_length": max_length}

    def restore_labels(self) -> None:
        """Take tags and windows from the model that was adopted, as it was saved. Raises DataError when it has no tags."""
        if not self._saved:
            raise DataError("this model has no head that tags: train one with objective: tag")
        known = [length for length in (self.max_length, self._ours.get("max_length")) if length]
        self.max_length, self._stride = min(known, default=None), self._ours.get("stride", self._stride)
        self.facts |= {"labels": self._saved, "max_length": self.max_length, "stride": self._stride}
        self._fixed = True
        self._choose_best()

    def scan(self, rows: Iterable[Any]) -> None:
        """Find the tags, O first, the others by the alphabet; say where they break their scheme, given or found."""
        if self._fixed:
            return
        sequences: Counter[tuple[str, ...]] = Counter()
        close = several = 0
        try:
            for row in rows:
                if isinstance(row, Tagged) and row.tags:
                    sequences[row.tags] += 1
                    several += len(row.words) > 1
                    close += len(row.words) > 1 and row.words[0][1] == row.words[1][0]
        except ReadOnceError:
            if self.config.labels:
                return
            raise
        self._characters = 2 * close > several
        counts: Counter[str] = Counter()
        for tags, times in sequences.items():
            counts.update({tag: number * times for tag, number in Counter(tags).items()})
        if not self.config.labels:
            self.facts["labels"] = self._found(counts)
            self._choose_best()
        if counts:
            self._remark(counts, sequences)

    def _found(self, counts: Counter[str]) -> list[str]:
        """The tags of the rows, by id. Raises DataError where there is nothing to learn."""
        from tunesmith.metrics import entities

        names = ordered(counts)
        if len(names) < 2:
            there = f"only the tag {names[0]!r}" if names else "no tag at all"
            raise DataError(
                f"the training rows have {there}: a tagger needs two.\n"
                "  Look at them with `tunesmith data preview`, or name the column with data.train.0.columns={tags: COLUMN}."
            )
        if all(map(label_names.is_whole, names)):
            raise DataError(
                f"the tags are numbers without names, such as {names[0]!r}: nobody could read what is predicted.\n"
                "  Write the names (B-person, O), which the data set's own list has, or give objective.labels=[...] as they are."
            )
        if self.config.label_all and entities.scheme_of(names) in ("BIO", "BIOES"):
            names = ordered(
                {*names, *map(tagging.inside_tag, names)}
            )  # tokens inside a word go on, also where no second word does
        if self._saved and set(names) <= set(self._saved):
            names = self._saved  # a head that knows these tags goes on
        return names

    def _remark(self, counts: Counter[str], sequences: Counter[tuple[str, ...]]) -> None:
        from tunesmith.metrics import entities

        words, found, scheme = counts.total(), Counter[str](), self.scheme
        types = {name.partition("-")[2] for name in self.labels} - {""}
        common, count = counts.most_common(1)[0]
        said = f"{scheme}, {len(types) or 1} types of entities" if scheme else "no entities, single tags"
        self.notes.append(
            f"tags: {len(self.labels)} ({said}); the most frequent is {common!r} ({count / words:.1%} of the words)"
        )
        odd = {
            tag: number for tag, number in counts.items() if tag != "O" and entities.scheme_of([tag]) is None
        }
        others = entities.scheme_of(counts.keys() - odd.keys())
        if others and 0 < sum(odd.values()) < words / 20:  # not parts of speech, but entities and a slip
            named = ", ".join(f"{tag!r} ({number})" for tag, number in list(odd.items())[:5])
            self.notes.append(
                f"tags: {named}: no tag of {others}, so none is read as an entity; for figures of entities mend these"
            )
        for tags, times in sequences.items():
            for kind, number in entities.problems(tags, scheme).items():
                found[kind] += number * times
        for kind, number in found.items():
            self.notes.append(
                f"tags: {number} times {entities.PROBLEMS[kind]}: kept, and read as an entity that begins there"
            )

    def head_config(self) -> dict[str, Any]:
        names = self.labels
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            "tunesmith": {
                "objective": "tag",
                "scheme": self.scheme,
                "word": "last token" if self._causal else "first token",
                "max_length": self.max_length,
                "stride": self._stride,
                **(
                    {"characters": True} if self._characters else {}
                ),  # words stand without a space between them
            },
        }

    # ------------------------------------------------------------------------------------------------------- examples

    def encode(self, rows: Sequence[Tagged], tokenizer: PreTrainedTokenizerBase) -> list[list[Example]]:
        return tagging.encode(
            rows, tokenizer, self.labels,
            causal=self._causal, max_length=self.max_length, stride=self._stride, label_all=self.config.label_all,
        )  # fmt: skip

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        """``targets`` (places,): the tag at each of ``positions``, -1 = not known; ``words``: of each window, which they are."""
        import torch

        batch = pack.with_positions(examples, layout, [example["places"] for example in examples])
        return {
            **batch,
            "targets": torch.from_numpy(
                np.concatenate([example["target"] for example in examples]).astype(np.int64)
            ),
            "words": [example["words"] for example in examples],
        }

    # ----------------------------------------------------------------------------------------------------------- loss

    def count(self, batch: Batch) -> int:
        """Places whose tag is known."""
        return int(np.count_nonzero(batch["targets"].numpy() >= 0))

    def loss(self, model: PreTrainedModel, batch: Batch) -> tuple[Any, Metrics]:
        """Sum over the known places of the cross-entropy of their tag."""
        from tunesmith.models.heads import task_heads

        logits = task_heads.token_logits(model, batch)
        return _losses(logits, batch["targets"].to(logits.device)).sum(), {}

    # ----------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
        """Of each window: its row, its words, the tag said of each with its probability, the true one, their loss and number."""
        import torch

        from tunesmith.models.heads import task_heads

        with torch.no_grad():
            logits = task_heads.token_logits(model, batch)
            scores, said = logits.softmax(-1).max(-1)
            targets = batch["targets"].to(logits.device)
            losses = _losses(logits, targets)
        values = [one.cpu().numpy() for one in (said, scores.float(), targets, losses.cpu().double())]
        return {"windows": [
            self._window(row, words, *(value[end - len(words) : end] for value in values))
            for row, words, end in zip(batch["rows"], batch["words"], np.cumsum([len(words) for words in batch["words"]]))
        ]}  # fmt: skip

    def _window(
        self,
        row: Row,
        words: np.ndarray,
        said: np.ndarray,
        scores: np.ndarray,
        targets: np.ndarray,
        losses: np.ndarray,
    ) -> dict[str, Any]:
        speaks = tagging.representing_tokens(words, self._causal)
        return {
            "row": row,
            "words": np.array(words[speaks]),
            "said": said[speaks].astype(np.int32),
            "scores": scores[speaks],
            "targets": targets[speaks].astype(np.int32),
            "loss": (float(losses[speaks].sum()), int((targets[speaks] >= 0).sum())),
        }

    def _joined(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The windows of each row as one, its words in order; the rows in order."""
        out = []
        for row, parts in token_mean.windows_by_row(records):
            order = np.argsort(np.concatenate([part["words"] for part in parts]))
            whole = {
                name: np.concatenate([part[name] for part in parts])[order]
                for name in ("said", "scores", "targets")
            }
            sums = [sum(column) for column in zip(*(part["loss"] for part in parts))]
            out.append({"row": row, **whole, "loss": tuple(sums)})
        return out

    def answers(self, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                "row": list(one["row"]),
                "prediction": [self.labels[number] for number in one["said"]],
                "scores": [float(score) for score in one["scores"]],
                "gold": None
                if (one["targets"] < 0).any()
                else [self.labels[number] for number in one["targets"]],
                "loss": one["loss"][0] / one["loss"][1] if one["loss"][1] else None,
            }
            for one in self._joined(records)
        ]

    def summarise(self, records: Sequence[dict[str, Any]]) -> dict[str, float]:
        """eval_loss, by word; eval_f1, eval_precision and eval_recall of entities; eval_accuracy, the share of right tags."""
        loss = token_mean.token_mean([{"rows": [one["loss"] for one in self._joined(records)]}])
        found = self.details(records)
        names = {"f1": "f1", "precision": "precision", "recall": "recall", "accuracy": "token_accuracy"}
        measured = {f"eval_{name}": found[key] for name, key in names.items() if found[key] is not None}
        return {name: value for name, value in loss.items() if name != "perplexity"} | measured

    def details(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """:func:`tunesmith.metrics.entities.score` over the rows whose tags are known; ``broken_tags``: how often their gold
        breaks the scheme, in any way."""
        from tunesmith.metrics import entities

        known = [one for one in self.answers(records) if one["gold"] is not None]
        found = entities.score(
            [one["gold"] for one in known], [one["prediction"] for one in known], self.scheme
        )
        return {
            **found,
            "broken_tags": sum(entities.problems(one["gold"], self.scheme).total() for one in known),
        }

    def present(self, row: Tagged, answer: dict[str, Any]) -> dict[str, Any]:
        """``entities``: type, start and end in characters, text, score (mean over its words) of each; ``tags`` of all words."""
        from tunesmith.metrics import entities

        tags, scores = answer["prediction"], answer["scores"]
        if not self.scheme:
            return {"tags": tags, "scores": scores}
        found = []
        for kind, first, end in entities.spans(tags):
            start, stop = row.words[first][0], row.words[end - 1][1]
            score = sum(scores[first:end]) / (end - first)
            found.append(
                {"type": kind, "start": start, "end": stop, "text": row.text[start:stop], "score": score}
            )
        return {"entities": found, "tags": tags}


def ordered(names: Iterable[str]) -> list[str]:
    """O first, the others by the alphabet."""
    return sorted(set(names), key=lambda name: (name != "O", name))


def _losses(logits: Any, targets: Any) -> Any:
    """(places,), 0 where the target is not known."""
    from torch.nn import functional

    return functional.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
