"""Labelled texts: docstrings and topics (classify), functions and the constructs in them (multilabel)."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from tunesmith.data.read import library
from tunesmith.data.read.library import Definition, Function, Module, dotted_name, excerpt, receiver
from tunesmith.synth.python.wording import Candidate, table

TOPICS = table("""
    networking|네트워크: socket ssl socketserver selectors http urllib ftplib imaplib poplib smtplib smtpd nntplib telnetlib
    networking|네트워크: xmlrpc ipaddress asyncore asynchat wsgiref cgi cgitb nturl2path
    mail|메일: email mailbox mailcap
    text|텍스트: string textwrap re sre_compile sre_parse difflib stringprep shlex locale gettext html reprlib pprint codecs
    data formats|데이터 형식: json csv xml plistlib configparser tomllib base64 binascii quopri uu netrc struct pickle
    data formats|데이터 형식: pickletools xdrlib
    numbers|숫자: decimal fractions statistics random numbers
    files|파일: os pathlib shutil glob fnmatch tempfile filecmp fileinput stat posixpath ntpath genericpath zipfile tarfile
    files|파일: gzip bz2 lzma linecache zipapp
    concurrency|동시성: asyncio threading multiprocessing concurrent queue sched subprocess contextvars
    data types|자료형: collections datetime calendar heapq bisect enum dataclasses types weakref copy graphlib zoneinfo
    data types|자료형: uuid array
    code analysis|코드 분석: ast dis inspect tokenize token symtable importlib pkgutil modulefinder runpy code codeop
    code analysis|코드 분석: py_compile compileall pyclbr opcode keyword zipimport
    testing and debugging|테스트와 디버깅: unittest doctest pdb bdb cProfile profile pstats timeit trace traceback
    testing and debugging|테스트와 디버깅: tracemalloc warnings logging
    user interface|사용자 인터페이스: tkinter turtle curses cmd getpass argparse optparse getopt rlcompleter
""")
"""Topic in English|Korean -> modules and packages about it. A module about several topics is in none."""

TOPIC_OF = {module: key.split("|") for key, lines in TOPICS.items() for module in " ".join(lines).split()}
"""Module or package -> its topic in English and Korean."""

CONSTRUCTS: dict[str, tuple[str, tuple[type[ast.AST], ...]]] = {
    "recursion": ("재귀", ()),
    "generator": ("제너레이터", (ast.Yield, ast.YieldFrom)),
    "assertion": ("단언문", (ast.Assert,)),
    "lambda": ("람다", (ast.Lambda,)),
    "nested function": ("중첩 함수", (ast.FunctionDef, ast.AsyncFunctionDef)),
    "context manager": ("컨텍스트 관리자", (ast.With, ast.AsyncWith)),
    "comprehension": ("컴프리헨션", (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)),
    "decorator": ("데코레이터", ()),
    "string formatting": ("문자열 서식", (ast.FormattedValue,)),
    "exception handling": ("예외 처리", (ast.Try, ast.TryStar)),
    "raising": ("예외 발생", (ast.Raise,)),
    "loop": ("반복문", (ast.For, ast.AsyncFor, ast.While)),
    "default value": ("기본값", ()),
    "condition": ("조건문", (ast.If, ast.IfExp)),
}
"""Construct -> its Korean name and its nodes. Rarer ones first: the first construct of a row is its group."""


def topic(module: str) -> str:
    """Return the English topic of a module, by its package; "" where the table lacks it."""
    return TOPIC_OF.get(module.partition(".")[0], [""])[0]


def classify(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    """Real: the text is the first paragraph of a docstring. The label is its module's topic in a table."""
    label = TOPIC_OF[module.name.partition(".")[0]][lang == "ko"]
    for item, row in library.docstrings(module, lang):
        if len(row["response"]) <= 400:
            yield Candidate(label, item.name, {"text": row["response"], "label": label})


def multilabel(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    """Real: the text is a function of the library; the labels are the constructs in its syntax tree."""
    for item in module.definitions:
        code = excerpt(item)
        if code and isinstance(item.node, Function):
            nodes = [*ast.walk(item.node)][1:]
            types = {type(node) for node in nodes}
            occurs = {name: not types.isdisjoint(kinds) for name, (_, kinds) in CONSTRUCTS.items()}
            occurs["recursion"] = _is_recursive(item, nodes)
            occurs["decorator"] = bool(item.node.decorator_list)
            occurs["string formatting"] |= any(map(_formats_string, nodes))
            occurs["default value"] = any(one.default for one in library.all_parameters(item.node))
            names = [name for name in CONSTRUCTS if occurs[name]]
            labels = [CONSTRUCTS[name][0] for name in names] if lang == "ko" else names
            yield Candidate(next(iter(labels), "none"), item.name, {"text": code.text, "labels": labels})


def _is_recursive(item: Definition, nodes: Sequence[ast.AST]) -> bool:
    """Return whether the function, or one inside it, calls itself; a method through its own object."""
    itself = item.short if item.kind == "function" else f"{receiver(item)}.{item.short}"
    inner = [(node, node.name) for node in nodes if isinstance(node, Function)]
    return any(
        isinstance(call, ast.Call) and dotted_name(call.func) == name
        for node, name in [(item.node, itself), *inner]
        for call in ast.walk(node)
    )


def _formats_string(node: ast.AST) -> bool:
    """Return whether the node is ``"...".format`` or ``"..." % ...``."""
    if isinstance(node, ast.BinOp):
        text = node.left if isinstance(node.op, ast.Mod) else None
    else:
        text = node.value if isinstance(node, ast.Attribute) and node.attr == "format" else None
    return isinstance(text, ast.JoinedStr) or (isinstance(text, ast.Constant) and isinstance(text.value, str))
