"""Names of classes in a matplotlib figure: cut to one line, and written with whichever installed font has their letters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.runs import figure_format

_LONGEST = 28  # characters of a name
_FIRST = "DejaVu Sans"  # comes with matplotlib, so figures look the same everywhere


@dataclass(frozen=True)
class Names:
    """``shown``: the names as they are drawn with the font ``families``. ``note``: a line for the axis, or nothing."""

    shown: list[str]
    families: list[str]
    note: str


def legible(names: Sequence[str], numbers: Sequence[int]) -> Names:
    """Return ``names`` as they can be drawn: a name whose letters no font has becomes the number of its class."""
    cut = [_one_line(name) for name in names]
    families, missing = fonts_of("".join(cut))
    has_glyphs = [not missing & set(name) for name in cut]
    shown = [name if is_drawn else f"#{number}" for name, number, is_drawn in zip(cut, numbers, has_glyphs)]
    note = "" if all(has_glyphs) else "\n#n = class n, counted from 0: no font here has its letters"
    return Names(shown, families, note)


def _one_line(name: str) -> str:
    line = "".join(letter if letter.isprintable() else " " for letter in " ".join(name.split()))
    return figure_format.shorter(line, _LONGEST) or "(empty)"


def fonts_of(letters: Iterable[str]) -> tuple[list[str], set[str]]:
    """Return (families to draw with, letters that none has): matplotlib's own font, and installed ones for what it lacks.

    Upright sans-serif fonts of normal weight are tried first. Files are opened only until every letter is found.
    """
    from matplotlib import font_manager

    def lacking(path: str, wanted: set[str]) -> set[str]:
        face = font_manager.get_font(path)
        return {letter for letter in wanted if not face.get_char_index(ord(letter))}

    missing = lacking(font_manager.findfont(_FIRST), {letter for letter in letters if not letter.isspace()})
    families = [_FIRST]
    if not missing:
        return families, missing

    def rank(entry: Any) -> tuple[bool, bool, bool, str]:
        is_sans = any(word in entry.name for word in ("Sans", "Gothic", "Hei"))
        return (
            entry.style != "normal",
            str(entry.weight) not in ("400", "normal", "regular"),
            not is_sans,
            entry.name,
        )

    for entry in sorted(font_manager.fontManager.ttflist, key=rank):
        if entry.name in families or entry.name.startswith("Last Resort"):  # which has a box for every letter
            continue
        rest = lacking(entry.fname, missing)
        if rest != missing:
            families.append(entry.name)
            missing = rest
        if not missing:
            break
    return families, missing
