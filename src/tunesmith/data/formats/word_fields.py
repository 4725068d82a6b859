"""What a row says of its words: tokens with a tag each, in the ways files write them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.data.formats.fields import FieldFault, clean, parsed, text
from tunesmith.data.row_problems import shorten
from tunesmith.data.rows import Tagged

WORD = re.compile(r"\S+")

CHARACTER = re.compile(r".", re.DOTALL)


def tokens(values: Mapping[str, Any]) -> Tagged:
    """A list of words with their tags. Words are joined by one space; where spaces are words themselves (``spaces``), by none."""
    words = _strings(values["tokens"], "tokens", "a list of words")
    if not words:
        raise FieldFault(
            "tokens", "at least one word", "an empty list", "Write the words, or delete the row."
        )
    between = "" if values.get("spaces") else " "
    places, end = [], -len(between)
    for word in words:
        start = end + len(between)
        end = start + len(word)
        places.append((start, end))
    return Tagged(between.join(words), tuple(places), _tags(values, len(words)))


def words(values: Mapping[str, Any]) -> Tagged:
    """A text whose words are what white space separates, with their tags; where spaces are words themselves (``spaces``), all its
    characters."""
    said = text(values["text"], "text")
    found = CHARACTER if values.get("spaces") else WORD
    places = tuple(match.span() for match in found.finditer(said))
    return Tagged(said, places, _tags(values, len(places)))


def spaces(sample: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether spaces are words of their own, as in text that is tagged character by character: some of the words in the first
    rows are white space, and most are one character."""
    seen = short = blank = 0
    for values in sample:
        try:
            listed = _strings(values["tokens"], "tokens", "a list of words")
        except (FieldFault, KeyError):
            continue
        seen += len(listed)
        short += sum(len(word) == 1 for word in listed)
        blank += sum(word.isspace() for word in listed)
    return {"spaces": True} if blank and 2 * short > seen else {}


def _tags(values: Mapping[str, Any], count: int) -> tuple[str, ...] | None:
    if "tags" not in values:
        return None
    if values["tags"] is None:
        raise FieldFault(
            "tags", "a list of tags", "nothing (null)", "Write a tag for each word, or delete the row."
        )
    tags = _strings(values["tags"], "tags", "a list of tags")
    if len(tags) != count:
        got = f"{len(tags)} for {count} words"
        raise FieldFault(
            "tags", "a tag for each word", got, "Write as many tags as words; O is the tag of a word outside."
        )
    return tuple(tag.strip() for tag in tags)


def _strings(value: Any, field: str, what: str) -> list[str]:
    """A list of strings with something in them: a list, a JSON list, or what white space separates."""
    if isinstance(value, str):
        clean(value, field)
        value = parsed(value, field, what) if value.lstrip().startswith(('["', "['", "[]")) else value.split()
    if not isinstance(value, list | tuple):
        raise FieldFault(field, what, shorten(value), "Write a list, one for each word.")
    for position, item in enumerate(value):
        place = f"{field}[{position}]"
        if field == "tags" and isinstance(item, int) and not isinstance(item, bool):
            fix = "Write the names, such as B-person; only the data set's own list says what a number means."
            raise FieldFault(place, "the name of a tag", shorten(item), fix)
        if item is None:
            raise FieldFault(
                place, what.removeprefix("a list of ")[:-1], "nothing (null)", "Fill it in or delete the row."
            )
        clean(item, place)
        if not item or (field == "tags" and not item.strip()):
            raise FieldFault(
                place, what.removeprefix("a list of ")[:-1], "empty text", "Fill it in or delete the row."
            )
    return list(value)
