"""Questions whose answers are stretches of a source text, and questions that the text does not answer (as in SQuAD 2)."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tunesmith.data.make.library import Definition, Excerpt, Module, dotted, excerpt, first_sentence, parameters, raised
from tunesmith.data.make.maker import NO_ANSWER, Candidate, Maker, number, pick

CHARACTERS = 1200
"""The longest context."""

LISTED = 5
"""Functions of a module that are described together."""

ASKED = {
    "en": {
        "default": (
            "What is the default value of the parameter `{parameter}`?",
            "Which value does `{parameter}` have when it is left out?",
            "If a caller does not give `{parameter}`, which value is used?",
        ),
        "exception": (
            "Which exception does the {kind} `{name}` raise?",
            "Which exception appears in the `raise` statement?",
        ),
        "annotation": (
            "With which type is the return value of `{name}` annotated?",
            "Which type does the {kind} `{name}` say that it returns?",
        ),
        "docstring": (
            "What does the {kind} `{name}` do, according to its docstring?",
            "How does the docstring of `{name}` begin?",
        ),
        "next parameter": (
            "Which parameter follows `{parameter}`?",
            "What is the name of the parameter after `{parameter}`?",
        ),
        "base": (
            "Which class does `{name}` inherit from?",
            "What is the base class of `{name}`?",
        ),
        "described": (
            "What does `{name}` do?",
            "How is `{name}` described?",
            "What is `{name}` for?",
        ),
        "listing": ("The module `{}` documents among others:",),
    },
    "ko": {
        "default": (
            "`{parameter}` 매개변수의 기본값은 무엇인가요?",
            "`{parameter}` 인자를 생략하면 어떤 값이 쓰이나요?",
            "호출할 때 `{parameter}` 값을 주지 않으면 어떤 값이 사용되나요?",
        ),
        "exception": (
            "`{name}` {kind}는 어떤 예외를 일으키나요?",
            "`raise` 문에 나오는 예외는 무엇인가요?",
        ),
        "annotation": (
            "`{name}` {kind}의 반환값에는 어떤 타입이 표시되어 있나요?",
            "`{name}` {kind}가 돌려준다고 표시한 타입은 무엇인가요?",
        ),
        "docstring": (
            "독스트링에 따르면 `{name}` {kind}의 기능은 무엇인가요?",
            "`{name}` {kind}의 독스트링은 어떤 문장으로 시작하나요?",
        ),
        "next parameter": (
            "`{parameter}` 매개변수 다음에 오는 매개변수는 무엇인가요?",
            "`{parameter}` 바로 뒤에 선언된 매개변수의 이름은 무엇인가요?",
        ),
        "base": (
            "`{name}` 클래스는 어떤 클래스를 상속하나요?",
            "`{name}` 클래스의 기반 클래스는 무엇인가요?",
        ),
        "described": (
            "`{name}`의 기능은 무엇인가요?",
            "`{name}`에 대한 설명은 무엇인가요?",
            "`{name}`의 용도는 무엇인가요?",
        ),
        "listing": ("`{}` 모듈의 문서에는 다음 내용이 있습니다.",),
    },
}

KINDS = {"en": {"function": "function", "method": "method"}, "ko": {"function": "함수", "method": "메서드"}}

Asked = tuple[str, dict[str, str], tuple[int, int] | None]
"""Task, facts for the question, and the characters [start, end) of the context that answer it; None: it does not."""


def _candidates(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    for item in [*module.functions, *module.classes]:
        assert not isinstance(item.node, ast.Module)
        part = excerpt(module, item.node)
        if part is None or len(part.text) > CHARACTERS or part.text.count("\n") < 1:
            continue
        about = _of_class(item, part) if isinstance(item.node, ast.ClassDef) else _of_function(module, item, part)
        facts = {"name": item.short, "kind": KINDS[lang].get(item.kind, "")}
        for task, more, span in about:
            yield _row(task, facts | more, part.text, span, item.name, lang, seed)
    yield from _listings(module, lang, seed)


def _row(
    task: str, facts: dict[str, str], context: str, span: tuple[int, int] | None, name: str, lang: str, seed: int
) -> Candidate:
    question = pick(ASKED[lang][task], seed, task, name, span is None).format(**facts)
    answers: dict[str, list[str] | list[int]] = {"text": [], "answer_start": []}
    if span is not None:
        answers = {"text": [context[slice(*span)]], "answer_start": [span[0]]}
    group = task if span else f"{NO_ANSWER}: {task}"
    return group, {"context": context, "question": question, "answers": answers}


def _of_function(module: Module, item: Definition, part: Excerpt) -> Iterator[Asked]:
    assert isinstance(item.node, ast.FunctionDef | ast.AsyncFunctionDef)
    node, taken = item.node, parameters(item)
    plain = [one for one in taken if not one.mark]
    given = [one for one in plain if one.default is not None and "\n" not in part.source(one.default)]
    absent = [one.name for one in plain if one.default is None]
    if given:
        one = pick(given, item.name)
        assert one.default is not None
        yield "default", {"parameter": one.name}, part.span(one.default)
    if absent and given and "default" not in part.text:
        yield "default", {"parameter": pick(absent, item.name)}, None
    found = raised(module, node)
    statements = sum(isinstance(one, ast.Raise) for one in ast.walk(node))  # with those of functions within it
    if found and len(found) == statements and len({dotted(one) for one in found}) == 1:
        yield "exception", {}, part.span(found[0])
    elif found == [] and "raise" not in part.text and _seldom(item, "exception"):
        yield "exception", {}, None
    if node.returns is not None:
        yield "annotation", {}, part.span(node.returns)
    elif any(one.node.annotation for one in taken) or _seldom(item, "annotation"):
        yield "annotation", {}, None
    sentence = first_sentence(item.doc)
    if sentence and item.doc.startswith(sentence):
        start, end = part.span(node.body[0])
        place = part.text.find(sentence, start, end)
        if place >= 0 and len(sentence) >= 12:
            yield "docstring", {}, (place, place + len(sentence))
    elif not item.doc and "#" not in part.text and _seldom(item, "docstring"):
        yield "docstring", {}, None
    if len(taken) > 1:
        before = number(item.name) % (len(taken) - 1)
        start, _ = part.span(taken[before + 1].node)
        yield "next parameter", {"parameter": taken[before].name}, (start, start + len(taken[before + 1].name))
        if _seldom(item, "next parameter"):
            yield "next parameter", {"parameter": taken[-1].name}, None


def _of_class(item: Definition, part: Excerpt) -> Iterator[Asked]:
    assert isinstance(item.node, ast.ClassDef)
    if len(item.node.bases) == 1 and not item.node.keywords:
        yield "base", {}, part.span(item.node.bases[0])
    elif not item.node.bases and not item.node.keywords:
        yield "base", {}, None


def _seldom(item: Definition, task: str) -> bool:
    """One in twelve: nearly every function could be asked what it does not say."""
    return number(task, item.name) % 12 == 0


def _listings(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    """Functions and classes of a module with what their docstrings say, a few at a time, and questions about each."""
    told = [(item.name.removeprefix(f"{module.name}."), first_sentence(item.doc)) for item in module.definitions[1:] if item.doc]
    told = [(name, sentence) for name, sentence in dict(told).items() if 12 <= len(sentence) <= 200]
    for first in range(0, len(told) - 2, LISTED):
        some = told[first : first + LISTED]
        others = [name for name, _ in told if name not in dict(some)]
        context = ASKED[lang]["listing"][0].format(module.name)
        starts = {}
        for name, sentence in some:
            context += f"\n{name}: "
            starts[name] = len(context)
            context += sentence
        name, sentence = pick(some, seed, module.name, first)
        span = starts[name], starts[name] + len(sentence)
        yield _row("described", {"name": name}, context, span, f"{module.name} {first}", lang, seed)
        if others:
            yield _row("described", {"name": pick(others, seed, context)}, context, None, f"{module.name} {first}", lang, seed)


MAKER = Maker(
    _candidates,
    about={
        "en": "Real: the contexts (source of the library, and sentences of its docstrings) and the answers in them. Made up: the "
        "questions, and the lists in which sentences of docstrings stand together.",
        "ko": "Real: the contexts (source of the library, and sentences of its docstrings, in English) and the answers in them. "
        "Made up: the Korean questions, and the lists in which sentences of docstrings stand together.",
    },
    identity=("context", "question"),
    subject=lambda row: row["context"],
    questions=True,
)
