"""Facts of functions and classes from the syntax tree: material of instructions, preferences, qa."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from tunesmith.data.read import library
from tunesmith.data.read.library import Definition, Excerpt, Function, dotted_name, parameters, receiver
from tunesmith.synth.python.wording import join_names, number, phrase, pick

VERBATIM = {"signature", "docstring", "quotation"}
"""Tasks whose answer is text, not a list of names."""


class Fact(NamedTuple):
    """``values`` answer the question of ``task`` about ``code``: names or source text; () = there are none.

    ``parameter``: a parameter that the question names. ``start``: where a single value begins in the code, if
    it is there.
    """

    task: str
    code: str
    values: tuple[str, ...]
    parameter: str = ""
    start: int | None = None


def facts(item: Definition) -> Iterator[Fact]:
    """Yield the facts of a definition; that something is absent, for a few definitions only."""
    code = library.excerpt(item)
    if isinstance(item.node, Function) and item.kind != "property":
        yield from _signature_facts(item, item.node)
        if code:
            yield from _parameter_facts(item, code)
            yield from _body_facts(item, item.node, code)
    elif isinstance(item.node, ast.ClassDef) and code and not item.node.keywords:
        bases = tuple(map(dotted_name, item.node.bases))
        if all(bases):
            start = code.span(item.node.bases[0])[0] if len(bases) == 1 else None
            yield Fact("bases", code.text, bases, start=start)


def _signature_facts(item: Definition, node: Function) -> Iterator[Fact]:
    """Yield the ``def`` line, if its parameters and their defaults are all of it."""
    args, taken = node.args, library.all_parameters(node)
    static = item.kind == "method" and not receiver(item)  # its decorator is not part of the line
    marked = args.posonlyargs or args.kwonlyargs or node.returns or any(one.node.annotation for one in taken)
    if static or marked or isinstance(node, ast.AsyncFunctionDef):
        return
    values = [f"={ast.unparse(one.default)}" if one.default else "" for one in taken]
    shown = [f"`{one.shown}{value}`" for one, value in zip(taken, values)]
    if 0 < len(", ".join(shown)) < 200 and all(one.count("`") == 2 for one in shown):
        yield Fact("signature", "", (f"def {node.name}({ast.unparse(args)}):",), ", ".join(shown))


def _parameter_facts(item: Definition, code: Excerpt) -> Iterator[Fact]:
    taken, text = parameters(item), code.text
    plain = [one for one in taken if one.shown == one.name]
    given = [(one.name, one.default) for one in plain if one.default is not None]
    absent = tuple(one.name for one in plain if one.default is None)
    if taken or _ask_absence(item, "parameters"):
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
        if _ask_absence(item, "next parameter"):
            yield Fact("next parameter", text, (), taken[-1].name)


def _body_facts(item: Definition, node: Function, code: Excerpt) -> Iterator[Fact]:
    text, raised = code.text, library.raised_exceptions(item)
    if raised:
        names = tuple(dict.fromkeys(map(dotted_name, raised)))
        every = sum(isinstance(one, ast.Raise) for one in ast.walk(node))  # with those of nested functions
        single = len(names) == 1 and len(raised) == every
        yield Fact("exceptions", text, names, start=code.span(raised[0])[0] if single else None)
    elif raised == [] and "raise" not in text and _ask_absence(item, "exceptions"):
        yield Fact("exceptions", text, ())
    if node.decorator_list:
        yield Fact("decorators", text, tuple(map(code.source, node.decorator_list)))
    sentence, (first, *rest) = library.first_sentence(item.doc), node.body
    if not item.doc and '"""' not in text and "#" not in text and _ask_absence(item, "quotation"):
        yield Fact("quotation", text, ())
    if 15 <= len(sentence) <= 160:
        place = text.find(sentence, *code.span(first))
        if place >= 0 and item.doc.startswith(sentence):
            yield Fact("quotation", text, (sentence,), start=place)
        shows_it = any(not isinstance(line, ast.Pass | ast.Raise) for line in rest)
        if shows_it and first.lineno > node.lineno:
            lines = text.split("\n")
            del lines[first.lineno - code.first : (first.end_lineno or 0) - code.first + 1]
            yield Fact("docstring", "\n".join(lines), (sentence,))


def _ask_absence(item: Definition, task: str) -> bool:
    """Return True for one definition in twelve: nearly every function lacks something."""
    return number(task, item.name) % 12 == 0


def question(fact: Fact, item: Definition, lang: str, seed: int) -> str:
    """Return one of the phrases that ask for a fact. The choice does not depend on the answer."""
    own = receiver(item)
    hidden = phrase(lang, "self", name=own) if own else ""
    kind = phrase(lang, item.kind) if lang == "ko" else item.kind
    slots = {"kind": kind, "name": item.short, "self": hidden, "parameter": fact.parameter}
    asked = phrase(lang, fact.task, seed=(seed, item.name), **slots)
    return phrase(lang, "frame", seed=(seed, item.name, fact.task), question=asked) if fact.code else asked


def answer(fact: Fact, values: tuple[str, ...], lang: str) -> str:
    """Return a sentence that answers the question for a fact with ``values``."""
    if fact.task in VERBATIM and values:
        return values[0]
    key = "yes" if values else "no default" if fact.task == "default" else "no"
    names = join_names([f"`{name}`" for name in values], lang) if values else ""
    return phrase(lang, key, names=names, parameter=fact.parameter)
