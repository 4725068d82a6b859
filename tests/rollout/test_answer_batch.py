"""Sampled answers in a batch: a prompt that several answers share is computed once, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tunesmith
from tests.rollout.sampling import made, rule
from tests.tiny import tiny_model
from tunesmith.data.batch import shared_prompts
from tunesmith.data.batch.pack import PACKED, PADDED, Layout
from tunesmith.data.batch.step import Listed, Step
from tunesmith.models.fast import attention
from tunesmith.models.heads import value_head
from tunesmith.models.network import base
from tunesmith.objectives import grpo, ppo
from tunesmith.rollout import answer_batch
from tunesmith.rollout.rewards import Rewards

APART = Layout(packed=True)
PROMPTS, ANSWERS = (7, 7, 7, 4, 4, 9, 7), (5, 1, 6, 3, 2, 4, 2)


def answers(prompts=PROMPTS, lengths=ANSWERS):
    """Answers with what training needs of their tokens. Prompts of one length are the same prompt."""
    generator = np.random.default_rng(0)
    made = []
    for prompt, length in zip(prompts, lengths, strict=True):
        ids = np.concatenate([np.arange(5, 5 + prompt), generator.integers(5, 500, length)]).astype(np.int32)
        tokens = {name: generator.normal(0, 0.3, length).astype(np.float32) for name in ("old_values", "advantages", "returns")}
        old = {name: generator.normal(-6, 0.3, length).astype(np.float32) for name in ("old_logps", "reference_logps")}
        prompt_alone = {"supervised": np.arange(len(ids)) >= prompt, "shared": np.array([prompt])}
        made.append({"input_ids": ids, **prompt_alone, **tokens, **old})
    return made


BEGINNING = [{**one, "shared": np.array([3])} for one in answers()]
"""The same with the first three tokens of all prompts to share."""


def test_neighbours_share_their_prompt_or_what_all_prompts_begin_with():
    """Whatever saves more: three answers each to prompts with little in common, one each after a long system message."""
    groups = [np.array([1, 2, 3, first, 5]) for first in (7, 7, 7, 8, 8, 8)]
    alone = [np.array([1, 2, 3, first]) for first in range(5)]
    assert shared_prompts.prefixes(groups) == [5] * 6 and shared_prompts.prefixes(alone) == [3] * 5
    assert shared_prompts.prefixes([np.array([2, 2]), *alone]) == [0, 3, 3, 3, 3, 3], "one has nothing in common with others"
    batch = answer_batch.with_answers(BEGINNING, PACKED)
    assert batch["segments"] == (3, 9, 5, 10, 4, 3, 10, 6) and batch["behind"] == (-1, 0, 0, 0, 0, 0, 0, 0)


def step_of(examples):
    listed = Listed(examples, [""] * len(examples), shares=True)
    return Step(1, listed, np.arange(len(examples)), answer_batch.with_answers)


def test_neighbours_with_one_prompt_hold_it_once():
    batch = answer_batch.with_answers(answers(), PACKED)
    assert batch["segments"] == (7, 5, 1, 6, 4, 3, 2, 9, 4, 7, 2)
    assert batch["behind"] == (-1, 0, 0, 0, -1, 4, 4, -1, 7, -1, 9), "the last one has its prompt again"
    assert batch["positions"].tolist()[:8] == [6, 7, 8, 9, 10, 6, 6, 13], "each first token is predicted by the prompt's last"
    expected = [token for example in answers() for token in example["input_ids"][example["supervised"]].tolist()]
    for layout in (PACKED, APART, PADDED):
        batch = answer_batch.with_answers(answers(), layout)
        assert batch["labels"].tolist() == expected and batch["lengths"] == list(ANSWERS)
        assert batch["owners"].tolist() == np.repeat(np.arange(7), ANSWERS).tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("kind", "rows"), [("grpo", answers()), ("ppo", answers()), ("ppo", BEGINNING)], ids=["grpo", "ppo", "beginning"]
)
def test_loss_gradients_and_measurements_are_those_of_answers_with_a_prompt_each(kind, rows, name):
    """Rotary and absolute positions, in fp32."""
    found = {}
    if kind == "grpo":
        objective = grpo.Objective(grpo.Config(num_generations=2, max_new_tokens=8, beta=0.1, temperature=0.7))
    else:
        objective = ppo.Objective(ppo.Config(num_generations=2, max_new_tokens=8, entropy_coef=0.1))
    attention.register()
    for layout in (PADDED, APART, PACKED):
        torch.manual_seed(0)
        model = tiny_model(name)
        value_head.attach(model)
        torch.nn.init.normal_(value_head.find(model).weight)
        base(model).set_attn_implementation(attention.NAME if layout.packed else "sdpa")
        batch = objective.collate(rows, layout)
        loss, _ = objective.loss(model, batch)
        (loss / objective.count(batch)).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        with torch.no_grad():
            measured = objective.measure(model, batch)
        found[layout] = loss.item(), gradients, measured
    for layout in (APART, PACKED):
        for one, other in ((found[layout], found[PADDED]), (found[PACKED], found[APART])):
            assert one[0] == pytest.approx(other[0], rel=1e-6, abs=1e-6 * sum(ANSWERS)), "a sum whose terms cancel"
            assert float((one[1] - other[1]).norm() / other[1].norm()) < 1e-6
            for ours, theirs in zip(one[2], other[2], strict=True):
                assert ours.keys() == theirs.keys() and {"old_logps", "entropies"} <= ours.keys()
                assert all(np.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=12),
    st.integers(1, 40),
    st.sampled_from([PACKED, APART, PADDED]),
)
def test_a_step_knows_the_tokens_of_its_micro_batches(drawn, budget, layout):
    step = step_of(answers([4 * prompt for prompt, _ in drawn], [length for _, length in drawn]))
    groups = step.split(budget, layout)
    assert sorted(place for group in groups for place in group) == list(range(len(drawn)))
    for group in groups:
        micro = step.micro(group, layout)
        assert micro.tokens == micro.batch["input_ids"].numel()
        assert micro.tokens <= budget or len(group) == 1


def test_a_run_computes_the_prompt_of_a_group_once(tmp_path, monkeypatch):
    """16 answers to four prompts: in one mini-batch four prompts are computed, in two each of those that it has."""
    seen, collate = [], grpo.Objective.collate

    def watched(self, examples, layout):
        batch = collate(self, examples, layout)
        if "old_logps" in batch:
            prompts = [example["input_ids"][~example["supervised"]] for example in examples]
            answers = sum(int(example["supervised"].sum()) for example in examples)
            distinct = {tuple(prompt): len(prompt) for prompt in prompts}
            seen.append((batch["input_ids"].numel(), sum(distinct.values()) + answers, sum(map(len, prompts)) + answers))
        return batch

    monkeypatch.setattr(Rewards, "score", rule)
    monkeypatch.setattr(grpo.Objective, "collate", watched)
    found = tunesmith.train(made(tmp_path, train={"max_steps": 4, "epochs": 1.0}), out=tmp_path / "run")
    assert found["steps"] == 4 and seen
    assert all(tokens == once < each for tokens, once, each in seen)
