"""The language of the pages that people read: English or Korean.

``TUNESMITH_LANGUAGE`` names it (``--language`` of the command line sets it), else the locale does. A page asks ``t`` for
each of its texts, and the English text is the key of the Korean one (``korean_pages``). Files of a run hold English
sentences, so that they mean the same to every program; ``recorded`` translates those that ``korean_records`` knows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from typing import Literal

from tunesmith.report import korean_pages, korean_records

Language = Literal["en", "ko"]
VARIABLE = "TUNESMITH_LANGUAGE"
_LOCALE = ("LC_ALL", "LC_MESSAGES", "LANG")
_NUMBER = r"[-+]?[\d.,:]+(?:e[-+]?\d+)?[%kMGT]?|nan|-?inf"


def current() -> Language:
    """Return the language of pages that are written now."""
    asked = os.environ.get(VARIABLE) or next(filter(None, map(os.environ.get, _LOCALE)), "")
    return "ko" if asked.startswith("ko") else "en"


def t(text: str, /, **values: object) -> str:
    """Return a text of a page in the current language, with ``values`` in its places."""
    texts = korean_pages.TEXTS if current() == "ko" else korean_pages.ENGLISH
    form = texts.get(text, text)
    return form.format(**values) if values else form


def recorded(sentence: str) -> str:
    """Return an English sentence or name of a file in the current language; unchanged if no template of it is known."""
    return (translation(sentence) or sentence) if current() == "ko" else sentence


@cache
def translation(sentence: str) -> str | None:
    """Return the Korean of a sentence; None if it is not known. Its places may hold sentences, too."""
    if (name := korean_records.NAMES.get(sentence)) is not None:
        return name
    for pattern, form in _patterns():
        if found := pattern.fullmatch(sentence):
            values = {key: translation(value) or value for key, value in found.groupdict().items()}
            return form.format(**values)
    for beginning, form in korean_records.BEGINNINGS.items():
        rest = sentence.removeprefix(beginning)
        if rest and rest != sentence:
            return form.format(figure=translation(rest) or rest, name=rest)
    return None


@cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    return [(_pattern(english), korean) for english, korean in korean_records.SENTENCES.items()]


def _pattern(template: str) -> re.Pattern[str]:
    """``{n_rows} rows`` -> a pattern with the group ``n_rows``; a place whose name begins with n_ holds a number."""
    parts = re.split(r"\{(\w+)\}", template)
    names = [f"(?P<{name}>{_NUMBER if name.startswith('n_') else '.+?'})" for name in parts[1::2]]
    return re.compile("".join(map("".join, zip(map(re.escape, parts[::2]), [*names, ""]))), re.DOTALL)


def recorded_notes(lines: Sequence[str]) -> list[str]:
    """Return recorded notes in the current language; those without a translation last, below a line that says so."""
    if current() == "en":
        return list(lines)
    unknown = [line for line in lines if translation(line) is None]
    known = [recorded(line) for line in lines if line not in unknown]
    return [*known, *([t("The notes below are as they were recorded.")] if unknown else []), *unknown]


def sentence(line: str) -> str:
    """Return a recorded line as a sentence of a page."""
    line = recorded(line)
    return f"{line[:1].upper()}{line[1:]}."
