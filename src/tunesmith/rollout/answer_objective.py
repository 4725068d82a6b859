"""The common part of all objectives that learn from sampled answers: prompts to tokens, answers to batches,
rewards, evaluation on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.encode import prompt_examples
from tunesmith.data.rows import Prompt
from tunesmith.json_types import JsonObject
from tunesmith.metrics.token_mean import token_mean
from tunesmith.rollout.rewards import Rewards
from tunesmith.rollout.rollout_config import RolloutKeys

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from tunesmith.data.batch.pack import Batch, Example, Layout
    from tunesmith.data.batch.step import Step
    from tunesmith.metrics.intervals import RowFigure
    from tunesmith.rollout.session_protocol import Session


class AnswerObjective:
    """Defaults of ``objectives.Objective`` and of ``rollouts.Learner``; an objective inherits from both."""

    config: RolloutKeys
    kl_key: str
    """The recipe's key that keeps the policy near its reference, for warnings."""
    rewards: Rewards
    max_length: int | None
    notes: list[str]

    def make_rewards(self, tokenizer: Tokenizer) -> None:
        """Make the rewards of the recipe ready to score; their weights are loaded later. Raises UserError."""
        self.rewards = Rewards(self.config.rewards, tokenizer)
        self.notes += self.rewards.notes

    def encode(self, rows: Sequence[Prompt], tokenizer: Tokenizer) -> list[list[Example]]:
        """Tokenise prompts. Raises RowFault where a reward lacks its column or a prompt is too long."""
        self.rewards.check_rows(rows)
        return prompt_examples.encode(
            rows, tokenizer, max_length=self.max_length, overlong=self.config.overlong
        )

    def collate(self, examples: Sequence[Example], layout: Layout) -> Batch:
        from tunesmith.rollout import answer_batch

        return answer_batch.with_answers(examples, layout)

    # ------------------------------------------------------------------------------------- the iteration

    def is_useless(self, rewards: np.ndarray) -> np.ndarray | None:
        """None: the answers to a prompt are not compared."""
        return None

    def stops_iteration(self, step: Step) -> bool:
        return False

    def state(self) -> JsonObject:
        return {}

    def load(self, state: Mapping[str, object]) -> None:
        """Nothing is kept between two iterations."""

    # --------------------------------------------------------------------------------------- evaluation

    def sample_records(self, session: Session, step: Step) -> list[JsonObject]:
        from tunesmith.rollout import held_out

        return held_out.records(session, self.config, self.rewards, step)

    def evaluate(self, model: PreTrainedModel, batch: Batch) -> JsonObject:
        """Return (-log p, tokens) of each answer of a batch that lies in memory."""
        import torch

        from tunesmith.models.heads.log_probs import log_probs
        from tunesmith.rollout import answer_batch

        with torch.no_grad():
            logps = answer_batch.by_answer(log_probs(model, batch), batch)
        return {"rows": [(-float(one.sum(dtype=np.float64)), len(one)) for one in logps if len(one)]}

    def summarise(self, records: Sequence[JsonObject]) -> dict[str, float]:
        """Return the figures of sampled answers, or the mean loss of answers that were not scored."""
        from tunesmith.rollout import held_out

        return token_mean(records) if "rows" in records[0] else held_out.summarise(records)

    def row_figures(self, records: Sequence[JsonObject]) -> dict[str, RowFigure]:
        from tunesmith.rollout import held_out

        return held_out.row_figures(records)
