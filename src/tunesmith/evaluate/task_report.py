"""report.html of an evaluation of labels, tags or answers: the figures, their pictures, and the worst mistakes to read.

One self-contained page, of the same style and under the same rules as the report of a run: texts from outside are escaped, and
the page forbids itself scripts and requests.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import tunesmith
from tunesmith import files
from tunesmith.engine.report_parts import facts as listed
from tunesmith.engine.report_parts import grid, notes, page, table, tile
from tunesmith.metrics import pictures
from tunesmith.runs import figures as written

_FIRST = (
    "accuracy", "micro_f1", "exact_match", "f1", "precision", "recall", "macro_f1", "auroc", "token_accuracy", "rmse", "mae",
    "pearson", "margin",
)  # fmt: skip
"""The first three of these that are there stand on top."""
_FOLDED = 30  # a longer table is folded away
_ROOM = 1200  # characters of a text that are shown
_AROUND = 200  # characters on either side of what is marked in a longer text
_PROBABLE = 5


def write(
    folder: str | Path,
    title: str,
    figures: Mapping[str, Any],
    mistakes: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write report.html, and each picture as a PNG, into ``folder`` (made if need be); return the report's path.

    ``title``: what was measured, text. ``figures``: what ``tunesmith.metrics`` returns (of ``classes.single``, ``multi``,
    ``regression``, ``entities.score``, ``squad.score``), with single figures of any name added. ``confusion``, ``curves``,
    ``calibration`` and ``per_class`` or ``by_type`` are drawn where they are there. ``facts``: model, data, rows ... as a list;
    ``notes`` in it are lines for the top of the page, ``command`` is shown as typed.

    ``mistakes``: the worst first, each {"where": "file:row", "gold": ..., "prediction": ...} (a string, a number, a list of
    strings; None or empty = none) and, as far as there are any:

    - ``text``, ``text_pair``, ``question``: what was read. A long text is cut, around what is marked in it if anything is;
    - ``probabilities`` {name: share}: the likeliest are shown, and the true ones;
    - ``gold_spans``, ``predicted_spans`` [{"start", "end", "type"}] in characters of ``text``, ``type`` optional: entities, or
      the places of answers. The text is shown twice, with what is true and with what was said marked in it;
    - ``loss`` or ``f1``: how bad it is.

    Files are replaced in one piece. Raises DiskFullError when there is no room for them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _pictures(figures)
    for name, (_, png) in drawn.items():
        files.replace_file(folder / f"{name}.png", png)
    rest = dict(facts or {})
    said = [str(line) for line in rest.pop("notes", None) or ()]
    sections = [
        _head(title, rest.pop("command", None)),
        _tiles(figures),
        notes(said),
        _figures(figures),
        _classes(figures),
        _shown(drawn),
        _mistakes(mistakes),
        f'<section><h2>What was measured</h2><div class="card">{listed(rest)}</div></section>' if rest else "",
        f"<footer>Written by tunesmith {escape(tunesmith.__version__)}</footer>",
    ]
    report = folder / "report.html"
    files.replace_file(report, page(title, sections).encode("utf-8", "replace"))
    return report


def _by_class(figures: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return figures.get("per_class") or figures.get("by_type") or {}


def _pictures(figures: Mapping[str, Any]) -> dict[str, tuple[str, bytes]]:
    """File name without its end -> (caption, PNG)."""
    found: dict[str, tuple[str, bytes]] = {}
    classes = _by_class(figures)
    if figures.get("confusion"):
        caption = "Confusion matrix: counts, coloured by the share of the row"
        found["confusion"] = caption, pictures.confusion(figures["confusion"], list(classes))
    if classes:
        found["per-class"] = "Precision, recall and F1", pictures.per_class(classes)
    if any((figures.get("curves") or {}).values()):
        by_support = sorted(figures["curves"], key=lambda name: -classes.get(name, {}).get("support", 0))
        curves = {name: figures["curves"][name] for name in by_support}
        found["precision-recall"] = "Precision and recall at every threshold", pictures.precision_recall(curves)
    if figures.get("calibration"):
        caption = "Calibration: how sure the model is, and how often it is right"
        found["calibration"] = caption, pictures.reliability(figures["calibration"])
    if figures.get("by_length"):
        caption = "Accuracy by how much longer the better answer is: does the model only measure length?"
        found["by-length"] = caption, pictures.buckets(figures["by_length"], 0.5)
    return found


def _head(title: str, command: Any) -> str:
    typed = f'<code class="command">$ {escape(written.typed(str(command)))}</code>' if command else ""
    return f'<header><div class="eyebrow">tunesmith evaluation</div><h1>{escape(title)}</h1>{typed}</header>'


def _tiles(figures: Mapping[str, Any]) -> str:
    twice = {"micro_f1"} if "accuracy" in figures else set()  # of one class for each row they are the same
    shown = [name for name in _FIRST if written.is_number(figures.get(name)) and name not in twice][:3]
    baseline = figures.get("baseline")
    tiles = []
    for name in shown:
        has_baseline = name in ("accuracy", "micro_f1") and name == shown[0]
        sub = f"{written.number(baseline)} by always saying the same" if has_baseline and written.is_number(baseline) else ""
        if name == "accuracy" and written.is_number(longer := figures.get("longer_is_better")):
            sub = f"{written.number(max(longer, 1 - longer))} by always taking the {'longer' if longer >= 0.5 else 'shorter'} one"
        tiles.append(tile(_words(name), written.number(figures[name]), sub))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _words(name: str) -> str:
    text = name.replace("_", " ").replace("f1", "F1")
    return text.upper() if name in ("auroc", "rmse", "mae", "mse") else text[0].upper() + text[1:]


def _figures(figures: Mapping[str, Any]) -> str:
    single = {key: value for key, value in figures.items() if not isinstance(value, Mapping | list) or key == "baseline_labels"}
    return f'<section><h2>Figures</h2><div class="card">{grid(single)}</div></section>' if single else ""


def _classes(figures: Mapping[str, Any]) -> str:
    classes = _by_class(figures)
    if not classes:
        return ""
    what = "class" if "per_class" in figures else "type"
    rows = [{"#": number, what: name, **values} for number, (name, values) in enumerate(classes.items())]
    body = table(sorted(rows, key=lambda row: -row["support"]))
    if len(rows) > _FOLDED:
        body = f"<details><summary>{len(rows)}, the most frequent first</summary>{body}</details>"
    return f'<section><h2>By {what}</h2><div class="card">{body}</div></section>'


def _shown(drawn: Mapping[str, tuple[str, bytes]]) -> str:
    if not drawn:
        return ""
    parts = []
    for caption, png in drawn.values():
        data = base64.b64encode(png).decode("ascii")
        width = int.from_bytes(png[16:20]) // 2  # of its header: drawn for twice the dots of a plain screen
        parts.append(
            f'<figure class="picture"><figcaption>{escape(caption)}</figcaption>'
            f'<img alt="{escape(caption)}" width="{width}" src="data:image/png;base64,{data}"></figure>'
        )
    return f'<section><h2>Pictures</h2><div class="pictures">{"".join(parts)}</div></section>'


def _mistakes(mistakes: Sequence[Mapping[str, Any]]) -> str:
    cards = "".join(map(_mistake, mistakes))
    return f"<section><h2>Worst mistakes</h2>{cards}</section>" if cards else ""


def _mistake(mistake: Mapping[str, Any]) -> str:
    measures = [
        f"{name} {written.number(mistake[key])}" for key, name in _MEASURES.items() if written.is_number(mistake.get(key))
    ]
    label = escape(" · ".join([str(mistake.get("where", "")), *measures]))
    spans = {key: mistake.get(key) or [] for key in ("gold_spans", "predicted_spans")}
    is_typed = any(span.get("type") for both in spans.values() for span in both)
    read = ["question"] if any(spans.values()) else ["question", "text", "text_pair"]
    above = "".join(f'<div class="text">{escape(_cut(str(mistake[key])))}</div>' for key in read if mistake.get(key))
    columns = []
    for key, own, other, kind in (
        ("gold", "gold_spans", "predicted_spans", ""),
        ("prediction", "predicted_spans", "gold_spans", " after"),
    ):
        inner = _value(mistake.get(key))
        if is_typed or spans[own]:
            marked = _marked(str(mistake.get("text", "")), spans[own], {_place(span) for span in spans[other]})
            inner = marked if is_typed else f"<b>{inner}</b>\n{marked}"  # an answer is repeated above its place
        elif key == "prediction" and mistake.get("probabilities"):
            inner += f'\n<span class="soft">{_likely(mistake["probabilities"], mistake.get("gold"))}</span>'
        judged = "rewards" in mistake  # the better of several answers, and the one with the highest reward
        name = ("better" if judged else "true") if key == "gold" else ("preferred" if judged else "predicted")
        columns.append(f'<div class="answer{kind}"><div class="label">{name}</div><div class="text">{inner}</div></div>')
    return (
        f'<div class="card mistake"><div class="prompt"><div class="label">{label}</div>{above}</div>'
        f'<div class="answers">{"".join(columns)}</div></div>'
    )


_MEASURES = {"loss": "loss", "f1": "F1"}


def _value(value: Any) -> str:
    if value is None or value == "" or value == []:
        return '<span class="soft">(none)</span>'
    if isinstance(value, list | tuple):
        return escape(" | ".join(map(str, value)))
    return written.number(value) if written.is_number(value) else escape(_cut(str(value)))


def _likely(probabilities: Mapping[str, float], gold: Any) -> str:
    true = set(gold) if isinstance(gold, list | tuple) else {gold}
    ordered = sorted(probabilities, key=lambda name: -probabilities[name])
    shown = [name for place, name in enumerate(ordered) if place < _PROBABLE or name in true]
    return escape(" · ".join(f"{name} {written.number(probabilities[name])}" for name in shown))


def _place(span: Mapping[str, Any]) -> tuple[int, int, Any]:
    return span["start"], span["end"], span.get("type")


def _cut(text: str) -> str:
    return text if len(text) <= _ROOM else f"{text[:_ROOM]}… ({len(text) - _ROOM:,} more characters)"


def _marked(text: str, spans: Sequence[Mapping[str, Any]], others: set[tuple[int, int, Any]]) -> str:
    """``text`` with its spans marked: green where the other side has the same one. A long text is cut around them."""
    first, last = 0, len(text)
    if len(text) > _ROOM:
        starts, ends = [span["start"] for span in spans], [span["end"] for span in spans]
        first = max(0, min(starts, default=0) - _AROUND)
        last = min(len(text), max(max(ends, default=0) + _AROUND, first + 2 * _AROUND), first + _ROOM)
    parts, done = ["…"] if first else [], first
    for span in sorted(spans, key=lambda span: span["start"]):
        start, end = max(span["start"], done), min(span["end"], last)
        if start >= end:  # within another, or cut away
            continue
        kind = "right" if _place(span) in others else "wrong"
        name = f"<sub>{escape(str(span['type']))}</sub>" if span.get("type") else ""
        parts += [escape(text[done:start]), f'<mark class="{kind}">{escape(text[start:end])}{name}</mark>']
        done = end
    return "".join([*parts, escape(text[done:last]), *(["…"] if last < len(text) else [])])
