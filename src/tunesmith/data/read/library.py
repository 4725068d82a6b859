"""Python's standard library as data: its modules, their definitions, and facts about each definition.

``builtin:docstrings`` asks questions that docstrings answer; ``synth.python`` makes rows from the code.
Sources are parsed with ``ast``; nothing is imported or run. Private modules and names are left out.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

SKIPPED = {
    "__phello__", "__pycache__", "_pyrepl", "antigravity.py", "config", "dist-packages", "distutils",
    "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "this.py",
    "turtledemo",
}  # fmt: skip
"""Folders and files that document nothing a user would ask about."""

PROPERTIES = {
    "property", "cached_property", "abstractproperty", "DynamicClassAttribute", "getter", "setter", "deleter",
}  # fmt: skip
"""Last names of decorators that turn a method into an attribute."""

QUESTIONS = {
    "en": {
        "module": "What is the Python module `{}` for?",
        "class": "What is the Python class `{}`?",
        "function": "What does the Python function `{}` do?",
        "method": "What does the Python method `{}` do?",
        "property": "What is the Python property `{}`?",
    },
    "ko": {
        "module": "파이썬 모듈 `{}`의 용도는 무엇인가요?",
        "class": "파이썬 클래스 `{}`에 대해 설명해 주세요.",
        "function": "파이썬 함수 `{}`의 기능은 무엇인가요?",
        "method": "파이썬 메서드 `{}`의 기능은 무엇인가요?",
        "property": "파이썬 속성 `{}`의 의미는 무엇인가요?",
    },
}
SHORTEST, LONGEST = 25, 700
"""Characters of an answer."""

CHARACTERS = 1000
"""Maximum length of the source text of an excerpt."""

ABBREVIATION = re.compile(r"(?:\be\.g|\bi\.e|\betc|\bvs|\bcf|\bresp|\b[A-Z])\.$")
SIGNATURE = re.compile(r"^[\w.]+\(.*\)( -+> .*)?$")
Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
TYPES = {name: value for name, value in vars(builtins).items() if isinstance(value, type)}
EXCEPTIONS = {name for name, value in TYPES.items() if issubclass(value, BaseException)}


@cache
def modules() -> dict[str, Path | None]:
    """Public module -> file, ordered by path; first ``builtins``, which has no file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {".".join(path.relative_to(root).with_suffix("").parts): path for path in _files(root)}
    return {"builtins": None, **{name.removesuffix(".__init__"): path for name, path in found.items()}}


def _files(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        private = entry.name.startswith(("config-", "test_", "_")) and entry.name != "__init__.py"
        if private or entry.name in SKIPPED:
            continue
        if entry.is_dir():
            yield from _files(entry)
        elif entry.suffix == ".py":
            yield entry


@dataclass(frozen=True)
class Definition:
    """A public module, class, method, property or function. ``name``: dotted_name, beginning with the module.

    ``node``: its syntax tree; that of the module if the definition is written in C."""

    module: Module
    name: str
    kind: str
    doc: str
    node: Documented

    @property
    def short(self) -> str:
        """The name without its module and class."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Module:
    """One file of the library, or ``builtins``, which has docstrings but no source."""

    name: str
    text: str
    tree: ast.Module

    @cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @cached_property
    def definitions(self) -> tuple[Definition, ...]:
        """The module and its public classes, methods, properties and functions, in the order of the file."""
        walk = _builtins(self) if self.name == "builtins" else _walk(self, self.tree, self.name, "module")
        return tuple(walk)


def read_module(name: str) -> Module:
    """Parse a module. A file that this Python cannot parse is an empty module."""
    path = modules()[name]
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n") if path else ""
        return Module(name, text, ast.parse(text))
    except (SyntaxError, ValueError):
        return Module(name, "", ast.parse(""))


def _walk(module: Module, node: Documented, name: str, kind: str) -> Iterator[Definition]:
    yield Definition(module, name, kind, ast.get_docstring(node, clean=True) or "", node)
    for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
        if isinstance(child, ast.ClassDef | Function) and not child.name.startswith("_"):
            own_kind = _kind(child, isinstance(node, ast.ClassDef))
            yield from _walk(module, child, f"{name}.{child.name}", own_kind)


def _kind(node: ast.ClassDef | Function, inside: bool) -> str:
    """The kind of a definition. ``inside``: it belongs to a class."""
    marks = {dotted_name(mark).rpartition(".")[2] for mark in node.decorator_list}
    in_class = "property" if marks & PROPERTIES else "method"
    return "class" if isinstance(node, ast.ClassDef) else in_class if inside else "function"


def _builtins(module: Module) -> Iterator[Definition]:
    for name, value in sorted(vars(builtins).items()):
        if name.startswith("_") or not callable(value) or not isinstance(value.__doc__, str):
            continue
        kind = "class" if isinstance(value, type) else "function"
        yield Definition(module, name, kind, value.__doc__, module.tree)
        if isinstance(value, type) and not issubclass(value, BaseException):
            for attribute, member in sorted(vars(value).items()):
                if not attribute.startswith("_") and isinstance(member.__doc__, str):
                    kind = "method" if callable(getattr(value, attribute)) else "property"
                    yield Definition(module, f"{name}.{attribute}", kind, member.__doc__, module.tree)


@dataclass(frozen=True)
class Excerpt:
    """The source of a definition, dedented by ``indent``. ``first``: number of its first line in the file."""

    text: str
    first: int
    indent: int

    def span(self, node: ast.expr | ast.stmt | ast.arg) -> tuple[int, int]:
        """[start, end) of a node, in characters of ``text``."""
        end = self._at(node.end_lineno or node.lineno, node.end_col_offset or 0)
        return self._at(node.lineno, node.col_offset), end

    def _at(self, line: int, column: int) -> int:
        *before, last = self.text.split("\n")[: line - self.first + 1]
        return sum(len(one) + 1 for one in before) + len(last.encode()[: column - self.indent].decode())

    def source(self, node: ast.expr) -> str:
        """The source text of a node."""
        return self.text[slice(*self.span(node))]


def excerpt(item: Definition) -> Excerpt | None:
    """The source of a definition with its decorators; None if too long, one line, or less indented inside."""
    if isinstance(item.node, ast.Module):
        return None
    indent = item.node.col_offset
    first = min([item.node.lineno, *(mark.lineno for mark in item.node.decorator_list)])
    lines = item.module.lines[first - 1 : item.node.end_lineno]
    text = "\n".join(line[indent:] for line in lines)
    left = any(line[:indent].strip(" ") for line in lines)
    return None if left or len(lines) < 2 or len(text) > CHARACTERS else Excerpt(text, first, indent)


class Parameter(NamedTuple):
    """A parameter. ``shown``: its name with stars. ``default``: None if it has none."""

    node: ast.arg
    shown: str
    default: ast.expr | None

    @property
    def name(self) -> str:
        return self.node.arg


def all_parameters(node: Function) -> list[Parameter]:
    """All parameters, in the order of the ``def`` line."""
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    absent: list[ast.expr | None] = [None] * (len(plain) - len(args.defaults))
    defaults = [*absent, *args.defaults, *args.kw_defaults]
    found = [Parameter(arg, arg.arg, value) for arg, value in zip([*plain, *args.kwonlyargs], defaults)]
    if args.vararg:
        found.insert(len(plain), Parameter(args.vararg, f"*{args.vararg.arg}", None))
    return [*found, Parameter(args.kwarg, f"**{args.kwarg.arg}", None)] if args.kwarg else found


def parameters(item: Definition) -> list[Parameter]:
    """The parameters of a function in order, without the ``self`` or ``cls`` of a method."""
    found = all_parameters(item.node) if isinstance(item.node, Function) else []
    return found[1:] if receiver(item) else found


def receiver(item: Definition) -> str:
    """The name of ``self`` or ``cls`` in a method or property; "" for functions and static methods."""
    if item.kind not in ("method", "property") or not isinstance(item.node, Function):
        return ""
    taken = [*item.node.args.posonlyargs, *item.node.args.args]
    return taken[0].arg if taken and "staticmethod" not in map(dotted_name, item.node.decorator_list) else ""


@lru_cache(maxsize=1)
def exceptions(module: Module) -> set[str]:
    """Names of the built-in exceptions, and of the module's classes that derive from one."""
    known = set(EXCEPTIONS)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ClassDef) and known & {*map(dotted_name, node.bases)}:
            known.add(node.name)
    return known


def raised_exceptions(item: Definition) -> list[ast.expr] | None:
    """The exception that each ``raise`` of a function names; None if one of them names none."""
    found: list[ast.expr] = []
    known = exceptions(item.module)
    for node in own_nodes(item.node):
        if isinstance(node, ast.Raise):
            name = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            last = dotted_name(name).rpartition(".")[2]
            if last not in known and not re.fullmatch(r"[A-Z]\w*(Error|Exception|Warning)", last):
                return None
            assert name is not None
            found.append(name)
    return found


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a body in the order of the file, without those of nested functions and classes."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, SCOPES):
            yield from own_nodes(child)


def dotted_name(node: ast.AST | None) -> str:
    """The dotted name of a name or attribute (``os.path.join``); "" for anything else."""
    if isinstance(node, ast.Attribute):
        inner = dotted_name(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def paragraphs(doc: str) -> list[str]:
    """The paragraphs, each on one line, without those that are only a signature (``split(sep=None)``)."""
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.cleandoc(doc).strip())]
    return [part for part in parts if part and not SIGNATURE.match(part)]


def first_paragraph(doc: str) -> str:
    """The first paragraph if it is a description, else ""."""
    text = next(iter(paragraphs(doc)), "")
    return "" if text.startswith((">>>", "$", "Copyright", "#")) else text


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph after ``.``, ``!`` or ``?`` where a new sentence begins."""
    ends = [match.end() for match in re.finditer(r"[.!?]['\")]?\s+(?=[A-Z`'\"(])", paragraph)]
    cuts = [0, *(end for end in ends if not ABBREVIATION.search(paragraph[:end].rstrip())), len(paragraph)]
    return [text for start, end in pairwise(cuts) if (text := paragraph[start:end].strip())]


def first_sentence(doc: str) -> str:
    """The first sentence of a docstring if it is complete (capital letter, full stop), else ""."""
    sentence = next(iter(sentences(first_paragraph(doc))), "")
    return sentence if re.fullmatch(r"[A-Z].*\w['\")`]*\.", sentence) else ""


def question(item: Definition, lang: str) -> str:
    """The question that the first paragraph of a definition's docstring answers."""
    return QUESTIONS[lang][item.kind].format(item.name)


def docstrings(module: Module, lang: str) -> Iterator[tuple[Definition, dict[str, str]]]:
    """Each definition with its row ``{"instruction": "What is the class ...", "response": ...}``."""
    for item in module.definitions:
        answer = first_paragraph(item.doc)
        if SHORTEST <= len(answer) <= LONGEST:
            yield item, {"instruction": question(item, lang), "response": answer}
