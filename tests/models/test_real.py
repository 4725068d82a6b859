"""The two models of the catalog, where they have been pulled."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.models.find import model_store
from tunesmith.models.find.folder_summary import show
from tunesmith.models.generate.decode import generate
from tunesmith.models.load.load import load, load_tokenizer, locate

MODELS = model_store.models()  # of the user: the tests themselves run with a store of their own


def pulled(name: str) -> Path:
    if not (MODELS / name).is_dir():
        pytest.skip(f"{name} is not in {MODELS}: tunesmith models pull {name}")
    return MODELS / name


@pytest.mark.real
def test_smollm2_answers_and_stops() -> None:
    path = pulled("smollm2-135m")
    assert show(path)["total_parameters"] == 134_515_008
    model, tokenizer = load(path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    answers = generate((model.float(), tokenizer), ["What is the capital of France?", "Say hello."], max_new_tokens=16)
    assert "Paris" in answers[0]
    assert answers == [
        generate((model, tokenizer), prompt, max_new_tokens=16)[0] for prompt in ("What is the capital of France?", "Say hello.")
    ]


@pytest.mark.real
def test_minilm_is_an_encoder() -> None:
    path = pulled("minilm-l6")
    assert show(path)["head"] is None
    assert load_tokenizer(locate(path))("Hello")["input_ids"] == [101, 7592, 102]
