"""From the text of a recipe to plain data, and from a key back to its line.

YAML is read as version 1.2: only ``true`` and ``false`` are booleans (so ``packing: off`` is the text "off"),
``2e-4`` is a number, and a key given twice is an error. ruamel.yaml parses the text into a tree; this module
builds the data from the tree. Tags are refused: a recipe holds plain values only, and reading one runs no
code.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, StreamMark, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

from tunesmith.errors import RecipeError
from tunesmith.json_types import JsonObject

_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset(("str", "int", "float", "bool", "null", "timestamp", "value", "merge"))

MAX_VALUES = 10_000
"""Values that a document may hold, aliases expanded: a few lines of them can stand for billions."""

MAX_DEPTH = 50

MAX_CHARACTERS = 2**20

MAX_DIGITS = 100

_CONSTANTS = {"true": True, "false": False, "null": None, "~": None, "": None}
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")


@dataclass(frozen=True)
class Text:
    """Source of a recipe: ``name`` for messages, YAML tree (None for plain data), overrides on top.

    ``given``: every key of the recipe, at any depth -> its value."""

    name: str
    tree: Node | None = None
    overrides: tuple[str, ...] = ()
    given: Mapping[str, object] = field(default_factory=dict)

    @property
    def folder(self) -> str | None:
        """The folder of the recipe's file; None for plain data."""
        return None if self.tree is None else str(Path(self.name).parent)

    def at(self, path: Sequence[str | int]) -> str:
        """``sft.yaml, line 7``, or the override that set the key at ``path``."""
        if override := self.override(path):
            return f"override {override!r}"
        line = _line(self.tree, path)
        return f"{self.name}, line {line}" if line else self.name

    def override(self, path: Sequence[str | int]) -> str | None:
        """Return the override that set the key at ``path``; None if no override did."""
        dotted = ".".join(map(str, path))
        for override in reversed(self.overrides):
            key = override.partition("=")[0].strip()
            if dotted == key or dotted.startswith(key + "."):
                return override
        return None

    def override_in(self, key: str) -> str | None:
        """Return the override that set ``key``, or a key above or below it; None if no override did."""
        typed = ((override, override.partition("=")[0].strip()) for override in reversed(self.overrides))
        inside = (override for override, name in typed if name.startswith(f"{key}."))
        return self.override(key.split(".")) or next(inside, None)

    def setting(self, path: Sequence[str | int], key: str, value: object) -> str:
        """Return ``key`` with its value, in the form in which the user wrote the key at ``path``.

        ``train.seed: 1`` in the recipe file, ``train.seed=1`` in an override."""
        text = _flow(value)
        if not self.override(path):
            return f"{key}: {text}"
        return shlex.quote(f"{key}={text}")


def read(text: str, name: str) -> tuple[Any, Node | None]:
    """(plain data, YAML tree) of a document. Raises RecipeError with the line."""
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{name}: expected at most {MAX_CHARACTERS:,} characters")
    try:
        _check_size(text, name)
        tree: Node | None = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        raise RecipeError(f"{_place(name, error.problem_mark)}: not valid YAML: {error.problem}") from None
    except (YAMLError, RecursionError) as error:
        raise RecipeError(f"{name}: not valid YAML: {error}") from None
    return _plain(tree, name, count(1)), tree


def _check_size(text: str, name: str) -> None:
    """Raise RecipeError for too many or too deeply nested values.

    It reads events, because a deep tree would exceed the recursion limit."""
    depth = values = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        values += isinstance(event, NodeEvent)
        if depth > MAX_DEPTH or values > MAX_VALUES:
            raise _too_large(_place(name, event.start_mark))


def _too_large(place: str) -> RecipeError:
    return RecipeError(
        f"{place}: expected at most {MAX_VALUES:,} values, {MAX_DEPTH} levels deep. Remove aliases (*name) and nesting."
    )


def dump(value: object, one_line: bool = False) -> str:
    """Write plain data as YAML; words that YAML 1.1 reads as another type are quoted."""
    out = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.Representer = _Representer
    writer.default_flow_style = one_line
    writer.width = 10**6 if one_line else 80
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # annotated as None alone
    writer.dump(value, out)
    return out.getvalue().removesuffix("...\n")  # YAML's end mark after a document of one scalar


def _flow(value: object) -> str:
    """Write plain data on one line, with every mapping in braces."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(child)}" for key, child in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return dump(value, one_line=True).strip()


class _Representer(SafeRepresenter):
    """The writer's choice between plain and quoted words."""

    def represent_str(self, data: str) -> ScalarNode:
        kind = VersionedResolver(version="1.1").resolve(ScalarNode, data, (True, False))
        style = None if kind == _TAG + "str" else "'"
        if not data.isprintable():
            style = '"'  # the only style in which every character can be escaped
        return self.represent_scalar(_TAG + "str", data, style=style)

    def represent_float(self, data: float) -> ScalarNode:
        node = super().represent_float(data)
        if "e" in node.value and "." not in node.value:  # YAML 1.1 reads 1e-05 as text
            node.value = node.value.replace("e", ".0e")
        return node


_Representer.add_representer(str, _Representer.represent_str)
_Representer.add_representer(float, _Representer.represent_float)


def _place(name: str, mark: StreamMark | None) -> str:
    return f"{name}, line {mark.line + 1 if mark else '?'}"


def _plain(node: Node | None, name: str, values: Iterator[int], depth: int = 0) -> object:
    """The data of a YAML node, built without ruamel's constructors, so that no tag can create an object."""
    if node is None:
        return None
    place = _place(name, node.start_mark)
    if next(values) > MAX_VALUES or depth > MAX_DEPTH:
        raise _too_large(place)
    if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
        return [_plain(child, name, values, depth + 1) for child in node.value]
    if isinstance(node, MappingNode) and node.tag == _TAG + "map":
        return _mapping(node, name, values, depth)
    kind = str(node.tag).removeprefix(_TAG)
    if not isinstance(node, ScalarNode) or kind not in _SCALARS:
        raise RecipeError(
            f"{place}: the tag {node.tag} is not allowed. A recipe holds plain values only; remove the tag."
        )
    if len(node.value) > MAX_DIGITS and kind in ("int", "float"):
        raise RecipeError(
            f"{place}: expected a number of at most {MAX_DIGITS} digits, got {len(node.value):,}"
        )
    return _scalar(kind, node.value)


def _mapping(node: MappingNode, name: str, values: Iterator[int], depth: int) -> dict[object, object]:
    given: dict[object, object] = {}
    merged: dict[object, object] = {}
    seen: set[str] = set()
    for key, child in node.value:
        place = _place(name, key.start_mark)
        if not isinstance(key, ScalarNode):
            raise RecipeError(f"{place}: a key must be a plain word")
        if key.value in seen:
            raise RecipeError(f"{place}: the key `{key.value}` is given twice")
        seen.add(key.value)
        value = _plain(child, name, values, depth + 1)
        if key.tag != _TAG + "merge":
            given[_plain(key, name, values, depth + 1)] = value
            continue
        for mapping in reversed(value if isinstance(value, list) else [value]):
            if not isinstance(mapping, dict):
                raise RecipeError(f"{place}: `<<` takes a mapping or a list of mappings")
            merged |= mapping
    return {**merged, **given}


def _scalar(kind: str, text: str) -> object:
    """A number only if it is decimal: 010, 0o7, 2024-01-01 and 1:30 are text, as are off and yes."""
    if kind in ("bool", "null"):
        return _CONSTANTS.get(text.lower(), text)
    if kind == "int" and _DECIMAL.fullmatch(text):
        return int(text)
    if kind == "float" and "_" not in text:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def keys_of(node: object) -> dict[str, object]:
    """Map every key of nested plain data to its value. If keys are equal, the first one's value counts."""
    found: dict[str, object] = {}
    for key, child in node.items() if isinstance(node, dict) else ():
        found = {**keys_of(child), str(key): child, **found}
    for child in node if isinstance(node, list) else ():
        found = {**keys_of(child), **found}
    return found


BLOCK_MARKS = ("|", ">")
"""These begin a text on the following lines; an override has one line, so there they are text."""


def apply(raw: JsonObject, override: str) -> JsonObject:
    """Return a copy of ``raw`` with one dotted key set.

    For example ``train.epochs=2``, ``data.train.0.limit=100``, ``data.train='[{path: x.json}]'``: the value
    is YAML.
    """
    key, equals, value = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise RecipeError(f"override {override!r}: expected KEY=VALUE, for example train.epochs=2")
    parsed = value.strip() if value.strip() in BLOCK_MARKS else read(value, f"override {override!r}")[0]
    first, *rest = parts
    return {**raw, first: _set(raw.get(first), rest, parsed, override, first)}


def _set(node: object, parts: Sequence[str], value: object, override: str, parent: str) -> object:
    """``node``, found at the key ``parent``, with ``value`` at the keys ``parts`` below it."""
    if not parts:
        return value
    first, *rest = parts
    here = f"{parent}.{first}"
    if isinstance(node, list):
        if not (first.isdigit() and int(first) < len(node)):
            raise RecipeError(
                f"override {override!r}: `{parent}` has the positions 0 to {len(node) - 1}, not `{first}`"
            )
        items = list(node)
        items[int(first)] = _set(node[int(first)], rest, value, override, here)
        return items
    if isinstance(node, str) and parent in ("objective", "adaptation"):
        node = {"type": node}
    if node is not None and not isinstance(node, dict):
        raise RecipeError(f"override {override!r}: `{parent}` holds {node!r}, which has no keys")
    node = node or {}
    if first == "type" and parent in ("objective", "adaptation") and node.get("type") != value:
        return {"type": value}  # another type has other keys
    return {**node, first: _set(node.get(first), rest, value, override, here)}


def find(tree: Node | None, path: Sequence[str | int]) -> Node | None:
    """Return the node at ``path``; None if the tree does not hold it."""
    for part in path:
        tree = (_pair(tree, part) or (None, None))[1]
    return tree


def _line(tree: Node | None, path: Sequence[str | int]) -> int | None:
    """The line (from 1) of the deepest key or item of ``path`` that the tree holds."""
    line = None
    for part in path:
        pair = _pair(tree, part)
        if pair is None:
            return line
        line, tree = pair[0].start_mark.line + 1, pair[1]
    return line


def _pair(tree: Node | None, part: str | int) -> tuple[Node, Node] | None:
    """(key, value) of a mapping's key, or (item, item) of a list's position; None if there is no such part."""
    if isinstance(tree, MappingNode):
        return next(((key, child) for key, child in tree.value if key.value == part), None)
    if isinstance(tree, SequenceNode) and isinstance(part, int) and part < len(tree.value):
        return tree.value[part], tree.value[part]
    return None
