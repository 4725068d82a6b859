"""Facts that the syntax tree gives about functions and classes: material of instructions, preferences, qa."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from tunesmith.data.read import library
from tunesmith.data.read.library import Definition, Excerpt, Function, dotted_name, parameters, receiver
from tunesmith.synth.python.wording import listed, number, pick, say

VERBATIM = {"signature", "docstring", "quotation"}
"""Tasks whose answer is text and not a list of names."""


class Fact(NamedTuple):
    """``values`` answer the question of ``task`` about ``code``: names or source text; () = there are none.

    ``parameter``: what else the question names. ``start``: where the only value begins in the code,
    None where there is no such value.
    """

    task: str
    code: str
    values: tuple[str, ...]
    parameter: str = ""
    start: int | None = None


def facts(item: Definition) -> Iterator[Fact]:
    """What can be asked about a definition. That something is absent is asked of some definitions only."""
    code = library.excerpt(item)
    if isinstance(item.node, Function) and item.kind != "property":
        yield from _signature(item, item.node)
        if code:
            yield from _of_parameters(item, code)
            yield from _of_body(item, item.node, code)
    elif isinstance(item.node, ast.ClassDef) and code and not item.node.keywords:
        bases = tuple(map(dotted_name, item.node.bases))
        if all(bases):
            start = code.span(item.node.bases[0])[0] if len(bases) == 1 else None
            yield Fact("bases", code.text, bases, start=start)


def _signature(item: Definition, node: Function) -> Iterator[Fact]:
    """The ``def`` line from its parameters; only lines that a list of names and defaults says completely."""
    taken, args = library.all_parameters(node), node.args
    static = item.kind == "method" and not receiver(item)  # its decorator is not part of the line
    marked = args.posonlyargs or args.kwonlyargs or node.returns or any(one.node.annotation for one in taken)
    if static or marked or isinstance(node, ast.AsyncFunctionDef):
        return
    values = [f"={ast.unparse(one.default)}" if one.default else "" for one in taken]
    shown = [f"`{one.shown}{value}`" for one, value in zip(taken, values)]
    if 0 < len(", ".join(shown)) < 200 and all(one.count("`") == 2 for one in shown):
        yield Fact("signature", "", (f"def {node.name}({ast.unparse(args)}):",), ", ".join(shown))


def _of_parameters(item: Definition, code: Excerpt) -> Iterator[Fact]:
    taken, text = parameters(item), code.text
    plain = [one for one in taken if one.shown == one.name]
    given = [(one.name, one.default) for one in plain if one.default is not None]
    absent = tuple(one.name for one in plain if one.default is None)
    if taken or _seldom(item, "parameters"):
        yield Fact("parameters", text, tuple(one.shown for one in taken))
    if given:
        yield Fact("required", text, absent)
        name, value = pick(given, item.name)
        if not set("\n`") & set(code.source(value)):
            yield Fact("default", text, (code.source(value),), name, code.span(value)[0])
        if absent and "default" not in text:
            yield Fact("default", text, (), pick(absent, item.name))
    if len(taken) > 1:
        before, after = pick([*pairwise(taken)], item.name)
        yield Fact("next parameter", text, (after.name,), before.name, code.span(after.node)[0])
        if _seldom(item, "next parameter"):
            yield Fact("next parameter", text, (), taken[-1].name)


def _of_body(item: Definition, node: Function, code: Excerpt) -> Iterator[Fact]:
    text, found = code.text, library.raised_exceptions(item)
    if found:
        names = tuple(dict.fromkeys(map(dotted_name, found)))
        every = sum(isinstance(one, ast.Raise) for one in ast.walk(node))  # with those of functions within it
        single = len(names) == 1 and len(found) == every
        yield Fact("exceptions", text, names, start=code.span(found[0])[0] if single else None)
    elif found == [] and "raise" not in text and _seldom(item, "exceptions"):
        yield Fact("exceptions", text, ())
    if node.decorator_list:
        yield Fact("decorators", text, tuple(map(code.source, node.decorator_list)))
    sentence, (first, *rest) = library.first_sentence(item.doc), node.body
    if not item.doc and '"""' not in text and "#" not in text and _seldom(item, "quotation"):
        yield Fact("quotation", text, ())
    if 15 <= len(sentence) <= 160:
        place = text.find(sentence, *code.span(first))
        if place >= 0 and item.doc.startswith(sentence):
            yield Fact("quotation", text, (sentence,), start=place)
        acts = any(not isinstance(line, ast.Pass | ast.Raise) for line in rest)  # else no code says it
        if acts and first.lineno > node.lineno:
            lines = text.split("\n")
            del lines[first.lineno - code.first : (first.end_lineno or 0) - code.first + 1]
            yield Fact("docstring", "\n".join(lines), (sentence,))


def _seldom(item: Definition, task: str) -> bool:
    """One in twelve: nearly every function could be asked what it does not say."""
    return number(task, item.name) % 12 == 0


def question(fact: Fact, item: Definition, lang: str, seed: int) -> str:
    """One of the phrases that ask for a fact. Which one does not depend on the answer."""
    hidden = say(lang, "self", name=receiver(item)) if receiver(item) else ""
    slots = {"kind": say(lang, item.kind) if lang == "ko" else item.kind, "name": item.short, "self": hidden}
    asked = say(lang, fact.task, seed=(seed, item.name), parameter=fact.parameter, **slots)
    return say(lang, "frame", seed=(seed, item.name, fact.task), question=asked) if fact.code else asked


def answer(fact: Fact, values: tuple[str, ...], lang: str) -> str:
    """A sentence that answers the question for a fact with ``values``."""
    if fact.task in VERBATIM and values:
        return values[0]
    key = "yes" if values else "no default" if fact.task == "default" else "no"
    names = listed([f"`{name}`" for name in values], lang) if values else ""
    return say(lang, key, names=names, parameter=fact.parameter)
