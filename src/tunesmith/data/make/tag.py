"""Tokens of sentences about code, and what each of them names, as the syntax tree of their module says."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tunesmith.data.make.library import (
    SCOPES,
    Definition,
    Excerpt,
    Module,
    all_parameters,
    dotted,
    excerpt,
    module_names,
    own,
    parameters,
    sentences,
)
from tunesmith.data.make.maker import Candidate, Maker, number
from tunesmith.data.make.tag_korean import KOREAN, Entity, korean_sentences

FEWEST, MOST = 3, 45
"""Tokens of a sentence."""

SELDOM = 3
"""One in so many lines of code, and sentences that name nothing: of both there are far more than of the rest."""

TOKEN = re.compile(r"\d+\.\d+|\w+|[^\w\s]")
NUMBER = re.compile(r"(?<![\w.\-/:])(?:0x[0-9a-fA-F]+|\d+(?:\.\d+)?)(?![\w\-/:]|\.\d)")
NAME = re.compile(r"(?<![\w.])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
BESIDE = re.compile(r"[`'\"*]* (module|class|object|instance|exception|function|method|argument|parameter)s?\b")
NO_CODE = re.compile(r"[`'\"*]* (codec|scheme|mode|option|key)s?\b")
"""What stands behind a quoted word that names something else than the library's code."""

QUOTES = frozenset("`'\"*")

WORDS = {
    "this", "array", "calendar", "code", "copy", "email", "formatter", "keyword", "numbers", "operator", "parser",
    "platform", "profile", "queue", "random", "resource", "secrets", "select", "signal", "site", "statistics", "string",
    "symbol", "token", "trace", "types", "time", "warnings",
}  # fmt: skip
"""Modules whose names, before the word "module", may be plain English: this module, a code module."""

PRODUCTS = ("Tk", "Tix")
"""Classes that share their name with what they belong to."""

NAMED_BY_NUMBER = re.compile(
    r"(?:\b(?:RFC|ISO|IEEE|PEP|Python|Tk|Tcl|HTTP|TLS|SSL|version|section|chapter|step|figure|table)|[Vv]ersion)[ /]$", re.I
)
"""What stands before a number that is part of a name."""

KINDS = ("EXCEPTION", "MODULE", "CLASS", "NUMBER", "FUNCTION", "PARAM")
"""The rarer ones first: a sentence is drawn as one of its rarest entity."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class UnsureError(Exception):
    """A word of a sentence may be a name or a mere word, so that its tag would be a guess."""


@dataclass(frozen=True)
class Names:
    """What the documentation of a definition may name: its parameters, and what its module defines or the library has."""

    parameters: frozenset[str]
    functions: frozenset[str]
    methods: frozenset[str]
    classes: frozenset[str]
    exceptions: frozenset[str]

    def kind(self, name: str) -> str | None:
        """What a dotted name is, None for nothing known. Raises UnsureError when it is two things."""
        owner, _, last = name.rpartition(".")
        found = {
            "EXCEPTION": name in self.exceptions,
            "CLASS": name in self.classes and name not in self.exceptions,
            "MODULE": name in module_names(),
            "FUNCTION": last in self.methods if owner in {"self", *self.classes} else name in self.functions | self.methods,
            "PARAM": name in self.parameters,
        }
        kinds = [kind for kind, is_one in found.items() if is_one]
        if len(kinds) > 1:
            raise UnsureError
        return kinds[0] if kinds else None


def mentions(sentence: str, names: Names) -> list[Entity]:
    """The entities of a sentence. Raises UnsureError where the words do not say whether a name is meant.

    A word is a name when it is written as one: in quotes, before parentheses, with a dot, an underscore or a capital letter
    within it, or beside a word that says what it is (``the socket module``).
    """
    found: list[Entity] = []
    for match in NAME.finditer(sentence):
        kind = names.kind(match.group())
        if _is_name(match, sentence, kind, names):
            if kind is None:
                raise UnsureError
            found.append((*match.span(), kind))
    covered = [range(start, end) for start, end, _ in found]
    numbers = [match.span() for match in NUMBER.finditer(sentence) if not any(match.start() in part for part in covered)]
    if any(NAMED_BY_NUMBER.search(sentence[:start]) for start, _ in numbers):
        raise UnsureError  # RFC 2822, Python 3.10, section 4: part of a name
    return sorted([*found, *((start, end, "NUMBER") for start, end in numbers)])


def _is_name(match: re.Match[str], sentence: str, kind: str | None, names: Names) -> bool:
    """Whether the word is a name, known or not. Raises UnsureError."""
    word, (start, end) = match.group(), match.span()
    if re.match(r"[`'\"*]* attribute", sentence[end:]):
        raise UnsureError  # whatever else has that name
    quoted = start > 0 and sentence[start - 1] in QUOTES and sentence[end : end + 1] in QUOTES and end < len(sentence)
    called = re.match(r"\((?!e?s\))", sentence[end:]) is not None
    if quoted and NO_CODE.match(sentence, end):
        raise UnsureError  # the "decode" codec
    if quoted or called or "_" in word or "." in word or re.search(r"[a-z][A-Z]|[A-Z]{2}[a-z]", word):
        return True
    if kind is None or word in ("True", "False", "None"):
        return False
    if "-" in (sentence[start - 1 : start], sentence[end : end + 1]):
        raise UnsureError  # part of a longer word
    if kind != "MODULE" and BESIDE.match(sentence, end) and not word.islower():
        return True
    if kind == "MODULE" and sentence.startswith(" module", end) and word.lower() not in WORDS:
        return True
    if kind == "PARAM" and BESIDE.match(sentence, end):
        return True
    if kind in ("CLASS", "EXCEPTION") and word[0].isupper() and start > 0 and word not in PRODUCTS:
        return True
    if kind == "FUNCTION" and word in names.methods and word not in names.functions:
        return False  # methods are called by verbs, and sentences are made of them
    raise UnsureError


def bio(text: str, entities: list[Entity]) -> tuple[list[str], list[str]]:
    """Tokens of a text and a tag for each: B- where an entity begins, I- within it, O elsewhere."""
    tokens, tags = [], []
    for match in TOKEN.finditer(text):
        inside = next(((start, kind) for start, end, kind in entities if start <= match.start() < end), None)
        tokens.append(match.group())
        tags.append(f"{'B' if match.start() == inside[0] else 'I'}-{inside[1]}" if inside else "O")
    return tokens, tags


def prose(doc: str) -> Iterator[str]:
    """The sentences of a docstring that are English: no examples, no tables, no lists."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(doc)) if doc else ():
        if not any(line.startswith((" ", ">>>", "-", "*", "@", ":", "#", "|", "+")) for line in paragraph.split("\n")):
            for sentence in sentences(" ".join(paragraph.split())):
                if re.match(r"[A-Z`'\"*]", sentence) and sentence.endswith((".", "!", "?")):
                    yield sentence


def _candidates(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    if lang == "ko":
        for text, entities in korean_sentences(module, seed):
            yield from _row(text, entities, lang)
        return
    properties = {item.short for item in module.properties}  # one of that name may be meant where a method has it, too
    methods = {item.short for item in module.functions if item.kind == "method"} - properties
    functions = {item.short for item in module.functions if item.kind == "function"} - properties
    classes = {item.short for item in module.classes}
    names = Names(frozenset(), frozenset(functions), frozenset(methods), frozenset(classes), module.exceptions)
    for item in module.definitions:
        taken = frozenset(one.name for one in parameters(item)) if isinstance(item.node, Function) else frozenset()
        for sentence in prose(item.doc):
            try:
                entities = mentions(sentence, replace(names, parameters=taken))
            except UnsureError:
                continue
            if entities or number(sentence) % SELDOM == 0:
                yield from _row(sentence, entities, lang)
        for line, entities in _lines_of_code(module, item):
            if number(line) % SELDOM == 0:
                yield from _row(line, entities, lang, "line of code")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import) and not any(name.asname for name in node.names):
            line = module.lines[node.lineno - 1].strip()
            if line == ast.unparse(node):
                ends = [name.end_col_offset or 0 for name in node.names]
                spans = [(end - node.col_offset - len(name.name), end - node.col_offset) for name, end in zip(node.names, ends)]
                yield from _row(line, [(*span, "MODULE") for span in spans], lang)


def _row(text: str, entities: list[Entity], lang: str, group: str | None = None) -> Iterator[Candidate]:
    tokens, tags = bio(text, entities)
    if FEWEST <= len(tokens) <= MOST:
        rarest = [kind for kind in KINDS if any(kind == one for _, _, one in entities)]
        shown = [tag[:2] + KOREAN[tag[2:]] if lang == "ko" and tag != "O" else tag for tag in tags]
        yield group or next(iter(rarest), "nothing named"), {"tokens": tokens, "ner_tags": shown}


def _lines_of_code(module: Module, item: Definition) -> Iterator[tuple[str, list[Entity]]]:
    """The first line of a function or class, and ``raise`` statements, where the tree says what each name in them is."""
    part = None if isinstance(item.node, ast.Module) else excerpt(module, item.node)
    if part is None:
        return
    node = item.node
    if isinstance(node, ast.ClassDef):
        classes = {one.short for one in module.classes}
        kinds = [
            "EXCEPTION" if one in module.exceptions else "CLASS" if one in classes else None for one in map(dotted, node.bases)
        ]
        own_kind = "EXCEPTION" if node.name in module.exceptions else "CLASS"
        if None not in kinds and not node.keywords:
            bases = [(*part.span(base), str(kind)) for base, kind in zip(node.bases, kinds, strict=True)]
            yield from _line(part, node, [_defined(part, node, own_kind), *bases])
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        taken = all_parameters(node)
        values = [one.default for one in taken if one.default is not None]
        if item.kind != "property" and not node.returns and not any(one.node.annotation for one in taken) and _constants(values):
            names = [(*part.span(one.node), "PARAM") for one in taken]
            yield from _line(part, node, [_defined(part, node, "FUNCTION"), *names, *_numeric(part, values)])
        for line in own(node):
            made = line.exc if isinstance(line, ast.Raise) and not line.cause else None
            if not isinstance(made, ast.Call) or dotted(made.func) not in module.exceptions:
                continue
            if isinstance(line, ast.Raise) and _constants(made.args) and not made.keywords:
                yield from _line(part, line, [(*part.span(made.func), "EXCEPTION"), *_numeric(part, made.args)])


def _defined(part: Excerpt, node: ast.ClassDef | Function, kind: str) -> Entity:
    """The name that a definition gives."""
    opening = re.compile(r"(async +)?(def|class) +").match(part.text, part.at(node.lineno, node.col_offset))
    assert opening is not None
    return opening.end(), opening.end() + len(node.name), kind


def _constants(values: Sequence[ast.expr]) -> bool:
    return all(isinstance(value, ast.Constant) for value in values)


def _numeric(part: Excerpt, values: Sequence[ast.expr]) -> list[Entity]:
    """The constants that are numbers (True is an int, but no number)."""
    return [(*part.span(one), "NUMBER") for one in values if isinstance(one, ast.Constant) and type(one.value) in (int, float)]


def _line(part: Excerpt, node: ast.stmt, entities: list[Entity]) -> Iterator[tuple[str, list[Entity]]]:
    """The line on which a statement begins, unless it goes on behind that line."""
    start = part.at(node.lineno, node.col_offset)
    line = part.text[start:].partition("\n")[0]
    whole = line.endswith(":") if isinstance(node, SCOPES) else line.count("(") == line.count(")") and not line.endswith("\\")
    if whole and "#" not in line:
        yield line, sorted((first - start, last - start, kind) for first, last, kind in entities)


MAKER = Maker(
    _candidates,
    about={
        "en": "Real: sentences of docstrings and lines of code; the tags are read off the syntax tree of their module. Sentences "
        "in which a word may be a name or a mere word are left out.",
        "ko": "Made up: the Korean sentences. Real: the names and facts in them, read off the syntax tree of their module.",
    },
    identity=("tokens",),
    labels=lambda row: [tag[2:] for tag in row["ner_tags"] if tag.startswith("B-")] or ["-"],
)
