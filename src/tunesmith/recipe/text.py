"""The text of a recipe -> plain data, and back to the line a key stands on.

YAML is read as version 1.2 reads it where that saves a user trouble: only ``true`` and ``false`` are booleans (so that
``packing: off`` is the word), ``2e-4`` is a number, and a key given twice is an error. Tags are refused: a recipe holds
plain values only, and reading one runs no code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from tunesmith.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """Safe YAML with plain booleans and numbers, and no key twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        letter: [
            (tag, pattern)
            for tag, pattern in pairs
            if tag.rpartition(":")[2] not in ("bool", "float", "int", "timestamp", "value")
        ]
        for letter, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key `{key.value}` is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan)$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class Text:
    """Where a recipe came from: ``name`` for messages, its YAML tree (None for plain data) and the overrides put on top."""

    name: str
    tree: Any = None
    overrides: tuple[str, ...] = ()

    def at(self, loc: Sequence[Any]) -> str:
        """``sft.yaml, line 7``, or the override that set the key, for the place ``loc`` (keys and list positions)."""
        dotted = ".".join(map(str, loc))
        for override in reversed(self.overrides):
            key = override.partition("=")[0].strip()
            if dotted == key or dotted.startswith(key + "."):
                return f"override {override!r}"
        line = _line(self.tree, loc)
        return f"{self.name}, line {line}" if line else self.name


def read(text: str, name: str) -> tuple[Any, Any]:
    """(plain data, YAML tree) of a document. Raises RecipeError with the line."""
    try:
        loader = _Loader(text)
        tree = loader.get_single_node()
        return (loader.construct_document(tree) if tree is not None else None), tree
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        problem = str(error.problem)
        if "tag" in problem:
            problem = f"{problem}. A recipe holds plain values only; remove the tag."
        raise RecipeError(f"{name}, line {line}: {problem}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(f"{name}, line {line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {error}") from None


BLOCKS = ("|", ">")
"""With these YAML begins a text on further lines, which a command line has not: there they are themselves."""


def apply(raw: dict[str, Any], override: str) -> dict[str, Any]:
    """``raw`` with one dotted key set: ``train.epochs=2``, ``data.train.0.limit=100``, ``data.train='[{path: x.json}]'``.

    The value is YAML, so lists and mappings work. ``raw`` is not changed.
    """
    key, equals, value = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise RecipeError(f"override {override!r}: expected KEY=VALUE, for example train.epochs=2")
    parsed = value.strip() if value.strip() in BLOCKS else read(value, f"override {override!r}")[0]
    done: dict[str, Any] = _set(raw, parts, parsed, override)
    return done


def _set(node: Any, parts: list[str], value: Any, override: str, parent: str = "") -> Any:
    if not parts:
        return value
    first, *rest = parts
    here = f"{parent}.{first}" if parent else first
    if isinstance(node, list):
        if not (first.isdigit() and int(first) < len(node)):
            raise RecipeError(f"override {override!r}: `{parent}` has the positions 0 to {len(node) - 1}, not `{first}`")
        position = int(first)
        return [*node[:position], _set(node[position], rest, value, override, here), *node[position + 1 :]]
    if isinstance(node, str) and parent in ("objective", "adaptation"):
        node = {"type": node}
    if node is not None and not isinstance(node, dict):
        raise RecipeError(f"override {override!r}: `{parent}` holds {node!r}, which has no keys")
    node = node or {}
    if first == "type" and parent in ("objective", "adaptation") and node.get("type") != value:
        return {"type": value}  # another type has other keys
    return {**node, first: _set(node.get(first), rest, value, override, here)}


def _line(tree: Any, loc: Sequence[Any]) -> int | None:
    """The line (from 1) of the deepest key or item of ``loc`` that the tree holds."""
    line = None
    for part in loc:
        if isinstance(tree, yaml.MappingNode):
            found = next(((key, child) for key, child in tree.value if key.value == part), None)
        elif isinstance(tree, yaml.SequenceNode) and isinstance(part, int) and part < len(tree.value):
            found = (tree.value[part], tree.value[part])
        else:
            found = None
        if found is None:
            return line
        line, tree = found[0].start_mark.line + 1, found[1]
    return line
