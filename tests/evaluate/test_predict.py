"""``tunesmith predict`` does not depend on the gold in a file."""

import json

import pytest

import tunesmith
from tests.runs import ROWS, recipe

WRONG = {
    "classify": {"label": ["a", "list"]},
    "tag": {"ner_tags": [1]},
    "qa": {"answers": {"text": ["never said"], "answer_start": [3]}},
}
GOLD = {
    "classify": {"label": "never seen"},
    "tag": {"ner_tags": lambda row: ["B-NEVER"] * len(row["tokens"])},
    "qa": {"answers": {"text": [], "answer_start": []}},
}


@pytest.mark.parametrize("objective", GOLD)
def test_gold_is_ignored(tmp_path, objective, trained):
    model, _ = trained(objective)
    rows = ROWS[objective](6)
    others = [{**row, **{name: to(row) if callable(to) else to for name, to in GOLD[objective].items()}} for row in rows]
    bare = [{name: value for name, value in row.items() if name not in GOLD[objective]} for row in rows]
    wrong = [{**row, **WRONG[objective]} for row in rows]
    said = []
    for name, some in (("known", rows), ("other", others), ("bare", bare), ("wrong", wrong)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
        said.append(list(tunesmith.predict(model, file)))
    assert said[0] == said[1] == said[2] == said[3] and len(said[0]) == 6 and not any("error" in one for one in said[0])


SENTENCES = ["Kim met Lee", "I saw Paris", "so Lee left"]


@pytest.mark.parametrize("by", ["character", "word"])
@pytest.mark.parametrize("labels", [None, ["O", "B-P"]])
def test_plain_text_is_split_as_in_training(tmp_path, by, labels):
    """A tagger trained on characters splits plain text into characters, spaces included."""
    plan = recipe(tmp_path, "bert", {"type": "tag", "labels": labels}, max_steps=1)
    lines = []
    for sentence in SENTENCES:
        words = list(sentence) if by == "character" else sentence.split()
        lines += [f"{word}\t{'B-P' if word[0].isupper() else 'O'}\n" for word in words] + ["\n"]
    (tmp_path / "rows.conll").write_text("".join(lines))
    plan["data"]["train"] = [{"path": str(tmp_path / "rows.conll")}]
    found = tunesmith.train(plan, out=tmp_path / "run")
    (tmp_path / "new.txt").write_text("Lee met  Kim\n")
    (said,) = tunesmith.predict(found["model_dir"], tmp_path / "new.txt")
    assert len(said["tags"]) == (12 if by == "character" else 3)
    (tmp_path / "new.jsonl").write_text('{"tokens": ["Lee", "left"]}\n')
    (said,) = tunesmith.predict(found["model_dir"], tmp_path / "new.jsonl")
    assert len(said["tags"]) == 2


def test_a_context_whose_first_word_is_no_token_costs_no_row(tmp_path):
    """Tokenizers of bert drop invisible characters. The answer that ``predict`` inserts must not be such a word."""
    from tokenizers import Tokenizer, normalizers

    made = recipe(tmp_path, "bert", "qa", max_steps=1)
    file = tmp_path / "model-bert" / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    backend.normalizer = normalizers.Replace("\u200b", "")
    backend.save(str(file))
    found = tunesmith.train(made, out=tmp_path / "run")
    row = {"question": "which?", "context": "\u200b the answer is here"}
    (tmp_path / "new.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "context": "Paris"}) + "\n")
    said = list(tunesmith.predict(found["model_dir"], tmp_path / "new.jsonl"))
    assert len(said) == 2 and all("answer" in one for one in said)
