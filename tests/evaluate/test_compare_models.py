"""Models compared on the same rows: who is better, which differences are chance, which rows changed."""

from __future__ import annotations

import json
import random
import sys

import numpy as np
import pytest

import tunesmith
from tests import processes
from tests.runs import labelled, recipe, rows
from tunesmith.cli.main import main
from tunesmith.data.read.prompts import AskedPrompt
from tunesmith.errors import UserError
from tunesmith.evaluate import compare_models, generated_figures
from tunesmith.evaluate.compare_models import Figure, System
from tunesmith.metrics import metric_names, squad


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three models: a base, the base trained to memorise the rows, and a copy of the base."""
    folder = tmp_path_factory.mktemp("two_models")
    made = recipe(folder, count=12, max_steps=30, learning_rate=1e-2, save_steps=30)
    tunesmith.train(made, out=folder / "run")
    base = made["model"]
    (folder / "copy").symlink_to(base, target_is_directory=True)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(12)))
    return folder, base


def compared(folder, *models, **settings):
    return compare_models.compare(list(models), str(folder / "data.jsonl"), **{"generate": 6, "max_new_tokens": 8, **settings})


def test_a_trained_model_is_better_than_its_base(folder):
    folder, base = folder
    result = compared(folder, base, str(folder / "run"))
    (pair,) = result["pairs"]
    loss = pair["figures"]["eval_loss"]
    assert result["decides"] == "eval_loss" and loss["better"] and loss["high"] < 0
    assert pair["better"] == str(folder / "run") and f"{folder / 'run'} is better than {base}: loss " in pair["verdict"]
    assert {"answer_rougeL", "answer_bleu", "answer_length"} <= pair["figures"].keys()
    answered = [row for row in pair["better_rows"] + pair["worse_rows"] if "answers" in row]
    assert answered and all(len(row["answers"]) == 2 for row in answered)


def test_the_same_model_twice_shows_no_difference(folder):
    folder, base = folder
    (pair,) = compared(folder, base, str(folder / "copy"))["pairs"]
    assert all(one["value"] == 0 and one["p"] == 1 and one["better"] is None for one in pair["figures"].values())
    assert pair["better"] is None and "no difference between" in pair["verdict"]
    assert pair["better_rows"] == pair["worse_rows"] == []


def test_the_figures_are_those_of_evaluate(folder):
    folder, base = folder
    (first, _) = compared(folder, base, str(folder / "run"))["systems"]
    alone = tunesmith.evaluate(base, folder / "data.jsonl")
    assert first["figures"]["eval_loss"]["value"] == pytest.approx(alone["eval_loss"], rel=1e-6)


def test_an_interrupted_comparison_goes_on_to_the_same_files(folder, monkeypatch, tmp_path):
    folder, base = folder
    models = base, str(folder / "run")
    compare_models.save(compared(folder, *models, out=tmp_path / "whole"), tmp_path / "whole")
    from tunesmith.evaluate import answer_file

    add, added = answer_file.AnswerFile.add, []

    def dies(self, index, line):
        if len(added) == 8:
            raise KeyboardInterrupt
        added.append(index)
        add(self, index, line)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(answer_file.AnswerFile, "add", dies)
        compared(folder, *models, out=tmp_path / "parts")
    compare_models.save(compared(folder, *models, out=tmp_path / "parts"), tmp_path / "parts")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "parts").iterdir())
    for name in names:
        if name != "figures.json":  # tokens per second differ
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.parametrize("models, words", [(("one",), "needs two models"), (("one", "one"), "named twice")])
def test_what_cannot_be_compared_is_refused(models, words):
    with pytest.raises(UserError, match=words):
        compare_models.compare(models, "data.jsonl")


# ------------------------------------------------------------- systems whose figures are known


def system(name, terms, tokenizer="same", decides="eval_accuracy", higher=True):
    figure = Figure({row: (value, 1.0) for row, value in enumerate(terms, 1)}, higher)
    return System(name, "classify", decides, {decides: figure}, {}, False, {row: row for row in figure.terms}, tokenizer)


def verdict(first, second, size=None):
    pair = compare_models._pair(first, second)
    compare_models._adjust([pair], first.decides)
    return compare_models._verdict(pair, first.decides, size)


def test_a_comparison_is_not_fooled_by_chance():
    """Two systems that are equally good, on the same 200 rows, in either order."""
    wrong = 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        systems = [system(name, (draw.random(200) < 0.6).astype(float)) for name in "AB"]
        wrong += verdict(*systems)[1] is not None
    assert wrong <= 0.05 * 200 + 3


def test_a_gain_of_ten_points_is_found():
    found = 0
    for seed in range(100):
        draw = np.random.default_rng(seed)
        before = draw.random(200) < 0.5
        after = np.where(before, draw.random(200) < 0.94, draw.random(200) < 0.26)
        found += verdict(system("A", before.astype(float)), system("B", after.astype(float)))[1] == "B"
    assert found >= 80


def test_order_changes_the_words_and_not_the_winner():
    draw = random.Random(0)
    systems = system("A", [draw.random() for _ in range(60)]), system("B", [draw.random() + 0.4 for _ in range(60)])
    assert verdict(*systems)[1] == verdict(*systems[::-1])[1] == "B"
    lower = [
        system(one.name, [t[0] for t in one.figures["eval_accuracy"].terms.values()], decides="eval_loss", higher=False)
        for one in systems
    ]
    assert verdict(*lower)[1] == "A"


def test_without_a_difference_the_rows_that_would_show_one_are_counted():
    draw = np.random.default_rng(0)
    systems = system("A", draw.normal(size=100)), system("B", draw.normal(size=100))
    words, better = verdict(*systems, size=0.1)
    assert better is None
    needed = int(words.partition("; about ")[2].partition(" rows")[0].replace(",", ""))
    assert needed == pytest.approx(100 * (2.8 * 1.41 / 10 / 0.1) ** 2, rel=0.25) and "show a difference of 0.1" in words


def test_many_figures_do_not_make_a_false_difference():
    draw = np.random.default_rng(2)
    pair = {"figures": {f"f{n}": {"p": float(p), "value": 1.0, "higher_is_better": True} for n, p in enumerate(draw.random(20))}}
    pair["figures"]["f3"]["p"] = 0.004
    compare_models._adjust([pair], "decides")
    assert not any(one["better"] for one in pair["figures"].values())


def test_losses_of_other_tokenizers_are_left_out():
    systems = [system("A", [1.0, 2.0], "one", "eval_loss", False), system("B", [1.0, 2.0], "other", "eval_loss", False)]
    for one in systems:
        one.writes_text = True
        one.figures["answer_rougeL"] = Figure({1: (0.5, 1.0), 2: (0.2, 1.0)}, True)
    assert compare_models._drop_losses(systems) == ["the tokenizers differ, so losses per token are left out"]
    assert systems[0].figures.keys() == {"answer_rougeL"} and systems[1].decides == "answer_rougeL"


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_the_verdict_first_and_writes_the_page(folder, tmp_path, capsys):
    folder, base = folder
    out = tmp_path / "out"
    arguments = ["compare", base, str(folder / "run"), "--data", str(folder / "data.jsonl"), "--generate", "4"]
    assert main([*arguments, "--max-new-tokens", "8", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{folder / 'run'} is better than {base}: loss")
    page = (out / "compare.html").read_text()
    assert "is better than" in page and "Rows that got better most" in page and "<script" not in page
    assert f">{folder / 'run'}</th>" in page
    assert json.loads((out / "figures.json").read_text())["pairs"][0]["better"] == str(folder / "run")


def test_language_models_of_different_trainings_are_compared_as_language_models(folder, tmp_path):
    folder, base = folder
    made = recipe(tmp_path, count=12, objective="dpo", max_steps=1)
    made["model"] = base
    tunesmith.train(made, out=tmp_path / "dpo")
    found = compared(folder, base, str(tmp_path / "dpo"), generate=0)
    assert found["decides"] == "eval_loss" and found["pairs"][0]["figures"]["eval_loss"]["rows"] == 12


def test_a_table_of_differences_is_read_in_eighty_columns(folder, monkeypatch, capsys):
    folder, base = folder
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["compare", base, str(folder / "run"), "--data", str(folder / "data.jsonl"), "--generate", "4"]
    assert main([*arguments, "--max-new-tokens", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("figure"))
    rows = [line for line in lines[head + 2 :] if line.strip()]
    table = rows[: next(number for number, line in enumerate(rows) if line.startswith("-: no difference"))]
    names = [line[:20].strip() for line in table]
    assert all(len(line.rstrip()) <= 80 for line in table) and all(names) and len(names) == len(set(names)), "no cell is broken"
    assert any("too few for an interval" in line for line in table) and any(line.rstrip().endswith("better") for line in table)


def test_models_of_other_kinds_are_refused(folder, tmp_path, monkeypatch):
    folder, base = folder
    other = tmp_path / "classify"
    made = recipe(tmp_path, count=12, objective="classify", max_steps=2)
    tunesmith.train(made, out=other)
    with pytest.raises(UserError, match=r"is a model for classify, .* for sft: their figures cannot be compared"):
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps({**row, **label}) + "\n" for row, label in zip(rows(12), labelled(12))))
        monkeypatch.setattr(compare_models, "_measure", None)  # before any evaluation
        compare_models.compare([base, str(other)], str(data))


# --------------------------------------------------------------------------------------- evaluate --generate


def test_answers_are_measured_next_to_a_baseline(folder, tmp_path):
    folder, _ = folder
    found = tunesmith.evaluate(str(folder / "run"), folder / "data.jsonl", generate=12, max_new_tokens=40, out=tmp_path / "out")[
        "generated"
    ]
    of_both = [[json.loads(line) for line in one.read_text().splitlines()] for one in (tmp_path / "out").glob("answers-*.jsonl")]
    assert len(of_both) == 2, "the base model answered, too"
    lengths = [np.mean([one["tokens"] for one in lines]) for lines in of_both]
    own, base_model = found["figures"]["length"]["value"], found["figures"]["length"]["baselines"][0]
    assert sorted([own, base_model["value"]]) == pytest.approx(sorted(lengths))
    assert base_model["difference"] == pytest.approx(own - base_model["value"]) and base_model["low"] <= base_model["high"]
    lines = of_both[int(np.argmin(np.abs(np.subtract(lengths, own))))]
    assert found["answers"] == len(lines) == 12
    by_hand = np.mean([squad.exact_match(line["answer"], [line["reference"]]) for line in lines])
    assert found["figures"]["exact_match"]["value"] == pytest.approx(by_hand)
    assert found["figures"]["length"]["value"] == pytest.approx(np.mean([line["tokens"] for line in lines]))
    rouge, length = ([one["words"] for one in found["figures"][name]["baselines"]] for name in ("rouge1", "length"))
    assert (
        rouge == ["the base model", "the prompt copied"]
        and length == ["the base model"]
        and 0 < found["figures"]["distinct_1"]["value"] <= 1
    )
    worst = [one["token_f1"] for one in found["worst"]]
    assert worst == sorted(worst)


def test_evaluate_prints_the_answers_figures(folder, capsys):
    folder, _ = folder
    data = str(folder / "data.jsonl")
    assert (
        main(["evaluate", str(folder / "run"), "--data", data, "--generate", "3", "--metric", "rouge1", "--metric", "length"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "3 answers to 3 prompts" in printed and "rouge1" in printed and "bleu" not in printed
    assert main(["evaluate", str(folder / "run"), "--data", data, "--generate", "3", "--metric", "rogue1"]) == 2
    assert "Did you mean `rouge1`?" in capsys.readouterr().err


def test_an_adapter_is_switched_off_for_its_base(folder, tmp_path, monkeypatch):
    folder, base = folder
    made = recipe(tmp_path, adaptation={"type": "lora", "r": 4}, count=12, max_steps=20, learning_rate=3e-2)
    made["model"] = base
    tunesmith.train(made, out=tmp_path / "lora")
    from tunesmith.evaluate import base_answers

    loaded, load_model = [], base_answers.load.load_model
    monkeypatch.setattr(
        base_answers.load, "load_model", lambda *given, **keys: loaded.append(given) or load_model(*given, **keys)
    )
    settings = {"generate": 12, "max_new_tokens": 10, "precision": "fp32", "answer_metrics": ["token_f1", "length"]}
    found = tunesmith.evaluate(tmp_path / "lora", folder / "data.jsonl", **settings)["generated"]["figures"]
    assert len(loaded) == 1, "nothing is loaded a second time"
    alone = tunesmith.evaluate(base, folder / "data.jsonl", **settings)["generated"]["figures"]
    for name in ("token_f1", "length"):
        known = found[name]["baselines"][0]
        assert known["words"] == "the base model" and known["value"] == pytest.approx(alone[name]["value"])
    assert found["length"]["value"] != alone["length"]["value"] or found["token_f1"]["value"] != alone["token_f1"]["value"]
    assert all(one["words"] != "the base model" for one in alone["token_f1"]["baselines"]), "a base model has no base"
    assert "the base model" not in str(tunesmith.evaluate(tmp_path / "lora", folder / "data.jsonl", with_base=False, **settings))


def test_a_base_that_changed_is_not_compared_with_and_named(folder, tmp_path):
    folder, _ = folder
    made = recipe(tmp_path, count=12, max_steps=1)
    tunesmith.train(made, out=tmp_path / "run")
    (tmp_path / "model-llama").rename(tmp_path / "elsewhere")
    found = tunesmith.evaluate(tmp_path / "run", folder / "data.jsonl", generate=2, max_new_tokens=2)["generated"]
    assert any("is not there" in line for line in found["cautions"])


def test_prompts_without_an_answer_are_counted_and_a_metric_that_needs_one_is_refused():
    asked = [AskedPrompt(row, f"question {row}", None if row == 3 else "yes") for row in range(1, 13)]
    asked[4] = AskedPrompt(5, "question 5", ({"role": "assistant", "content": " "},))
    rouge = metric_names.of_names(["rouge1"])
    (caution,) = generated_figures.missing_references(asked, rouge, "rows.jsonl")
    assert caution == "2 of 12 prompts have no answer in the data: overlap is that of the others"
    with pytest.raises(UserError, match=r"rouge1: rows.jsonl has no answers to compare with.\n.*--metric length"):
        generated_figures.missing_references([asked[2], asked[4]], rouge, "rows.jsonl")
    assert generated_figures.missing_references([asked[2]], metric_names.of_names(["rouge1", "length"]), "rows.jsonl")


@pytest.mark.parametrize(
    "content, words", [("", "has no rows"), ('{"prompt": "question", "completion": " "}\n', "got only spaces"), ("[]", "no ")]
)
def test_a_file_without_prompts_or_with_empty_answers_is_refused(folder, tmp_path, capsys, content, words):
    folder, base = folder
    (tmp_path / "rows.jsonl").write_text(content)
    assert main(["evaluate", base, "--data", str(tmp_path / "rows.jsonl"), "--generate", "5"]) == 2
    assert words in capsys.readouterr().err


def test_a_metric_without_answers_is_refused(folder, capsys):
    folder, base = folder
    assert main(["evaluate", base, "--data", str(folder / "data.jsonl"), "--metric", "rouge1"]) == 2
    assert "--metric and --task choose figures of answers: add --generate 50" in capsys.readouterr().err


def test_the_task_decides(folder):
    folder, base = folder
    found = compared(folder, base, str(folder / "run"), task="translate", generate=12)
    assert found["decides"] == "answer_chrf" and "answer_rouge1" not in found["pairs"][0]["figures"]
    assert "answer chrf" in found["pairs"][0]["verdict"]


KILLED = """
import os, sys
from tunesmith.cli.main import main
from tunesmith.evaluate import answer_file
add, most = answer_file.AnswerFile.add, int(sys.argv.pop(1))
def dies(self, index, line):
    global most
    most -= 1
    if most < 0:
        os.kill(os.getpid(), 9)
    add(self, index, line)
answer_file.AnswerFile.add = dies
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_evaluation_goes_on_to_the_same_files(folder, tmp_path):
    """Killed for real: in the answers of the model, and in those of its base."""
    folder, _ = folder
    words = ["evaluate", str(folder / "run"), "--data", str(folder / "data.jsonl"), "--generate", "8", "--max-new-tokens", "4"]
    words += ["--precision", "fp32"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    for kept in (3, 10):
        killed = processes.run([sys.executable, "-c", KILLED, str(kept), *words, "--out", str(tmp_path / "parts")])
        assert killed.returncode == -9, killed.stderr
        assert list((tmp_path / "parts").glob("*.partial"))
        assert not (tmp_path / "parts" / "figures.json").exists()
    assert main([*words, "--out", str(tmp_path / "parts")]) == 0
    files = [{one.name: one.read_bytes() for one in (tmp_path / name).iterdir()} for name in ("whole", "parts")]
    assert files[0] == files[1] and len(files[0]) == 5


def test_macro_f1_is_compared_where_the_labels_are_the_same():
    from tunesmith.metrics.sum_functions import macro_f1

    def system(name, predicted, labels):
        terms = {row: (2.0 * (row % 2 == 0 == p), 2.0 * (row % 2 == 1 == p), (row % 2 == 0) + (p == 0), (row % 2 == 1) + (p == 1))
                 for row, p in enumerate(predicted)}  # fmt: skip
        figures = {"eval_macro_f1": Figure(terms, True, macro_f1, labels)}
        return System(name, "classify", "eval_macro_f1", figures, {}, False, {}, "")

    worse, better = system("worse", [0] * 60, ("a", "b")), system("better", [0, 1] * 30, ("a", "b"))
    assert compare_models._other_labels([worse, better]) == []
    pair = compare_models._pair(worse, better)
    found = pair["figures"]["eval_macro_f1"]
    assert found["before"] == pytest.approx(1 / 3) and found["after"] == 1 and found["low"] > 0.5 and found["p"] < 0.001
    other = system("other", [0, 1] * 30, ("b", "a"))
    assert compare_models._other_labels([worse, other]) == ["the labels of the models differ, so macro f1 is not compared"]
    assert compare_models._pair(worse, other)["figures"] == {}
