"""The data section of a run's report: what was read and kept, and how long it is.

``data_values`` turns ``data.store.data_report.Report.as_dict()``, as the manifest keeps it, into the values of ``data.html``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.runs import figure_format

_SPLITS = ("train", "eval")
_NAMES = {
    "duplicates_train_eval": "eval_rows_also_in_train",
    "cached": "from_the_cache",
    "seconds": "prepared_in_seconds",
}
_LENGTHS = {"median": "median length", "p95": "95% are at most", "max": "longest"}


@dataclass(frozen=True)
class Cell:
    """``key`` names the unit of ``value``; ``share`` is shown after it in brackets."""

    value: Any
    key: str = ""
    share: str = ""


def data_values(report: dict[str, Any]) -> dict[str, Any]:
    """Keys that the report has and this function does not know are kept; keys that are absent are left out."""
    splits = {name: report[name] for name in _SPLITS if isinstance(report.get(name), dict)}
    splits |= {
        f"eval {name}": one
        for name, one in _mapping(report.get("eval_sets")).items()
        if isinstance(one, dict)
    }
    cells = {name: _cells(split) for name, split in splits.items()}
    sources = [one for one in report.get("sources") or () if isinstance(one, dict)]
    contaminated = _mapping(report.get("contaminated"))
    known = (*_SPLITS, "eval_sets", "sources", "contaminated")
    single = {_NAMES.get(key, key): value for key, value in report.items() if key not in known}
    if figure_format.is_number(contaminated.get("rows")) and figure_format.is_number(
        contaminated.get("share")
    ):
        share = figure_format.share(contaminated["share"], 1)
        single["eval_rows_that_share_text_with_train"] = f"{contaminated['rows']:,} ({share})"
    shared = contaminated.get("first")
    return {
        "figures": single,
        "splits": list(splits),
        # A line for each figure, a column for each split: that is how splits are compared.
        "examples": [
            (name, [split.get(name) for split in cells.values()])
            for name in dict.fromkeys(name for split in cells.values() for name in split)
        ],
        "lengths": _length_counts(_mapping(splits.get("train", {}).get("histogram"))),
        "sources": [_source(one) for one in sources],
        "lists": {
            "Rows left out": [problem for one in sources for problem in one.get("problems") or ()],
            "Text the template leaves out": [text for text in map(_left_out, sources) if text],
            "Rows with nothing to learn": list(
                dict.fromkeys(
                    place for split in splits.values() for place in split.get("unlearnable_first") or ()
                )
            ),
        },
        "shared_title": f"Text that evaluation and training share, {contaminated.get('ngram')} tokens or more",
        "shared": [one for one in shared if isinstance(one, dict)] if isinstance(shared, list) else [],
    }


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _cells(split: dict[str, Any]) -> dict[str, Cell]:
    """Name -> figure of one split."""
    out = {}
    for key, value in split.items():
        if key in ("histogram", "overlong", "unlearnable_first"):
            continue
        if key == "supervised_tokens" and value == split.get("examples"):
            continue  # the rows have a label each, not their tokens
        name = {"unlearnable": "nothing to learn"}.get(key, key.replace("_", " "))
        is_part = (
            key == "supervised_tokens"
            and figure_format.is_number(value)
            and figure_format.is_number(split.get("tokens"))
        )
        out[name] = Cell(value, key, figure_format.share(value, split["tokens"]) if is_part else "")
    overlong = _mapping(split.get("overlong"))
    if figure_format.is_number(overlong.get("rows")):
        policy = f" ({overlong.get('policy')})" if overlong["rows"] else ""
        out["above max length"] = Cell(figure_format.number(overlong["rows"]) + policy)
        if figure_format.is_number(overlong.get("dropped")) and overlong["dropped"]:
            out["of these left out whole"] = Cell(overlong["dropped"])
        if figure_format.is_number(overlong.get("tokens_lost")) and overlong["tokens_lost"]:
            share = overlong.get("share_lost")
            out["tokens lost by that"] = Cell(
                overlong["tokens_lost"],
                share=figure_format.share(share, 1) if figure_format.is_number(share) else "",
            )
    histogram = _mapping(split.get("histogram"))
    return out | {
        name: Cell(histogram[key])
        for key, name in _LENGTHS.items()
        if figure_format.is_number(histogram.get(key))
    }


def _source(source: dict[str, Any]) -> dict[str, Any]:
    """The part of a source that a table has room for; its whole hash is in manifest.json."""
    hidden = ("problems", "sha256", "left_out", "cached", "seconds", "revision")
    row = {key.removeprefix("rows_"): value for key, value in source.items() if key not in hidden}
    short = {"commit": source.get("revision"), "sha256": source.get("sha256")}
    return row | {key: str(value)[:12] for key, value in short.items() if value}


def _left_out(source: dict[str, Any]) -> str:
    """``a.json: 2 of 256 rows looked at, for example ...``; empty when the template shows all of every row."""
    found = _mapping(source.get("left_out"))
    if not found.get("rows"):
        return ""
    first = found.get("first")
    example = f", for example {first[0]}" if isinstance(first, list) and first else ""
    return f"{source.get('path')}: {found['rows']} of {found.get('looked_at')} rows looked at{example}"


def _length_counts(histogram: dict[str, Any]) -> dict[str, float]:
    """``{"edges": [16, 32, 50], "counts": [...]}`` (counts up to each edge) -> {"1-16": n, "17-32": n, "33-50": n}."""
    edges, counts = histogram.get("edges"), histogram.get("counts")
    if (
        not isinstance(edges, list)
        or not isinstance(counts, list)
        or not all(map(figure_format.is_number, [*edges, *counts]))
    ):
        return {}
    return {f"{low + 1:,}-{high:,}": count for low, high, count in zip([0, *edges], edges, counts)}
