"""Phrases in English and Korean, the choice of one of several phrases, and a row that may be drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from tunesmith.json_types import JsonObject

Choice = TypeVar("Choice")


class Candidate(NamedTuple):
    """A row that may be drawn: evenly from the groups, a second row about a subject last."""

    group: str
    about: str
    row: JsonObject


def table(text: str) -> dict[str, tuple[str, ...]]:
    """Read lines ``key: phrase`` into key -> its phrases."""
    phrases: dict[str, tuple[str, ...]] = {}
    for line in text.strip().split("\n"):
        key, _, phrase = line.strip().partition(": ")
        phrases[key] = (*phrases.get(key, ()), phrase)
    return phrases


WORDING = {
    "en": table("""
        frame: {question}
        frame: Read the code. {question}
        frame: {question} Answer from the code.
        parameters: Which parameters does the {kind} `{name}` take{self}? Keep their order.
        required: Which parameters of `{name}` have no default value{self}? Leave out those with a star.
        default: What is the default value of the parameter `{parameter}` of `{name}`?
        default: Which value does `{parameter}` have when the {kind} `{name}` is called without it?
        next parameter: Which parameter of the {kind} `{name}` follows `{parameter}`?
        exceptions: Which exceptions does the {kind} `{name}` raise with a `raise` statement of its own?
        exceptions: Which exceptions appear in the `raise` statements of `{name}`?
        decorators: Which decorators does the {kind} `{name}` carry?
        bases: Which classes does `{name}` inherit from?
        bases: What is the base class of `{name}`, or what are its base classes?
        quotation: What does the {kind} `{name}` do, according to its docstring?
        quotation: How does the docstring of `{name}` begin?
        docstring: Write the first sentence of a docstring for the {kind} `{name}`.
        docstring: What does this {kind} do? Say it in one sentence, as its docstring would.
        signature: Write the `def` line of a Python {kind} named `{name}`. Its parameters are {parameter}.
        signature: How does the definition of a Python {kind} `{name}` begin? Its parameters are {parameter}.
        described: What does `{name}` do?
        listing: The module `{name}` documents among others:
        summarise: Summarise this documentation in one sentence.
        summarise: What is this documentation about? Answer in one sentence.
        documentation: The documentation of the {kind} `{name}`:
        translate: Translate into Korean.
        translate: Write this in Korean. Keep the code as it is.
        stated parameters: The parameters of the {kind} `{name}` are, in this order, {names}.
        stated parameters: The {kind} `{name}` is called with {names}.
        stated required: In the {kind} `{name}`, no default value belongs to {names}.
        stated default: If `{parameter}` is left out when the {kind} `{name}` is called, its value is {names}.
        stated default: The default value of the parameter `{parameter}` of the {kind} `{name}` is {names}.
        stated next parameter: In the {kind} `{name}`, the parameter {names} follows `{parameter}`.
        stated exceptions: The {kind} `{name}` may raise {names}.
        stated exceptions: A call of the {kind} `{name}` can end with {names}.
        stated decorators: The {kind} `{name}` is decorated with {names}.
        stated bases: The class `{name}` inherits from {names}.
        stated bases: The class `{name}` is derived from {names}.
        self: , without `{name}`
        yes: {names}.
        no: None.
        no default: `{parameter}` has no default value; it must be given.
    """),
    "ko": table("""
        frame: {question}
        frame: 코드를 읽고 답하세요. {question}
        frame: {question} 코드에서 답을 찾으세요.
        parameters: `{name}` {kind}의 매개변수는 무엇인가요{self}? 선언된 순서대로 답하세요.
        required: `{name}` {kind}에서 기본값이 없는 매개변수는 무엇인가요{self}? 별표가 붙은 것은 빼세요.
        default: `{name}` {kind}에서 `{parameter}` 매개변수의 기본값은 무엇인가요?
        default: `{name}` {kind}를 호출하면서 `{parameter}` 인자를 생략하면 어떤 값이 쓰이나요?
        next parameter: `{name}` {kind}에서 `{parameter}` 매개변수 다음에 오는 매개변수는 무엇인가요?
        exceptions: `{name}` {kind}가 자신의 `raise` 문으로 일으키는 예외는 무엇인가요?
        exceptions: `{name}` {kind}의 `raise` 문에는 어떤 예외가 나오나요?
        decorators: `{name}` {kind}에 붙은 데코레이터는 무엇인가요?
        bases: `{name}` 클래스는 어떤 클래스를 상속하나요?
        bases: `{name}` 클래스의 기반 클래스는 무엇인가요?
        quotation: 독스트링에 따르면 `{name}` {kind}의 기능은 무엇인가요?
        quotation: `{name}` {kind}의 독스트링은 어떤 문장으로 시작하나요?
        docstring: `{name}` {kind}에 넣을 영어 독스트링의 첫 문장을 쓰세요.
        docstring: 이 {kind}의 기능을 독스트링처럼 영어 한 문장으로 설명하세요.
        signature: 파이썬 {kind} `{name}`의 `def` 줄을 쓰세요. 매개변수는 다음과 같습니다: {parameter}.
        signature: 파이썬에서 `{name}` {kind}의 정의는 어떻게 시작하나요? 매개변수는 다음과 같습니다: {parameter}.
        described: `{name}`의 기능은 무엇인가요?
        listing: `{name}` 모듈의 문서에는 다음 내용이 있습니다.
        summarise: 이 문서를 영어 한 문장으로 요약하세요.
        summarise: 이 문서는 무엇에 관한 것인가요? 영어 한 문장으로 답하세요.
        documentation: `{name}` {kind}의 문서:
        translate: 영어로 번역하세요.
        translate: 다음 글을 영어로 옮기세요. 코드는 그대로 두세요.
        stated parameters: `{name}` {kind}의 매개변수는 순서대로 {names}입니다.
        stated parameters: `{name}` {kind}를 호출할 때 넘기는 것은 {names}입니다.
        stated required: `{name}` {kind}에서 기본값이 없는 것은 {names}입니다.
        stated default: `{name}` {kind}를 호출할 때 `{parameter}` 인자를 생략하면 그 값은 {names}입니다.
        stated default: `{name}` {kind}에서 `{parameter}` 매개변수의 기본값은 {names}입니다.
        stated next parameter: `{name}` {kind}에서 `{parameter}` 다음에 오는 매개변수는 {names}입니다.
        stated exceptions: `{name}` {kind}가 일으킬 수 있는 예외는 {names}입니다.
        stated exceptions: `{name}` {kind}를 호출하면 생길 수 있는 예외는 {names}입니다.
        stated decorators: `{name}` {kind}에 붙은 데코레이터는 {names}입니다.
        stated bases: `{name}` 클래스가 상속하는 것은 {names}입니다.
        stated bases: `{name}` 클래스의 기반 클래스는 {names}입니다.
        self:  (`{name}` 제외)
        yes: {names}입니다.
        no: 없습니다.
        no default: `{parameter}` 매개변수에는 기본값이 없습니다. 반드시 넘겨야 합니다.
        class: 클래스
        function: 함수
        method: 메서드
        property: 속성
        module: 모듈
    """),
}
"""Questions by task, frames for questions about code, answers (``no``: nothing to name), words."""


def phrase(lang: str, key: str, seed: object = 0, **slots: object) -> str:
    """Return a phrase for ``key``, chosen by ``seed``, with its slots filled."""
    return pick(WORDING[lang][key], key, seed).format(**slots)


def pick(options: Sequence[Choice], *key: object) -> Choice:
    """Return one of ``options`` by a hash of ``key``, the same on every machine."""
    return options[number(*key) % len(options)]


def number(*key: object) -> int:
    """Return a hash of ``key`` below 2**32, the same on every machine."""
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=4).digest())


def join_names(names: Iterable[str], lang: str) -> str:
    """Return ``a, b and c``; in Korean ``a, b, c``."""
    *most, last = names
    return ", ".join([*most, last]) if lang == "ko" or not most else f"{', '.join(most)} and {last}"
