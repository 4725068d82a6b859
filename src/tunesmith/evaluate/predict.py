"""Classes, entities, answers or rewards of a model for unlabelled rows, in the order of the file."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tunesmith.data.batch.pack import to_device
from tunesmith.data.batch.step import Listed
from tunesmith.data.data_config import Source
from tunesmith.data.encode.templates import apply_template
from tunesmith.data.formats.fields import Columns
from tunesmith.data.read.source import OpenedSource, open_source
from tunesmith.data.row_problems import Record, RowFault, RowProblem
from tunesmith.data.rows import (
    Chat,
    Labelled,
    Message,
    PromptCompletion,
    Question,
    Ranking,
    Row,
    Tagged,
    turns,
    without_gold,
)
from tunesmith.data.store.cache import ALIGNED
from tunesmith.errors import DataError, ModelError
from tunesmith.evaluate.open_model import OpenedModel, open_model
from tunesmith.evaluate.trained_reading import ModelArgument, make_source, source_as_trained
from tunesmith.json_types import JsonObject
from tunesmith.models import forward_groups
from tunesmith.models.load.compute_dtype import ComputeDtype
from tunesmith.objectives import Example, TaskHead
from tunesmith.train import fast_path

Item = tuple[Record, Row] | RowProblem
"""A row with its record, or why there is none."""

BLOCK = 512
"""Rows that are encoded and sorted by length together: enough to fill batches, few enough to hold."""


def predict(
    model: ModelArgument,
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
    template_kwargs: JsonObject | None = None,
    note: Callable[[str], None] = lambda line: None,
    on_precision: Callable[[ComputeDtype], None] = lambda chosen: None,
) -> Iterator[JsonObject]:
    """Yield a dict for each row of ``data``, in order: ``row`` (its number) and an answer, or ``error``.

    Columns and ``max_length`` default to those of the model's training. The keys of an answer depend on the
    model. A classifier has label (labels, or value) and probabilities; a tagger has entities (type, start,
    end, text, score) and tags; question answering has answer, start, end, score and n_best; a reward model
    has reward, or rewards and ranking of several answers.

    Gold labels in the rows are ignored. An unreadable row gets ``error`` and affects no other row. A row
    above ``max_length`` is cut. ``note`` receives the numbers of unreadable and of cut rows at the end;
    ``on_precision`` the compute dtype, before the first row is computed.
    ``rewards``: accept reward models only. ``template_kwargs``: variables of the chat template. Raises
    UserError for a model that generates text, and for a file that cannot be opened.
    """
    hub = {"split": split, "name": name, "streaming": streaming}
    given, keys = {"format": format, "columns": columns}, {"limit": limit, **hub}
    make_source(data, **given, **keys)  # report a wrong option before the model loads
    opened = open_model(model, max_length=max_length, rewards=rewards)
    if not isinstance(opened.objective, TaskHead):
        use = "train a reward model with objective: reward" if rewards else "use tunesmith generate"
        raise ModelError(f"this model writes text: {use}.")
    ranks = Ranking in opened.objective.traits.rows
    if rewards and not ranks:
        raise ModelError(f"this model was trained for {opened.name}, not rewards: use tunesmith predict.")
    if template_kwargs:
        opened = replace(opened, tokenizer=apply_template(opened.tokenizer, None, template_kwargs)[0])
    accepted, trained = opened.objective.traits.rows, opened.trained
    reader = _open_rows(source_as_trained(trained, data, accepted, given, keys, gold=False), opened)
    longest = max_length or trained.get("max_length") or opened.objective.max_length
    cut = bad = 0
    rows = _predict_rows(opened, reader, longest, precision, batch_tokens, on_precision)
    for answer, lost_tokens in rows:
        cut += lost_tokens
        bad += "error" in answer
        yield answer
    if cut:
        lost = "their prompts were cut from the left" if ranks else "the model did not read their ends"
        note(f"{cut} rows were longer than {longest} tokens; {lost}")
    if bad:
        note(f"{bad} rows could not be read: they have `error` in place of an answer")


def _predict_rows(
    opened: OpenedModel,
    reader: OpenedSource,
    longest: int | None,
    precision: str,
    budget: int,
    on_precision: Callable[[ComputeDtype], None],
) -> Iterator[tuple[JsonObject, int]]:
    """Yield each row's dict, and how many of its examples were cut."""
    rows = reader.rows()
    route = None
    try:
        while block := list(itertools.islice(rows, BLOCK)):
            encoded = [_encode(item, reader, opened) for item in block]
            examples = [example for result in encoded if isinstance(result, list) for example in result]
            if examples and route is None:
                readable = [item for item, result in zip(block, encoded) if isinstance(result, list)]
                shortest = _trial_examples(readable[:16], opened, longest)
                route, chosen_dtype = opened.prepare(precision, shortest, longest or 0)
                on_precision(chosen_dtype)
            cut = Counter(int(example["row"][1]) for example in examples if _cut(example, longest))
            answers = _answers(opened, examples, route, budget) if route else {}
            for item, result in zip(block, encoded):
                if isinstance(result, RowProblem):
                    yield {"row": result.row, "error": str(result)}, 0
                elif isinstance(item, tuple):
                    record, row = item
                    answer = opened.task.present(row, answers[record.row])
                    yield {"row": record.row, **answer}, cut[record.row]
    finally:
        if route is not None:
            route.disable()


def _open_rows(source: Source, opened: OpenedModel) -> OpenedSource:
    """Open a source without gold. A reward model also takes what a language model might have written."""
    accepted = opened.objective.traits.rows
    try:
        reader = open_source(source, accepted, gold=False)
    except DataError as unranked:
        if Ranking not in accepted:
            raise
        try:
            reader = open_source(source, (Chat, PromptCompletion), gold=False)
        except DataError:
            raise unranked from None
    convert = reader.convert
    by_character = opened.task.head_config()["tunesmith"].get("characters")
    if not by_character or convert is None or convert.form.name != "words":
        return reader
    # The tagger's words were characters, so those of plain text are, too. Listed words stay as they are.
    return replace(reader, convert=replace(convert, facts={**(convert.facts or {}), "spaces": True}))


def _encode(item: Item, reader: OpenedSource, opened: OpenedModel) -> list[Example] | RowProblem:
    """Return the examples of a row, each with the number of its row."""
    if isinstance(item, RowProblem):
        return item
    record, row = item
    try:
        (examples,) = opened.objective.encode([without_gold(_as_ranking(row))], opened.tokenizer)
    except RowFault as fault:
        return reader.problem(record, fault)
    if examples:
        return [{**example, "row": np.array([0, record.row])} for example in examples]
    expected, fix = "answers within max_length", "Give --max-length, or shorten the answers."
    return RowProblem(record.path, record.row, "row", expected, "longer ones", fix, record.line)


def _trial_examples(items: Sequence[Item], opened: OpenedModel, longest: int | None) -> list[Example]:
    """Return two short examples to choose the route by. It compares losses, so each gets some gold."""
    known = opened.task.head_config()
    with_gold = [_with_any_gold(_as_ranking(item[1]), known) for item in items if isinstance(item, tuple)]
    encoded = [opened.objective.encode([row], opened.tokenizer)[0][0] for row in with_gold]
    shortest = sorted(encoded, key=lambda example: len(example["input_ids"]))[:2]
    for example in shortest:
        if "span" in example:  # "no answer": a word of the context need not be a token
            example["span"] = example["null"].repeat(2)
        _cut(example, longest)
    return shortest


def _as_ranking(row: Row) -> Row:
    """Return a language model's text as a ranking of one answer, and any other row unchanged."""
    if isinstance(row, PromptCompletion):
        return Ranking(row.prompt, (row.completion,), (0,))
    if isinstance(row, Chat):
        return Ranking(row.messages[:-1], (row.messages[-1:],), (0,), tools=row.tools)
    return row


def _with_any_gold(row: Row, known: JsonObject) -> Row:
    """Return ``row`` with some gold, right or wrong. ``known``: the config of the model's head."""
    label = known["id2label"][0]
    if isinstance(row, Tagged):
        return replace(row, tags=(label,) * len(row.words))
    if isinstance(row, Question):
        return without_gold(row)
    if isinstance(row, Ranking):
        answers: tuple[str, ...] | tuple[tuple[Message, ...], ...] = (str(row.answers[0]), "-")
        if not isinstance(row.prompt, str):
            answers = (turns(row.answers[0]), ({"role": "assistant", "content": "-"},))
        return replace(row, answers=answers, ranks=(0, 1), scores=None)
    assert isinstance(row, Labelled)
    if known["problem_type"] == "multi_label_classification":
        return replace(row, label=None, labels=(label,))
    return replace(row, label=0.0 if known["problem_type"] == "regression" else label, labels=None)


def _cut(example: Example, longest: int | None) -> bool:
    """Cut an example to ``longest`` tokens in place; return whether any were lost."""
    if "cut" in example:  # its objective has cut it
        return bool(example["cut"][0])
    if longest is None or len(example["input_ids"]) <= longest:
        return False
    for key in ALIGNED:
        if key in example:
            example[key] = example[key][:longest]
    return True


def _answers(
    opened: OpenedModel, examples: list[Example], route: fast_path.FastPath, budget: int
) -> dict[int, JsonObject]:
    """Return row number -> the objective's answer."""
    if not examples:
        return {}
    layout = route.layout
    examples = sorted(examples, key=lambda example: -len(example["input_ids"]))

    @torch.no_grad()
    def run(places: list[int]) -> JsonObject:
        batch = opened.objective.collate([examples[place] for place in places], layout)
        return opened.objective.evaluate(opened.network, to_device(batch, opened.device))

    def name(place: int) -> str:
        return f"row {examples[place]['row'][1]}"

    sizes = Listed(examples, [""] * len(examples)).sizes(slice(None), layout)
    groups = forward_groups.run_groups(run, sizes, budget, layout, opened.device, name)
    return {answer["row"][1]: answer for answer in opened.task.answers([record for _, record in groups])}
