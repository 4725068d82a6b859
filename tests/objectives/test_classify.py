"""Classification against transformers' own heads and losses, and what the numbers must not depend on."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

import tunesmith
from tests.numeric.test_invariance import assert_no_split_matters
from tests.runs import LABELS, history, killed_before, labelled, model_folder, recipe, weights
from tests.shortened import shortened
from tests.tiny import ENCODERS, encoder_tokenizer, tiny_tokenizer
from tunesmith.data.batch.pack import PACKED, PADDED, to_device
from tunesmith.data.data_config import Source
from tunesmith.data.read.source import open_source
from tunesmith.data.rows import Labelled
from tunesmith.errors import DataError, RecipeError
from tunesmith.models.find.locate import locate
from tunesmith.models.load import head_loading, load
from tunesmith.objectives import classify, tag

NETWORKS = ["bert", "roberta", "llama", "gpt2", "qwen3"]
TEXTS = ["Paris is the capital.", "a lazy dog", "x", "def add(a, b): return a, the quick brown fox jumps over"]
PROBLEMS = {
    "single": [Labelled(text, label=LABELS[n % 3]) for n, text in enumerate(TEXTS)],
    "multi": [Labelled(text, labels=LABELS[: n % 3]) for n, text in enumerate(TEXTS)],
    "regression": [Labelled(text, label=n / 2) for n, text in enumerate(TEXTS)],
    "pair": [Labelled(text, text_pair=TEXTS[n - 1], label=LABELS[n % 2]) for n, text in enumerate(TEXTS)],
}


def made(name, rows, tmp_path, **config):
    """(objective, network, tokenizer, examples): a head on a correctly loaded body."""
    folder = locate(model_folder(tmp_path, name))
    tokenizer = load.load_tokenizer(folder)
    objective = classify.Objective(classify.Config(**config))
    objective.bind(load.load_config(folder), tokenizer, 128)
    objective.scan(rows)
    torch.manual_seed(0)
    network = load.load_model(folder, head="score", trainable=True, head_config=objective.head_config())
    return objective, network, tokenizer, [one for row in objective.encode(rows, tokenizer) for one in row]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_loss_and_gradients_are_those_of_transformers(name, problem, tmp_path):
    """On a padded batch, with transformers' own head, pooling and loss; its mean is over rows, and over labels where there are several."""
    rows = PROBLEMS[problem]
    objective, network, tokenizer, examples = made(name, rows, tmp_path)
    if name in ENCODERS or problem != "pair":
        given = [[row.text for row in rows]] + ([[row.text_pair for row in rows]] if problem == "pair" else [])
        stock = tokenizer(*given, padding=True, return_tensors="pt")
    else:
        stock = tokenizer([f"{row.text}\n\n{row.text_pair}" for row in rows], padding=True, return_tensors="pt")
    stock.pop("token_type_ids") if "token_type_ids" in stock and name != "bert" else None
    targets = torch.from_numpy(np.stack([one["target"] for one in examples]))
    labels = targets if problem == "multi" else targets[:, 0] if problem == "regression" else targets[:, 0].long()
    expected = network(**stock, labels=labels).loss
    gradients = torch.autograd.grad(expected, [one for one in network.parameters()], allow_unused=True)
    batch = objective.collate(examples, PADDED)
    loss, _ = objective.loss(network, batch)
    ours = torch.autograd.grad(loss / objective.count(batch), [one for one in network.parameters()], allow_unused=True)
    assert float(loss / 4) == pytest.approx(float(expected), abs=1e-6)
    for one, other in zip(ours, gradients):
        assert (one is None) == (other is None)
        if one is not None:
            assert float((one - other).abs().max()) <= 1e-6 * max(1.0, float(other.abs().max()))


def test_class_weights_and_smoothing_are_torchs(tmp_path):
    objective, network, _, examples = made(
        "bert", PROBLEMS["single"], tmp_path, class_weights={"good": 2.0, "bad": 0.5}, label_smoothing=0.1
    )
    batch = objective.collate(examples, PADDED)
    logits = network(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
    weight = torch.tensor([{"good": 2.0, "bad": 0.5}.get(name, 1.0) for name in objective.labels])
    expected = torch.nn.functional.cross_entropy(
        logits, batch["targets"][:, 0].long(), weight=weight, label_smoothing=0.1, reduction="sum"
    )
    assert float(objective.loss(network, batch)[0]) == pytest.approx(float(expected), abs=1e-6)


def test_balanced_weights_have_the_mean_one(tmp_path):
    rows = [Labelled("x", label="a")] * 6 + [Labelled("y", label="b")] * 2
    objective, _, _, examples = made("bert", rows, tmp_path, class_weights="balanced")
    drawn = objective._weights[[int(one["target"][0]) for one in examples]]
    assert drawn.mean() == pytest.approx(1.0) and objective._weights.tolist() == pytest.approx([8 / 12, 2.0])


def test_balanced_rows_with_a_label_count_as_much_as_those_without(tmp_path):
    rows = [Labelled("x", labels=("a", "c")), *[Labelled("y", labels=("b", "c"))] * 3, *[Labelled("z", labels=("c",))] * 4]
    objective, _, _, examples = made("bert", rows, tmp_path, class_weights="balanced")
    assert objective._weights.tolist() == pytest.approx([7.0, 5 / 3, 1 / 8])
    batch = objective.collate(examples, PADDED)
    logits = torch.zeros(8, 3, requires_grad=True)
    objective._losses(logits, batch["targets"], objective._weights).sum().backward()
    assert logits.grad.sum(0)[:2].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)  # of a network that does not know anything


@pytest.mark.parametrize("pooling", [None, "mean"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_row_has_the_same_scores_in_any_batch(name, pooling, tmp_path):
    """Packed, padded, alone, on the left and on the right of padding; and by the stock class where it reads one token."""
    objective, network, tokenizer, examples = made(name, PROBLEMS["single"], tmp_path, pooling=pooling)
    with torch.no_grad():
        alone = np.concatenate([objective.evaluate(network, objective.collate([one], PADDED))["scores"] for one in examples])
        padded = objective.evaluate(network, objective.collate(examples, PADDED))["scores"]
        assert np.abs(alone - padded).max() <= 1e-6
        if pooling is None:
            for side in ("left", "right") if name not in ENCODERS else ("right",):
                tokenizer.padding_side = side
                stock = tokenizer([row.text for row in PROBLEMS["single"]], padding=True, return_tensors="pt")
                found = network(stock["input_ids"], attention_mask=stock["attention_mask"], position_ids=places(stock, name))
                assert np.abs(found.logits.softmax(-1).numpy() - alone).max() <= 2e-6, side
        changed = {**examples[0], "input_ids": examples[0]["input_ids"].copy()}
        changed["input_ids"][-1 if name not in ENCODERS else 1] ^= 1
        other = objective.evaluate(network, objective.collate([changed, *examples[1:]], PADDED))["scores"]
    assert np.abs(other[0] - alone[0]).max() > 1e-4 and np.abs(other[1:] - alone[1:]).max() <= 1e-6


def places(stock, name):
    if name in ENCODERS:
        return None
    return (stock["attention_mask"].cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("eos_is_pad", [False, True])
def test_the_padding_token_never_ends_a_row(eos_is_pad, tmp_path):
    tokenizer = tiny_tokenizer("chatml", pad_is_eos=eos_is_pad)
    from tunesmith.data.encode import texts

    texts.set_padding_token(tokenizer, len(tokenizer))
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)


MEAN = {"type": "classify", "pooling": "mean"}
HOW = {
    "dropout": ("bert", "classify", "full", {"hidden_dropout_prob": 0.2}),
    "lora": ("roberta", "classify", {"type": "lora", "r": 4, "lora_dropout": 0.3}, {}),
    "mean": ("llama", MEAN, {"type": "prompt", "num_virtual_tokens": 3}, {}),
}
"""A decoder's last token is among the objectives of ``tests/numeric/test_every_objective.py``."""


@pytest.mark.parametrize("how", HOW)
def test_any_split_makes_the_same_gradients_and_figures(how, tmp_path):
    name, objective, adaptation, changes = HOW[how]
    model_folder(tmp_path, name, **changes)
    made = recipe(tmp_path, name, objective, adaptation, learning_rate=1e-3, optim_args={"eps": 1e-3})
    assert_no_split_matters(made, tmp_path)


def test_killed_and_resumed_it_is_the_same_run(tmp_path):
    model_folder(tmp_path, "bert", hidden_dropout_prob=0.2)
    made = recipe(tmp_path, "bert", "classify", "full", count=14, max_steps=5, eval_steps=2, save_steps=1, precision="bf16")
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl"), "limit": 5}
    straight = tunesmith.train(made, out=tmp_path / "straight")
    killed_before(4, made, tmp_path / "killed")
    resumed = tunesmith.train(made, out=tmp_path / "killed", resume=True)
    assert history(tmp_path / "killed") == history(tmp_path / "straight")
    ours, theirs = weights(resumed["model_dir"]), weights(straight["model_dir"])
    assert all(ours[key].equal(theirs[key]) for key in theirs)


MEMORISED = [("bert", "multi"), ("llama", "single"), ("gpt2", "regression")]


@pytest.mark.parametrize(("name", "problem"), shortened(MEMORISED, [("llama", "single")]))
def test_eight_rows_are_memorised(name, problem, tmp_path):
    rows = [{"text": row["text"]} for row in labelled(8)]
    for number, row in enumerate(rows):
        row |= {
            "single": {"label": LABELS[number % 3]},
            "multi": {"labels": list(LABELS[: number % 4])},
            "regression": {"label": number / 4},
        }[problem]
    made = recipe(tmp_path, name, "classify", "full", max_steps=200, learning_rate=5e-3, batch_size=8)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = tunesmith.train(made, out=tmp_path / "run")
    said = list(predictions(outcome["model_dir"], tmp_path / "rows.jsonl"))
    for row, answer in zip(rows, said, strict=True):
        if problem == "regression":
            assert answer["value"] == pytest.approx(row["label"], abs=0.1)
        else:
            key = "label" if problem == "single" else "labels"
            assert answer[key] == row[key] if problem == "single" else sorted(answer[key]) == sorted(row[key])


@pytest.fixture(scope="module")
def bert_run(tmp_path_factory):
    """The model folder of a run on ``labelled`` rows."""
    root = tmp_path_factory.mktemp("bert")
    return tunesmith.train(recipe(root, "bert", "classify", "full", max_steps=1), out=root / "run")["model_dir"]


def predictions(model, file, **options):
    from tunesmith.evaluate.predict import predict

    return predict(model, file, **options)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_transformers_pipeline_predicts_the_same(name, tmp_path):
    outcome = tunesmith.train(recipe(tmp_path, name, "classify", "full"), out=tmp_path / "run")
    said = list(predictions(outcome["model_dir"], tmp_path / "rows.jsonl", precision="fp32"))
    stock = pipeline("text-classification", model=outcome["model_dir"], batch_size=4, top_k=None)
    for row, ours in zip(stock([one["text"] for one in labelled(12)]), said, strict=True):
        theirs = {one["label"]: one["score"] for one in row}
        assert theirs.keys() == ours["probabilities"].keys()
        assert all(theirs[label] == pytest.approx(chance, abs=1e-5) for label, chance in ours["probabilities"].items())
    assert AutoModelForSequenceClassification.from_pretrained(outcome["model_dir"]).config.id2label == dict(
        enumerate(sorted(LABELS))
    )


def test_an_unreadable_row_does_not_stop_the_prediction_of_others(bert_run, tmp_path):
    (tmp_path / "new.jsonl").write_text('{"text": "a lazy dog"}\n{"text": ""}\n{"text": "Paris ' + "is the " * 200 + '"}\n')
    notes = []
    said = list(predictions(bert_run, tmp_path / "new.jsonl", note=notes.append))
    assert [("error" in one, one["row"]) for one in said] == [(False, 1), (True, 2), (False, 3)]
    assert "1 rows were longer" in notes[0] and "1 rows could not" in notes[1]


def test_an_unknown_label_names_row_and_label(bert_run, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "x", "label": "good"}\n{"text": "y", "label": "god"}\n')
    with pytest.raises(DataError, match=r"other.jsonl:2:label .*'god'.*Did you mean `good`"):
        tunesmith.evaluate(bert_run, tmp_path / "other.jsonl")


def test_bad_rows_are_listed_when_too_few_rows_are_left(tmp_path):
    made = recipe(tmp_path, "bert", "classify", "full")
    (tmp_path / "rows.jsonl").write_bytes('{"text": "x", "label": "\uae0d\uc815"}\n'.encode("cp949") * 12)
    with pytest.raises(
        DataError, match=r"(?s)12 bad rows:.*rows.jsonl:1:label.*UTF-8.* and 2 more bad rows\nWithout them the training rows"
    ):
        tunesmith.train(made, out=tmp_path / "run")


def test_one_class_is_nothing_to_learn(tmp_path):
    made = recipe(tmp_path, "bert", "classify", "full")
    (tmp_path / "rows.jsonl").write_text('{"text": "x", "label": "good"}\n' * 4)
    with pytest.raises(DataError, match="only the class 'good'"):
        tunesmith.train(made, out=tmp_path / "run")


@pytest.mark.parametrize("name", ["--5", "-", "7" * 5000, "\u00b2"])
def test_labels_that_look_almost_like_numbers_are_names(name):
    objective = classify.Objective(classify.Config())
    objective.scan([Labelled("t", label="4"), Labelled("u", label=name)])
    assert objective.labels == (["4", name])


SAID = {
    "fractions": ([0.5, 1, 2.25], ["numbers from 0.5 to 2.25: regression targets"]),
    "fractions of a csv": (["0.50", "1", "2.25"], ["3 numbers (from 0.5 to 2.25): class names"]),
    "whole": (["0", "10", "2"], ["3 whole numbers (from 0 to 10): class names"]),
    "case": (["pos", "Pos", "neg"], ["'Pos' and 'pos' look the same but are different classes"]),
    "forms": (["caf\u00e9", "cafe\u0301", "a\u00a0b", "a b"], [r"'a b' and 'a\xa0b'", r"'cafe\u0301' and 'caf\xe9'"]),
    "invisible": (["pos", "pos\u200b"], [r"'pos' and 'pos\u200b'"]),
    "nothing": (["pos", "neg", "1"], []),
}


@pytest.mark.parametrize("case", SAID)
def test_guesses_about_labels_are_noted(case):
    found, said = SAID[case]
    objective = classify.Objective(classify.Config())
    objective.scan([Labelled("t", label=label) for label in found])
    notes = [note for note in objective.notes if not note.startswith("labels: ")]
    assert len(notes) == len(said) and all(part in note for part, note in zip(said, notes))


NEVER = {
    "vectors": ([[1, 0, 0], [0, 0, 1], [1, 0, 1]], ["0", "1", "2"], "1"),
    "objects": ([{"joy": 0, "fear": 1}, {"joy": 0, "fear": 0}], ["fear", "joy"], "joy"),
}


@pytest.mark.parametrize("how", NEVER)
def test_a_label_that_no_row_has_is_kept_and_noted(how, tmp_path):
    given, names, never = NEVER[how]
    rows = "".join(json.dumps({"text": "t", "labels": one}) + "\n" for one in given)
    (tmp_path / "rows.jsonl").write_text(rows)
    objective = classify.Objective(classify.Config(class_weights="balanced"))
    objective.scan(row for _, row in open_source(Source(path=str(tmp_path / "rows.jsonl")), (Labelled,)).rows())
    assert objective.labels == names and np.isfinite(objective._weights).all()
    assert [note.rpartition(": ")[2] for note in objective.notes if "no training row has" in note] == [never]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_mean_pooling_is_noted_as_a_feature_of_tunesmith(name, tmp_path):
    for pooling, count in (("mean", 1), (None, 0)):
        objective, *_ = made(name, PROBLEMS["single"], tmp_path, pooling=pooling, labels=list(LABELS))
        assert sum("pooling: mean is a feature of tunesmith" in note for note in objective.notes) == count


def test_smoothing_is_refused_with_several_labels():
    with pytest.raises(ValueError, match="label_smoothing applies to single-label classification only"):
        classify.Config(problem_type="multi_label_classification", labels=["a", "b"], label_smoothing=0.1)


def test_a_number_that_cannot_be_squared_is_no_target(tmp_path):
    made = recipe(tmp_path, "bert", "classify", "full")
    (tmp_path / "rows.jsonl").write_text('{"text": "x", "label": 0.5}\n{"text": "y", "label": 1e30}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2:label .*expected a number.*1e\+?30"):
        tunesmith.train(made, out=tmp_path / "run")


@pytest.mark.parametrize("kind", [classify, tag])
def test_a_label_named_twice_is_refused(kind):
    with pytest.raises(ValueError, match="'a' 2 times: write each name once"):
        kind.Config(labels=["a", "b", "a"])


def test_weights_of_a_class_that_is_not_there_are_refused(tmp_path):
    made = recipe(tmp_path, "bert", {"type": "classify", "class_weights": {"god": 2.0}}, "full")
    with pytest.raises(RecipeError, match=r"god.*Did you mean `good`"):
        tunesmith.train(made, out=tmp_path / "run")


def test_a_cut_row_still_ends_in_its_separator(tmp_path):
    objective, _, _, (example, *_) = made("bert", PROBLEMS["single"], tmp_path, overlong="truncate")
    cut = {key: value[:6] if key in ("input_ids", "token_type_ids") else value for key, value in example.items()}
    ids = objective.collate([cut], PACKED)["input_ids"][0].tolist()
    assert ids[-1] == encoder_tokenizer("bert").sep_token_id and ids[:5] == example["input_ids"][:5].tolist()


def test_the_threshold_is_chosen_on_held_out_rows_and_saved(tmp_path):
    rows = [{"text": row["text"], "labels": list(LABELS[: n % 3])} for n, row in enumerate(labelled(12))]
    made = recipe(tmp_path, "bert", "classify", "full", eval_steps=2)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl")}
    outcome = tunesmith.train(made, out=tmp_path / "run")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert 0 < config["tunesmith"]["threshold"] < 1
    again = tunesmith.evaluate(outcome["model_dir"], tmp_path / "rows.jsonl", precision="fp32")
    assert again["eval_micro_f1"] == pytest.approx(outcome["eval_micro_f1"], abs=1e-6)


def test_an_adapter_knows_its_labels_in_plain_folders_too(tmp_path):
    outcome = tunesmith.train(recipe(tmp_path, "llama", "classify", {"type": "lora", "r": 4}), out=tmp_path / "run")
    model, _ = tunesmith.load(outcome["model_dir"])
    assert model.config.id2label == dict(enumerate(sorted(LABELS)))
    tunesmith.merge(outcome["model_dir"], tmp_path / "merged", dtype="float32")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert stock.config.id2label == model.config.id2label
    ids = torch.tensor([[5, 6, 7, 300]])
    with torch.no_grad():
        assert float((stock(ids).logits - head_loading.row_logits(model, ids)).abs().max()) <= 1e-5


def test_the_body_cache_tells_rows_apart_by_token_types(tmp_path):
    """features trains the head alone; with token types two rows of the same tokens are two rows."""
    from tunesmith.train import frozen_body_cache

    objective, _, _, _ = made("bert", PROBLEMS["pair"], tmp_path)
    first, second = (
        {
            "input_ids": np.array([3, 9, 4, 9, 4], np.int32),
            "token_type_ids": np.array(types, np.uint8),
            "target": np.zeros(1, np.float32),
        }
        for types in ([0, 0, 0, 1, 1], [0, 0, 0, 0, 1])
    )
    rows = frozen_body_cache.rows_of(to_device(objective.collate([first, second], PACKED), "cpu"))
    assert rows[0].digest != rows[1].digest


def test_a_bad_file_of_a_folder_for_each_class_is_named(tmp_path):
    plan = recipe(tmp_path, "bert", "classify", max_steps=1)
    for place, text in (("good/a", "fine"), ("good/b", "nice"), ("bad/c", ""), ("bad/d", "awful")):
        file = tmp_path / "reviews" / f"{place}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    plan["data"]["train"] = [{"path": str(tmp_path / "reviews")}]
    with pytest.raises(DataError, match=r"reviews/bad/c\.txt:1:text"):
        tunesmith.train(plan, out=tmp_path / "run")
