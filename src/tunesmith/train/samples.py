"""Fixed prompts answered at every evaluation: a curve says that a model changed, an answer says how."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.encode import conversations
from tunesmith.data.store.encoded_rows import Encoded
from tunesmith.models.generate import decode
from tunesmith.train.train_config import SampleConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """``ids`` are given to the model; ``reference`` is what the data says comes next, if it does."""

    ids: list[int]
    text: str
    reference: str | None


def prompts(
    config: SampleConfig, held_out: Encoded | None, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    """The recipe's prompts, or the beginnings of the first held-out rows."""
    if config.prompts is not None:
        return [Prompt(conversations.prompt_ids(text, tokenizer), text, None) for text in config.prompts]
    rows = [] if held_out is None else [held_out[row] for row in range(min(config.count, len(held_out)))]
    return [_of_row(row, tokenizer) for row in rows]


def _of_row(row: dict[str, np.ndarray], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The beginning of a row. A response that was judged undesirable is no reference."""
    prompt = _beginning(*_learnt(row), tokenizer)
    undesirable = "desirable" in row and not row["desirable"][0]
    return replace(prompt, reference=None) if undesirable else prompt


def _learnt(row: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a row and which of them are learnt; of several answers those of the first better one."""
    if "answers" not in row:
        return row["input_ids"], row["supervised"]
    ends = np.cumsum(row["answers"])
    best = int(row["pairs"][0]) if len(row["pairs"]) else 0  # a judged row has one answer and no pairs
    kept = np.r_[0 : ends[0], ends[best] : ends[best + 1]]
    return row["input_ids"][kept], row["learnt"][kept]


def _beginning(ids: np.ndarray, supervised: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Up to the first learnt token; of a row that is learnt whole, its first tokens."""
    learnt = np.flatnonzero(supervised)
    start = int(learnt[0]) if len(learnt) else len(ids)
    if start <= 1:
        start = max(1, min(32, len(ids) // 2))
    rest = ids[start:]
    unlearnt = np.flatnonzero(~supervised[start:])
    answer = rest[: int(unlearnt[0])] if len(unlearnt) else rest
    prompt = [int(token) for token in ids[:start]]
    return Prompt(prompt, _last_turn(prompt, tokenizer), tokenizer.decode(answer, skip_special_tokens=True))


def _last_turn(prompt: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """What a person reads of a prompt: of a chat the last turn before the answer, without its role; of a text all of it."""
    specials = set(tokenizer.all_special_ids)
    turns: list[list[int]] = [[]]
    for token in prompt:
        if token in specials:
            turns.append([])
        else:
            turns[-1].append(token)
    texts = [text for turn in turns if (text := tokenizer.decode(turn).strip())]
    if len(texts) < 2 or not tokenizer.chat_template:
        return "\n".join(texts)
    role, _, said = texts[-2].partition("\n")  # the last is the header of the answer to come
    return said.strip() if role in ("user", "human") and said.strip() else texts[-2]


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[Prompt], max_new_tokens: int
) -> list[str]:
    """Greedy answers, so that only the model changes between two evaluations."""
    settings = decode.Settings(max_new_tokens=max_new_tokens)
    found = decode.generate_ids(model, tokenizer, [prompt.ids for prompt in asked], settings)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
