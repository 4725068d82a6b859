"""A padding token for decoders whose tokenizer brings none that could be one: gpt2's has one special token and no padding."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer, pipeline

import tunesmith
from tests.runs import ROWS, recipe
from tests.tiny import CORPUS, TINY
from tunesmith.data.encode import texts
from tunesmith.errors import ModelError

END = "<|endoftext|>"


def pieces(alphabet=None):
    """A byte-level BPE as gpt2's is."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    made = json.loads(backend.to_str())["model"]
    return GPT2Tokenizer(vocab=made["vocab"], merges=[tuple(pair) for pair in made["merges"]])


def gpt2(folder, pad=None):
    """A model folder as gpt2's: without padding, or with a padding token that has no row in the embedding."""
    tokenizer = pieces()
    values = {**TINY["gpt2"], "vocab_size": len(tokenizer), "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **values)).save_pretrained(folder)
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("objective", "pad"), [("classify", None), ("classify", "<pad>"), ("reward", END)])
def test_gpt2_is_trained_and_a_transformers_pipeline_predicts_the_same(objective, pad, tmp_path):
    made = {**recipe(tmp_path, "gpt2", objective), "model": str(gpt2(tmp_path / "gpt2", pad))}
    found = tunesmith.train(made, out=tmp_path / "run")["model_dir"]
    rows = ROWS[objective](6)
    if objective == "reward":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    ours = list(tunesmith.predict(found, tmp_path / "new.jsonl", precision="fp32"))
    function = "none" if objective == "reward" else "softmax"
    stock = pipeline("text-classification", model=found, batch_size=2, function_to_apply=function)
    assert stock.model.config.pad_token_id == stock.tokenizer.pad_token_id < stock.model.config.vocab_size
    given = [row.get("text") or row["prompt"] + row["completion"] + END for row in rows]
    for theirs, said in zip(stock(given), ours, strict=True):
        assert theirs["score"] == pytest.approx(said["reward" if objective == "reward" else "score"], abs=1e-5)


def test_an_adapter_on_gpt2_needs_no_new_row(tmp_path):
    made = {**recipe(tmp_path, "gpt2", "classify", {"type": "lora", "r": 2}), "model": str(gpt2(tmp_path / "gpt2"))}
    found = tunesmith.train(made, out=tmp_path / "run")
    stock = pipeline("text-classification", model=found["merged_dir"], batch_size=2)
    ours = list(tunesmith.predict(found["model_dir"], tmp_path / "rows.jsonl", precision="fp32"))
    given = [json.loads(line)["text"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [one["score"] for one in stock(given)] == pytest.approx([one["score"] for one in ours], abs=1e-5)


def test_a_letter_that_names_the_padding_stays_text(tmp_path):
    tokenizer = pieces()
    before = tokenizer("Ha\u00ff, \u00ff\u00ff")["input_ids"]
    assert texts.set_padding_token(tokenizer, len(tokenizer)) == "\u00ff"
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert one("Ha\u00ff, \u00ff\u00ff")["input_ids"] == before and one.pad_token_id not in before


def test_without_any_padding_the_model_is_refused():
    tokenizer = pieces(alphabet=[])
    with pytest.raises(ModelError, match="no token that could be padding"):
        texts.set_padding_token(tokenizer, len(tokenizer))
