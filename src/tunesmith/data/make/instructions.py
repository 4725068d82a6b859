"""Instructions about code, whose answers the syntax tree knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tunesmith.data.make.library import (
    Definition,
    Excerpt,
    Module,
    Parameter,
    dotted,
    excerpt,
    first_sentence,
    is_generator,
    parameters,
    raised,
    receiver,
    without_docstring,
)
from tunesmith.data.make.maker import Candidate, Maker, coded, definition, listed, number, pick

LINES, CHARACTERS = 30, 1000
"""The longest excerpt."""

ASKED = {
    "en": {
        "parameters": (
            "List the parameters of this {kind} in order{self}.",
            "Which parameters does `{name}` take{self}? Keep their order.",
            "Name every parameter of this {kind}{self}, in the order of declaration.",
            "What are the parameters of `{name}`{self}? Answer with their names only.",
        ),
        "count": (
            "How many parameters does this {kind} have{self}?",
            "Count the parameters of `{name}`{self}, and name them.",
            "How many parameters does `{name}` declare{self}?",
        ),
        "required": (
            "Which arguments must be given when `{name}` is called?",
            "Which parameters of this {kind} have no default value{self}? Leave out those with a star.",
            "Name the arguments of `{name}` that cannot be left out{self}.",
        ),
        "default": (
            "What is the default value of the parameter `{parameter}`?",
            "Which value does `{parameter}` have when `{name}` is called without it?",
            "A caller leaves out `{parameter}`. Which value does `{name}` use?",
        ),
        "exceptions": (
            "Which exceptions does this {kind} raise with a `raise` statement of its own?",
            "Name the exceptions in the `raise` statements of `{name}`.",
            "Read the code. Which exceptions does `{name}` itself raise?",
        ),
        "generator": (
            "Is this {kind} a generator? Give the reason.",
            "Does calling `{name}` give a generator? Say why.",
        ),
        "signature": (
            "Write the `def` line of a Python {kind} named `{name}`. {given}",
            "A Python {kind} is named `{name}`. {given} Write its first line.",
            "How does the definition of a {kind} `{name}` begin in Python? {given}",
        ),
        "docstring": (
            "Write the first sentence of a docstring for this {kind}.",
            "What does this {kind} do? Answer in one sentence, as its docstring would.",
            "Document `{name}` in one sentence.",
        ),
        "methods": (
            "Name the public methods of the class `{name}`.",
            "Which methods of this class are public, that is, do not begin with an underscore?",
            "List the methods of `{name}` that do not begin with an underscore, in order.",
        ),
        "bases": (
            "What does the class `{name}` inherit from?",
            "Name the base class or classes of `{name}`.",
            "Which classes are the bases of this class?",
        ),
        "decorators": (
            "Which decorators does this {kind} carry?",
            "Name the decorators of `{name}`.",
        ),
    },
    "ko": {
        "parameters": (
            "이 {kind}의 매개변수를 순서대로 나열하세요{self}.",
            "`{name}` {kind}의 매개변수는 무엇인가요{self}? 선언된 순서대로 답하세요.",
            "다음 {kind}의 매개변수 이름을 선언된 순서대로 모두 쓰세요{self}.",
            "`{name}` {kind}에는 어떤 매개변수가 있나요{self}? 이름만 답하세요.",
        ),
        "count": (
            "이 {kind}의 매개변수는 몇 개인가요{self}?",
            "`{name}` {kind}의 매개변수가 몇 개인지 세고 이름도 쓰세요{self}.",
            "`{name}` {kind}에 선언된 매개변수는 모두 몇 개인가요{self}?",
        ),
        "required": (
            "`{name}` {kind}를 호출할 때 반드시 넘겨야 하는 인자는 무엇인가요?",
            "이 {kind}에서 기본값이 없는 매개변수를 모두 쓰세요{self}. 별표가 붙은 것은 빼세요.",
            "`{name}` {kind}를 호출할 때 생략할 수 없는 인자의 이름을 쓰세요.",
        ),
        "default": (
            "`{parameter}` 매개변수의 기본값은 무엇인가요?",
            "`{name}` {kind}를 호출하면서 `{parameter}` 인자를 생략하면 어떤 값이 쓰이나요?",
            "이 {kind}에서 `{parameter}` 매개변수는 기본적으로 어떤 값을 가지나요?",
        ),
        "exceptions": (
            "이 {kind}가 자신의 `raise` 문으로 일으키는 예외는 무엇인가요?",
            "`{name}` {kind}의 `raise` 문에 나오는 예외의 이름을 쓰세요.",
            "코드를 읽고, `{name}` {kind}가 직접 일으키는 예외를 모두 쓰세요.",
        ),
        "generator": (
            "이 {kind}는 제너레이터인가요? 이유도 말해 주세요.",
            "`{name}` {kind}를 호출하면 제너레이터가 만들어지나요? 이유와 함께 답하세요.",
        ),
        "signature": (
            "파이썬 {kind} `{name}`의 `def` 줄을 쓰세요. {given}",
            "파이썬 {kind} `{name}`의 첫 줄을 작성하세요. {given}",
            "파이썬에서 `{name}` {kind}의 정의는 어떻게 시작하나요? {given}",
        ),
        "docstring": (
            "이 {kind}에 넣을 영어 독스트링의 첫 문장을 쓰세요.",
            "이 {kind}의 기능을 독스트링처럼 영어 한 문장으로 설명하세요.",
            "`{name}` {kind}를 영어 한 문장으로 문서화하세요.",
        ),
        "methods": (
            "`{name}` 클래스의 공개 메서드 이름을 쓰세요.",
            "이 클래스의 메서드 가운데 공개된 것, 곧 이름이 밑줄로 시작하지 않는 것은 무엇인가요?",
            "`{name}` 클래스에서 이름이 밑줄로 시작하지 않는 메서드를 순서대로 나열하세요.",
        ),
        "bases": (
            "`{name}` 클래스는 무엇을 상속하나요?",
            "`{name}` 클래스의 기반 클래스를 모두 쓰세요.",
            "이 클래스의 기반 클래스는 무엇인가요?",
        ),
        "decorators": (
            "이 {kind}에 붙은 데코레이터는 무엇인가요?",
            "`{name}` {kind}의 데코레이터 이름을 쓰세요.",
        ),
    },
}

SAID = {
    "en": {
        "function": "function",
        "method": "method",
        "self": ", without `{}`",
        "names": "{}.",
        "no parameters": "It has no parameters.",
        "one": "It has 1 parameter: {names}.",
        "count": "It has {count} parameters: {names}.",
        "none required": "None: every parameter without a star has a default value.",
        "default": "`{}`.",
        "no default": "`{}` has no default value; it must be given.",
        "generator": "Yes. Its body holds a `yield`, so calling it makes a generator.",
        "no generator": "No. There is no `yield` in its body.",
        "no exceptions": "None. It has no `raise` statement.",
        "given none": "It takes no arguments.",
        "given": "It takes {}.",
        "given self": "After `{self}` it takes {given}.",
        "given only self": "It takes only `{self}`.",
        "with default": "`{name}` with the default `{default}`",
    },
    "ko": {
        "function": "함수",
        "method": "메서드",
        "self": " (`{}` 제외)",
        "names": "{}입니다.",
        "no parameters": "매개변수가 없습니다.",
        "one": "1개입니다: {names}.",
        "count": "{count}개입니다: {names}.",
        "none required": "없습니다. 별표가 붙지 않은 매개변수에는 모두 기본값이 있습니다.",
        "default": "`{}`입니다.",
        "no default": "`{}` 매개변수에는 기본값이 없습니다. 반드시 넘겨야 합니다.",
        "generator": "네. 본문에 `yield` 문이 있으므로 호출하면 제너레이터가 만들어집니다.",
        "no generator": "아니요. 본문에 `yield` 문이 없습니다.",
        "no exceptions": "없습니다. `raise` 문이 없습니다.",
        "given none": "인자는 없습니다.",
        "given": "매개변수는 다음과 같습니다: {}.",
        "given self": "`{self}` 다음의 매개변수는 다음과 같습니다: {given}.",
        "given only self": "매개변수는 `{self}` 하나뿐입니다.",
        "with default": "`{name}`(기본값 `{default}`)",
    },
}


def _candidates(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    for item in module.functions:
        for task, facts, shown, answer in _of_function(module, item, lang):
            facts |= {"kind": SAID[lang][item.kind], "name": item.short}
            yield task, _row(task, item, facts, shown, answer, lang, seed)
    for item in module.classes:
        for task, shown, names in _of_class(item):
            answer = SAID[lang]["names"].format(listed(coded(names), lang))
            yield task, _row(task, item, {"name": item.short}, shown, answer, lang, seed)


def _row(task: str, item: Definition, facts: dict[str, str], shown: str, answer: str, lang: str, seed: int) -> dict[str, str]:
    phrase = pick(ASKED[lang][task], seed, task, item.name)
    return {"instruction": phrase.format(**facts), "input": shown, "output": answer}


def _of_function(module: Module, item: Definition, lang: str) -> Iterator[tuple[str, dict[str, str], str, str]]:
    """(task, facts for the question, the code shown, the answer) of a function."""
    assert isinstance(item.node, ast.FunctionDef | ast.AsyncFunctionDef)
    said = SAID[lang]
    taken = parameters(item)
    hidden = {"self": said["self"].format(receiver(item)) if receiver(item) else ""}
    yield from _signature(item, taken, lang)
    part = excerpt(module, item.node)
    if part is None or len(part.text) > CHARACTERS or not 3 <= part.text.count("\n") + 1 <= LINES:
        return
    names = listed(coded(one.shown for one in taken), lang)
    if taken or _now_and_then(item, "parameters"):
        yield "parameters", hidden, part.text, said["names"].format(names) if taken else said["no parameters"]
    if taken:
        count = said["one" if len(taken) == 1 else "count"].format(count=len(taken), names=names)
        yield "count", hidden, part.text, count
    plain = [one for one in taken if not one.mark]
    required = coded(one.name for one in plain if one.default is None)
    if plain and len(required) < len(taken):
        answer = said["names"].format(listed(required, lang)) if required else said["none required"]
        yield "required", hidden, part.text, answer
    yield from _default(item, plain, part, lang)
    names_raised = raised(module, item.node)
    if names_raised:
        told = said["names"].format(listed(coded(dict.fromkeys(map(dotted, names_raised))), lang))
        yield "exceptions", {}, part.text, told
    elif names_raised is not None and _now_and_then(item, "exceptions"):
        yield "exceptions", {}, part.text, said["no exceptions"]
    if is_generator(item.node):
        yield "generator", {}, part.text, said["generator"]
    elif _now_and_then(item, "generator", 40) and "yield" not in part.text:
        yield "generator", {}, part.text, said["no generator"]
    if item.node.decorator_list:
        marks = coded(part.source(mark) for mark in item.node.decorator_list)
        yield "decorators", {}, part.text, said["names"].format(listed(marks, lang))
    sentence = first_sentence(item.doc)
    bare = without_docstring(part, item.node) if 15 <= len(sentence) <= 160 else None
    if bare and _is_code(item):
        yield "docstring", {}, bare, sentence


def _now_and_then(item: Definition, task: str, often: int = 12) -> bool:
    return number(task, item.name) % often == 0


def _is_code(item: Definition) -> bool:
    """Whether the body does more than refuse or pass: else nothing in it says what the docstring says."""
    body = item.node.body[1:]
    return any(not isinstance(line, ast.Pass | ast.Raise) for line in body)


def _default(
    item: Definition, plain: list[Parameter], part: Excerpt, lang: str
) -> Iterator[tuple[str, dict[str, str], str, str]]:
    given = [one for one in plain if one.default is not None]
    absent = [one for one in plain if one.default is None]
    if given:
        one = pick(given, item.name)
        assert one.default is not None
        text = part.source(one.default)
        if "\n" not in text and "`" not in text:
            yield "default", {"parameter": one.name}, part.text, SAID[lang]["default"].format(text)
        if absent and _now_and_then(item, "default", 6):
            name = pick(absent, item.name).name
            yield "default", {"parameter": name}, part.text, SAID[lang]["no default"].format(name)


def _signature(item: Definition, taken: list[Parameter], lang: str) -> Iterator[tuple[str, dict[str, str], str, str]]:
    """The ``def`` line from a description of the parameters; only lines that the description says completely."""
    node, said = item.node, SAID[lang]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    args = node.args
    annotated = node.returns or any(one.node.annotation for one in taken)
    if isinstance(node, ast.AsyncFunctionDef) or args.posonlyargs or args.kwonlyargs or annotated or len(taken) > 6:
        return
    given = []
    for one in taken:
        if one.default is None:
            given.append(f"`{one.shown}`")
            continue
        default = ast.unparse(one.default)
        if len(default) > 40 or "`" in default:
            return
        given.append(said["with default"].format(name=one.name, default=default))
    first = receiver(item)
    form = ("given self" if given else "given only self") if first else "given" if given else "given none"
    text = said[form].format(listed(given, lang), self=first, given=listed(given, lang))
    if not first and item.kind == "method":  # a static method: its decorator is not part of the line
        return
    yield "signature", {"given": text}, "", f"def {node.name}({ast.unparse(args)}):"


def _of_class(item: Definition) -> Iterator[tuple[str, str, list[str]]]:
    """(task, the code shown, the names to answer with) of a class."""
    shown = _outline(item)
    if shown is None:
        return
    assert isinstance(item.node, ast.ClassDef)
    names = re.findall(r"^    (?:async )?def (\w+)", shown, re.MULTILINE)
    public = [name for name in names if not name.startswith("_")]
    if public and len(names) >= 2:
        yield "methods", shown, public
    bases = [base for base in map(dotted, item.node.bases) if base]
    if bases and len(bases) == len(item.node.bases):
        yield "bases", shown, bases


def _outline(item: Definition) -> str | None:
    """The header of a class and of each of its methods; None for one with properties or without methods."""
    assert isinstance(item.node, ast.ClassDef)
    methods = [line for line in item.node.body if isinstance(line, ast.FunctionDef | ast.AsyncFunctionDef)]
    others = [line for line in item.node.body if line not in methods]
    if any(
        isinstance(inner, ast.FunctionDef) for line in others for inner in ast.walk(line) if not isinstance(line, ast.ClassDef)
    ):
        return None  # a method under an `if`
    plain = all(dotted(mark) in ("staticmethod", "classmethod") for line in methods for mark in line.decorator_list)
    if not plain or len({line.name for line in methods}) != len(methods) or not 1 <= len(methods) <= 16:
        return None
    given = [ast.unparse(base) for base in item.node.bases] + [ast.unparse(word) for word in item.node.keywords]
    lines = [f"class {item.node.name}({', '.join(given)}):" if given else f"class {item.node.name}:"]
    for line in methods:
        lines += [f"    @{ast.unparse(mark)}" for mark in line.decorator_list]
        kind = "async def" if isinstance(line, ast.AsyncFunctionDef) else "def"
        lines.append(f"    {kind} {line.name}({ast.unparse(line.args)}): ...")
    text = "\n".join(lines)
    return text if len(text) <= CHARACTERS else None


MAKER = Maker(
    _candidates,
    about={
        "en": "Real: the code, every name in an answer, the docstrings. Made up: the wording of questions and answers, and the "
        "outlines of classes (their headers, without the bodies).",
        "ko": "Real: the code, every name in an answer, the docstrings (which stay English). Made up: the Korean wording of "
        "questions and answers, and the outlines of classes (their headers, without the bodies).",
    },
    identity=("instruction", "input"),
    subject=lambda row: definition(row["input"] or row["output"]),
)
