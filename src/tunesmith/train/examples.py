"""Choose answers to held-out rows for the report, wrong and right ones, and add the text of their rows."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tunesmith.data.data_config import Source
from tunesmith.data.read.source import open_source
from tunesmith.data.rows import Labelled, Message, Question, Ranking, Row, Tagged
from tunesmith.json_types import JsonObject
from tunesmith.metrics import entities

MOST_RIGHT = 5


def select(answers: Sequence[JsonObject], most: int) -> JsonObject:
    """Return ``wrong``, at most ``most`` wrong answers, highest loss first, and ``right``, some right ones.

    Equal mistakes (the same gold and predicted value, or the same confusions of tags) are one entry. It has
    the answer with the highest loss, and ``alike`` counts its rows."""
    known = [answer for answer in answers if answer["loss"] is not None]
    wrong: dict[str, JsonObject] = {}
    for answer in sorted(known, key=lambda answer: -answer["loss"]):
        if _is_right(answer):
            continue
        key = _kind_of_mistake(answer)
        if key in wrong:
            wrong[key]["alike"] += 1
        elif len(wrong) < most:
            wrong[key] = {**answer, "alike": 1}
    return {"wrong": list(wrong.values()), "right": [one for one in known if _is_right(one)][:MOST_RIGHT]}


def _is_right(answer: JsonObject) -> bool:
    return bool(answer.get("right", answer["prediction"] == answer["gold"]))


def _kind_of_mistake(answer: JsonObject) -> str:
    gold, predicted = answer["gold"], answer["prediction"]
    if gold is None or not isinstance(gold, str | list):  # rankings and numbers are never equal mistakes
        return str(answer["row"])
    if "scores" in answer:  # tags of words
        return json.dumps(sorted({(true, tag) for true, tag in zip(gold, predicted) if true != tag}))
    return json.dumps([gold, predicted])


def with_rows(
    answers: Sequence[JsonObject], sources: Sequence[Source], accepted: tuple[type, ...]
) -> list[JsonObject]:
    """Return answers with the text of their rows. Reads the rows again from their files."""
    shown = {}
    for index, source in enumerate(sources):
        numbers = {answer["row"][1] for answer in answers if answer["row"][0] == index}
        rows = iter(open_source(source, accepted).rows() if numbers else ())
        last = max(numbers, default=0)
        for item in rows:
            if isinstance(item, tuple) and item[0].row in numbers:
                shown[index, item[0].row] = item[1]
            if isinstance(item, tuple) and item[0].row >= last:
                break
    return [
        {"where": f"{sources[place[0]].label}:{place[1]}", **_with_text(shown[place], answer)}
        for answer in answers
        if (place := (answer["row"][0], answer["row"][1])) in shown
    ]


def _with_text(row: Row, answer: JsonObject) -> JsonObject:
    """Return ``answer`` with the text of its row, in the form that ``report.task_page`` shows.

    ``gold_spans`` and ``predicted_spans`` are the character ranges of entities and answers. For a ranking,
    ``gold`` is the best answer, and ``prediction`` is the one of the others with the highest reward.
    """
    if isinstance(row, Labelled):
        pair = {} if row.text_pair is None else {"text_pair": row.text_pair}
        return {"text": row.text, **pair, **answer}
    if isinstance(row, Tagged):
        gold_tags = answer["gold"] or []  # None = untagged
        tags = {"gold_spans": gold_tags, "predicted_spans": answer["prediction"]}
        if not entities.scheme_of(tag for names in tags.values() for tag in names):
            return {"text": row.text, **answer}
        spans: JsonObject = {
            key: [
                {"type": kind, "start": row.words[first][0], "end": row.words[end - 1][1]}
                for kind, first, end in entities.spans(names)
            ]
            for key, names in tags.items()
        }
        return {"text": row.text, **spans, **answer}
    if isinstance(row, Question):
        predicted = [] if answer["start"] is None else [{"start": answer["start"], "end": answer["end"]}]
        true = [{"start": start, "end": start + len(text)} for text, start in row.answers or ()]
        shown = {"question": row.question, "text": row.context}
        return {**shown, "gold_spans": true, "predicted_spans": predicted, **answer}
    assert isinstance(row, Ranking)
    rewards = answer["prediction"]
    best = row.ranks.index(min(row.ranks))
    other = max((place for place in range(len(rewards)) if place != best), key=rewards.__getitem__)
    texts = [_turns_text(turns) for turns in row.answers]
    gold, prediction = (f"[reward {rewards[place]:.3f}] {texts[place]}" for place in (best, other))
    text = _turns_text(row.prompt)
    return {**answer, "text": text, "gold": gold, "prediction": prediction, "rewards": rewards}


def _turns_text(turns: str | Sequence[Message]) -> str:
    """Return the text of turns. If there are several, each begins with its role."""
    if isinstance(turns, str):
        return turns
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
