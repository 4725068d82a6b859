"""Warnings about a run that learns from its own answers: what goes wrong, and the key to turn.

A rising reward alone does not show that the answers get better. Each function looks at the figures of the
iterations so far and returns a sentence, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tunesmith.rollout.sampled_answers import TOTAL

History = Sequence[Mapping[str, float]]
"""Figures of each iteration, in order: ``FIGURES``, those that were measured.

``length_variance`` and ``length_covariance``: of the lengths of the iteration's answers, and of lengths and
rewards. ``eval_reward``: of the last evaluation before the iteration's updates."""

FIGURES = (
    TOTAL, "reward_stderr", "entropy", "response_length", "stopped", "kl_per_answer", "length_variance",
    "length_covariance", "eval_reward", "eval_reward_stderr",
)  # fmt: skip

WINDOW = 4
"""Iterations that are compared with as many before them: one iteration is a small sample."""

ENTROPY_SHARE = 0.2
"""Share of the first entropy below which the policy has collapsed."""

LENGTH_FACTOR = 2.0
"""Answers this many times as long, or as short, as those of the first iterations have drifted."""

KL_FACTOR = 1.25
"""The KL divergence rises if its mean over a window is this many times that of the window before."""


def mean(history: History, name: str) -> float:
    return sum(one[name] for one in history) / len(history)


def _windows(history: History) -> tuple[History, History]:
    """Return the last ``WINDOW`` iterations, after as many before them."""
    return history[-2 * WINDOW : -WINDOW], history[-WINDOW:]


def _noise(history: History) -> float:
    """Return the standard error of the difference between the mean rewards of the two ``_windows``."""
    return (sum(one["reward_stderr"] ** 2 for one in history[-2 * WINDOW :]) / WINDOW**2) ** 0.5


def truncated(history: History, kl_key: str) -> str | None:
    """All answers of the last iteration reached the limit of tokens."""
    if history[-1]["stopped"] > 0:
        return None
    return (
        "no answer of this iteration ended by itself: all were cut at objective.max_new_tokens, and rewards score the cut texts. "
        "Raise objective.max_new_tokens, or reward answers that end, with {type: final_stop} under objective.rewards"
    )


def collapsed(history: History, kl_key: str) -> str | None:
    """The policy chooses nearly the same tokens every time, so further sampling finds nothing new."""
    first, now = mean(history[:WINDOW], "entropy"), mean(history[-WINDOW:], "entropy")
    if len(history) < 2 * WINDOW or now > ENTROPY_SHARE * first:
        return None
    return (
        f"the policy's entropy fell from {first:.3g} to {now:.3g} nats a token: its answers to a prompt are nearly all alike, so "
        f"sampling finds nothing better. Raise {kl_key}, or lower train.learning_rate"
    )


def drifted(history: History, kl_key: str) -> str | None:
    """Answers became much longer or shorter: rewards often pay for length by accident."""
    first, now = (mean(part, "response_length") for part in (history[:WINDOW], history[-WINDOW:]))
    if len(history) < 2 * WINDOW or first / LENGTH_FACTOR < now < first * LENGTH_FACTOR:
        return None
    return (
        f"answers {'grew' if now > first else 'shrank'} from {first:.0f} to {now:.0f} tokens: the reward may pay for length. "
        "Read samples.jsonl; a reward {type: length, target: N} under objective.rewards keeps the length"
    )


def diverging(history: History, kl_key: str) -> str | None:
    """The policy leaves its reference and the reward does not rise: the distance buys nothing."""
    if len(history) < 2 * WINDOW or not all("kl_per_answer" in one for one in history):
        return None
    before, after = _windows(history)
    kl_before, kl_after = mean(before, "kl_per_answer"), mean(after, "kl_per_answer")
    reward_before, reward_after = mean(before, TOTAL), mean(after, TOTAL)
    rises = reward_after > reward_before + _noise(history)
    if kl_after < KL_FACTOR * max(kl_before, 0.0) or kl_after <= 0 or rises:
        return None
    return (
        f"over {WINDOW} iterations the KL divergence of an answer rose from {kl_before:.3g} to {kl_after:.3g} nats, and the "
        f"reward did not rise ({reward_before:.3g} to {reward_after:.3g}). Raise {kl_key}, or lower train.learning_rate"
    )


def pays_for_length(history: History, kl_key: str) -> str | None:
    """The reward rises with the length of the answers, and falls among answers of equal length.

    The reward of a token more is the regression of reward on length within the iterations."""
    if len(history) < 2 * WINDOW:
        return None
    before, after = _windows(history)
    spread = sum(one["length_variance"] for one in (*before, *after))
    rise, noise = mean(after, TOTAL) - mean(before, TOTAL), _noise(history)
    longer = mean(after, "response_length") - mean(before, "response_length")
    if spread <= 0 or rise <= noise:
        return None
    of_a_token = sum(one["length_covariance"] for one in (*before, *after)) / spread
    if (controlled := rise - of_a_token * longer) >= -noise:
        return None
    return (
        f"over {WINDOW} iterations the reward rose by {rise:.3g} and the answers' length changed by {longer:+.3g} tokens. At "
        f"equal length the reward fell by {-controlled:.3g}: the policy learns length, not quality. Add "
        f"{{type: length, target: N}} to objective.rewards, or raise {kl_key}"
    )


def falls_on_held_out(history: History, kl_key: str) -> str | None:
    """The reward of the training prompts rises, and that of the held-out prompts falls."""
    if len(history) < 2 * WINDOW or not all("eval_reward_stderr" in one for one in history[-WINDOW - 1 :]):
        return None
    before, after = _windows(history)
    reward_before, reward_after = mean(before, TOTAL), mean(after, TOTAL)
    first, last = before[-1], after[-1]
    noise = (first["eval_reward_stderr"] ** 2 + last["eval_reward_stderr"] ** 2) ** 0.5
    rises = reward_after > reward_before + _noise(history)
    if not rises or last["eval_reward"] >= first["eval_reward"] - noise:
        return None
    return (
        f"the reward of the training prompts rose from {reward_before:.3g} to {reward_after:.3g}, and that of the held-out "
        f"prompts fell from {first['eval_reward']:.3g} to {last['eval_reward']:.3g}: the policy is overfit. Train fewer steps "
        f"(train.max_steps), add prompts, or raise {kl_key}"
    )


WARNINGS: dict[str, Callable[[History, str], str | None]] = {
    check.__name__: check
    for check in (truncated, collapsed, drifted, diverging, pays_for_length, falls_on_held_out)
}
"""(history, recipe key of the KL penalty) -> a sentence, or None."""


def find(history: History, kl_key: str) -> dict[str, str]:
    """Return the warnings that hold after the last iteration, by name."""
    found = {name: check(history, kl_key) for name, check in WARNINGS.items()}
    return {name: line for name, line in found.items() if line is not None}
