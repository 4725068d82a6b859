"""A template may close turns with another token than the end token: the saved model stops there in plain transformers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor

import tunesmith
from tests.runs import recipe
from tests.tiny import CHATML, save_tiny, tiny_tokenizer
from tunesmith.models.load.load import load

CLOSES, ENDS = 4, 2
"""Ids of <|im_end|>, which closes a turn of the template, and </s>, the tokenizer's end token."""


class Always(LogitsProcessor):
    """A logits processor that always selects ``token``."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        return torch.zeros_like(scores).index_fill(1, torch.tensor([self.token]), 1.0)


def written(folder, token):
    """Return how many tokens plain transformers generates with a model that writes ``token`` only."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7]])
    out = model.generate(ids, max_new_tokens=6, do_sample=False, logits_processor=[Always(token)], pad_token_id=0)
    return out.shape[1] - ids.shape[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that ends texts with </s>, and turns with <|im_end|>."""
    folder = tmp_path_factory.mktemp("stops")
    save_tiny("llama", folder / "model-llama", template=CHATML)
    assert tiny_tokenizer(CHATML).convert_ids_to_tokens([CLOSES, ENDS]) == ["<|im_end|>", "</s>"]
    assert written(folder / "model-llama", CLOSES) == 6  # the base model does not know its template
    return folder


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request, folder):
    settings = recipe(folder, "llama", adaptation=request.param, max_steps=1)
    chats = [{"question": f"what {n}?", "answer": f"the fox {n}."} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    tunesmith.train(settings, out=folder / request.param)
    return folder / request.param


def test_the_saved_and_the_merged_model_stop_in_plain_transformers(run, tmp_path):
    saved = run / "model"
    assert GenerationConfig.from_pretrained(saved).eos_token_id == [ENDS, CLOSES]
    if (saved / "adapter_config.json").exists():
        tunesmith.merge(saved, tmp_path / "merged")
        saved = tmp_path / "merged"
        assert GenerationConfig.from_pretrained(saved).eos_token_id == [ENDS, CLOSES]
    assert written(saved, CLOSES) == written(saved, ENDS) == 1 and written(saved, 9) == 6


def test_the_tokenizer_is_saved_without_how_it_was_loaded(run):
    config = json.loads((run / "model" / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only"} & config.keys()
    assert load(run)[1].eos_token == "</s>"
