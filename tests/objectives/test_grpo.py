"""GRPO's loss, advantages and figures against TRL's own trainer, and a policy that learns a rule."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tunesmith
from tests.rollout.sampling import made
from tests.runs import history
from tests.shortened import shortened
from tests.tiny import tiny_model
from tunesmith.data.batch.pack import PACKED, PADDED
from tunesmith.errors import RecipeError
from tunesmith.models.heads import log_probs
from tunesmith.objectives import grpo
from tunesmith.recipe import parse
from tunesmith.rollout import group_advantages

TEMPERATURE = 0.7
PROMPTS, LENGTHS = (5, 5, 3, 3), (6, 2, 4, 7)
REWARDS = np.array([[1.0, 0.25], [0.5, 3.0]])
AGGREGATIONS = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}


def config(**keys):
    return grpo.Config(num_generations=2, max_new_tokens=8, temperature=TEMPERATURE, **keys)


def frozen_batch():
    """Two prompts with two answers each, the log-probabilities of an older policy, and a reference's."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 500, (length,), generator=generator) for length in PROMPTS[::2]]
    examples = []
    for number, length in enumerate(LENGTHS):
        ids = torch.cat([prompts[number // 2], torch.randint(5, 500, (length,), generator=generator)])
        old, reference = -3 - 3 * torch.rand(2, length, generator=generator)
        examples.append({
            "input_ids": ids.numpy().astype(np.int32), "supervised": np.arange(len(ids)) >= PROMPTS[number],
            "old_logps": old.numpy(), "reference_logps": reference.numpy(),
        })  # fmt: skip
    return examples


def near(model, examples):
    """Put the frozen log-probabilities near the model's, so that some ratios are clipped and others are not."""
    objective = grpo.Objective(config())
    batch = objective.collate(examples, PADDED)
    with torch.no_grad():
        logps = log_probs.log_probs(model, batch, TEMPERATURE).numpy()
    for example, own in zip(examples, np.split(logps, np.cumsum(LENGTHS)[:-1]), strict=True):
        for name in ("old_logps", "reference_logps"):
            example[name] = (own + 0.3 * (example[name] + 4.5)).astype(np.float32)
    return examples


def trl_loss(model, examples, advantages, keys, loss_type):
    """The loss and the metrics of TRL's GRPOTrainer on its own layout: prompts padded left, answers right."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    rows, longest, width = len(examples), max(PROMPTS), max(LENGTHS)
    prompt, answer = torch.zeros(rows, longest, dtype=torch.long), torch.zeros(rows, width, dtype=torch.long)
    prompt_mask, answer_mask = torch.zeros_like(prompt), torch.zeros_like(answer)
    frozen = {name: torch.zeros(rows, width) for name in ("old_logps", "reference_logps")}
    for row, (example, start, length) in enumerate(zip(examples, PROMPTS, LENGTHS, strict=True)):
        ids = torch.from_numpy(example["input_ids"]).long()
        prompt[row, longest - start :], prompt_mask[row, longest - start :] = ids[:start], 1
        answer[row, :length], answer_mask[row, :length] = ids[start:], 1
        for name, values in frozen.items():
            values[row, :length] = torch.from_numpy(example[name])

    def logps(model, input_ids, attention_mask, logits_to_keep, **others):
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions).logits / TEMPERATURE
        kept = logits[:, -logits_to_keep - 1 : -1].log_softmax(-1)
        entropies = -(kept.exp() * kept).sum(-1)
        return kept.gather(2, input_ids[:, -logits_to_keep:, None])[..., 0], entropies, None

    metrics = defaultdict(lambda: defaultdict(list))
    trainer = SimpleNamespace(
        beta=keys.get("beta", 0.0), loss_type=loss_type, epsilon_low=0.2, epsilon_high=keys.get("clip_range_high", 0.2),
        importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1, max_completion_length=8,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1), model=model, _metrics=metrics,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda values: values, reduce=lambda values, reduction: values),
        _get_per_token_logps_and_entropies=logps,
    )  # fmt: skip
    inputs = {
        "prompt_ids": prompt, "prompt_mask": prompt_mask, "completion_ids": answer, "completion_mask": answer_mask,
        "advantages": advantages, "old_per_token_logps": frozen["old_logps"], "ref_per_token_logps": frozen["reference_logps"],
        "num_items_in_batch": answer_mask.sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, model.train(), inputs)
    return loss, metrics["train"]


@pytest.mark.parametrize("layout", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("keys", [{}, {"beta": 0.3, "clip_range_high": 0.28}], ids=["plain", "kl"])
def test_loss_gradient_and_metrics_are_those_of_trl(aggregation, keys, layout):
    from tunesmith.models.fast import attention

    model = tiny_model("llama")
    examples = near(model, frozen_batch())
    objective = grpo.Objective(config(loss_aggregation=aggregation, **keys))
    advantages = torch.from_numpy(group_advantages.grpo(REWARDS).flatten())
    expected, theirs = trl_loss(model, examples, advantages.float(), keys, AGGREGATIONS[aggregation])
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    if layout.packed:
        attention.register()
        model.set_attn_implementation(attention.NAME)
    rows = [
        {**example, "advantages": np.full(length, float(value), np.float32)}
        for example, length, value in zip(examples, LENGTHS, advantages, strict=True)
    ]
    batch = objective.collate(rows, layout)
    loss, metrics = objective.loss(model, batch)
    (loss / objective.count(batch)).backward()
    assert float(loss.detach() / objective.count(batch)) == pytest.approx(float(expected.detach()), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    clipped = float(metrics["clip_fraction"][0]) / metrics["clip_fraction"][1]
    assert clipped == pytest.approx(theirs["clip_ratio/region_mean"][0]) and 0 < clipped < 1
    if "beta" in keys:
        assert float(metrics["kl"][0]) / metrics["kl"][1] == pytest.approx(theirs["kl"][0], rel=1e-5)


def test_advantages_are_those_of_trl_and_of_their_papers():
    from trl.trainer.utils import nanstd

    scores = np.array([[1.0, 2.0, 4.0, 9.0], [0.5, 0.5, 0.5, 0.5]])
    rewards = torch.from_numpy(scores)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    assert group_advantages.grpo(scores) == pytest.approx(expected.numpy())
    assert group_advantages.dr_grpo(scores)[0].tolist() == [-3, -2, 0, 5]
    others = [1 - (2 + 4 + 9) / 3, 2 - (1 + 4 + 9) / 3, 4 - (1 + 2 + 9) / 3, 9 - (1 + 2 + 4) / 3]
    assert group_advantages.rloo(scores)[0] == pytest.approx(others)
    assert group_advantages.without_variance(scores).tolist() == [False, True]
    for function in group_advantages.ADVANTAGES.values():
        assert not function(scores)[1].any(), "equal scores teach nothing"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("plain", [False, True], ids=["blocked", "plain"])
def test_entropy_is_that_of_the_whole_distribution(temperature, plain):
    from tunesmith.models.heads import lm_head

    model = tiny_model("llama")
    lm_head.use_plain_head(model, plain)
    batch = grpo.Objective(config()).collate(frozen_batch(), PADDED)
    with torch.no_grad():
        found = log_probs.at_targets(model, batch, temperature, entropies=True)
        logps, entropies = found.logps, found.entropies
        logits = model(**lm_head.inputs(model, batch)).logits.flatten(0, 1)[batch["positions"]] / temperature
        everything = torch.distributions.Categorical(logits=logits)
        assert torch.equal(logps, log_probs.log_probs(model, batch, temperature))
    assert torch.allclose(entropies, everything.entropy(), atol=1e-5)
    assert torch.allclose(logps, everything.log_prob(batch["labels"]), atol=1e-5)


@pytest.mark.parametrize(("advantage", "seeds"), shortened([("grpo", 1), ("grpo", 3), ("rloo", 3)], [("grpo", 1)]))
def test_a_policy_learns_a_rule(tmp_path_factory, advantage, seeds):
    """Answers of few characters: the mean reward rises by three standard errors with each seed, and the KL is bounded."""
    for seed in range(seeds):
        folder = tmp_path_factory.mktemp(f"{advantage}-{seed}")
        recipe = made(
            folder, advantage=advantage, num_generations=8, rollout_batch_size=8, update_epochs=2, max_new_tokens=8, beta=0.02,
            rewards=[{"type": "length", "target": 0, "unit": "characters"}],
            train={"batch_size": 32, "epochs": 12.0, "learning_rate": 5e-3, "lr_scheduler_type": "constant"},
        )  # fmt: skip
        tunesmith.train({**recipe, "seed": seed}, out=folder / "run")
        records = [record for record in history(folder / "run") if record["kind"] == "rollout"]
        first, last = records[0], records[-1]
        error = (first["reward_std"] ** 2 / 64 + last["reward_std"] ** 2 / 64) ** 0.5
        assert last["reward"] - first["reward"] > 3 * error, (seed, first["reward"], last["reward"], error)
        assert last["kl_per_answer"] < 20


def test_keys_that_would_do_nothing_are_refused():
    start = {"model": "m", "data": {"train": [{"path": "x"}]}}
    for keys, expected in (
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"use_kl_in_reward": True}, "beta is 0"),
    ):
        with pytest.raises(RecipeError, match=expected):
            parse({**start, "objective": {"type": "grpo", **keys}})
