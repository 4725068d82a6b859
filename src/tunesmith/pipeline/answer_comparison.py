"""The answers of every stage's model to the same prompts, side by side.

The prompts are held-out rows of the last stage that writes text, as long as no stage of the pipeline was
trained on their prompt. Each model reads a prompt through its own chat template. Reward models of the
pipeline score all answers.
"""

from __future__ import annotations

import gc
import hashlib
import json
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tunesmith.data.data_config import Source
from tunesmith.data.read.prompts import AskedPrompt, read_prompts
from tunesmith.data.read.source import eval_sources
from tunesmith.data.rows import Chat, Text
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.data.store.prepare import Prepared
from tunesmith.errors import UserError
from tunesmith.evaluate.predict import predict
from tunesmith.json_types import JsonObject
from tunesmith.metrics import squad
from tunesmith.models.generate import decode
from tunesmith.pipeline import stage_manifest
from tunesmith.pipeline.pipeline_file import Pipeline, Stage
from tunesmith.train import distributed, setup

Note = Callable[[str], None]


def compare(pipeline: Pipeline, ended: Sequence[Stage], before: JsonObject, note: Note) -> JsonObject | None:
    """Return prompts with the answers and rewards of all models; None if no stage writes text.

    ``before``: the comparison of the last call, which is returned if nothing changed since.
    """
    wanted, writers = pipeline.comparison, [stage for stage in ended if stage.writes]
    if not writers or not (wanted.prompts or wanted.count):
        return None
    bases = dict.fromkeys(stage.recipe.model for stage in writers if "model" not in stage.inputs)
    models = {_base_name(base, bases, writers): base for base in bases}
    models |= {stage.name: str(stage.folder) for stage in writers}
    facts = [asdict(wanted), [stage_manifest.read(pipeline, stage) for stage in ended], list(models)]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if before.get("key") == key:
        return before
    asked = [AskedPrompt(number, text, None) for number, text in enumerate(wanted.prompts, 1)]
    asked = asked or _held_out_prompts(ended, writers, wanted.count)
    if not asked:
        note(
            "the answers of the stages are not compared: no prompt was held out by every stage (compare.prompts names some)"
        )
        return None
    answers = {}
    for name, model in models.items():
        note(f"answering {len(asked)} prompts with {name}")
        answers[name] = decode.generate(
            model, [one.prompt for one in asked], max_new_tokens=wanted.max_new_tokens
        )
        gc.collect()
    judges = [stage for stage in ended if stage.traits.rewards]
    rewards = {
        judge.name: {name: _rewards(judge, asked, answers[name]) for name in models} for judge in judges
    }
    prompts = [
        {
            **one.as_dict(),
            "answers": {name: answers[name][row] for name in models},
            "rewards": {judge: {name: rewards[judge][name][row] for name in models} for judge in rewards},
        }
        for row, one in enumerate(asked)
    ]
    figures = [
        _figures(name, asked, answers[name], {judge: rewards[judge][name] for judge in rewards})
        for name in models
    ]
    return {"key": key, "max_new_tokens": wanted.max_new_tokens, "models": figures, "prompts": prompts}


def _base_name(base: str, bases: Collection[str], stages: Sequence[Stage]) -> str:
    """Return the last part of a model's path, if no other model has the same."""
    short = Path(base).name
    others = [Path(other).name for other in bases if other != base] + [stage.name for stage in stages]
    return base if short in others else short


def _figures(
    name: str, asked: Sequence[AskedPrompt], answers: Sequence[str], rewards: dict[str, list[float | None]]
) -> JsonObject:
    """Return means over a model's answers: words, F1 of the words in common with the reference, rewards."""
    known = [
        (answer, str(one.as_dict()["reference"]))
        for one, answer in zip(asked, answers)
        if one.reference is not None
    ]
    row: JsonObject = {"model": name, "words": _mean([len(answer.split()) for answer in answers])}
    if known:
        row["F1 with the reference"] = _mean([squad.f1(answer, [reference]) for answer, reference in known])
    return row | {f"reward by {judge}": _mean(values) for judge, values in rewards.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _rewards(judge: Stage, asked: Sequence[AskedPrompt], answers: Sequence[str]) -> list[float | None]:
    """Return the reward of each answer; None for an answer that cannot be scored, such as an empty one."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answers.jsonl"
        rows = (_answered(one, answer) for one, answer in zip(asked, answers, strict=True))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        try:
            scored = list(predict(str(judge.folder), file, rewards=True))
        except UserError:  # not one of the answers can be read
            return [None] * len(answers)
    gc.collect()
    return [row.get("reward") for row in scored]


def _answered(asked: AskedPrompt, answer: str) -> JsonObject:
    prompt = asked.prompt
    if isinstance(prompt, Text):
        return {"prompt": prompt.text, "completion": answer}
    turns = list(prompt.messages) if isinstance(prompt, Chat) else [{"role": "user", "content": prompt}]
    return {"messages": [*turns, {"role": "assistant", "content": answer}]}


def _held_out_prompts(ended: Sequence[Stage], writers: Sequence[Stage], count: int) -> list[AskedPrompt]:
    """Return the first ``count`` held-out prompts of the last writer that no stage was trained on."""
    data = {stage.name: _read_rows(stage) for stage in ended}
    trained = np.unique(np.concatenate([_groups(one.train) for one in data.values()]))
    for stage in reversed(writers):
        held_out = data[stage.name].eval
        if held_out is None:
            continue
        groups = _groups(held_out)
        unseen = np.flatnonzero(~np.isin(groups, trained))
        _, firsts = np.unique(groups[unseen], return_index=True)  # one row for each prompt
        chosen = unseen[np.sort(firsts)][:count]
        if len(chosen):
            return _asked(stage, data[stage.name].kinds, held_out, chosen)
    return []


def _read_rows(stage: Stage) -> Prepared:
    """Read the rows of a stage as its run did; they are in the cache, unless the recipe switches it off."""

    def silent(line: str) -> None:
        pass

    base = setup.open_base(setup.choose(stage.recipe, distributed.state().device, None), silent)
    return setup.read_rows(base, silent)


def _groups(data: Encoded) -> np.ndarray:
    """Return uint64[n]: the group of each example's prompt (``data.store.hold_out``)."""
    groups = np.zeros(len(data), np.uint64)
    for number, entry in enumerate(data.entries):
        mine = data.source == number
        groups[mine] = entry.group[data.views.example[mine]]
    return groups


def _asked(stage: Stage, kinds: Sequence[str], held_out: Encoded, chosen: np.ndarray) -> list[AskedPrompt]:
    """Return the prompts of the examples ``chosen`` (indices) of ``held_out``."""
    config = stage.recipe.data
    by_label: dict[str, Source] = {
        source.label: source for source in [*config.train, *eval_sources(config).values()]
    }
    asked: list[AskedPrompt] = []
    for number in np.unique(held_out.source[chosen]):
        mine = chosen[held_out.source[chosen] == number]
        rows = {int(row) for row in held_out.entries[number].row[held_out.views.example[mine]]}
        source = by_label[held_out.paths[number]]
        read = source.model_copy(update={"limit": min(source.limit or max(rows), max(rows))})
        prompts, _ = read_prompts(read, kinds)
        asked += [one for one in prompts if one.row in rows]
    return asked
