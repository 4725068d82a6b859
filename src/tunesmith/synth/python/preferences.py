"""A prompt with a true answer and a wrong one, as pairs (preferences) or one by one (judged).

Which of the two is longer says nothing about which is true.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from tunesmith.data.read.library import Definition, Module, docstrings, paragraphs
from tunesmith.synth.python.facts import Fact, answer, facts, question
from tunesmith.synth.python.wording import Candidate, number, pick

STRANGERS = {
    "default": "None True False 0 1 -1 '' () 'utf-8' 'strict' 'r' 10 1024 'replace' 0.5 'localhost'",
    "parameters": "path value name timeout key encoding flags callback size default x n mode",
    "exceptions": "ValueError TypeError KeyError OSError RuntimeError AttributeError IndexError EOFError",
}
"""By task, what the true answer may be mistaken for."""


def preferences(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    """Real: the code, the docstrings, every fact of a chosen answer. Made up: the questions, the sentences
    around facts, and every rejected answer: another's docstring, one cut off, a wrong value, list or exception."""
    told = {row["instruction"]: (item, row["response"]) for item, row in docstrings(module, lang)}
    whole = {asked: one for asked, one in told.items() if 40 <= len(one[1]) <= 400 and one[1][-1] in ".!?"}
    for asked, (item, text) in whole.items():
        others = [other for one, other in whole.values() if one.kind == item.kind and _differ(text, other)]
        flaws = {"another's docstring": others, "cut off": _cut(item, text, seed)}
        flaw = pick([name for name, wrong in flaws.items() if wrong] or ["cut off"], seed, item.name)
        yield from _pair(flaw, asked, text, flaws[flaw], item, seed)
    for item in module.definitions:
        for fact in facts(item):
            if fact.task in STRANGERS and fact.values:
                false = [answer(fact, values, lang) for values in _wrong(fact, item, seed)]
                asked = f"{question(fact, item, lang, seed)}\n\n{fact.code}"
                yield from _pair(fact.task, asked, answer(fact, fact.values, lang), false, item, seed)


def judged(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    """Real: the code, the docstrings, every fact of a good answer. Made up: the questions, the sentences
    around facts, and every bad answer: another's docstring, one cut off, a wrong value, list or exception."""
    for group, about, row in preferences(module, lang, seed):
        for name, label in ("chosen", True), ("rejected", False):
            judgement = {"prompt": row["instruction"], "completion": row[name], "label": label}
            yield Candidate(f"{group}, {'good' if label else 'bad'}", about, judgement)


def _wrong(fact: Fact, item: Definition, seed: int) -> list[tuple[str, ...]]:
    """Other defaults; lists with a name too many, of another name or left out."""
    strange = [name for name in STRANGERS[fact.task].split() if name not in fact.values]
    if fact.task == "default":
        value = ast.parse(fact.values[0], mode="eval").body
        known = isinstance(value, ast.Constant)  # what a name stands for may be the same value
        return [(name,) for name in strange if known and ast.literal_eval(name) != ast.literal_eval(value)]
    place = number(seed, item.name, "place") % len(fact.values)
    before, after = fact.values[:place], fact.values[place:]
    some = strange[number(seed, item.name) % 4 :: 4]
    out = [(*before, some[0], *after), *((*before, name, *after[1:]) for name in some)]
    return [*out, (*before, *after[1:])] if len(fact.values) > 1 else out


def _differ(text: str, other: str) -> bool:
    """Whether two docstrings say different things: they share less than half of their words."""
    one, two = set(text.lower().split()), set(other.lower().split())
    return 2 * len(one & two) < min(len(one), len(two))


def _cut(item: Definition, text: str, seed: int) -> list[str]:
    """The docstring cut off within a sentence: within its first paragraph, and within a later one."""
    whole = " ".join(paragraphs(item.doc))
    out = []
    further = min(len(whole) - 12, 3 * len(text))
    for shortest, longest in ((len(text) // 3, len(text) - 12), (len(text) + 20, further)):
        places = [n for n in range(shortest, longest) if whole[n] == " " and whole[n - 1].isalpha()]
        if places:
            out.append(whole[: pick(places, seed, item.name, shortest)])
    return out


def _pair(
    flaw: str, prompt: str, chosen: str, wrong: Sequence[str], item: Definition, seed: int
) -> Iterator[Candidate]:  # fmt: skip
    """One of the wrong answers that are longer or of those that are shorter, as the toss of a coin says."""
    sides = {"longer": [text for text in wrong if len(text) > len(chosen)]}
    sides["shorter"] = [text for text in wrong if len(text) < len(chosen)]
    there = [side for side, texts in sides.items() if texts]
    if there:
        side = pick(there, seed, item.name, flaw, "side")
        near = sorted(sides[side], key=lambda text: (abs(len(text) - len(chosen)), text))[:4]
        row = {"instruction": prompt, "chosen": chosen, "rejected": pick(near, seed, item.name, flaw)}
        yield Candidate(f"{flaw}, {side}", item.name, row)
