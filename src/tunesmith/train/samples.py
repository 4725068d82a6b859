"""Sample prompts, answered at every evaluation: a curve shows that a model changed, an answer shows how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.batch.step import Example
from tunesmith.data.encode import conversations
from tunesmith.data.encode.templates import special_tokens
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.models.generate.engine import Engine
from tunesmith.models.generate.running_rows import Request
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.train.train_config import SampleConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTIONERS = ("user", "human")
"""Roles whose turns are questions."""


@dataclass(frozen=True)
class Prompt:
    """A sample prompt. ``ids``: its tokens. ``reference``: the answer in the data, if there is one."""

    ids: list[int]
    text: str
    reference: str | None


def prompts(
    config: SampleConfig, held_out: Encoded | None, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    """Return the recipe's prompts, or the prompts of the first held-out rows."""
    if config.prompts is not None:
        return [Prompt(conversations.prompt_ids(text, tokenizer), text, None) for text in config.prompts]
    rows = [] if held_out is None else [held_out[row] for row in range(min(config.count, len(held_out)))]
    return [_prompt_of(row, tokenizer) for row in rows]


def _prompt_of(row: Example, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return the prompt of a row. An answer that was marked undesirable is no reference."""
    prompt = _split(*_supervised(row), tokenizer)
    undesirable = "desirable" in row and not row["desirable"][0]
    return replace(prompt, reference=None) if undesirable else prompt


def _supervised(row: Example) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a row and its loss mask; of several answers those of the first chosen one."""
    if "answers" not in row:
        ids = row["input_ids"]
        return ids, row.get("supervised", np.zeros(len(ids), np.bool_))  # a prompt alone has no such mask
    ends = np.cumsum(row["answers"])
    chosen = int(row["pairs"][0]) if len(row["pairs"]) else 0  # a row of kto has one answer and no pairs
    kept = np.r_[0 : ends[0], ends[chosen] : ends[chosen + 1]]
    return row["input_ids"][kept], row["supervised"][kept]


def _split(ids: np.ndarray, supervised: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Split a row at its first supervised token, or after some tokens if that is its start."""
    targets = np.flatnonzero(supervised)
    if not len(targets):
        prompt = [int(token) for token in ids]
        return Prompt(prompt, _readable(prompt, tokenizer), None)
    start = int(targets[0])
    if start <= 1:
        start = max(1, min(32, len(ids) // 2))
    rest = ids[start:]
    others = np.flatnonzero(~supervised[start:])
    answer = rest[: int(others[0])] if len(others) else rest
    prompt = [int(token) for token in ids[:start]]
    return Prompt(prompt, _readable(prompt, tokenizer), tokenizer.decode(answer, skip_special_tokens=True))


def _readable(prompt: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a prompt without special tokens: the question of a chat with only one, else the whole text."""
    specials = set(tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer))))
    turns: list[list[int]] = [[]]
    for token in prompt:
        if token in specials:
            turns.append([])
        else:
            turns[-1].append(token)
    texts: list[str] = [text for turn in turns if (text := tokenizer.decode(turn).strip())]
    if len(texts) < 2 or not tokenizer.chat_template:
        return "\n".join(texts)
    *turns_before, _ = texts  # the last text is the header of the answer that follows
    if sum(text.partition("\n")[0].strip() in QUESTIONERS for text in turns_before) > 1:
        return "\n".join(turns_before)
    role, _, content = turns_before[-1].partition("\n")
    return content.strip() if role in QUESTIONERS and content.strip() else turns_before[-1]


@dataclass(frozen=True)
class Answer:
    """Text of a generated answer. ``cut``: its tokens if it was cut at the limit before its end, or None."""

    text: str
    cut: int | None


def answer(engine: Engine, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Answer]:
    """Answer greedily, so that only the model changes between two evaluations."""
    params = SamplingParams(max_new_tokens=max_new_tokens)
    requests = [Request(tuple(prompt.ids), params, number) for number, prompt in enumerate(prompts)]
    answers = engine.answers(requests)
    engine.release()
    return [Answer(one.text, None if one.reason == "stop" else len(one.ids)) for one in answers]
