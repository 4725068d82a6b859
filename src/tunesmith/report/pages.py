"""The Jinja2 environment of all pages, its filters, and how a page is saved.

Autoescape is on and no template marks text as safe: the browser never runs what a row, a label or a file name
contains. A name that a template misspells is an error (``StrictUndefined``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from tunesmith.files import replace_file
from tunesmith.json_types import JsonObject
from tunesmith.report import language
from tunesmith.report.language import recorded
from tunesmith.runs import figure_format
from tunesmith.runs.figure_format import is_number, signed

_SHARES = ("share", "fraction", "percent")


@dataclass(frozen=True)
class Tile:
    """A headline figure: ``before`` -> ``figure``, below it ``change`` (coloured by ``trend``) and ``note``."""

    name: str
    figure: str
    note: str = ""
    before: str = ""
    change: str = ""
    trend: str = ""
    """``good``, ``bad`` or empty."""


def save(path: Path, template: str, **values: object) -> Path:
    """Write the page of ``template``, a file of ``templates/``, to ``path``, and return ``path``.

    The file is replaced atomically. Raises DiskFullError.
    """
    html = environment().get_template(template).render(**values)
    # JSON may hold half of a surrogate pair, which UTF-8 cannot encode.
    replace_file(path, html.encode("utf-8", "replace"))
    return path


@cache
def environment() -> Environment:
    """Return the environment of all templates."""
    environment = Environment(
        loader=PackageLoader("tunesmith.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    for function in (figure_format.short_command, words, key_words, unit, columns):
        environment.filters[function.__name__] = function
    environment.globals |= {"t": language.t, "language": language.current}
    return environment


def words(key: str) -> str:
    """``peak_memory_bytes`` -> peak memory, in the language of the page."""
    return recorded(key_words(key))


def key_words(key: str) -> str:
    """``peak_memory_bytes`` -> peak memory: a key of a file, in English in every language."""
    return str(key).replace("_", " ").removesuffix(" bytes").removesuffix(" seconds")


def heading(name: str) -> str:
    """``eval_macro_f1`` -> Eval macro F1."""
    if language.current() != "en":
        return recorded(name.replace("_", " "))
    text = name.replace("_", " ").replace("f1", "F1").replace("auroc", "AUROC")
    return text.upper() if name in ("rmse", "mae", "mse") else text[:1].upper() + text[1:]


def unit(value: float, key: str) -> str:
    """Format a figure in the unit that its key names."""
    if key.endswith("_bytes") or key == "bytes":
        return figure_format.size(value)
    if key.endswith("seconds"):
        return duration(value)
    if any(word in key for word in _SHARES) and 0 <= value <= 1:
        return figure_format.share(value, 1)
    return figure_format.number(value)


def interval(one: JsonObject, form: Callable[[float], str] = figure_format.number) -> str:
    """Return ``figure_format.interval_text`` in the language of the page."""
    return recorded(figure_format.interval_text(one, form))


def change(one: JsonObject) -> str:
    """Return ``figure_format.change_text`` in the language of the page: ``+0.329 (+0.25 to +0.41)``."""
    return f"{signed(one['value'])} ({interval(one, signed)})"


def duration(seconds: float) -> str:
    """Return ``figure_format.duration`` in the language of the page."""
    text = figure_format.duration(seconds)
    return text if language.current() == "en" else text.replace(" s", "초").replace(" d", "일")


def columns(rows: Sequence[JsonObject]) -> list[tuple[str, bool]]:
    """Return (key, whether its values are figures) of each column: all keys of the rows, in order."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [(key, all(is_number(row.get(key, 0)) for row in rows)) for key in keys]
