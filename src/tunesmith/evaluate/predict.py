"""What a model says of rows that nobody has labelled: classes with probabilities, entities, answers; in the order of the file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.data.data_config import Source
from tunesmith.data.formats.fields import Columns
from tunesmith.data.read.source import Opened, open_source
from tunesmith.data.row_problems import Record, RowFault, RowProblem
from tunesmith.data.rows import Chat, PromptCompletion, Question, Ranking, Tagged, without_gold
from tunesmith.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK = 512
"""Rows encoded and sorted by length together: enough to fill batches, few enough to hold."""


def predict(
    model: str | Path | tuple[Any, Any],
    data: str | Path,
    *,
    format: str | None = None,
    columns: Columns | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    precision: str = "auto",
    batch_tokens: int = 2048,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    rewards: bool = False,
    note: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """One dict for each row of ``data``, in order: ``row`` (its number) and what the model says of it, or ``error``.

    A classifier: label (labels, or value) and probabilities. A tagger: entities (type, start, end, text, score) and tags.
    A reader: answer, start, end, score and the n best. A reward model: reward, or of several answers rewards and ranking. Gold
    that a row may have is not looked at. A row that cannot be read gives ``error`` and costs no other row; one above
    ``max_length`` is cut and counted. ``note`` is told at the end.
    ``rewards``: whether anything but a reward model is refused.
    Raises UserError for a model that writes text, and for a file that cannot be opened.
    """
    from tunesmith.evaluate import open_model

    source = open_model.source_of(
        data, format=format, columns=columns, limit=limit, split=split, name=name, streaming=streaming
    )
    chosen = open_model.open_model(model, max_length=max_length, rewards=rewards)
    if chosen.objective.traits.head == "lm":
        use = (
            "a reward model gives rewards, train one with objective: reward"
            if rewards
            else "use tunesmith generate"
        )
        raise ModelError(f"this model writes text: {use}.")
    if rewards and Ranking not in chosen.objective.traits.rows:
        raise ModelError(
            f"this model was trained for {chosen.name}, it gives no rewards: use tunesmith predict."
        )
    opened_source = _opened(source, chosen.objective.traits.rows)
    if chosen.objective.head_config()["tunesmith"].get("characters"):
        opened_source = _by_character(opened_source)
    rows = opened_source.rows()
    longest = max_length or chosen.objective.max_length
    cut = bad = 0
    way = None
    try:
        while block := list(itertools.islice(rows, BLOCK)):
            made = [_encoded(item, opened_source, chosen.objective, chosen.tokenizer) for item in block]
            examples = [one for item in made if isinstance(item, list) for one in item]
            cut += sum(_cut(one, longest) for one in examples)
            if examples and way is None:
                tried = _tried(
                    [item for item, result in zip(block, made) if isinstance(result, list)], chosen, longest
                )
                way = chosen.ready(precision, tried, longest or 0)
            answers = _answers(chosen, examples, way, batch_tokens) if examples else {}
            for item, result in zip(block, made):
                if isinstance(item, RowProblem):
                    bad += 1
                    yield {"row": item.row, "error": str(item)}
                elif isinstance(result, RowProblem):
                    bad += 1
                    yield {"row": result.row, "error": str(result)}
                else:
                    record, row = item
                    yield {"row": record.row, **chosen.objective.present(row, answers[record.row])}
    finally:
        if way is not None:
            way.disable(chosen.network)
    if cut:
        lost = (
            "their prompts were cut from the left"
            if Ranking in chosen.objective.traits.rows
            else "what stands after that was not read"
        )
        note(f"{cut} rows were longer than {longest} tokens; {lost}")
    if bad:
        note(f"{bad} rows could not be read: they have `error` in the place of an answer")


def _opened(source: Source, accepted: tuple[type, ...]) -> Opened:
    """The rows of a source. To be judged are rankings, and else what a language model might have written."""
    if Ranking not in accepted:
        return open_source(source, accepted, gold=False)
    try:
        return open_source(source, accepted, gold=False)
    except DataError as none:
        try:
            return open_source(source, (Chat, PromptCompletion))
        except DataError:
            raise none from None


def _by_character(opened: Opened) -> Opened:
    """Plain text for a tagger whose words were characters: each is one here too. Rows that list their words keep them."""
    convert = opened.convert
    if convert is None or convert.form.name != "words":
        return opened
    return replace(opened, convert=replace(convert, facts={**(convert.facts or {}), "spaces": True}))


def _encoded(
    item: tuple[Record, Any] | RowProblem, source: Any, objective: Any, tokenizer: PreTrainedTokenizerBase
) -> list[Any] | RowProblem:
    """The examples of a row, each with its number."""
    import numpy as np

    if isinstance(item, RowProblem):
        return item
    record, row = item
    try:
        (examples,) = objective.encode([without_gold(_ranked(row))], tokenizer)
    except RowFault as fault:
        found: RowProblem = source.problem(record, fault)
        return found
    if not examples:
        fix = "Give --max-length, or shorten the answers."
        return RowProblem(
            record.path,
            record.row,
            "row",
            "answers that fit into max_length",
            "longer ones",
            fix,
            record.line,
        )
    return [{**example, "row": np.array([0, record.row])} for example in examples]


def _tried(items: list[Any], chosen: Any, longest: int | None) -> list[Any]:
    """Two short examples to find the route with. It compares losses, and these rows have none: each gets some answer."""
    known = chosen.objective.head_config()
    encoded = [
        chosen.objective.encode([_answered(_ranked(row), known)], chosen.tokenizer)[0][0]
        for _, row in items[:16]
    ]
    shortest = sorted(encoded, key=lambda one: len(one["input_ids"]))[:2]
    for one in shortest:
        if "span" in one:  # of a question that there is none: a word of the context need not be a token
            one["span"] = one["null"].repeat(2)
        _cut(one, longest)
    return shortest


def _ranked(row: Any) -> Any:
    """What a language model wrote as a ranking of one; any other row as it is."""
    if isinstance(row, PromptCompletion):
        return Ranking(row.prompt, (row.completion,), (0,))
    return (
        Ranking(row.messages[:-1], (row.messages[-1:],), (0,), tools=row.tools)
        if isinstance(row, Chat)
        else row
    )


def _answered(row: Any, known: dict[str, Any]) -> Any:
    """``row`` with an answer that the model knows, right or wrong."""
    name = known["id2label"][0]
    if isinstance(row, Tagged):
        return replace(row, tags=(name,) * len(row.words))
    if isinstance(row, Question):
        return without_gold(row)
    if isinstance(row, Ranking):
        other = "-" if isinstance(row.prompt, str) else ({"role": "assistant", "content": "-"},)
        both: Any = (row.answers[0], other)
        return replace(row, answers=both, ranks=(0, 1), scores=None)
    if known["problem_type"] == "multi_label_classification":
        return replace(row, label=None, labels=(name,))
    return replace(row, label=0.0 if known["problem_type"] == "regression" else name, labels=None)


def _cut(example: dict[str, Any], longest: int | None) -> bool:
    """Cut an example to ``longest`` tokens, in place. Windows never are longer."""
    from tunesmith.data.store.cache import ALIGNED

    if "cut" in example:  # its objective has seen to it
        return bool(example["cut"][0])
    whole = len(example["input_ids"])
    if longest is None or whole <= longest:
        return False
    for key in ALIGNED:
        if key in example:
            example[key] = example[key][:longest]
    return True


def _answers(chosen: Any, examples: list[Any], way: Any, budget: int) -> dict[int, dict[str, Any]]:
    """Row number -> the objective's answer."""
    import torch

    from tunesmith.data.batch.pack import to_device
    from tunesmith.data.batch.step import Listed
    from tunesmith.train import forward_batches

    examples = sorted(examples, key=lambda one: -len(one["input_ids"]))

    @torch.no_grad()
    def run(places: list[int]) -> dict[str, Any]:
        batch = chosen.objective.collate([examples[place] for place in places], way.layout)
        found: dict[str, Any] = chosen.objective.evaluate(chosen.network, to_device(batch, chosen.device))
        return found

    def name(place: int) -> str:
        return f"row {examples[place]['row'][1]}"

    rows = Listed(examples, [""] * len(examples))
    sizes = rows.sizes(slice(None), way.layout)
    records = [
        record
        for _, record in forward_batches.run_groups(run, sizes, budget, way.layout, chosen.device, name)
    ]
    return {answer["row"][1]: answer for answer in chosen.objective.answers(records)}
