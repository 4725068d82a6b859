"""A prompt, a true answer and a wrong one; which of the two is longer says nothing about which is true."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from tunesmith.data.make.docstrings import QUESTIONS
from tunesmith.data.make.library import (
    EXCEPTIONS,
    Definition,
    Module,
    dotted,
    excerpt,
    first_paragraph,
    paragraphs,
    parameters,
    raised,
    receiver,
)
from tunesmith.data.make.maker import Candidate, Maker, coded, definition, listed, number, pick

SHORTEST, LONGEST = 40, 400
"""Characters of a docstring that answers."""

CHARACTERS = 800
"""The longest source text in a prompt."""

ASKED = {
    "en": {
        "default": "What is the default value of `{parameter}` in the {kind} `{name}`?",
        "parameters": "Which parameters does the {kind} `{name}` take{self}?",
        "exceptions": "Which exceptions does the {kind} `{name}` raise itself?",
        "code": "\n\n{}",
    },
    "ko": {
        "default": "`{name}` {kind}에서 `{parameter}` 매개변수의 기본값은 무엇인가요?",
        "parameters": "`{name}` {kind}의 매개변수는 무엇인가요{self}?",
        "exceptions": "`{name}` {kind}가 직접 일으키는 예외는 무엇인가요?",
        "code": "\n\n{}",
    },
}

SAID = {
    "en": {
        "function": "function",
        "method": "method",
        "self": ", besides `{}`",
        "default": "The default value of `{}` is `{}`.",
        "parameters": "It takes {}.",
        "exceptions": "It raises {}.",
    },
    "ko": {
        "function": "함수",
        "method": "메서드",
        "self": " (`{}` 제외)",
        "default": "`{}` 매개변수의 기본값은 `{}`입니다.",
        "parameters": "매개변수는 다음과 같습니다: {}.",
        "exceptions": "다음 예외를 일으킵니다: {}.",
    },
}

VALUES = (None, True, False, 0, 1, -1, "", (), "utf-8", "strict", "r", 10, 1024, "replace", 0.5, "localhost")
"""What a default may be mistaken for."""

WORDS = ("path", "value", "name", "timeout", "key", "encoding", "flags", "callback", "size", "default", "x", "n", "mode")
"""Parameters that a function may be said to have."""

FAULTS = ("ValueError", "TypeError", "KeyError", "OSError", "RuntimeError", "AttributeError", "IndexError", "NotImplementedError")


def _candidates(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    spoken = [(item, first_paragraph(item.doc)) for item in module.definitions if item.doc]
    spoken = [(item, text) for item, text in spoken if SHORTEST <= len(text) <= LONGEST and text.endswith((".", "!", "?"))]
    for item, text in spoken:
        prompt = QUESTIONS[lang][item.kind].format(item.name)
        others = [other for near, other in spoken if near.kind == item.kind and _differ(text, other)]
        pairs = [
            [*_pair("another's docstring", prompt, text, others, item, seed)],
            [*_pair("cut off", prompt, text, _cut(item, text, seed), item, seed)],
        ]
        made = [pair for pair in pairs if pair]
        if made:
            yield from pick(made, seed, item.name, "flaw")
    for item in module.functions:
        yield from _facts(module, item, lang, seed)


def _facts(module: Module, item: Definition, lang: str, seed: int) -> Iterator[Candidate]:
    assert isinstance(item.node, ast.FunctionDef | ast.AsyncFunctionDef)
    part = excerpt(module, item.node)
    if part is None or len(part.text) > CHARACTERS:
        return
    asked, said = ASKED[lang], SAID[lang]
    taken = parameters(item)
    hidden = said["self"].format(receiver(item)) if receiver(item) else ""
    facts = {"kind": said[item.kind], "name": item.short, "self": hidden}
    code = asked["code"].format(part.text)

    given = [(one.name, one.default.value) for one in taken if isinstance(one.default, ast.Constant)]
    given = [(name, value) for name, value in given if len(repr(value)) <= 30]
    if given:
        name, value = pick(given, seed, item.name)
        wrong = {repr(other): other for other in [*(other for _, other in given), *VALUES] if other != value}
        question = asked["default"].format(parameter=name, **facts) + code
        true, *false = (said["default"].format(name, text) for text in [repr(value), *sorted(wrong)])
        yield from _pair("default value", question, true, false, item, seed)
    if taken:
        names = [one.shown for one in taken]
        true, *false = (
            said["parameters"].format(listed(coded(some), lang)) for some in [names, *_other_names(names, item, seed)]
        )
        yield from _pair("parameters", asked["parameters"].format(**facts) + code, true, false, item, seed)
    found = raised(module, item.node)
    if found:
        names = list(dict.fromkeys(map(dotted, found)))
        strange = [name for name in (*FAULTS, *sorted(module.exceptions - EXCEPTIONS)) if name not in names]
        others = [[*names[:-1], name] for name in strange]
        others += [[*names, strange[0]], names[:-1]] if len(names) > 1 else [[*names, strange[0]]]
        true, *false = (said["exceptions"].format(listed(coded(some), lang)) for some in [names, *others])
        yield from _pair("exceptions", asked["exceptions"].format(**facts) + code, true, false, item, seed)


def _other_names(names: list[str], item: Definition, seed: int) -> list[list[str]]:
    """Lists that are not the function's: with a parameter too many, of another name or left out, or in another order."""
    strange = [word for word in WORDS if word not in names]
    place = number(seed, item.name, "place") % len(names)
    more = pick(strange, seed, item.name)
    out = [[*names[:place], more, *names[place:]], [*names[:place], more, *names[place + 1 :]]]
    if len(names) > 1:
        out += [names[:place] + names[place + 1 :], [*names[1:], names[0]]]
    return out


def _differ(text: str, other: str) -> bool:
    """Whether two docstrings say different things: they share less than half of their words."""
    one, two = set(text.lower().split()), set(other.lower().split())
    return 2 * len(one & two) < min(len(one), len(two))


def _cut(item: Definition, text: str, seed: int) -> list[str]:
    """The docstring cut off within a sentence: within its first paragraph, and within a later one."""
    whole = " ".join(paragraphs(item.doc))
    out = []
    for shortest, longest in ((len(text) // 3, len(text) - 12), (len(text) + 20, min(len(whole) - 12, 3 * len(text)))):
        places = [n for n in range(shortest, longest) if whole[n : n + 1] == " " and whole[n - 1].isalpha()]
        if whole.startswith(text) and places:
            out.append(whole[: pick(places, seed, item.name, shortest)])
    return out


def _pair(flaw: str, prompt: str, chosen: str, wrong: Sequence[str], item: Definition, seed: int) -> Iterator[Candidate]:
    """One of the wrong answers: a longer or a shorter one, whichever the toss of a coin says, if there are both."""
    wrong = [text for text in wrong if text != chosen]
    sides = {
        "longer": [text for text in wrong if len(text) > len(chosen)],
        "shorter": [text for text in wrong if len(text) < len(chosen)],
        "as long": [text for text in wrong if len(text) == len(chosen)],
    }
    there = [name for name in ("longer", "shorter") if sides[name]] or [name for name in sides if sides[name]]
    if not there:
        return
    side = pick(there, seed, item.name, flaw, "side")
    near = sorted(sides[side], key=lambda text: (abs(len(text) - len(chosen)), text))[:4]
    rejected = pick(near, seed, item.name, flaw)
    yield f"{flaw}, {side}", {"instruction": prompt, "chosen": chosen, "rejected": rejected}


MAKER = Maker(
    _candidates,
    about={
        "en": "Real: the code, the docstrings, every fact of a chosen answer. Made up: the questions, the sentences around "
        "facts, and every rejected answer: another's docstring, one cut off, a wrong value, list or exception.",
        "ko": "Real: the code, the docstrings (which stay English), every fact of a chosen answer. Made up: the Korean "
        "questions, the sentences around facts, and every rejected answer: another's docstring, one cut off, a wrong value, list "
        "or exception.",
    },
    identity=("instruction",),
    subject=lambda row: definition(row["instruction"]),
)
