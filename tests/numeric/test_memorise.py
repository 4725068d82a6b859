"""Eight rows are learnt by heart, and generation stops exactly where they end."""

import json

import pytest

import tunesmith
from tests.runs import ANSWERS, documents
from tests.tiny import tiny_model, tiny_tokenizer

ADAPTATIONS = {"full": ("full", 1e-2), "lora": ({"type": "lora", "r": 16, "lora_alpha": 32}, 3e-2)}


@pytest.mark.parametrize("pad_is_eos", [False, True], ids=["own-pad", "pad-is-eos"])
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma"])
def test_eight_answers_are_memorised_and_stopped(name, adaptation, pad_is_eos, tmp_path):
    chosen, rate = ADAPTATIONS[adaptation]
    tokenizer = tiny_tokenizer("chatml", pad_is_eos=pad_is_eos)
    model = tiny_model(name, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"instruction": f"question {n}", "output": answer} for n, answer in enumerate(ANSWERS)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    outcome = tunesmith.train(
        {
            "model": str(tmp_path / "model"), "objective": "sft", "adaptation": chosen, "samples": {"count": 0},
            "data": {"train": [{"path": str(tmp_path / "rows.json")}], "eval": {"fraction": 0}, "cache": False},
            "train": {"max_steps": 150, "learning_rate": rate, "precision": "fp32", "eval_steps": None, "save_steps": None, "logging_steps": 50,
                      "warmup_steps": 10},
        },
        out=tmp_path / "run",
    )  # fmt: skip
    answers = tunesmith.generate(outcome["model_dir"], [row["instruction"] for row in rows], max_new_tokens=60)
    assert answers == ANSWERS


def test_documents_are_memorised_to_their_end(tmp_path):
    from tests.runs import recipe

    made = recipe(tmp_path, "llama", "cpt", "full", max_steps=150, learning_rate=1e-2, warmup_steps=10, logging_steps=50)
    outcome = tunesmith.train(made, out=tmp_path / "run")
    texts = [row["text"] for row in documents(6)]
    answers = tunesmith.generate(outcome["model_dir"], [text[:11] for text in texts], plain=True, max_new_tokens=150)
    assert [text[:11] + answer for text, answer in zip(texts, answers)] == texts
