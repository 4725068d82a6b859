"""Questions answered in words (docstrings, instructions) or by a span of the context (qa)."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.data.read import library
from tunesmith.data.read.library import Module, first_sentence
from tunesmith.synth.python.facts import answer, facts, question
from tunesmith.synth.python.wording import Candidate, phrase, pick

NO_ANSWER = "no answer"
"""Beginning of the group names of unanswerable questions."""

IN_CODE = {"default", "exceptions", "quotation", "next parameter", "bases"}
"""Tasks whose answer may be one span of the code."""

LISTED = 5
"""Definitions of a module that one context describes."""


def docstrings(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    """Real: the answer is the first paragraph of the docstring. Made up: the wording of the question."""
    for item, row in library.docstrings(module, lang):
        yield Candidate(item.kind, item.name, {**row})


def instructions(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    """Real: the code, every name in an answer, docstrings. Made up: the wording of questions and answers."""
    for item in module.definitions:
        for fact in facts(item):
            row = {"instruction": question(fact, item, lang, seed), "input": fact.code}
            yield Candidate(fact.task, item.name, {**row, "output": answer(fact, fact.values, lang)})


def qa(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    """Real: the contexts (source of the library, sentences of its docstrings) and the answers in them.
    Made up: the questions, and the lists that join sentences of several docstrings."""
    for item in module.definitions:
        for fact in facts(item):
            if fact.task in IN_CODE and (fact.start is not None or not fact.values):
                yield _row(fact.task, fact.code, question(fact, item, lang, seed), fact.start, *fact.values)
    prefix = f"{module.name}."
    sentences = {item.name.removeprefix(prefix): first_sentence(item.doc) for item in module.definitions[1:]}
    sentences = {name: sentence for name, sentence in sentences.items() if 12 <= len(sentence) <= 200}
    for first in range(0, len(sentences) - 2, LISTED):
        names = [*sentences][first : first + LISTED]
        lines = "".join(f"\n{name}: {sentences[name]}" for name in names)
        context = phrase(lang, "listing", name=module.name) + lines
        inside, anywhere = pick(names, seed, context), pick([*sentences], seed, context, "anywhere")
        start = context.index(f"\n{inside}: ") + len(f"\n{inside}: ")
        yield _row("described", context, phrase(lang, "described", name=inside), start, sentences[inside])
        if anywhere not in names:
            yield _row("described", context, phrase(lang, "described", name=anywhere), None)


def _row(task: str, context: str, asked: str, start: int | None, *texts: str) -> Candidate:
    answers = {"text": [*texts], "answer_start": [] if start is None else [start]}
    group = task if texts else f"{NO_ANSWER}: {task}"
    return Candidate(group, context, {"context": context, "question": asked, "answers": answers})
