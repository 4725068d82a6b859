"""The data section of a run's report: what was read and kept, and how long the rows are.

``data_values`` turns ``data.store.data_report.Report.as_dict()``, which the manifest holds, into the values
of ``data.html``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tunesmith.json_types import JsonObject
from tunesmith.report.language import recorded, t
from tunesmith.runs.figure_format import is_number, number, share

_SPLITS = ("train", "eval")
_TABLES = (*_SPLITS, "eval_sets", "sources", "contaminated", "held_out")
_NAMES = {
    "duplicates_train_eval": "eval_rows_also_in_train",
    "cached": "from_the_cache",
    "seconds": "prepared_in_seconds",
    "unlearnable": "no supervised tokens",
}
_LENGTHS = {"median": "median length", "p95": "95% are at most", "max": "longest"}


@dataclass(frozen=True)
class Cell:
    """``key`` names the unit of ``value``; ``share`` is shown after it in brackets."""

    value: object
    key: str = ""
    share: str = ""


def data_values(report: JsonObject) -> JsonObject:
    """Return the values of ``data.html``. Unknown keys of the report are shown too, missing ones left out."""
    splits = {name: report[name] for name in _SPLITS if isinstance(report.get(name), dict)}
    sets = mapping(report.get("eval_sets"))
    splits |= {t("eval {name}", name=name): split for name, split in sets.items() if isinstance(split, dict)}
    cells = {name: _cells(split) for name, split in splits.items()}
    sources = _mappings(report.get("sources"))
    contaminated = mapping(report.get("contaminated"))
    figures = {_NAMES.get(key, key): value for key, value in report.items() if key not in _TABLES}
    if is_number(contaminated.get("rows")) and is_number(contaminated.get("share")):
        part = share(contaminated["share"], 1)
        figures["eval_rows_that_share_text_with_train"] = f"{contaminated['rows']:,} ({part})"
    if (held_out := mapping(report.get("held_out"))).get("rows") is not None:
        figures["held_out_rows"] = t(
            "{done} of {all}", done=f"{held_out['rows']:,}", all=f"{held_out['of']:,}"
        )
    names = dict.fromkeys(name for split in cells.values() for name in split)
    unsupervised = dict.fromkeys(_join(splits.values(), "unlearnable_first"))
    return {
        "figures": {
            name: recorded(value) if isinstance(value, str) else value for name, value in figures.items()
        },
        "splits": list(splits),
        # A line for each figure and a column for each split, so that splits can be compared.
        "examples": [(name, [split.get(name) for split in cells.values()]) for name in names],
        "lengths": _length_counts(mapping(splits.get("train", {}).get("histogram"))),
        "sources": [_source(source) for source in sources],
        "lists": {
            t("Rows left out"): _join(sources, "problems"),
            t("Text the template leaves out"): list(filter(None, map(_left_out_text, sources))),
            t("Rows without supervised tokens"): list(unsupervised),
        },
        "shared_title": t(
            "Text in both evaluation and training, {letters} letters or more",
            letters=contaminated.get("letters"),
        ),
        "shared": _mappings(contaminated.get("first")),
    }


def grave_notes(report: JsonObject) -> list[str]:
    """Return sentences on faults of the data that make the model or its figures wrong."""
    notes = [
        t(
            "The chat template leaves out text, so the model did not learn it: {text}. Choose another data.template, or "
            "change these rows.",
            text=text,
        )
        for text in map(_left_out_text, _mappings(report.get("sources")))
        if text
    ]
    equal, contaminated = report.get("duplicates_train_eval"), mapping(report.get("contaminated"))
    if is_number(equal) and equal:
        notes.append(
            t(
                "{rows} held-out rows are also training rows, so the held-out figures are better than those on new text. "
                "Remove them from one side.",
                rows=f"{equal:,}",
            )
        )
    if is_number(contaminated.get("rows")) and contaminated["rows"]:
        part = f" ({share(contaminated['share'], 1)})" if is_number(contaminated.get("share")) else ""
        notes.append(
            t(
                "{rows} held-out rows{part} share long passages with training rows, so the held-out figures are better than "
                "those on new text. The data section below shows some.",
                rows=f"{contaminated['rows']:,}",
                part=part,
            )
        )
    return notes


def mapping(value: object) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _mappings(value: object) -> list[JsonObject]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list | tuple) else []


def _join(parts: Iterable[JsonObject], key: str) -> list[str]:
    return [text for part in parts for text in part.get(key) or ()]


def _cells(split: JsonObject) -> dict[str, Cell]:
    """Return name -> figure of one split."""
    cells = {}
    for key, value in split.items():
        if key in ("histogram", "overlong", "unlearnable_first"):
            continue
        share_text = ""
        if key == "supervised_tokens":
            if value == split.get("examples"):
                continue  # the rows have one label each, not supervised tokens
            if is_number(value) and is_number(split.get("tokens")):
                share_text = share(value, split["tokens"])
        cells[_NAMES.get(key, key.replace("_", " "))] = Cell(value, key, share_text)
    overlong = mapping(split.get("overlong"))
    rows, dropped, lost, share_lost = map(overlong.get, ("rows", "dropped", "tokens_lost", "share_lost"))
    if is_number(rows):
        cells["above max length"] = Cell(number(rows) + (f" ({overlong.get('policy')})" if rows else ""))
        if is_number(dropped) and dropped:
            cells["of these left out whole"] = Cell(dropped)
        if is_number(lost) and lost:
            text = share(share_lost, 1) if is_number(share_lost) else ""
            cells["tokens lost by that"] = Cell(lost, share=text)
    lengths = mapping(split.get("histogram"))
    return cells | {name: Cell(lengths[key]) for key, name in _LENGTHS.items() if is_number(lengths.get(key))}


def _source(source: JsonObject) -> JsonObject:
    """Return the columns that a table has room for; manifest.json has the whole hash."""
    hidden = ("problems", "sha256", "left_out", "cached", "seconds", "revision", "in_turns")
    row = {key.removeprefix("rows_"): value for key, value in source.items() if key not in hidden}
    short = {"commit": source.get("revision"), "sha256": source.get("sha256")}
    row |= {"role": recorded(str(row["role"]))} if "role" in row else {}
    return row | {key: str(value)[:12] for key, value in short.items() if value}


def _left_out_text(source: JsonObject) -> str:
    """``a.json: 2 of 256 rows looked at, for example ...``; empty if the template renders every row whole."""
    facts = mapping(source.get("left_out"))
    if not facts.get("rows"):
        return ""
    first = facts.get("first")
    example = t(", for example {row}", row=first[0]) if isinstance(first, list) and first else ""
    counts = {"rows": facts["rows"], "all": facts.get("looked_at")}
    return t("{path}: {rows} of {all} rows looked at", path=source.get("path"), **counts) + example


def _length_counts(histogram: JsonObject) -> dict[str, float]:
    """``{"edges": [16, 32], "counts": [...]}`` (counts up to each edge) -> {"1-16": n, "17-32": n}."""
    edges, counts = histogram.get("edges"), histogram.get("counts")
    if not (isinstance(edges, list) and isinstance(counts, list) and all(map(is_number, [*edges, *counts]))):
        return {}
    return {f"{low + 1:,}-{high:,}": count for low, high, count in zip([0, *edges], edges, counts)}
