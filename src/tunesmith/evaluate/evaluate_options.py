"""Options of ``evaluate``: the same for ``tunesmith evaluate`` and the Python function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tunesmith.data.formats.fields import Columns
from tunesmith.errors import UserError
from tunesmith.evaluate.trained_reading import make_source
from tunesmith.json_types import JsonObject
from tunesmith.metrics import metric_names, tasks

if TYPE_CHECKING:
    from tunesmith.models.generate.decode_step import DecodeWeights


@dataclass(frozen=True)
class EvaluateOptions:
    """Rows to read, figures to measure, and the folder to write to. Columns, template and the keys of the objective
    default to those of the model's training."""

    objective: str | None = None
    """Decides which tokens are supervised. None = that of training, or ``sft`` for a language model that records none
    (the last answer; text rows whole). ``cpt`` supervises every token of a document and splits long ones."""
    format: str | None = None
    columns: Columns | None = None
    separator: str | None = None
    prompt_template: str | None = None
    template: str | None = None
    template_kwargs: JsonObject | None = None
    max_length: int | None = None
    overlong: str | None = None
    """Policy for rows above ``max_length``; None = the objective's."""
    bad_rows: Literal["error", "skip"] = "error"
    limit: int | None = None
    precision: str = "auto"
    batch_tokens: int = 2048
    """Bounds memory and never changes a metric."""
    split: str = "train"
    """``split``, ``name`` and ``streaming``: of a Hub data set ("hub:OWNER/NAME"), as in a recipe."""
    name: str | None = None
    streaming: bool = False
    reference: str | Path | None = None
    """Reference policy of dpo and kto; None = the model that training started from."""
    generate: int = 0
    """Prompts that a language model answers."""
    task: tasks.Task | None = None
    answer_metrics: Sequence[str] = ()
    """Figures of the answers: a name, or the import path of a Python function. Without any, those of ``task`` or of
    the task of the training, else all."""
    max_new_tokens: int = 128
    decode_weights: DecodeWeights = "stored"
    """Weights of the answers, as in ``Engine``."""
    with_base: bool = True
    """Let the base model answer the same prompts, too."""
    engine: str | None = None
    """``engine`` and ``served_model``: vLLM gives the model's answers (``models.generate.vllm_backend.open_vllm``)."""
    served_model: str | None = None
    out: str | Path | None = None
    """With ``generate``, the folder of figures.json and the answers, from which an interrupted evaluation goes on. For
    a task head, a new folder for report.html, figures.json and the worst mistakes."""

    @property
    def reading(self) -> JsonObject:
        """Keys of a source that say how its rows are read, and that default to those of training."""
        names = ("format", "columns", "separator", "prompt_template")
        return {name: vars(self)[name] for name in names}

    @property
    def rows(self) -> JsonObject:
        """Keys of a source that say which rows are read."""
        return {name: vars(self)[name] for name in ("limit", "split", "name", "streaming")}

    @property
    def folder(self) -> Path | None:
        return None if self.out is None else Path(self.out)

    def check(self, data: str | Path) -> None:
        """Raise UserError for options that are wrong whatever the model is, before a model is loaded."""
        make_source(data, **self.reading, **self.rows)
        if not self.generate and (self.answer_metrics or self.task):
            raise UserError("--metric and --task choose figures of answers: add --generate 50")
        if self.decode_weights != "stored" and (self.engine or not self.generate):
            raise UserError(
                "--decode-weights is for answers of tunesmith's engine; other figures use the weights as stored.\n"
                "  Leave it out, or add --generate 50 without --engine."
            )
        metric_names.of_names(self.answer_metrics)
