"""Tagging and question answering against transformers' own heads and losses, and what the numbers must not depend on."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, pipeline

import tunesmith
from tests.numeric.test_invariance import assert_no_split_matters, in_two_processes, same_run
from tests.runs import apart, history, killed_before, model_folder, questions, recipe, tagged, weights
from tests.shortened import shortened
from tests.tiny import ENCODERS
from tunesmith.data.batch.pack import PADDED
from tunesmith.data.rows import Question, Tagged
from tunesmith.errors import DataError, ReadOnceError
from tunesmith.evaluate.predict import predict
from tunesmith.models.find.locate import locate
from tunesmith.models.load import load
from tunesmith.objectives import qa, tag

NETWORKS = ["bert", "roberta", "llama", "gpt2", "qwen3"]
WINDOWED = {
    "tag": ("tag", {"max_length": 9}),
    "label_all": ({"type": "tag", "label_all": True, "stride": 3}, {"max_length": 9}),
    "qa": ({"type": "qa", "window": 32, "stride": 4, "max_answer_tokens": 6}, {}),
}
"""Objectives whose rows become several windows."""


def tagged_rows():
    return [
        Tagged(
            " ".join(row["tokens"]),
            tuple((len(" ".join([*row["tokens"][:at], ""])), len(" ".join(row["tokens"][: at + 1]))) for at in range(len(row["tokens"]))),
            tuple(row["ner_tags"]),
        )
        for row in tagged(5)
    ]  # fmt: skip


def asked_rows():
    rows = [
        Question(row["question"], row["context"], ((row["answers"]["text"][0], row["answers"]["answer_start"][0]),))
        for row in questions(4)
    ]
    return [*rows, Question("what?", rows[0].context, ())]


def made(name, objective, rows, tmp_path):
    """(network, examples): a head on a correctly loaded body."""
    folder = locate(model_folder(tmp_path, name))
    tokenizer = load.load_tokenizer(folder)
    objective.bind(load.load_config(folder), tokenizer, 128)
    objective.scan(rows)
    torch.manual_seed(0)
    network = load.load_model(folder, head=objective.traits.head, trainable=True, head_config=objective.head_config())
    return network, [one for row in objective.encode(rows, tokenizer) for one in row]


def inputs(example):
    return {key: torch.from_numpy(example[key]).long()[None] for key in ("input_ids", "token_type_ids") if key in example}


def test_a_misspelt_entity_tag_of_the_recipe_is_noted():
    tags = ("B-PER", "I-PER", "O", "O", "B PER")
    objective = tag.Objective(tag.Config(labels=sorted(set(tags))))
    objective.scan([Tagged("a " * len(tags), tuple((2 * at, 2 * at + 1) for at in range(len(tags))), tags)])
    assert any("'B PER' (1) do not follow BIO" in note for note in objective.notes)


BROKEN = [
    Tagged("a b c", ((0, 1), (2, 3), (4, 5)), tags) for tags in (("O", "I-X", "I-X"), ("B-X", "I-X", "O"), ("I-X", "O", "O"))
]


@pytest.mark.parametrize("labels", [None, ["I-X", "B-X", "O"]])
def test_tags_that_break_their_scheme_are_counted_whether_labels_are_given_or_not(labels):
    objective = tag.Objective(tag.Config(labels=labels))
    objective.scan(BROKEN)
    assert objective.labels == (labels or ["O", "B-X", "I-X"])
    assert any("2 times an I- with no B- before it" in note for note in objective.notes)
    windows = [
        {"row": (0, n), "words": np.arange(3), "predicted": np.zeros(3, np.int32), "scores": np.zeros(3), "loss": (0.0, 3),
         "targets": np.array([objective.labels.index(one) for one in row.tags])}
        for n, row in enumerate(BROKEN)
    ]  # fmt: skip
    assert objective.details([{"windows": windows}])["broken_tags"] == 2


def test_a_stream_is_not_read_where_its_tags_are_given():
    def stream():
        raise ReadOnceError("a stream")
        yield

    tag.Objective(tag.Config(labels=["O", "B-X"])).scan(stream())
    with pytest.raises(DataError, match="a stream"):
        tag.Objective(tag.Config()).scan(stream())


@pytest.mark.parametrize("label_all", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_tagging_has_the_loss_and_gradients_of_transformers(name, label_all, tmp_path):
    objective = tag.Objective(tag.Config(label_all=label_all))
    network, examples = made(name, objective, tagged_rows(), tmp_path)
    expected = 0.0
    for one in examples:
        labels = torch.full((1, len(one["input_ids"])), -100)
        labels[0, one["places"]] = torch.from_numpy(one["target"]).long()
        expected = expected + network(**inputs(one), labels=labels).loss * len(one["places"])
    same_as(expected, objective, network, examples)
    assert int(objective.count(objective.collate(examples, PADDED))) == sum(len(one["places"]) for one in examples)


@pytest.mark.parametrize("name", NETWORKS)
def test_answers_have_the_loss_and_gradients_of_transformers(name, tmp_path):
    objective = qa.Objective(qa.Config())
    network, examples = made(name, objective, asked_rows(), tmp_path)
    expected = 0.0
    for one in examples:
        start, end = torch.from_numpy(one["span"]).long()[:, None]
        expected = expected + network(**inputs(one), start_positions=start, end_positions=end).loss
    same_as(expected, objective, network, examples)


def same_as(expected, objective, network, examples):
    trained = list(network.parameters())
    theirs = torch.autograd.grad(expected, trained, allow_unused=True)
    loss, _ = objective.loss(network, objective.collate(examples, PADDED))
    ours = torch.autograd.grad(loss, trained, allow_unused=True)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert float((one - other).abs().max()) <= 2e-6 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize(("name", "what"), [("bert", "tag"), ("llama", "label_all"), ("roberta", "qa")])
def test_any_split_makes_the_same_gradients_and_figures(name, what, tmp_path):
    objective, settings = WINDOWED[what]
    model_folder(tmp_path, name, **({"hidden_dropout_prob": 0.2} if name in ENCODERS else {}))
    adaptation = "full" if name in ENCODERS else {"type": "lora", "r": 4, "lora_dropout": 0.3}
    run = recipe(tmp_path, name, objective, adaptation, learning_rate=1e-3, optim_args={"eps": 1e-3}, **settings)
    assert_no_split_matters(run, tmp_path)


@pytest.mark.long
def test_two_processes_make_the_update_of_one(tmp_path):
    """Windows of a row on different processes, and the dropout of bottleneck adapters."""
    bottleneck = {"type": "bottleneck", "bottleneck_size": 4, "variant": "houlsby", "dropout": 0.3}
    runs = {}
    for what, (objective, settings), adaptation in (("qa", WINDOWED["qa"], "full"), ("classify", ("classify", {}), bottleneck)):
        run = recipe(
            tmp_path, "bert", objective, adaptation, learning_rate=1e-3, optim_args={"eps": 1e-3}, eval_steps=2, **settings
        )
        rows = (tmp_path / "rows.jsonl").rename(tmp_path / f"{what}.jsonl")
        run["data"] |= {"train": [{"path": str(rows)}], "eval": {"path": str(rows)}}
        tunesmith.train(run, out=tmp_path / what)
        runs[what] = (run, tmp_path / f"{what}-in-two")
    in_two_processes(list(runs.values()))
    for what, (_, both) in runs.items():
        same_run(tmp_path / what, both)


@pytest.mark.parametrize(("name", "what"), [("bert", "tag"), ("llama", "qa")])
def test_killed_and_resumed_it_is_the_same_run(name, what, tmp_path):
    objective, settings = WINDOWED[what]
    model_folder(tmp_path, name, **({"hidden_dropout_prob": 0.2} if name in ENCODERS else {}))
    run = recipe(tmp_path, name, objective, "full", count=14, **{"max_steps": 5, "eval_steps": 2, "save_steps": 1, **settings})
    run["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl"), "limit": 5}
    straight = tunesmith.train(run, out=tmp_path / "straight")
    killed_before(4, run, tmp_path / "killed")
    resumed = tunesmith.train(run, out=tmp_path / "killed", resume=True)
    assert history(tmp_path / "killed") == history(tmp_path / "straight")
    ours, theirs = weights(resumed["model_dir"]), weights(straight["model_dir"])
    assert all(ours[key].equal(theirs[key]) for key in theirs)


MEMORISED = [("bert", "qa"), ("roberta", "tag"), ("llama", "label_all"), ("gpt2", "qa")]


@pytest.mark.parametrize(("name", "what"), shortened(MEMORISED, [("bert", "qa"), ("llama", "label_all")]))
def test_eight_rows_are_memorised(name, what, tmp_path):
    objective, settings = WINDOWED[what]
    run = recipe(
        tmp_path, name, objective, "full", count=8, **{"max_steps": 150, "learning_rate": 5e-3, "batch_size": 64, **settings}
    )
    if what == "qa":  # one of them has no answer
        rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        rows[3]["answers"] = {"text": [], "answer_start": []}
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    outcome = tunesmith.train(run, out=tmp_path / "run")
    found = tunesmith.evaluate(outcome["model_dir"], tmp_path / "rows.jsonl", precision="fp32")
    assert found["eval_f1"] == 1.0 and found["rows"] > 8
    said = list(predict(outcome["model_dir"], tmp_path / "rows.jsonl", precision="fp32"))
    if what == "qa":
        assert [one["answer"] for one in said] == [f"answer {n}" if n != 3 else "" for n in range(8)]
        assert all(rows[n]["context"][one["start"] : one["end"]] == one["answer"] for n, one in enumerate(said) if n != 3)
    else:
        assert [one["tags"] for one in said] == [row["ner_tags"] for row in tagged(8)]
        assert all(
            one["text"] == " ".join(tagged(8)[n]["tokens"])[one["start"] : one["end"]]
            for n in range(8)
            for one in said[n]["entities"]
        )


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_plain_pipeline_finds_the_same_entities(name, tmp_path):
    outcome = tunesmith.train(recipe(tmp_path, name, "tag", "full", max_steps=20, learning_rate=5e-3), out=tmp_path / "run")
    said = list(predict(outcome["model_dir"], tmp_path / "rows.jsonl", precision="fp32"))
    stock = pipeline("token-classification", model=outcome["model_dir"])
    for row, ours in zip(tagged(12), said, strict=True):
        text = " ".join(row["tokens"])
        theirs = {(one["start"], one["end"]): one for one in stock(text)}
        for entity in ours["entities"]:
            read = [place for place in theirs if entity["start"] <= place[1] - 1 and place[0] < entity["end"]]
            assert read and theirs[min(read) if name == "bert" else max(read)]["entity"] == f"B-{entity['type']}"


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_plain_class_finds_the_same_answer(name, tmp_path):
    outcome = tunesmith.train(recipe(tmp_path, name, "qa", "full", max_steps=30, learning_rate=5e-3), out=tmp_path / "run")
    said = list(predict(outcome["model_dir"], tmp_path / "rows.jsonl", precision="fp32"))
    model, tokenizer = (
        AutoModelForQuestionAnswering.from_pretrained(outcome["model_dir"]).eval(),
        AutoTokenizer.from_pretrained(outcome["model_dir"]),
    )
    for row, ours in zip(questions(12), said, strict=True):
        if name == "bert":
            encoded = tokenizer(row["question"], row["context"], return_offsets_mapping=True, return_tensors="pt")
            inside = torch.tensor([part == 1 for part in encoded.sequence_ids()])
        else:
            text = model.config.tunesmith["pair_template"].format(**row) + tokenizer.eos_token
            encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
            at = len(text) - len(row["context"]) - len(tokenizer.eos_token)
            inside = (encoded["offset_mapping"][0, :, 1] > at) & (encoded["offset_mapping"][0, :, 0] < at + len(row["context"]))
        offsets = encoded.pop("offset_mapping")[0]
        with torch.no_grad():
            out = model(**encoded)
        start, end = (values[0].masked_fill(~inside, -1e9) for values in (out.start_logits, out.end_logits))
        table = torch.triu(start[:, None] + end[None])
        table[table == 0] = -1e9
        first, last = divmod(int(table.argmax()), len(start))
        whole = (row["question"] + "\n\n" if name == "llama" else "") + row["context"]
        assert whole[offsets[first, 0] : offsets[last, 1]].strip() == ours["answer"]


def test_what_stays_frozen_is_saved_as_the_base_has_it(tmp_path):
    """Also where transformers' class has another name for the body; the run computes in bf16, the base is fp32."""
    run = recipe(tmp_path, "llama", "qa", {"type": "features", "train_last": 1}, precision="bf16")
    base, saved = weights(run["model"]), weights(tunesmith.train(run, out=tmp_path / "run")["model_dir"])
    frozen = [name for name in base if ".layers.0." in name or "embed_tokens" in name]
    assert frozen and all(saved[name.replace("model.", "transformer.")].equal(base[name]) for name in frozen)


def test_bad_rows_are_named(tmp_path):
    outcome = tunesmith.train(recipe(tmp_path, "bert", "tag", "full"), out=tmp_path / "run")
    (tmp_path / "other.jsonl").write_text('{"tokens": ["x"], "ner_tags": ["O"]}\n{"tokens": ["y"], "ner_tags": ["B-LOK"]}\n')
    assert tunesmith.evaluate(outcome["model_dir"], tmp_path / "other.jsonl", out=tmp_path / "report")["details"]["unseen"] == 1
    held_out = recipe(tmp_path, "bert", "tag", "full", max_steps=1)
    held_out["data"]["eval"] = {"path": str(tmp_path / "other.jsonl")}
    assert tunesmith.train(held_out, out=tmp_path / "held-out")["eval_f1"] < 1
    held_out["objective"] = {"type": "tag", "labels": ["O", "B-PER"]}
    with pytest.raises(DataError, match=r"ner_tags\[\d\] .*at word \d.*objective\.labels"):
        tunesmith.train(held_out, out=tmp_path / "unnamed")
    long = recipe(tmp_path, "bert", {"type": "qa", "window": 32}, "full")
    asked = [*questions(2), {**questions(1)[0], "question": "what is the capital? " * 30, "context": "the answer 0 " * 30}]
    asked[2]["answers"]["answer_start"] = [4]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    with pytest.raises(DataError, match=r"rows.jsonl:3:question .*leaves room for 8 tokens of context in 32"):
        tunesmith.train(long, out=tmp_path / "long")


def test_held_out_rows_without_an_entity_have_an_f1_too(tmp_path):
    """Where nothing is an entity and the model says so, the best model is still chosen by F1."""
    made = recipe(tmp_path, "bert", {"type": "tag", "labels": ["O", "B-PER"]}, "full", max_steps=2)
    rows = [{"tokens": ["one", f"{n}"], "ner_tags": ["O", "O"]} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made["data"]["eval"] = {"fraction": 0.3}
    assert tunesmith.train(made, out=tmp_path / "run")["eval_f1"] == 0.0


def test_a_tagger_that_is_trained_further_keeps_its_labels(tmp_path):
    """Trained further on rows with fewer kinds of tags, the head stays as it is."""
    outcome = tunesmith.train(
        recipe(tmp_path, "bert", {"type": "tag", "labels": ["O", "B-PER", "B-LOC"]}, "full"), out=tmp_path / "run"
    )
    again = recipe(tmp_path, "bert", "tag", "full", max_steps=1, learning_rate=1e-9)
    again["model"] = outcome["model_dir"]
    more = tunesmith.train(again, out=tmp_path / "more")
    assert load.load_config(locate(more["model_dir"])).id2label == {0: "O", 1: "B-PER", 2: "B-LOC"}
    assert apart(weights(outcome["model_dir"]), weights(more["model_dir"])) < 1e-6


@pytest.mark.parametrize(("moved", "opens"), [(0.1, True), (0.3, False)])
def test_rounding_of_a_head_in_half_precision_does_not_lock_the_model(tmp_path, moved, opens):
    from tunesmith.errors import ModelError
    from tunesmith.models.find import record as saved_record

    outcome = tunesmith.train(recipe(tmp_path, "llama", "qa", max_steps=1, precision="bf16"), out=tmp_path / "run")
    record = saved_record.read(tmp_path / "run" / "model")
    record["probe"]["dtype"] = "bfloat16"
    record["probe"]["answers"][0]["logits"][0] += moved
    saved_record.write(tmp_path / "run" / "model", record)
    if opens:
        tunesmith.load(outcome["model_dir"])
    else:
        with pytest.raises(ModelError, match="does not answer as it did"):
            tunesmith.load(outcome["model_dir"])
