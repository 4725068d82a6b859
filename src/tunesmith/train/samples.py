"""Sample prompts, answered at every evaluation: a curve shows that a model changed, an answer shows how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.batch.step import Example
from tunesmith.data.encode import conversations
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.models.generate import decode
from tunesmith.train.train_config import SampleConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """``ids``: tokens for the model; ``reference``: the answer in the data, if there is one."""

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
        return row["input_ids"], row["supervised"]
    ends = np.cumsum(row["answers"])
    chosen = int(row["pairs"][0]) if len(row["pairs"]) else 0  # a row of kto has one answer and no pairs
    kept = np.r_[0 : ends[0], ends[chosen] : ends[chosen + 1]]
    return row["input_ids"][kept], row["learnt"][kept]


def _split(ids: np.ndarray, supervised: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Split a row at its first supervised token, or after some tokens if that is its start."""
    targets = np.flatnonzero(supervised)
    start = int(targets[0]) if len(targets) else len(ids)
    if start <= 1:
        start = max(1, min(32, len(ids) // 2))
    rest = ids[start:]
    others = np.flatnonzero(~supervised[start:])
    answer = rest[: int(others[0])] if len(others) else rest
    prompt = [int(token) for token in ids[:start]]
    return Prompt(prompt, _last_turn(prompt, tokenizer), tokenizer.decode(answer, skip_special_tokens=True))


def _last_turn(prompt: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what a person reads of a prompt: the last turn of a chat without its role, or the whole text."""
    specials = set(tokenizer.all_special_ids)
    turns: list[list[int]] = [[]]
    for token in prompt:
        if token in specials:
            turns.append([])
        else:
            turns[-1].append(token)
    texts: list[str] = [text for turn in turns if (text := tokenizer.decode(turn).strip())]
    if len(texts) < 2 or not tokenizer.chat_template:
        return "\n".join(texts)
    role, _, content = texts[-2].partition("\n")  # the last text is the header of the answer to come
    return content.strip() if role in ("user", "human") and content.strip() else texts[-2]


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[str]:
    """Answer greedily, so that only the model changes between two evaluations."""
    settings = decode.Settings(max_new_tokens=max_new_tokens)
    answers = decode.generate_ids(model, tokenizer, [prompt.ids for prompt in prompts], settings)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
