"""Python's own library as text and syntax tree: which modules there are, what they define, and what is true of it.

Sources are read with ``ast``; nothing is imported or run. Private modules and names are left out.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

SKIPPED = {
    "__phello__", "_pyrepl", "config", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test",
    "tests", "distutils", "turtledemo", "this.py", "antigravity.py", "__pycache__",
}  # fmt: skip
"""Folders and files of the standard library that document nothing a user would ask about."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Callable = ast.FunctionDef | ast.AsyncFunctionDef
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)

PROPERTIES = {
    "property", "cached_property", "abstractproperty", "DynamicClassAttribute", "getter", "setter", "deleter",
}  # fmt: skip
"""Decorators, by their last names, that make an attribute of a function: it is read, never called."""

EXCEPTIONS = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)}


@lru_cache(maxsize=1)
def sources() -> tuple[Path, ...]:
    """Files of the standard library in the order of their paths; private modules are left out."""
    return tuple(_files(library()))


def _files(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        name = entry.name
        private = name.startswith("_") and name != "__init__.py"
        if private or name in SKIPPED or name.startswith(("config-", "test_")):
            continue
        if entry.is_dir():
            yield from _files(entry)
        elif entry.suffix == ".py":
            yield entry


@lru_cache(maxsize=1)
def library() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def module_name(path: Path) -> str:
    """``.../json/decoder.py`` -> json.decoder."""
    return ".".join(path.relative_to(library()).with_suffix("").parts).removesuffix(".__init__")


@lru_cache(maxsize=1)
def module_names() -> frozenset[str]:
    """Every module that may be named: those with a source here, and those written in C."""
    return frozenset(map(module_name, sources())) | frozenset(n for n in sys.stdlib_module_names if not n.startswith("_"))


@dataclass(frozen=True)
class Definition:
    """A public module, class, method, property or function. ``name`` is dotted, from the module on."""

    name: str
    kind: str
    node: Documented

    @property
    def short(self) -> str:
        """The name without its module and class."""
        return self.name.rpartition(".")[2]

    @cached_property
    def doc(self) -> str:
        """The docstring without its indentation; "" when there is none."""
        return ast.get_docstring(self.node, clean=True) or ""


def walk(node: Documented, name: str) -> Iterator[Definition]:
    """``node`` and the public classes, methods, properties and functions under it, in the order of the file."""
    inside = isinstance(node, ast.ClassDef)
    yield Definition(name, "module" if isinstance(node, ast.Module) else "class" if inside else "function", node)
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
                for found in walk(child, f"{name}.{child.name}"):
                    own_kind = inside and found.kind == "function"
                    yield Definition(found.name, _in_class(found.node), found.node) if own_kind else found


def _in_class(node: Documented) -> str:
    """What a function in the body of a class is: "property" or "method"."""
    marks = node.decorator_list if isinstance(node, Callable) else []
    return "property" if any(dotted(mark).rpartition(".")[2] in PROPERTIES for mark in marks) else "method"


@dataclass(frozen=True)
class Module:
    """One file of the library."""

    name: str
    text: str
    tree: ast.Module

    @cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @cached_property
    def definitions(self) -> tuple[Definition, ...]:
        return tuple(walk(self.tree, self.name))

    @cached_property
    def functions(self) -> tuple[Definition, ...]:
        """All that is called: functions and methods, but no properties."""
        return tuple(item for item in self.definitions if item.kind in ("function", "method"))

    @cached_property
    def properties(self) -> tuple[Definition, ...]:
        return tuple(item for item in self.definitions if item.kind == "property")

    @cached_property
    def classes(self) -> tuple[Definition, ...]:
        return tuple(item for item in self.definitions if isinstance(item.node, ast.ClassDef))

    @cached_property
    def exceptions(self) -> frozenset[str]:
        """Names of exceptions: the built-in ones, and classes of this file whose base is one."""
        known = set(EXCEPTIONS)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and base.id in known for base in node.bases):
                known.add(node.name)
        return frozenset(known)


def read_module(path: Path) -> Module | None:
    """The file, parsed; None when it was written for another Python."""
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        return Module(module_name(path), text, ast.parse(text))
    except (SyntaxError, ValueError):
        return None


def first_paragraph(doc: str) -> str:
    """The first paragraph on one line; a leading signature line (``split(sep=None)``) is not an answer."""
    spoken = paragraphs(doc)
    answer = spoken[0] if spoken else ""
    return "" if answer.startswith((">>>", "$", "Copyright", "#")) else answer


def paragraphs(doc: str) -> list[str]:
    """Each paragraph on one line; lines that are only a signature are left out."""
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.cleandoc(doc).strip())]
    signature = re.compile(r"^[\w.]+\(.*\)( -+> .*)?$")
    return [part for part in parts if part and not signature.match(part)]


ABBREVIATIONS = re.compile(r"(?:\be\.g|\bi\.e|\betc|\bvs|\bcf|\bresp|\b[A-Z])\.$")


def sentences(paragraph: str) -> list[str]:
    """A paragraph cut behind ``.``, ``!`` or ``?`` where a new sentence begins."""
    out: list[str] = []
    start = 0
    for match in re.finditer(r"[.!?]['\")]?\s+(?=[A-Z`'\"(])", paragraph):
        if not ABBREVIATIONS.search(paragraph[start : match.end()].rstrip()):
            out.append(paragraph[start : match.end()].strip())
            start = match.end()
    return [*out, paragraph[start:].strip()] if paragraph[start:].strip() else out


def first_sentence(doc: str) -> str:
    """The first sentence of a docstring when it is a whole one (capital letter, full stop), else ""."""
    parts = sentences(first_paragraph(doc))
    return parts[0] if parts and re.fullmatch(r"[A-Z].*\w['\")`]*\.", parts[0]) else ""


@dataclass(frozen=True)
class Excerpt:
    """The lines of a definition, moved to the left margin. ``first``: number of its first line in the file."""

    text: str
    first: int
    indent: int

    @cached_property
    def _lines(self) -> list[str]:
        return self.text.split("\n")

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for line in self._lines:
            starts.append(starts[-1] + len(line) + 1)
        return starts

    def span(self, node: ast.expr | ast.stmt | ast.arg | ast.alias) -> tuple[int, int]:
        """Characters [start, end) of ``text`` that a node of the definition was parsed from."""
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno or 0, node.end_col_offset or 0)

    def at(self, line: int, column: int) -> int:
        """The character at a line of the file and a column in bytes, as the syntax tree counts."""
        row = line - self.first
        inside = self._lines[row].encode()[: column - self.indent].decode()
        return self._starts[row] + len(inside)

    def source(self, node: ast.expr | ast.stmt | ast.arg) -> str:
        """The text of a node as it was written."""
        start, end = self.span(node)
        return self.text[start:end]


def excerpt(module: Module, node: ast.ClassDef | Callable) -> Excerpt | None:
    """The source of a definition with its decorators; None when a line of it stands left of its first."""
    first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
    lines = module.lines[first - 1 : node.end_lineno]
    indent = node.col_offset
    if any(line.strip() and line[:indent].strip() for line in lines) or any("\t" in line[: indent + 1] for line in lines):
        return None
    return Excerpt("\n".join(line[indent:].rstrip() if not line.strip() else line[indent:] for line in lines), first, indent)


def without_docstring(part: Excerpt, node: ast.ClassDef | Callable) -> str | None:
    """The text of an excerpt with the docstring's lines taken out; None when nothing else is in the body."""
    stated = node.body[0]
    if len(node.body) < 2 or not isinstance(stated, ast.Expr) or stated.lineno == node.lineno:
        return None
    lines = part.text.split("\n")
    del lines[stated.lineno - part.first : (stated.end_lineno or stated.lineno) - part.first + 1]
    while (after := stated.lineno - part.first) < len(lines) and not lines[after].strip():
        del lines[after]
    return "\n".join(lines)


@dataclass(frozen=True)
class Parameter:
    """``mark`` is "", "*" or "**". ``default`` is None where there is none."""

    node: ast.arg
    mark: str
    default: ast.expr | None

    @property
    def name(self) -> str:
        return self.node.arg

    @property
    def shown(self) -> str:
        """With its stars."""
        return self.mark + self.name


def parameters(item: Definition) -> list[Parameter]:
    """The parameters of a function in order; of a method without the one that the object or class is given to."""
    assert isinstance(item.node, Callable)
    found = all_parameters(item.node)
    return found[1:] if receiver(item) else found


def receiver(item: Definition) -> str:
    """``self`` or ``cls`` of a method or property; "" for a function and a static method."""
    assert isinstance(item.node, Callable)
    static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in item.node.decorator_list)
    first = next(iter([*item.node.args.posonlyargs, *item.node.args.args]), None)
    return first.arg if item.kind in ("method", "property") and first is not None and not static else ""


def all_parameters(node: Callable) -> list[Parameter]:
    """Every parameter, in the order of the ``def`` line."""
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    absent: list[ast.expr | None] = [None] * (len(plain) - len(args.defaults))
    found = [Parameter(arg, "", default) for arg, default in zip(plain, [*absent, *args.defaults], strict=True)]
    found += [Parameter(args.vararg, "*", None)] if args.vararg else []
    found += [Parameter(arg, "", default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return [*found, Parameter(args.kwarg, "**", None)] if args.kwarg else found


def own(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes in a function's body without those of functions and classes within it, in the order of the file."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, SCOPES):
            yield from own(child)


def raised(module: Module, node: Callable) -> list[ast.expr] | None:
    """The names of the exceptions in the ``raise`` statements of a function, one for each statement.

    None when one of the statements does not say (``raise``, ``raise error``), so that the list would be incomplete.
    """
    found: list[ast.expr] = []
    for item in own(node):
        if isinstance(item, ast.Raise):
            name = item.exc.func if isinstance(item.exc, ast.Call) else item.exc
            last = dotted(name).rpartition(".")[2]
            if name is None or not (last in module.exceptions or re.fullmatch(r"[A-Z]\w*(Error|Exception|Warning)", last)):
                return None
            found.append(name)
    return found


def dotted(node: ast.AST | None) -> str:
    """``os.path.join`` of a name or an attribute of names; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def is_generator(node: Callable) -> bool:
    """Whether calling the function makes a generator."""
    return any(isinstance(item, ast.Yield | ast.YieldFrom) for item in own(node))
