"""Prompts with a true and a wrong answer, as pairs (preferences) or one by one (judged).

The length of an answer does not tell whether it is true.
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
"""Task -> plausible wrong names."""


def preferences(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    """Real: the code, the docstrings, every fact of a chosen answer. Made up: the questions, the sentences
    around facts, and every rejected answer: another's docstring, one cut off, a wrong value, list or
    exception."""
    rows = {row["instruction"]: (item, row["response"]) for item, row in docstrings(module, lang)}
    whole = {asked: row for asked, row in rows.items() if 40 <= len(row[1]) <= 400 and row[1][-1] in ".!?"}
    for asked, (item, text) in whole.items():
        others = [other for one, other in whole.values() if one.kind == item.kind and _differ(text, other)]
        flaws = {"another's docstring": others, "cut off": _cut_off(item, text, seed)}
        flaw = pick([name for name, wrong in flaws.items() if wrong] or ["cut off"], seed, item.name)
        yield from _pair(flaw, asked, text, flaws[flaw], item, seed)
    for item in module.definitions:
        for fact in facts(item):
            if fact.task in STRANGERS and fact.values:
                wrong = [answer(fact, values, lang) for values in _wrong_values(fact, item, seed)]
                asked = f"{question(fact, item, lang, seed)}\n\n{fact.code}"
                yield from _pair(fact.task, asked, answer(fact, fact.values, lang), wrong, item, seed)


def judged(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    """Real: the code, the docstrings, every fact of a good answer. Made up: the questions, the sentences
    around facts, and every bad answer: another's docstring, one cut off, a wrong value, list or exception."""
    for group, about, row in preferences(module, lang, seed):
        for name, label, word in ("chosen", True, "good"), ("rejected", False, "bad"):
            judgement = {"prompt": row["instruction"], "completion": row[name], "label": label}
            yield Candidate(f"{group}, {word}", about, judgement)


def _wrong_values(fact: Fact, item: Definition, seed: int) -> list[tuple[str, ...]]:
    """Return other defaults; or lists with one name added, replaced or left out."""
    strange = [name for name in STRANGERS[fact.task].split() if name not in fact.values]
    if fact.task == "default":
        value = ast.parse(fact.values[0], mode="eval").body
        if not isinstance(value, ast.Constant):  # a name may stand for an equal value
            return []
        return [(name,) for name in strange if ast.literal_eval(name) != ast.literal_eval(value)]
    place = number(seed, item.name, "place") % len(fact.values)
    before, after = fact.values[:place], fact.values[place:]
    names = strange[number(seed, item.name) % 4 :: 4]
    wrong = [(*before, names[0], *after), *((*before, name, *after[1:]) for name in names)]
    return [*wrong, (*before, *after[1:])] if len(fact.values) > 1 else wrong


def _differ(text: str, other: str) -> bool:
    """Return whether two docstrings share less than half of their words."""
    a, b = set(text.lower().split()), set(other.lower().split())
    return 2 * len(a & b) < min(len(a), len(b))


def _cut_off(item: Definition, text: str, seed: int) -> list[str]:
    """Return the docstring cut off within a sentence: in its first paragraph, and in a later one."""
    whole = " ".join(paragraphs(item.doc))
    cut = []
    longest_later = min(len(whole) - 12, 3 * len(text))
    for shortest, longest in (len(text) // 3, len(text) - 12), (len(text) + 20, longest_later):
        places = [n for n in range(shortest, longest) if whole[n] == " " and whole[n - 1].isalpha()]
        if places:
            cut.append(whole[: pick(places, seed, item.name, shortest)])
    return cut


def _pair(
    flaw: str, prompt: str, chosen: str, wrong: Sequence[str], item: Definition, seed: int
) -> Iterator[Candidate]:  # fmt: skip
    """Yield a pair with one of the longer or one of the shorter wrong answers, as a coin decides."""
    sides = {"longer": [text for text in wrong if len(text) > len(chosen)]}
    sides["shorter"] = [text for text in wrong if len(text) < len(chosen)]
    possible = [side for side, texts in sides.items() if texts]
    if possible:
        side = pick(possible, seed, item.name, flaw, "side")
        near = sorted(sides[side], key=lambda text: (abs(len(text) - len(chosen)), text))[:4]
        row = {"instruction": prompt, "chosen": chosen, "rejected": pick(near, seed, item.name, flaw)}
        yield Candidate(f"{flaw}, {side}", item.name, row)
