"""Pages from templates: the Jinja2 environment, the filters that write values for people, and how a page is saved.

Autoescape is on for every template and no template marks text as safe: whatever a row, a label or a file name
contains is shown and never obeyed. A name that a template misspells is an error (``StrictUndefined``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tunesmith.files import replace_file
from tunesmith.runs import figure_format

_SHARES = ("share", "fraction", "percent")


@dataclass(frozen=True)
class Tile:
    """A headline figure: ``name``, ``before`` -> ``figure``, and below ``change`` (coloured by ``trend``) and ``note``."""

    name: str
    figure: str
    note: str = ""
    before: str = ""
    change: str = ""
    trend: str = ""
    """``good``, ``bad`` or empty."""


def render(template: str, **values: Any) -> str:
    """Return the page that ``template`` (a file of ``templates/``) makes of ``values``."""
    return environment().get_template(template).render(**values)


def save(path: Path, template: str, **values: Any) -> Path:
    """Write that page to ``path`` in one piece and return ``path``. Raises DiskFullError when there is no room for it."""
    # A JSON file may hold half of a surrogate pair, which UTF-8 cannot.
    replace_file(path, render(template, **values).encode("utf-8", "replace"))
    return path


@cache
def environment() -> Environment:
    """The environment of all templates, which the board shares."""
    made = Environment(
        loader=PackageLoader("tunesmith.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "number": figure_format.number,
        "typed": figure_format.typed,
        "words": words,
        "unit": unit,
        "columns": columns,
    }
    return made


def words(key: str) -> str:
    """``peak_memory_bytes`` -> peak memory."""
    return str(key).replace("_", " ").removesuffix(" bytes").removesuffix(" seconds")


def titled(name: str) -> str:
    """``eval_macro_f1`` -> Eval macro F1."""
    text = name.replace("_", " ").replace("f1", "F1").replace("auroc", "AUROC")
    return text.upper() if name in ("rmse", "mae", "mse") else text[:1].upper() + text[1:]


def unit(value: float, key: str) -> str:
    """A figure in the unit that its key names."""
    if key.endswith("_bytes") or key == "bytes":
        return figure_format.size(value)
    if key.endswith("seconds"):
        return figure_format.duration(value)
    if any(word in key for word in _SHARES) and 0 <= value <= 1:
        return figure_format.share(value, 1)
    return figure_format.number(value)


def columns(rows: Sequence[dict[str, Any]]) -> list[tuple[str, bool]]:
    """(key, whether its values are figures) of each column: all keys of the rows, in the order they are met."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [(key, all(figure_format.is_number(row.get(key, 0)) for row in rows)) for key in keys]
