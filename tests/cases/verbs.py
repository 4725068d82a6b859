"""Small files of the kinds that users bring, and the outcome of every verb.

    python -m tests.cases.verbs          # a table: what each verb does with each file
    python -m tests.cases.verbs --json   # the same, with whole messages

The files lie in ``$TUNESMITH_SHARED/cases``; their README says how each is to be treated.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.data.zoo import QWEN3
from tests.runs import model_folder
from tests.tiny import save_tiny, tiny_tokenizer
from tunesmith.cli.main import main

GEMMA_STYLE = """{{ bos_token }}{% for m in messages %}
{{- '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{% endif %}"""

TEMPLATES = {"tools": QWEN3, "turn end": GEMMA_STYLE}
"""Chat templates by the property that a file needs; both end a turn with <|im_end|>, and </s> is eos of the second."""


@dataclass(frozen=True)
class Case:
    """A file, how it is read, and the right outcome.

    ``refused``: words that the message of lint, check and train must hold, in any order; empty: the file trains.
    ``reported``: words that lint, preview or check must print of a file that trains.
    ``twins``: formats in which the same rows must give the same tokens.
    """

    file: str
    objective: str = "sft"
    model: str = "llama"
    template: str = "chatml"
    source: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    reported: tuple[str, ...] = ()
    twins: tuple[str, ...] = ("csv", "jsonl", "json", "parquet")

    @property
    def name(self) -> str:
        return f"{self.file} as {self.objective}"


NO_CSV = ("jsonl", "json", "parquet")
CASES = (
    Case("tool-call-vanishes.jsonl", refused=("tool",)),
    Case("tool-call-vanishes.jsonl", template="tools"),
    Case("tool-calls-native.json", template="tools", twins=("csv", "jsonl", "json")),  # arguments both as text and as object
    Case("sharegpt-consecutive-calls.json", template="tools"),
    Case("tool-calls-null-keys.jsonl", template="tools"),
    Case("tool-calls-null-keys.parquet", template="tools"),
    Case("turn-weight-zero.jsonl"),
    Case("turn-loss-false.jsonl"),
    Case("turn-end-is-not-eos.jsonl", template="turn end"),
    Case("instruction-context-response.jsonl"),
    Case("system-and-history.jsonl"),
    Case("document-summary.jsonl"),
    Case("preference-with-tools.jsonl", "dpo", template="tools"),
    Case("preference-with-tools.jsonl", "reward", template="tools"),
    Case("special-tokens-in-text.jsonl", reported=("<|im_end|>",)),
    Case("think-repeated-by-template.jsonl", template="tools"),
    Case("held-out-20.jsonl", data={"eval": {"fraction": 0.3}}, reported=("6",)),
    Case("held-out-100.jsonl", data={"eval": {"fraction": 0.3}}, reported=("30",)),
    Case("korean-keys.jsonl"),
    Case("class-ids-with-gaps.jsonl", "classify", "bert"),
    Case(
        "class-id-unseen.jsonl",
        "classify",
        "bert",
        settings={"objective": {"type": "classify", "labels": ["0", "2"]}},
        refused=("7", "objective.labels", ":3"),
    ),
    Case("tags-comment-lines.tsv", "tag", "bert", refused=("format: conll",), twins=()),
    Case("tags-comment-lines.tsv", "tag", "bert", source={"format": "conll"}, twins=()),
    Case("messages-with-label.jsonl", refused=("kto",)),
    Case("messages-with-label.jsonl", "kto"),
    Case("pairs-given-to-sft.jsonl", refused=("dpo", "reward")),
    Case("pairs-given-to-sft.jsonl", "dpo"),
    Case("images-in-messages.jsonl", refused=("image",)),
    Case("unclosed-quote.tsv", "classify", "bert", refused=("quote",), twins=()),
    Case("reviews-tab-separated.txt", "classify", "bert", data={"bad_rows": "skip"}, twins=()),
    Case("reviews-tab-separated.txt", "cpt", refused=("tab",), twins=()),
    Case("no-header-numbers.tsv", "classify", "bert", refused=("header",), twins=()),
    Case("iob1.conll", "tag", "bert", reported=("IOB1",), twins=()),
    Case("scores-nested.jsonl", "classify", "bert", refused=("labels.label",)),
    Case(
        "scores-nested.jsonl",
        "classify",
        "bert",
        twins=NO_CSV,
        source={"columns": {"text": "sentence1", "text_pair": "sentence2", "label": "labels.binary-label"}},
    ),
    Case("carriage-returns-in-cells.csv"),
    Case("python-lists-in-cells.csv", "qa", "bert", refused=("context",), twins=()),
)


def model(case: Case, folder: Path) -> Path:
    """The tiny model of a case, with its chat template."""
    if case.template == "chatml":
        tokenizer_folder = model_folder(folder, case.model)
        if case.model == "llama":
            tiny_tokenizer("chatml").save_pretrained(tokenizer_folder)
        return tokenizer_folder
    target = folder / f"model-{case.template.replace(' ', '-')}"
    if not target.exists():
        save_tiny("llama", target, max_position_embeddings=2048)
        tokenizer = tiny_tokenizer(template=TEMPLATES[case.template])
        if case.template == "tools":
            tokenizer.eos_token = "<|im_end|>"
        tokenizer.save_pretrained(target)
    return target


def recipe(case: Case, file: Path, folder: Path) -> dict[str, Any]:
    """Two steps on the case's file."""
    written = case.objective in ("sft", "cpt", "dpo", "kto")
    return {
        "model": str(model(case, folder)),
        "objective": case.objective,
        "adaptation": "full",
        "data": {"train": [{"path": str(file), **case.source}], "eval": {"fraction": 0}, "cache": False, **case.data},
        "train": {"batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, "precision": "fp32"},
        **({"samples": {"count": 0}} if written else {}),
        **case.settings,
    }


@dataclass(frozen=True)
class Outcome:
    """Exit code of a command line and what it printed."""

    code: int
    text: str

    @property
    def line(self) -> str:
        """``ok``, or the message in one line."""
        words = " ".join(self.text.split("error:")[-1].split())
        return "ok" if self.code == 0 else f"exit {self.code}: {words}"


def command(*words: str) -> Outcome:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return Outcome(code, out.getvalue() + err.getvalue())


def outcomes(case: Case, file: Path, folder: Path) -> dict[str, Outcome]:
    """Return the outcomes of lint, preview, check and train on a file, and of generate or evaluate with the trained model."""
    made = folder / "recipe.yaml"
    made.write_text(yaml.safe_dump(recipe(case, file, folder), allow_unicode=True), encoding="utf-8")
    run = folder / "run"
    done = {
        "lint": command("data", "lint", str(made), "--model", str(model(case, folder))),
        "preview": command("data", "preview", str(made)),
        "check": command("check", str(made)),
        "train": command("train", str(made), "--out", str(run)),
    }
    if done["train"].code == 0:
        trained = str(run / "model")
        options = _reading_options(case)
        if case.objective == "sft":
            done["generate"] = command("generate", trained, "--data", str(file), "--max-new-tokens", "4", *options)
        else:
            done["evaluate"] = command("evaluate", trained, "--data", str(file), *options)
    return done


def _reading_options(case: Case) -> list[str]:
    """The source's keys as options of verbs that read a file without a recipe."""
    columns = case.source.get("columns", {})
    kind = ["--format", case.source["format"]] if "format" in case.source else []
    skip = ["--bad-rows", "skip"] if case.data.get("bad_rows") == "skip" else []
    return [*kind, *(word for name, column in columns.items() for word in ("--column", f"{name}={column}")), *skip]


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The file's rows, read by other programs' readers."""
    if file.suffix == ".parquet":
        import pyarrow.parquet

        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
        return rows
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if file.suffix == ".json":
        loaded: list[dict[str, Any]] = json.loads(text)
        return loaded
    return list(csv.DictReader(io.StringIO(file.read_bytes().decode("utf-8"), newline="")))


def _write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One cell a value; what is no text as JSON, an absent key as an empty cell."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            cells = (row.get(name) for name in names)
            writer.writerow(["" if c is None else c if isinstance(c, str) else json.dumps(c, ensure_ascii=False) for c in cells])


def _write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


WRITERS: dict[str, Callable[[Sequence[Mapping[str, Any]], Path], None]] = {
    "csv": _write_csv,
    "parquet": _write_parquet,
    "json": lambda rows, path: path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8") and None,
    "jsonl": lambda rows, path: (
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8") and None
    ),
}


def examples(case: Case, file: Path, folder: Path) -> list[dict[str, np.ndarray]]:
    """The arrays that training would see: tokens, loss mask, labels; without the number of the row."""
    import torch

    from tunesmith.recipe import load
    from tunesmith.train import setup

    made = folder / f"twin-{file.suffix[1:]}.yaml"
    made.write_text(yaml.safe_dump(recipe(case, file, folder), allow_unicode=True), encoding="utf-8")
    read = setup.read(load(str(made)), torch.device("cpu"), lambda line: None)
    return [{k: v for k, v in read.data.train[i].items() if k != "row"} for i in range(len(read.data.train))]


def table(cases: Path) -> list[dict[str, Any]]:
    """Every case and what each verb did."""
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            done = outcomes(case, cases / case.file, Path(folder))
        rows.append({"case": case.name, **{verb: outcome.line for verb, outcome in done.items()}})
    return rows


def _main() -> None:
    from tests.conftest import SHARED

    rows = table(SHARED / "cases")
    if "--json" in sys.argv:
        print(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    for row in rows:
        print(row.pop("case"))
        for verb, line in row.items():
            print(f"    {verb:<9} {line[:400]}")


if __name__ == "__main__":
    _main()
