"""The part of a run that objectives use: one engine samples in all iterations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from tunesmith import adaptations
from tunesmith.models.generate.engine import Engine
from tunesmith.models.generate.running_rows import Request
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.train.session import RunSession

TOKENIZER = tiny_tokenizer("chatml")


def test_samples_come_in_the_order_of_the_requests_from_one_engine() -> None:
    model: Any = tiny_model("llama").train()
    path: Any = SimpleNamespace(attention="sdpa", compiled=False)
    epochs: Any = None
    session = RunSession(TOKENIZER, torch.device("cpu"), 0, epochs, model, path)
    limits = (9, 2, 5)
    wanted = [
        Request((7, 8, 9), SamplingParams(max_new_tokens=limit, temperature=1.0, stop=frozenset()), 1, sample)
        for sample, limit in enumerate(limits)
    ]
    first = session.sample(wanted)
    engine = session._engine
    assert [(answer.sample, len(answer.ids)) for answer in first] == list(enumerate(limits))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    second = session.sample(wanted)
    assert session._engine is engine and engine is not None and engine.slots.count == 0 and model.training
    fresh = Engine(model, session.tokenizer).answers(wanted)
    assert [answer.ids for answer in second] == [answer.ids for answer in fresh] != [answer.ids for answer in first]
    assert second[0].fingerprint != first[0].fingerprint


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_the_fingerprint_is_that_of_the_answers(kind: str) -> None:
    """The virtual tokens of an adapter are parameters outside the network that computes logits."""
    module = adaptations.module(kind)
    keys: Any = {"r": 4} if kind == "lora" else {"num_virtual_tokens": 3}
    model = module.Adaptation(module.Config(**keys)).apply(tiny_model("llama"), "lm", (), TOKENIZER)
    path: Any = SimpleNamespace(attention="sdpa", compiled=False)
    epochs: Any = None
    session = RunSession(TOKENIZER, torch.device("cpu"), 0, epochs, model, path)
    wanted = [Request((7, 8, 9), SamplingParams(max_new_tokens=2))]
    before = session.fingerprint()
    assert session.sample(wanted)[0].fingerprint == before
    with torch.no_grad():
        next(weight for weight in model.parameters() if weight.requires_grad).add_(0.1)
    assert session.sample(wanted)[0].fingerprint == session.fingerprint() != before
