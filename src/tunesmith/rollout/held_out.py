"""Evaluation of a policy by the rewards of its answers to held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunesmith.data.batch.pack import file_rows
from tunesmith.data.batch.step import Step
from tunesmith.json_types import JsonObject
from tunesmith.metrics.intervals import RowFigure
from tunesmith.models.generate.running_rows import Request
from tunesmith.rollout.rewards import Rewards
from tunesmith.rollout.rollout_config import RolloutKeys
from tunesmith.rollout.sampled_answers import TOTAL, sample, score
from tunesmith.rollout.session_protocol import Session


def records(run: Session, keys: RolloutKeys, rewards: Rewards, step: Step) -> list[JsonObject]:
    """Return the scores, tokens and end of one sampled answer to each prompt of ``step``.

    Every evaluation draws with the same random numbers, so that two of them differ by the policy alone.
    """
    rewards.open(run)
    examples = step.examples()
    params = keys.sampling(run.seed)
    requests = [
        Request(tuple(example["input_ids"].tolist()), params, place) for place, example in enumerate(examples)
    ]
    answers = sample(run, requests, step.rows.tolist())
    score(run, rewards, answers, step.data)
    return [
        {"row": row, "scores": answer.scores, "tokens": len(answer.ids), "stopped": answer.stopped}
        for row, answer in zip(file_rows(examples), answers, strict=True)
    ]


def summarise(records: Sequence[JsonObject]) -> dict[str, float]:
    """``eval_reward`` with its standard error, the mean of each reward, the length and the share that stopped."""
    number = len(records)
    rewards = [record["scores"][TOTAL] for record in records]
    mean = math.fsum(rewards) / number
    figures = {"eval_reward": mean}
    if number > 1:
        variance = math.fsum((reward - mean) ** 2 for reward in rewards) / (number - 1)
        figures["eval_reward_stderr"] = math.sqrt(variance / number)
    for name in records[0]["scores"]:
        if name != TOTAL:
            figures[f"eval_reward/{name}"] = math.fsum(one["scores"][name] for one in records) / number
    figures["eval_response_length"] = math.fsum(record["tokens"] for record in records) / number
    figures["eval_stopped"] = math.fsum(record["stopped"] for record in records) / number
    return figures


def row_figures(records: Sequence[JsonObject]) -> dict[str, RowFigure]:
    """Return the reward and each of its parts, by the row of the prompt."""
    names = records[0]["scores"] if records else ()
    return {
        "eval_reward" if name == TOTAL else f"eval_reward/{name}": RowFigure(
            {record["row"]: (record["scores"][name], 1.0) for record in records}
        )
        for name in names
    }
