"""The real data sets, as they are, through a whole run of a tiny model: read, encoded, trained on, evaluated."""

import pytest

import tunesmith
from tests.runs import model_folder

FILES = {
    "alpaca_en_demo.json": ({"type": "sft", "overlong": "drop"}, "full", "alpaca"),
    "ko_chatbot.csv": ({"type": "sft", "overlong": "drop"}, {"type": "lora", "r": 4}, "question_answer"),
    "wiki_demo.txt": ("cpt", "full", "text"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_real_file_needs_no_configuration(name, shared, tmp_path):
    objective, adaptation, form = FILES[name]
    made = {
        "model": str(model_folder(tmp_path, "llama")),
        "objective": objective,
        "adaptation": adaptation,
        "data": {"train": [{"path": str(shared / "data" / name), "limit": 12}], "eval": {"fraction": 0.4}},
        "train": {"max_steps": 3, "max_length": 256, "batch_size": 4, "learning_rate": 1e-2, "precision": "fp32"},
        "samples": {"count": 1, "max_new_tokens": 4},
    }
    found = tunesmith.check(made)
    (source,) = found["data"]["sources"]
    assert source["format"].startswith(form) and source["rows_kept"] == source["rows_read"] == 12
    outcome = tunesmith.train(made, out=tmp_path / "run")
    assert outcome["eval_loss"] < outcome["eval_loss_before"]
    assert tunesmith.evaluate(outcome["model_dir"], shared / "data" / name, objective=made["objective"] if objective == "cpt" else "sft",
                              limit=4, overlong="split" if objective == "cpt" else "truncate", precision="fp32")["rows"] >= 1  # fmt: skip
