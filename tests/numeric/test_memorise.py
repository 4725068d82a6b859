"""Eight rows are learnt by heart, and generation stops exactly where they end."""

import json
from itertools import product

import pytest

import tunesmith
from tests.runs import ANSWERS, documents
from tests.shortened import shortened
from tests.tiny import tiny_model, tiny_tokenizer

ADAPTATIONS = {"full": ("full", 1e-2), "lora": ({"type": "lora", "r": 16, "lora_alpha": 32}, 3e-2)}
OTHERS = {
    "features": ({"type": "features", "train_last": 1}, 1e-2),
    "head": ({"type": "features", "target_modules": ["lm_head"]}, 3e-2),
    "qlora": ({"type": "qlora", "r": 16, "lora_alpha": 32}, 3e-2),
    "bottleneck": ({"type": "bottleneck", "bottleneck_size": 32, "variant": "houlsby"}, 2e-2),
}
FEW = {
    "llama-prefix": ({"type": "prefix", "num_virtual_tokens": 20}, 1e-1),
    "gpt2-prefix": ({"type": "prefix", "num_virtual_tokens": 20}, 1e-1),
    "llama-ia3": ("ia3", 1e-1),
    "gpt2-ia3": ("ia3", 1e-1),
    "mistral-ia3": ("ia3", 1e-1),
}
"""These steer a network that can speak; a random one of two layers, 32 wide, has little to steer: of the eight answers they learn at
most five in 600 steps, so that they are asked for one. Not among them: a prefix that mistral's window of 16 leaves behind before the
answer begins; and prompt tuning, whose loss for one answer stays at 4.5 (llama) and 5.7 (gpt2) in 300 steps, where 6.2 is chance."""


@pytest.mark.parametrize(
    ("name", "adaptation"),
    shortened(product(["llama", "gpt2", "qwen3", "gemma"], ADAPTATIONS), [("llama", "full"), ("gemma", "lora")]),
)
def test_eight_answers_are_memorised_and_stopped(name, adaptation, tmp_path):
    """Where a LoRA is trained, the padding token is the end token."""
    assert_memorised(ANSWERS, name, *ADAPTATIONS[adaptation], tmp_path, pad_is_eos=adaptation == "lora", steps=100)


ONE_OF_EACH = [("gpt2", "features"), ("llama", "head"), ("mistral", "qlora"), ("llama", "bottleneck")]


@pytest.mark.parametrize(("name", "adaptation"), shortened(product(["llama", "gpt2", "mistral"], OTHERS), ONE_OF_EACH))
def test_eight_answers_are_memorised_by_every_adaptation_that_has_room_for_them(name, adaptation, tmp_path):
    if adaptation == "qlora":
        pytest.importorskip("bitsandbytes")
    assert_memorised(ANSWERS, name, *OTHERS[adaptation], tmp_path)


@pytest.mark.parametrize("case", shortened(FEW, ["llama-prefix", "gpt2-ia3"]))
def test_one_answer_is_memorised_by_the_others(case, tmp_path):
    assert_memorised(ANSWERS[5:6], case.partition("-")[0], *FEW[case], tmp_path)


def assert_memorised(answers, name, adaptation, rate, folder, pad_is_eos=False, steps=150):
    tokenizer = tiny_tokenizer("chatml", pad_is_eos=pad_is_eos)
    model = tiny_model(name, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"instruction": f"question {n}", "output": answer} for n, answer in enumerate(answers)]
    (folder / "rows.json").write_text(json.dumps(rows))
    outcome = tunesmith.train(
        {
            "model": str(folder / "model"), "objective": "sft", "adaptation": adaptation, "samples": {"count": 0},
            "data": {"train": [{"path": str(folder / "rows.json")}], "eval": {"fraction": 0}, "cache": False},
            "train": {"max_steps": steps, "learning_rate": rate, "precision": "fp32", "eval_steps": None, "save_steps": None, "logging_steps": 50,
                      "warmup_steps": 10},
        },
        out=folder / "run",
    )  # fmt: skip
    assert tunesmith.generate(outcome["model_dir"], [row["instruction"] for row in rows], max_new_tokens=60) == answers


def test_documents_are_memorised_to_their_end(tmp_path):
    from tests.runs import recipe

    made = recipe(tmp_path, "llama", "cpt", "full", max_steps=100, learning_rate=1e-2, warmup_steps=10, logging_steps=50)
    outcome = tunesmith.train(made, out=tmp_path / "run")
    texts = [row["text"] for row in documents(6)]
    answers = tunesmith.generate(outcome["model_dir"], [text[:11] for text in texts], plain=True, max_new_tokens=150)
    assert [text[:11] + answer for text, answer in zip(texts, answers)] == texts
