"""Names of classes in a matplotlib figure: cut to one line, in whichever installed font has their letters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from tunesmith.report.language import t
from tunesmith.runs.figure_format import shorten_middle

if TYPE_CHECKING:
    from matplotlib.font_manager import FontEntry

_MOST_CHARACTERS = 28
_FIRST = "DejaVu Sans"  # comes with matplotlib, so figures look the same everywhere


@dataclass(frozen=True)
class Names:
    """``shown``: names to draw with the font ``families``. ``note``: a line for the axis label, or empty."""

    shown: list[str]
    families: list[str]
    note: str


def fit_names(names: Sequence[str], numbers: Sequence[int]) -> Names:
    """Cut ``names`` and find fonts for them. A name that no font can draw becomes the number of its class."""
    short = [_one_line(name) for name in names]
    families, missing = fonts_of("".join(short))
    has_glyphs = [not missing & set(name) for name in short]
    shown = [name if has else f"#{number}" for name, number, has in zip(short, numbers, has_glyphs)]
    note = (
        "" if all(has_glyphs) else "\n" + t("#n = class n, counted from 0: no installed font has its letters")
    )
    return Names(shown, families, note)


def _one_line(name: str) -> str:
    line = "".join(letter if letter.isprintable() else " " for letter in " ".join(name.split()))
    return shorten_middle(line, _MOST_CHARACTERS) or t("(empty)")


def fonts_of(letters: Iterable[str]) -> tuple[list[str], set[str]]:
    """Return (families to draw with, letters in none): matplotlib's font, and installed ones for what it
    lacks.

    Upright sans-serif fonts of normal weight come first. Font files are opened only until every letter is
    found.
    """
    from matplotlib import font_manager

    def lacking(path: str, wanted: set[str]) -> set[str]:
        face = font_manager.get_font(path)
        return {letter for letter in wanted if not face.get_char_index(ord(letter))}

    missing = lacking(font_manager.findfont(_FIRST), {letter for letter in letters if not letter.isspace()})
    families = [_FIRST]
    if not missing:
        return families, missing

    def rank(entry: FontEntry) -> tuple[bool, bool, bool, str]:
        is_sans = any(word in entry.name for word in ("Sans", "Gothic", "Hei"))
        is_regular = str(entry.weight) in ("400", "normal", "regular")
        return entry.style != "normal", not is_regular, not is_sans, entry.name

    for is_listed in (True, False):  # matplotlib keeps its list, without fonts that were installed later
        if missing and not is_listed:
            _list_new_fonts()
        for entry in sorted(font_manager.fontManager.ttflist, key=rank) if missing else ():
            if entry.name in families or entry.name.startswith(
                "Last Resort"
            ):  # which has a box for every letter
                continue
            still_missing = lacking(entry.fname, missing)
            if still_missing != missing:
                families.append(entry.name)
                missing = still_missing
            if not missing:
                break
    return families, missing


@cache
def _list_new_fonts() -> None:
    """Add the installed fonts that matplotlib's list lacks to it, once in a process."""
    from matplotlib import font_manager

    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in sorted({*font_manager.findSystemFonts()} - known):
        with suppress(OSError, RuntimeError):  # a file that is no font
            font_manager.fontManager.addfont(path)
