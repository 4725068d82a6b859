"""Rows of words with one tag each, in the ways that files write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tunesmith.data.formats.fields import FieldFault, Values, check_list, check_text, parse_json
from tunesmith.data.row_problems import shorten
from tunesmith.data.rows import Tagged
from tunesmith.json_types import JsonObject

WORD = re.compile(r"\S+")
CHARACTER = re.compile(r".", re.DOTALL)

FILL_IN = "Fill it in or delete the row."


def build_tokens(values: Values) -> Tagged:
    """The row of a list of words with tags. One space joins them; with the fact ``spaces``, nothing."""
    words = _strings(values["tokens"], "tokens", "word")
    if not words:
        fix = "Write the words, or delete the row."
        raise FieldFault("tokens", "at least one word", "an empty list", fix)
    joint = "" if values.get("spaces") else " "
    spans, end = [], -len(joint)
    for word in words:
        start = end + len(joint)
        end = start + len(word)
        spans.append((start, end))
    return Tagged(joint.join(words), tuple(spans), _tags(values, len(words)))


def build_words(values: Values) -> Tagged:
    """The row of a text and the tags of its words; with the fact ``spaces``, of its characters."""
    text = values.text("text")
    pattern = CHARACTER if values.get("spaces") else WORD
    spans = tuple(match.span() for match in pattern.finditer(text))
    return Tagged(text, spans, _tags(values, len(spans)))


def scan_spaces(sample: Sequence[Values]) -> JsonObject:
    """Detect text that is tagged by character: most words are one character, and some are spaces."""
    count = short = blank = 0
    for values in sample:
        try:
            words = _strings(values["tokens"], "tokens", "word")
        except (FieldFault, KeyError):
            continue
        count += len(words)
        short += sum(len(word) == 1 for word in words)
        blank += sum(word.isspace() for word in words)
    return {"spaces": True} if blank and 2 * short > count else {}


def _tags(values: Values, count: int) -> tuple[str, ...] | None:
    if "tags" not in values:
        return None
    if values["tags"] is None:
        fix = "Write a tag for each word, or delete the row."
        raise FieldFault("tags", "a list of tags", shorten(None), fix)
    tags = _strings(values["tags"], "tags", "tag")
    if len(tags) != count:
        fix = "Write as many tags as words; O is the tag of a word outside."
        raise FieldFault("tags", "a tag for each word", f"{len(tags)} for {count} words", fix)
    return tuple(tag.strip() for tag in tags)


def _strings(value: object, field: str, item_name: str) -> list[str]:
    """A list of strings that are not empty: a list, a JSON list, or a text split at white space."""
    expected = f"a list of {item_name}s"
    if isinstance(value, str):
        check_text(value, field)
        is_json = value.lstrip().startswith(('["', "['", "[]"))
        value = parse_json(value, field, expected) if is_json else value.split()
    strings = []
    for index, item in enumerate(check_list(value, field, expected, "Write a list, one for each word.")):
        place = f"{field}[{index}]"
        if field == "tags" and isinstance(item, int) and not isinstance(item, bool):
            fix = "Write the names, such as B-person; only the data set's own list defines the numbers."
            raise FieldFault(place, "the name of a tag", shorten(item), fix)
        if item is None:
            raise FieldFault(place, f"a {item_name}", shorten(None), FILL_IN)
        string = check_text(item, place)
        if not string or (field == "tags" and not string.strip()):
            raise FieldFault(place, f"a {item_name}", "empty text", FILL_IN)
        strings.append(string)
    return strings
