"""``builtin:docstrings``: questions about Python and their documented answers, made from the Python that runs.

Real text that everybody has, so a first run needs no download but the model. Sources are read with ``ast``; nothing is
imported. The order is that of the module names, and within a module that of the file.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import inspect
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

NAME = "builtin:docstrings"

SKIPPED = {
    "__phello__", "_pyrepl", "config", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test",
    "tests", "distutils", "turtledemo", "this.py", "antigravity.py", "__pycache__",
}  # fmt: skip
"""Folders and files of the standard library that document nothing a user would ask about."""

SHORTEST, LONGEST = 25, 700
"""Characters of an answer."""


def docstrings() -> Iterator[dict[str, str]]:
    """Rows ``{"instruction": "What does `json.dumps` do in Python?", "response": "Serialize ``obj`` to ..."}``."""
    seen: set[str] = set()
    for name, kind, doc in _documented():
        answer = _first_paragraph(doc)
        if SHORTEST <= len(answer) <= LONGEST and name not in seen:
            seen.add(name)
            yield {"instruction": _question(name, kind), "response": answer}


def digest() -> str:
    """Hash of all the text that the rows are made from: the sources, and the built-in functions' documentation."""
    content = hashlib.sha256(sys.version.encode())
    for path in _sources():
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()


def _documented() -> Iterator[tuple[str, str, str]]:
    """(dotted name, kind, docstring)."""
    yield from _builtins()
    root = _library()
    for path in _sources():
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a file for another Python
            continue
        yield from _walk(tree, module)


def _builtins() -> Iterator[tuple[str, str, str]]:
    for name in sorted(vars(builtins)):
        value = getattr(builtins, name)
        doc = getattr(value, "__doc__", None)
        if name.startswith("_") or not callable(value) or not isinstance(doc, str):
            continue
        yield name, "class" if isinstance(value, type) else "function", doc
        if isinstance(value, type) and not issubclass(value, BaseException):
            for attribute in sorted(vars(value)):
                doc = getattr(vars(value)[attribute], "__doc__", None)
                if not attribute.startswith("_") and isinstance(doc, str):
                    yield f"{name}.{attribute}", "method", doc


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str, str]]:
    """Public modules, classes, methods and functions in and under ``node``."""
    inside = isinstance(node, ast.ClassDef)
    kind = "module" if isinstance(node, ast.Module) else "class" if inside else "function"
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        doc = ast.get_docstring(node, clean=True)
        if doc:
            yield name, kind, doc
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
                for full, what, text in _walk(child, f"{name}.{child.name}"):
                    yield full, "method" if inside and what == "function" else what, text


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _sources() -> Iterator[Path]:
    """Files of the standard library in the order of their paths; private modules are left out."""
    root = _library()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).parts
        private = any(part.startswith("_") and part != "__init__.py" for part in parts)
        if not private and not any(part in SKIPPED or part.startswith(("config-", "test_")) for part in parts):
            yield path


def _question(name: str, kind: str) -> str:
    if kind == "module":
        return f"What is the Python module `{name}` for?"
    if kind == "class":
        return f"What is the Python class `{name}`?"
    return f"What does the Python {kind} `{name}` do?"


def _first_paragraph(doc: str) -> str:
    """The first paragraph on one line; a leading signature line (``split(sep=None)``) is not an answer."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.cleandoc(doc).strip())]
    signature = re.compile(r"^[\w.]+\(.*\)( -+> .*)?$")
    spoken = [part for part in paragraphs if part and not signature.match(part)]
    answer = spoken[0] if spoken else ""
    return "" if answer.startswith((">>>", "$", "Copyright", "#")) else answer
