"""Questions about Python and their documented answers."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator

from tunesmith.data.make.library import Module, first_paragraph, read_module, sources
from tunesmith.data.make.maker import Candidate, Maker

SHORTEST, LONGEST = 25, 700
"""Characters of an answer."""

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


def docstrings(lang: str = "en") -> Iterator[dict[str, str]]:
    """Rows ``{"instruction": "What does the Python function `json.dumps` do?", "response": "Serialize ``obj`` to ..."}``.

    First what is built in, then by module in the order of their names, within a module in that of the file.
    """
    seen: set[str] = set()
    for name, kind, doc in _documented():
        row = _row(name, kind, doc, lang)
        if row and name not in seen:
            seen.add(name)
            yield row


def _documented() -> Iterator[tuple[str, str, str]]:
    """(dotted name, kind, docstring)."""
    yield from _builtins()
    for path in sources():
        module = read_module(path)
        for item in module.definitions if module else ():
            yield item.name, item.kind, item.doc


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
                    kind = "method" if callable(getattr(value, attribute)) else "property"
                    yield f"{name}.{attribute}", kind, doc


def _row(name: str, kind: str, doc: str, lang: str) -> dict[str, str] | None:
    answer = first_paragraph(doc) if doc else ""
    if not SHORTEST <= len(answer) <= LONGEST:
        return None
    return {"instruction": QUESTIONS[lang][kind].format(name), "response": answer}


def _candidates(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    return _told(((item.name, item.kind, item.doc) for item in module.definitions), lang)


def _told(documented: Iterable[tuple[str, str, str]], lang: str) -> Iterator[Candidate]:
    for name, kind, doc in documented:
        row = _row(name, kind, doc, lang)
        if row:
            yield kind, row


MAKER = Maker(
    _candidates,
    about={
        "en": "Real: the answer is the first paragraph of the docstring, as it stands. Made up: the wording of the question.",
        "ko": "Real: the answer is the first paragraph of the docstring, in English. Made up: the wording of the question.",
    },
    identity=("instruction",),
    stratum=lambda module: "",
    besides=lambda lang: _told(_builtins(), lang),
)
