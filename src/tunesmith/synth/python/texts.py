"""Texts to shorten and to translate: documentation and its first sentence, facts in English and Korean."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.data.read import library
from tunesmith.data.read.library import Definition, Module
from tunesmith.synth.python.facts import VERBATIM, Fact, facts
from tunesmith.synth.python.wording import Candidate, join_names, phrase

SUMMARY_CHARACTERS, DOCUMENT_CHARACTERS = (20, 200), (200, 1500)
"""Fewest and most characters of a summary, and of the text without it."""
LONGER = 2
"""The text is at least this many times as long as its summary."""
SENTENCES = 3
"""Most facts of a definition that one text states."""


def summaries(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    """Real: the text is a docstring without its first sentence, which is the summary. Made up: the instruction."""
    for item in module.definitions:
        summary = library.first_sentence(item.doc)
        rest = _without_first_sentence(item.doc) if summary else ""
        fits = SUMMARY_CHARACTERS[0] <= len(summary) <= SUMMARY_CHARACTERS[1]
        is_long = max(DOCUMENT_CHARACTERS[0], LONGER * len(summary)) <= len(rest) <= DOCUMENT_CHARACTERS[1]
        if fits and is_long and summary not in rest:
            head = phrase(lang, "documentation", kind=_kind(item, lang), name=item.short)
            asked = phrase(lang, "summarise", seed=(seed, item.name))
            row = {"instruction": asked, "input": f"{head}\n\n{rest}", "output": summary}
            yield Candidate(item.kind, item.name, row)


def translations(module: Module, lang: str, seed: int) -> Iterator[Candidate]:
    """Real: the facts, and every name and value. Made up: the sentences that state them in both languages."""
    for item in module.definitions:
        stated = [
            fact for fact in facts(item) if fact.values and fact.task not in VERBATIM and _is_plain(fact)
        ]
        for first in range(0, len(stated), SENTENCES):
            part = stated[first : first + SENTENCES]
            texts = {of: " ".join(_state(fact, item, of, seed) for fact in part) for of in ("en", "ko")}
            source, target = ("ko", "en") if lang == "ko" else ("en", "ko")
            asked = phrase(lang, "translate", seed=(seed, item.name, first))
            row = {"instruction": asked, "input": texts[source], "output": texts[target]}
            yield Candidate(part[0].task, item.name, row)


def _without_first_sentence(doc: str) -> str:
    """Return the paragraphs of a docstring but its first sentence and examples of code."""
    first, *others = library.paragraphs(doc)
    rest = " ".join(library.sentences(first)[1:])
    return "\n\n".join(part for part in (rest, *others) if part and not part.startswith(">>>"))


def _state(fact: Fact, item: Definition, lang: str, seed: int) -> str:
    """Return the sentence that states a fact. The same phrase is chosen in both languages."""
    names = join_names([f"`{name}`" for name in fact.values], lang)
    slots = {"kind": _kind(item, lang), "name": item.short, "parameter": fact.parameter, "names": names}
    return phrase(lang, f"stated {fact.task}", seed=(seed, item.name), **slots)


def _is_plain(fact: Fact) -> bool:
    """Return whether no value would break the marks around it."""
    return not any("`" in value or "\n" in value for value in fact.values)


def _kind(item: Definition, lang: str) -> str:
    return phrase(lang, item.kind) if lang == "ko" else item.kind
