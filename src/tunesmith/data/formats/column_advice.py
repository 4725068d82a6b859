"""Messages about a file whose columns fit no format, or whose rows the objective cannot use.

A mapping is suggested only from columns whose names match a field. If a field has no such column, the message
has a placeholder: no suggestion is better than a wrong one.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from tunesmith.data.formats import judgement_fields, preference_fields
from tunesmith.data.formats.fields import Field, Format
from tunesmith.data.rows import (
    Chat,
    Judged,
    Labelled,
    Prompt,
    PromptCompletion,
    Question,
    Ranking,
    Tagged,
    Text,
)

Keys = Sequence[tuple[str, ...]]
"""The columns of each of the first rows."""

ADVICE: dict[type, str] = {
    Chat: "objective: sft", PromptCompletion: "objective: sft", Text: "objective: cpt",
    Labelled: "objective: classify", Tagged: "objective: tag", Question: "objective: qa",
    Ranking: "objective: dpo or reward", Judged: "objective: kto",
    Prompt: "objective: grpo or ppo",
}  # fmt: skip
"""Recipe setting that trains on each type of row."""

SYNONYMS = {
    "prompt": "question, input, instruction, query, prompts, user, human, 질문, 지시, 프롬프트, 입력",
    "completion": "output, response, answer, reply, completions, assistant, 답변, 응답, 대답, 출력",
    "messages": "dialog, dialogue, chat, turns, conversation, conversations, history, 대화",
    "chosen": "accepted, preferred, better, winner, winning, positive, chosen_response, response_chosen, chosen_answer, "
    "response, answer, output, completion",
    "rejected": "dispreferred, declined, worse, loser, losing, negative, rejected_response, response_rejected, rejected_answer",
    "text": "sentence, body, passage, description, title, utterance, 문장, 본문, 내용, 텍스트, 글",
    "label": "labels, classes, type, topic, emotion, intent, gold, 레이블, 라벨, 분류, 감정, 정답",
    "tags": "tag, labels, bio, ner, entities, 태그, 개체명",
    "context": "passage, paragraph, document, article, 지문, 본문, 문맥",
    "answers": "answer_spans, spans",
}
"""Field of a format -> other names of its column, likeliest first. These names are only suggested: a column
is read under one of them only if the recipe maps it."""


def columns_of(keys: Keys) -> list[str]:
    """Return the columns of these rows, each once."""
    return list(dict.fromkeys(str(key) for row in keys for key in row))


def no_format(format: str | None, table: Sequence[Format], accepted: tuple[type, ...], keys: Keys) -> str:
    """Return the message for a file whose columns fit no format."""
    named = next((form for form in table if form.name == format), None)
    makers = _detected(table, accepted)
    tried = f"the format {format} needs {_needs(named)}" if named else "no format fits"
    listed = "".join(f"\n    {maker.name}: {_needs(maker)}" for maker in makers)
    there = columns_of(keys[:5])
    return (
        f"{tried}. Columns of the file: {', '.join(there) or 'none'}.\n"
        f"  Map the columns, for example {_mapping(table, accepted, there)}. Formats:{listed}"
    )


def other_rows(
    fitting: Sequence[Format], table: Sequence[Format], accepted: tuple[type, ...], keys: Keys
) -> str:
    """Return the message for a file whose columns fit only formats that make rows of other types."""
    form, there = fitting[0], columns_of(keys[:5])
    learns = ", ".join(row.__name__ for row in accepted)
    head = (
        f"the format {form.name} makes {form.row.__name__} rows, but the objective learns from {learns} rows"
    )
    is_pair = form in preference_fields.PAIRS
    rows = [one.row for one in fitting]
    if (
        is_pair or Judged in rows
    ):  # an objective that reads them without the judgement trains on bad answers, too
        rows = [form.row if is_pair else Judged]
    lines = [f"To learn from these rows, set {' or '.join(dict.fromkeys(ADVICE[row] for row in rows))}."]
    if is_pair and Judged in accepted:
        name = judgement_fields.unpaired_name(form)
        lines = [
            "To make two rows of each pair, the chosen answer desirable and the rejected one undesirable, "
            f"name the format: {name} (on the command line: --format {name}).",
            *lines,
        ]
    elif is_pair and Chat in accepted:
        lines.append(f"To train on the chosen answers alone, set {typed(_chosen_alone(form, there))}.")
    else:
        lines.append(f"Or map other columns, for example {_mapping(table, accepted, there)}.")
    return "\n  ".join([f"{head}.", *lines])


def _mapping(table: Sequence[Format], accepted: tuple[type, ...], there: Sequence[str]) -> str:
    """Return the suggested mapping that fills most fields; without one, placeholders for the missing
    fields."""
    forms = _detected(table, accepted)
    if Chat in accepted:  # any written row can be read as one of these
        forms = [form for form in forms if form.name in ("messages", "prompt_completion")]
    suggested = [(len(_required(form)), suggest(form, there)) for form in forms]
    found = [(fields, mapping) for fields, mapping in suggested if mapping]
    best = max(found, key=lambda one: (one[0], -len(one[1])), default=(0, {}))[1]
    return typed(best or dict.fromkeys(_lacking(forms, there), "COLUMN")) + _flag_columns(accepted, there)


def suggest(form: Format, there: Sequence[str]) -> dict[str, str]:
    """Return {field: column} for the required fields of a format that no column has under a known name.

    A column is chosen if its name matches the field. Return {} if a field has no such column."""
    mapping: dict[str, str] = {}
    needed = _required(form)
    present = {part.name: column for part in needed if (column := _own_column(part, there))}
    for part in needed:
        taken = {*present.values(), *mapping.values()}
        if part.name in present:
            continue
        column = _synonym(part, [column for column in there if column not in taken])
        if column is None:
            return {}
        mapping[part.name] = column
    return mapping


def _own_column(part: Field, there: Sequence[str]) -> str | None:
    folded = {column.strip().casefold(): column for column in reversed(there)}
    return next((folded[name] for name in part.columns if name in folded), None)


def _synonym(part: Field, free: Sequence[str]) -> str | None:
    """Return the free column whose name equals a name of the field, or contains one as a word."""
    names = [*part.columns, *SYNONYMS.get(part.name, "").split(", ")]
    words = {column: {column.strip().casefold(), *_words(column)} for column in free}
    return next((column for name in names if name for column in free if name in words[column]), None)


def _words(column: str) -> list[str]:
    return re.split(r"[\W_]+", column.strip().casefold())


def _chosen_alone(form: Format, there: Sequence[str]) -> dict[str, str]:
    """Return the mapping that reads only the chosen answers of a file of pairs, as conversations or texts."""
    own = {part.name: column for part in form.fields if (column := _own_column(part, there))}
    chosen = own.get("chosen", "")
    for prompt, fields in (
        ("prompt", ("prompt", "completion")), ("conversations", ("prompt", "completion")),
        ("instruction", ("instruction", "output")),
    ):  # fmt: skip
        if prompt in own and chosen:
            return {fields[0]: own[prompt], fields[1]: chosen}
    return {"messages": chosen or own["messages"]}


def _detected(table: Sequence[Format], accepted: tuple[type, ...]) -> list[Format]:
    """Return the formats that are detected from columns and make rows of these types."""
    also = {PromptCompletion} if Chat in accepted else set()  # its prompts may be turns
    return [form for form in table if not form.by_name and form.row in {*accepted, *also}]


def _lacking(makers: Sequence[Format], there: Sequence[str]) -> list[str]:
    """Return the fields that the likeliest format lacks.

    The likeliest format lacks about as many fields as the file has columns that it does not use.
    """

    def lacking(form: Format) -> list[str]:
        return [part.name for part in _required(form) if _own_column(part, there) is None]

    def difference(form: Format) -> int:
        used = len(_required(form)) - len(lacking(form))
        return abs(len(there) - used - len(lacking(form)))

    return lacking(min(makers, key=difference))


def _required(form: Format) -> list[Field]:
    return [part for part in form.fields if part.required]


def typed(mapping: dict[str, str]) -> str:
    """Return ``columns: {label: mood} (on the command line: --column label=mood)``."""
    keys = ", ".join(f"{name}: {column}" for name, column in mapping.items())
    flags = " ".join(f"--column {shlex.quote(f'{name}={column}')}" for name, column in mapping.items())
    return f"columns: {{{keys}}} (on the command line: {flags})"


def _flag_columns(accepted: tuple[type, ...], there: Sequence[str]) -> str:
    """Return a mapping of several columns of 0 and 1, if there is a text column and several others."""
    text = next((column for column in there if column.strip().casefold() == "text"), None)
    free = [column for column in there if column != text]
    if Labelled not in accepted or text is None or len(free) < 2:
        return ""
    return f"; columns of 0 and 1, one for each label: {{labels: [{', '.join(free)}]}}"


def _needs(form: Format) -> str:
    return " + ".join("|".join(filter(str.isascii, part.columns)) for part in _required(form))
