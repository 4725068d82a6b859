"""Pages made from plain data of any shape, and their pieces. Everything that comes in as text goes out escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from tunesmith.engine.report_style import CSS
from tunesmith.runs import figures

_SHARES = ("share", "fraction", "percent")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, sections: Sequence[str]) -> str:
    """A whole page that forbids itself scripts and requests. ``title`` is text, ``sections`` are HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · tunesmith</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def notes(lines: Sequence[str]) -> str:
    """What a reader should know first, one line each."""
    if not lines:
        return ""
    return (
        '<section class="card notes"><div class="label">notes</div><ul>'
        + "".join(f"<li>{escape(line)}</li>" for line in lines)
        + "</ul></section>"
    )


def tile(name: str, figure: str, sub: str = "") -> str:
    """A headline figure. All three are HTML of ours: figures and words, never text from outside."""
    below = f'<div class="sub">{sub}</div>' if sub else ""
    return f'<div class="tile"><div class="name">{name}</div><div class="figure">{figure}</div>{below}</div>'


def grid(values: dict[str, Any]) -> str:
    """Single figures side by side, each under its name."""
    cells = "".join(
        f'<div><div class="name">{escape(_words(key))}</div><div class="value">{shown(key, value)}</div></div>'
        for key, value in values.items()
    )
    return f'<div class="grid">{cells}</div>' if cells else ""


def facts(values: dict[str, Any]) -> str:
    """Names and values as a list; mappings nest, lists of mappings become tables."""
    items = "".join(f"<dt>{escape(_words(key))}</dt><dd>{shown(key, value)}</dd>" for key, value in values.items())
    return f"<dl>{items}</dl>"


def shown(key: str, value: Any) -> str:
    """One value as HTML; its key says the unit."""
    if value is None or value == [] or value == {}:
        return '<span class="soft">none</span>'
    if isinstance(value, bool):
        return "yes" if value else "no"
    if figures.is_number(value):
        return _figure(key, value)
    if isinstance(value, dict):
        return facts(value)
    if isinstance(value, list | tuple):
        if all(isinstance(one, dict) for one in value):
            return table(value)
        return ", ".join(shown(key, one) for one in value)
    return escape(str(value))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Mappings as rows; the columns are all their keys, in the order they are met."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {key for key in columns if all(figures.is_number(row.get(key, 0)) for row in rows)}
    kind = {key: ' class="num"' if key in numeric else "" for key in columns}
    head = "".join(f"<th{kind[key]}>{escape(_words(key))}</th>" for key in columns)
    body = "".join(
        "<tr>" + "".join(f"<td{kind[key]}>{shown(key, row.get(key))}</td>" for key in columns) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def bars(counts: dict[str, float]) -> str:
    """A histogram: label -> count."""
    most = max(counts.values(), default=0) or 1
    lines = (
        f'<span>{escape(str(label))}</span><i style="width:{100 * count / most:.1f}%"></i><span class="num">{count:,}</span>'
        for label, count in counts.items()
    )
    return f'<div class="bars">{"".join(lines)}</div>'


def answers(prompt: str, given: Sequence[dict[str, Any]], best_step: float | None) -> str:
    """The answers to one prompt: before training, after it (at the step whose weights were kept, when known), the reference."""
    first = given[0]
    kept = [one for one in given if one.get("step") == best_step]
    last = kept[-1] if kept else given[-1]
    columns = [_answer("before" if first.get("step") == 0 else "first", first)]
    if last is not first:
        columns.append(_answer("after", last))
    reference = next((one["reference"] for one in given if one.get("reference")), None)
    if reference is not None:
        columns.append(_column("reference", "reference, from the data", reference))
    between = [one for one in given if one is not first and one is not last]
    folded = ""
    if between:
        middle = "".join(_answer("between", one) for one in between)
        folded = f'<details><summary>{len(between)} in between</summary><div class="answers">{middle}</div></details>'
    return (
        f'<div class="card"><div class="prompt"><div class="label">prompt</div><div class="text">{escape(prompt)}</div></div>'
        f'<div class="answers">{"".join(columns)}</div>{folded}</div>'
    )


def _answer(kind: str, sample: dict[str, Any]) -> str:
    step = sample.get("step")
    at = f"step {step:,}" if figures.is_number(step) else ""
    label = f"{kind}, {at}" if at and kind != "between" else at or kind
    return _column(kind, label, sample.get("answer"))


def _column(kind: str, label: str, text: Any) -> str:
    inner = escape(str(text)) if text not in (None, "") else '<span class="soft">(empty)</span>'
    return f'<div class="answer {kind}"><div class="label">{label}</div><div class="text">{inner}</div></div>'


def _words(key: str) -> str:
    return str(key).replace("_", " ").removesuffix(" bytes").removesuffix(" seconds")


def _figure(key: str, value: float) -> str:
    if key.endswith("_bytes") or key == "bytes":
        return figures.size(value)
    if key.endswith("seconds"):
        return figures.duration(value)
    if any(word in key for word in _SHARES) and 0 <= value <= 1:
        return figures.share(value, 1)
    return figures.number(value)
