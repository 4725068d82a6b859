"""Korean sentences about the library: made-up wording around true names. Every name stands before a Korean noun or a space, so
that no particle depends on how it is read aloud."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tunesmith.data.make.library import Definition, Module, dotted, parameters, raised
from tunesmith.data.make.maker import number, pick

Entity = tuple[int, int, str]
"""Characters [start, end) of a sentence, and what they name."""

KOREAN = {
    "EXCEPTION": "예외",
    "MODULE": "모듈",
    "CLASS": "클래스",
    "NUMBER": "숫자",
    "FUNCTION": "함수",
    "PARAM": "매개변수",
}

SENTENCES = {
    "function": (
        "{MODULE} 모듈의 {FUNCTION} 함수는 {PARAM} 매개변수를 받습니다.",
        "{FUNCTION} 함수를 쓰려면 먼저 {MODULE} 모듈을 가져와야 합니다.",
        "{MODULE} 모듈을 열어 보면 {FUNCTION} 함수가 정의되어 있습니다.",
        "{FUNCTION} 함수를 호출할 때 {REQUIRED} 인자를 빠뜨리면 안 됩니다.",
        "{FUNCTION} 함수의 {NUMERIC} 매개변수에는 기본값 {NUMBER} 대신 다른 값을 줄 수 있습니다.",
        "{NUMERIC} 인자를 생략하면 {FUNCTION} 함수는 {NUMBER} 값을 기본으로 사용합니다.",
        "{FUNCTION} 함수는 상황에 따라 {EXCEPTION} 예외를 일으킬 수 있습니다.",
        "{EXCEPTION} 예외를 처리하려면 {FUNCTION} 함수 호출을 try 문으로 감싸세요.",
        "{FUNCTION} 함수에서 {PARAM} 매개변수 다음에는 {NEXT} 매개변수가 옵니다.",
        "{FUNCTION} 함수에 {PARAM} 값을 넘기고 결과를 확인해 보세요.",
        "{MODULE} 모듈의 문서에서 {FUNCTION} 함수의 설명을 찾을 수 있습니다.",
        "이 예제는 {MODULE} 모듈에 있는 {FUNCTION} 함수의 사용법을 보여 줍니다.",
    ),
    "method": (
        "{CLASS} 클래스의 {FUNCTION} 메서드는 {PARAM} 매개변수를 받습니다.",
        "{CLASS} 객체를 만든 다음 {FUNCTION} 메서드를 호출하세요.",
        "{MODULE} 모듈에는 {CLASS} 클래스가 있고, 그 안에 {FUNCTION} 메서드가 있습니다.",
        "{CLASS} 객체의 {FUNCTION} 메서드는 상황에 따라 {EXCEPTION} 예외를 일으킬 수 있습니다.",
        "{FUNCTION} 메서드를 {CLASS} 클래스의 하위 클래스에서 다시 정의할 수 있습니다.",
        "{CLASS} 클래스의 {FUNCTION} 메서드를 호출할 때는 {REQUIRED} 인자가 꼭 필요합니다.",
        "{FUNCTION} 메서드의 {NUMERIC} 매개변수에는 기본값 {NUMBER} 대신 다른 값을 줄 수 있습니다.",
        "{FUNCTION} 메서드에서 {PARAM} 매개변수 다음에는 {NEXT} 매개변수가 옵니다.",
        "{EXCEPTION} 예외를 처리하려면 {FUNCTION} 메서드 호출을 try 문으로 감싸세요.",
        "{MODULE} 모듈을 가져온 뒤 {CLASS} 객체의 {FUNCTION} 메서드에 {PARAM} 값을 넘겨 보세요.",
    ),
    "class": (
        "{MODULE} 모듈에는 {CLASS} 클래스가 정의되어 있습니다.",
        "{MODULE} 모듈을 가져오면 {CLASS} 객체를 만들 수 있습니다.",
        "{CLASS} 클래스의 공개 메서드는 모두 {NUMBER} 개입니다.",
    ),
    "exception": (
        "{EXCEPTION} 예외는 {MODULE} 모듈에 정의되어 있습니다.",
        "{MODULE} 모듈을 쓸 때는 {EXCEPTION} 예외에 대비하세요.",
    ),
}

TAG_OF = {"REQUIRED": "PARAM", "NEXT": "PARAM", "NUMERIC": "PARAM"}


def korean_sentences(module: Module, seed: int) -> Iterator[tuple[str, list[Entity]]]:
    """Two sentences for each public name of a module that is no property, with the entities in them."""
    for item in module.definitions:
        if item.kind in ("module", "property"):
            continue
        facts = _facts(module, item)
        kind = "exception" if "EXCEPTION" in facts and item.kind == "class" else item.kind
        fitting = [text for text in SENTENCES[kind] if set(re.findall(r"{(\w+)}", text)) <= facts.keys()]
        if not fitting:
            continue
        first = number(seed, item.name) % len(fitting)
        for text in {fitting[first]: None, fitting[(first + 1 + len(fitting) // 2) % len(fitting)]: None}:
            yield _filled(text, facts, pick(("{}", "`{}`"), seed, item.name, text))


def _facts(module: Module, item: Definition) -> dict[str, str]:
    """What may be said of a definition, by the place in a sentence that it fills."""
    facts = {"MODULE": module.name}
    if isinstance(item.node, ast.ClassDef):
        if item.short in module.exceptions:
            return {**facts, "EXCEPTION": item.short}
        methods = [one for one in module.functions if one.name.rpartition(".")[0] == item.name]
        count = 0 if item.node.bases else len({one.short for one in methods})  # inherited ones are not seen
        return {**facts, "CLASS": item.short, **({"NUMBER": str(count)} if count else {})}
    assert isinstance(item.node, ast.FunctionDef | ast.AsyncFunctionDef)
    facts["FUNCTION"] = item.short
    if item.kind == "method":
        owner = item.name.split(".")[-2]
        facts |= {"CLASS": owner} if owner not in module.exceptions else {}
    taken = [one for one in parameters(item) if not one.mark]
    required = [one.name for one in taken if one.default is None]
    numeric = [(one.name, one.default.value) for one in taken if isinstance(one.default, ast.Constant)]
    numeric = [(name, value) for name, value in numeric if type(value) in (int, float)]
    facts |= {"PARAM": taken[0].name} if taken else {}
    facts |= {"NEXT": taken[1].name} if len(taken) > 1 else {}
    facts |= {"REQUIRED": required[0]} if required else {}
    facts |= {"NUMERIC": numeric[0][0], "NUMBER": repr(numeric[0][1])} if numeric else {}
    names = [dotted(name) for name in raised(module, item.node) or ()]
    return {**facts, "EXCEPTION": names[0]} if names else facts


def _filled(text: str, facts: dict[str, str], form: str) -> tuple[str, list[Entity]]:
    """The sentence with its facts, and where they stand in it. Names are put in ``form``, numbers are not."""
    out, entities = "", []
    for piece in re.split(r"({\w+})", text):
        if not piece.startswith("{"):
            out += piece
            continue
        place = piece[1:-1]
        shown = facts[place] if place == "NUMBER" else form.format(facts[place])
        start = len(out) + shown.index(facts[place])
        entities.append((start, start + len(facts[place]), TAG_OF.get(place, place)))
        out += shown
    return out, entities
