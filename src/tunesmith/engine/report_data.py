"""The data part of report.html: what was read and kept, how long it is. Shows ``data.store.data_report.Report.as_dict()``."""

from __future__ import annotations

from html import escape
from typing import Any

from tunesmith.engine.report_parts import bars, grid, shown, table
from tunesmith.runs import figures

_SPLITS = ("train", "eval")
_NAMES = {"duplicates_train_eval": "eval_rows_also_in_train", "cached": "from_the_cache", "seconds": "prepared_in_seconds"}


def data_summary(report: dict[str, Any]) -> str:
    """HTML of a data report. Keys it does not know are shown too; keys that are absent are left out."""
    splits = {name: report[name] for name in _SPLITS if isinstance(report.get(name), dict)}
    sets = report.get("eval_sets")
    splits |= {f"eval {name}": one for name, one in sets.items() if isinstance(one, dict)} if isinstance(sets, dict) else {}
    sources = [one for one in report.get("sources") or () if isinstance(one, dict)]
    apart = (*_SPLITS, "eval_sets", "sources", "contaminated")
    rest = {_NAMES.get(key, key): value for key, value in report.items() if key not in apart}
    shared = report.get("contaminated")
    shared = shared if isinstance(shared, dict) else {}
    if figures.is_number(shared.get("rows")) and figures.is_number(shared.get("share")):
        rest["eval_rows_that_share_text_with_train"] = f"{shared['rows']:,} ({figures.share(shared['share'], 1)})"
    lengths = _length_counts(splits.get("train", {}).get("histogram"))
    places = list(dict.fromkeys(place for split in splits.values() for place in split.get("unlearnable_first") or ()))
    examples = _block("Examples", _splits(splits))
    beside = _block("Tokens per training example", bars(lengths) if lengths else "")
    # Half a page has room for two columns of figures.
    above, beside = (examples, beside) if len(splits) > len(_SPLITS) else ("", examples + beside)
    return (
        grid(rest)
        + above
        + (f'<div class="pair">{beside}</div>' if beside else "")
        + _block("Sources", table([_source(one) for one in sources]) if sources else "")
        + _block("Rows left out", _lines([problem for one in sources for problem in one.get("problems") or ()]))
        + _block("Text the template leaves out", _lines([text for text in map(_left_out, sources) if text]))
        + _block("Rows with nothing to learn", _lines(places))
        + _block(f"Text that evaluation and training share, {shared.get('ngram')} tokens or more", _shared(shared.get("first")))
    )


def _block(title: str, html: str) -> str:
    return f"<div><h3>{title}</h3>{html}</div>" if html else ""


def _splits(splits: dict[str, dict[str, Any]]) -> str:
    """One line for each figure, one column for each split: that is how they are compared."""
    figures_of = {name: _split(split) for name, split in splits.items()}
    names = list(dict.fromkeys(name for split in figures_of.values() for name in split))
    head = "".join(f'<th class="num">{escape(name)}</th>' for name in splits)
    body = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f'<td class="num">{split.get(name, "")}</td>' for split in figures_of.values())
        + "</tr>"
        for name in names
    )
    return f'<div class="scroll"><table class="compact"><tr><th></th>{head}</tr>{body}</table></div>' if names else ""


def _split(split: dict[str, Any]) -> dict[str, str]:
    """Name -> HTML of the figure."""
    out = {}
    for key, value in split.items():
        if key in ("histogram", "overlong", "unlearnable_first"):
            continue
        if key == "supervised_tokens" and value == split.get("examples"):
            continue  # rows are learnt, not tokens
        name = {"supervised_tokens": "tokens learnt", "unlearnable": "nothing to learn"}.get(key, key.replace("_", " "))
        out[name] = shown(key, value)
        if key == "supervised_tokens" and figures.is_number(value) and figures.is_number(split.get("tokens")):
            out[name] += f' <span class="soft">({figures.share(value, split["tokens"])})</span>'
    overlong = split.get("overlong")
    if isinstance(overlong, dict) and figures.is_number(overlong.get("rows")):
        policy = f" ({escape(str(overlong.get('policy')))})" if overlong["rows"] else ""
        out["above max length"] = figures.number(overlong["rows"]) + policy
        if figures.is_number(overlong.get("dropped")) and overlong["dropped"]:
            out["of these left out whole"] = figures.number(overlong["dropped"])
        if figures.is_number(overlong.get("tokens_lost")) and overlong["tokens_lost"]:
            share = overlong.get("share_lost")
            of = f' <span class="soft">({figures.share(share, 1)})</span>' if figures.is_number(share) else ""
            out["tokens lost by that"] = figures.number(overlong["tokens_lost"]) + of
    histogram = split.get("histogram")
    if isinstance(histogram, dict):
        for key, name in (("median", "median length"), ("p95", "95% are at most"), ("max", "longest")):
            if figures.is_number(histogram.get(key)):
                out[name] = figures.number(histogram[key])
    return out


def _source(source: dict[str, Any]) -> dict[str, Any]:
    """What of a source fits a table; its whole hash is in manifest.json."""
    row = {key: value for key, value in source.items() if key not in ("problems", "sha256", "left_out", "cached", "seconds")}
    row = {key.removeprefix("rows_"): value for key, value in row.items()}
    if row.pop("revision", None):
        row["commit"] = str(source["revision"])[:12]
    if source.get("sha256"):
        row["sha256"] = str(source["sha256"])[:12]
    return row


def _left_out(source: dict[str, Any]) -> str:
    """``a.json: 2 of 256 rows looked at, for example ...``; empty when the template shows all of every row."""
    found = source.get("left_out")
    if not isinstance(found, dict) or not found.get("rows"):
        return ""
    first = found.get("first")
    example = f", for example {first[0]}" if isinstance(first, list) and first else ""
    return f"{source.get('path')}: {found['rows']} of {found.get('looked_at')} rows looked at{example}"


def _shared(first: Any) -> str:
    """The held-out rows that share text with a training row, each with that text."""
    return table([one for one in first if isinstance(one, dict)]) if isinstance(first, list | tuple) and first else ""


def _lines(lines: list[Any]) -> str:
    return '<ul class="lines">' + "".join(f"<li>{escape(str(line))}</li>" for line in lines) + "</ul>" if lines else ""


def _length_counts(histogram: Any) -> dict[str, float]:
    """``{"edges": [16, 32, 50], "counts": [...]}`` (counts up to each edge) -> {"1-16": n, "17-32": n, "33-50": n}."""
    if not isinstance(histogram, dict):
        return {}
    edges, counts = histogram.get("edges"), histogram.get("counts")
    if not isinstance(edges, list) or not isinstance(counts, list) or not all(map(figures.is_number, [*edges, *counts])):
        return {}
    return {f"{low + 1:,}-{high:,}": count for low, high, count in zip([0, *edges], edges, counts)}
