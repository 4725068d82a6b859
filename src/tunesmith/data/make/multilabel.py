"""Functions of the library and the constructs that occur in them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence

from tunesmith.data.make.library import Definition, Module, all_parameters, dotted, excerpt, receiver
from tunesmith.data.make.maker import Candidate, Maker

LINES, CHARACTERS = 40, 1500
"""The longest function."""

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Nodes = Sequence[ast.AST]
Construct = Callable[[Definition, Nodes], bool]
"""Whether a construct occurs in a function, given also all nodes under it."""


def _has(*kinds: type[ast.AST]) -> Construct:
    """Whether a node of one of these kinds is anywhere in the function."""
    return lambda item, nodes: any(isinstance(node, kinds) for node in nodes)


def _recursive(item: Definition, nodes: Nodes) -> bool:
    """Whether the function, or one within it, calls itself by its name: a method through the object that it was called on."""
    itself = item.short if item.kind == "function" else f"{receiver(item)}.{item.short}" if receiver(item) else ""
    inner = [(node, node.name) for node in nodes if isinstance(node, Function)]
    return any(
        isinstance(call, ast.Call) and name and dotted(call.func) == name
        for node, name in [(item.node, itself), *inner]
        for call in ast.walk(node)
    )


def _formats(item: Definition, nodes: Nodes) -> bool:
    """An f-string with a field, ``"...".format(...)`` or ``"..." % ...``."""
    for node in nodes:
        if isinstance(node, ast.FormattedValue):
            return True
        if isinstance(node, ast.Attribute) and node.attr == "format" and _is_string(node.value):
            return True
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and _is_string(node.left):
            return True
    return False


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _has_default(item: Definition, nodes: Nodes) -> bool:
    assert isinstance(item.node, Function)
    return any(one.default is not None for one in all_parameters(item.node))


def _decorated(item: Definition, nodes: Nodes) -> bool:
    assert isinstance(item.node, Function)
    return bool(item.node.decorator_list)


CONSTRUCTS: dict[str, Construct] = {
    "recursion": _recursive,
    "generator": _has(ast.Yield, ast.YieldFrom),
    "assertion": _has(ast.Assert),
    "lambda": _has(ast.Lambda),
    "nested function": _has(*FUNCTIONS),
    "context manager": _has(ast.With, ast.AsyncWith),
    "comprehension": _has(*COMPREHENSIONS),
    "decorator": _decorated,
    "string formatting": _formats,
    "exception handling": _has(ast.Try, ast.TryStar),
    "raising": _has(ast.Raise),
    "loop": _has(ast.For, ast.AsyncFor, ast.While),
    "default value": _has_default,
    "condition": _has(ast.If, ast.IfExp),
}
"""The rarer ones first: a row is drawn as one of its first label."""

KOREAN = {
    "recursion": "재귀",
    "generator": "제너레이터",
    "assertion": "단언문",
    "lambda": "람다",
    "nested function": "중첩 함수",
    "context manager": "컨텍스트 관리자",
    "comprehension": "컴프리헨션",
    "decorator": "데코레이터",
    "string formatting": "문자열 서식",
    "exception handling": "예외 처리",
    "raising": "예외 발생",
    "loop": "반복문",
    "default value": "기본값",
    "condition": "조건문",
}


def _candidates(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    for item in module.definitions:
        if not isinstance(item.node, Function):
            continue
        part = excerpt(module, item.node)
        if part is None or len(part.text) > CHARACTERS or not 3 <= part.text.count("\n") + 1 <= LINES:
            continue
        nodes = [*ast.walk(item.node)][1:]
        found = [name for name, occurs in CONSTRUCTS.items() if occurs(item, nodes)]
        labels = [KOREAN[name] for name in found] if lang == "ko" else found
        yield labels[0] if labels else "none", {"text": part.text, "labels": labels}


MAKER = Maker(
    _candidates,
    about={
        "en": "Real: the text is a function of the library; its labels are read off its syntax tree.",
        "ko": "Real: the text is a function of the library; its labels, in Korean, are read off its syntax tree.",
    },
    identity=("text",),
    labels=lambda row: row["labels"] or ["none"],
)
