"""Answers to score, without a model that sampled them."""

from __future__ import annotations

from typing import Any

from tunesmith.data.rows import Prompt, TextOrTurns
from tunesmith.rollout.reward_config import Completion


def answered(text: str, tokens: int = 3, stopped: bool = True, prompt: TextOrTurns = "q", **columns: Any) -> Completion:
    """An answer of ``tokens`` tokens, and the stop token if it ``stopped``."""
    return Completion(Prompt(prompt, columns), text, list(range(tokens + stopped)), stopped, "rollout:0:0")
