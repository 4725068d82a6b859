"""The recipe's keys of a rollout, shared by the objectives that sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, model_validator

from tunesmith.errors import RecipeError
from tunesmith.rollout.rewards import Reward

if TYPE_CHECKING:
    from tunesmith.models.generate.sampling import SamplingParams


class RolloutKeys(BaseModel):
    """Keys of sampling, and of the passes over what was sampled."""

    rewards: list[Reward] = Field(
        default_factory=list,
        description="what an answer is scored by: a list of {type: ..., weight: 1.0}; their weighted sum is the reward",
    )
    num_generations: int = Field(
        8, ge=1, description="answers sampled for each prompt (TRL's name and default)"
    )
    rollout_batch_size: int | None = Field(
        None,
        gt=0,
        description="prompts of an iteration; default: train.batch_size / num_generations, so that an iteration is one step",
    )
    update_epochs: int = Field(
        1, gt=0, description="passes over the answers of an iteration (Shao et al. 2024: 1; PPO: 4)"
    )
    max_new_tokens: int = Field(256, gt=0, description="most tokens of an answer (TRL 0.24: 256)")
    temperature: float = Field(
        1.0,
        gt=0,
        description="of sampling; log-probabilities are those at this temperature (TRL's default: 1)",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="below 1, the likeliest tokens only: samples are then not the policy's own",
    )
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error", description="a prompt that leaves no room for max_new_tokens; truncate cuts its left"
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_int8(cls, given: object) -> object:
        if isinstance(given, dict) and "decode_weights" in given:
            raise ValueError(
                f"decode_weights {given['decode_weights']} is not a key of a run that learns from its samples: their "
                "log-probabilities must be those of the policy, whose weights are not rounded.\n"
                "  Remove objective.decode_weights; tunesmith generate and chat have --decode-weights."
            )
        return given

    def sampling(self, seed: int) -> SamplingParams:
        from tunesmith.models.generate.sampling import SamplingParams

        return SamplingParams(self.max_new_tokens, temperature=self.temperature, top_p=self.top_p, seed=seed)

    def prompt_room(self, window: int | None) -> int | None:
        """Return the most tokens of a prompt. Raises RecipeError where the answer takes the whole ``window``."""
        if window is None:
            return None
        if window <= self.max_new_tokens:
            raise RecipeError(
                f"objective.max_new_tokens is {self.max_new_tokens}, and prompt and answer have at most {window} tokens "
                "together (train.max_length, or the model's window): no token is left for the prompt.\n"
                f"  Set objective.max_new_tokens below {window}."
            )
        return window - self.max_new_tokens
