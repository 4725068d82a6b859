"""Run folders read back, whatever state they are in: written by hand, so that no model is trained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tunesmith.cli.main import main
from tunesmith.errors import UserError
from tunesmith.report import charts
from tunesmith.report.curves import Curve
from tunesmith.runs import compare, run_list

RECIPE = "model: m\nobjective: {type: sft}\nadaptation: {type: lora}\n"
EVALS = [{"kind": "eval", "step": 0, "eval_loss": 3.5}]


def written(folder, manifest=None, records=(), recipe=RECIPE):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    if manifest is not None:
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("metrics.jsonl", '{"kind": "eval", "step": 0}\nbroken\n{}\n', "metrics.jsonl, line 2"),
        ("manifest.json", "[", "manifest.json, line 1"),
        ("manifest.json", "[]", "manifest.json, line 1"),
        ("recipe.yaml", "model: m\nx: [", "recipe.yaml, line 2"),
        ("recipe.yaml", "- a", "recipe.yaml, line 1"),
    ],
)
def test_one_bad_folder_is_listed_as_unreadable_with_the_others(tmp_path, capsys, file, content, told):
    written(tmp_path / "good", {"finished": "now"})
    (written(tmp_path / "bad", {"finished": "now"}) / file).write_text(content, encoding="utf-8")
    assert main(["runs", "list", str(tmp_path), "--json"]) == 0
    states = {run["run"].rpartition("/")[2]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert states["good"]["state"] == "done" and states["good"]["problem"] is None
    assert states["bad"]["state"] == "unreadable" and told in states["bad"]["problem"]
    assert main(["runs", "list", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert told in out and out.splitlines()[1].split()[-2:] == ["-", "-"]
    with pytest.raises(UserError, match=rf"{told}[\s\S]*restore it"):
        run_list.read(tmp_path / "bad")


SOURCE = {"split": "train", "weight": 1.0}


def of_recipe(name, files=("rows.jsonl",), folder="somewhere/far/away", **parts):
    data = {"train": [{"path": f"{folder}/{file}", **SOURCE} for file in files]}
    return run_list.StoredRun(Path(f"runs/{name}"), {"model": "m", "objective": {"type": "sft"}, "data": data, **parts}, {}, [])


def test_a_run_is_labelled_by_its_name_and_short_keys():
    full = of_recipe("a", adaptation={"type": "full"}, samples={"prompts": None})
    lora = of_recipe("b", adaptation={"type": "lora", "r": 4}, samples={"prompts": ["some", "long prompts " * 9]})
    assert compare.labels([full, lora]) == ["a (type full)", "b (type lora, r 4, prompts)"]


def test_other_data_is_labelled_by_file_names():
    one, two = of_recipe("a"), of_recipe("b", files=("rows.jsonl", "more.jsonl"))
    assert compare.labels([one, two]) == ["a (data rows.jsonl)", "b (data rows.jsonl + more.jsonl)"]


def test_a_label_is_never_long():
    many = [of_recipe(name, files=(f"{name * 30}.jsonl", "x" * 90)) for name in "abc"] + [of_recipe("d" * 100)]
    assert all(len(label) <= 60 for label in compare.labels(many))
    assert len(set(compare.labels(many))) == 4


def test_runs_of_one_name_are_distinguished_by_their_folders():
    assert compare.names([of_recipe("x/run"), of_recipe("y/run")]) == ["x/run", "y/run"]


def test_sources_differ_key_by_key_and_idle_defaults_are_not_listed():
    full = of_recipe("a", adaptation={"type": "full"})
    lora = of_recipe("b", files=("other.jsonl",), adaptation={"type": "lora", "r": 4, "use_dora": False})
    assert compare.differences([full, lora]) == {
        "data.train.0.path": ["somewhere/far/away/rows.jsonl", "somewhere/far/away/other.jsonl"],
        "adaptation.type": ["full", "lora"],
        "adaptation.r": [None, 4],
    }


def test_the_table_keeps_its_keys_whole_in_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("a", "b", "c"):
        source = f"data:\n  train:\n  - {{path: {'deep/' * 20}{name}.jsonl, prompt_template: {name}}}\n"
        written(tmp_path / name, {}, EVALS, RECIPE + source)
    folders = [str(tmp_path / name) for name in ("a", "b", "c")]
    assert main(["runs", "compare", *folders, "--out", str(tmp_path / "c.png")]) == 0
    out = capsys.readouterr().out
    assert "data.train.0.prompt_template" in out and "a.jsonl" in out and "deep" not in out


@pytest.fixture
def figure(monkeypatch):
    """The matplotlib figures that are saved."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: (save(self, *args, **kwargs), saved.append(self))[0])
    return saved


def assert_readable(figure):
    """Whole steps on the axes, the loss named, a legend next to the axes and inside the picture."""
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    for axes in figure.axes:
        assert axes.get_ylabel() == "loss"
        assert all(tick == int(tick) for tick in axes.get_xticks())
        assert not box.overlaps(axes.get_window_extent())


@pytest.mark.draws
def test_the_pictures_can_be_read(figure):
    steps = [*EVALS, {"kind": "train", "step": 1, "loss": 3.0}, {"kind": "train", "step": 2, "loss": 2.0}]
    kept = [replace(of_recipe(name, files=(name * 99,)), records=steps) for name in "abcde"]
    charts.png(charts.compare(compare.losses(kept)))
    charts.png(charts.over_steps("loss", [Curve("train", [(1, 3.0), (2, 2.0)]), Curve("eval", [(0, 3.5), (2, 2.0)])]))
    for one in figure:
        assert_readable(one)
    assert len(figure) == 2


@pytest.mark.draws
def test_a_run_with_evaluations_alone_is_in_the_legend(figure):
    charts.png(charts.compare(compare.losses([replace(of_recipe(name), records=EVALS) for name in "ab"])))
    assert [text.get_text() for text in figure[0].legends[0].get_texts()] == ["a", "b"]


PART = [
    *EVALS,
    {"kind": "train", "step": 2, "loss": 3.0, "tokens": 90, "tokens_per_second": 300.0, "peak_memory_bytes": 10**9},
    {"kind": "eval", "step": 2, "eval_loss": 2.5, "perplexity": 12.2, "best": True},
    {"kind": "train", "step": 3, "loss": 3.0, "tokens": 120, "tokens_per_second": 400.0, "peak_memory_bytes": 10**8},
    {"kind": "eval", "step": 3, "eval_loss": 2.75, "perplexity": 15.6, "best": False},
]


def shown(folder, capsys):
    assert main(["runs", "show", str(folder)]) == 0
    return capsys.readouterr().out


def test_a_killed_run_shows_what_its_records_have(tmp_path, capsys):
    folder = written(tmp_path / "run", {"steps": 400}, PART)
    for step in (1, 2):
        (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
    facts = run_list.read(folder).facts()
    assert (facts["eval_loss_before"], facts["eval_loss"], facts["best_step"], facts["perplexity"]) == (3.5, 2.5, 2, 12.2)
    assert (facts["tokens_per_second"], facts["tokens"], facts["peak_memory_bytes"]) == (400.0, 120, 10**9)
    out = shown(folder, capsys)
    assert "killed, step 3 of 400, last checkpoint at step 2" in out
    assert "3.5000 before, 2.5000 at best so far (step 2)" in out and "400 tokens/s" in out


def test_a_run_of_several_processes_is_resumed_by_as_many(tmp_path, capsys):
    one = written(tmp_path / "one", {"processes": 1})
    assert f"tunesmith train {one}/recipe.yaml --out {one} --resume" in shown(one, capsys)
    two = written(tmp_path / "a b", {"processes": 2, "deepspeed": {"x": 1}, "command": "tunesmith launch --deepspeed ds.json"})
    assert f"tunesmith launch --processes 2 '{two}/recipe.yaml' --out '{two}' --deepspeed ds.json --resume" in shown(two, capsys)


def test_what_is_not_known_is_left_out(tmp_path, capsys):
    out = shown(written(tmp_path / "run"), capsys)
    assert "None" not in out and "started" not in out and "machine" not in out and "loss" not in out and "speed" not in out


def test_the_command_is_shown_as_it_is_typed(tmp_path, capsys):
    command = "/opt/lib/tunesmith/__main__.py train r.yaml --out /opt/tunesmith/x"
    out = shown(written(tmp_path / "run", {"command": command}), capsys)
    assert "started     tunesmith train r.yaml --out /opt/tunesmith/x" in out
    assert run_list.read(tmp_path / "run").manifest["command"] == command


@pytest.mark.parametrize(("records", "told"), [((), "metrics.jsonl has no records"), (PART, "model has no weights")])
def test_a_run_with_nothing_to_compare_with_is_not_repeated(tmp_path, capsys, records, told):
    folder = written(tmp_path / "run", {"finished": "now"}, records)
    assert main(["runs", "reproduce", str(folder)]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run-again").exists()


def test_a_run_is_one_line_in_80_columns_and_whole_in_a_pipe(tmp_path, capsys, monkeypatch):
    recipe = RECIPE.replace("model: m", "model: a-model-with-a-name-of-some-length")
    for name in ("sft-lora-long-name-1", "sft-lora-long-name-2"):
        written(tmp_path / name, {"steps": 400, "created": "2026-01-01T00:00:00Z"}, PART, recipe)
    assert main(["runs", "list", str(tmp_path)]) == 0
    heads = ("run", "state", "what", "model", "steps", "loss", "tokens/s", "memory", "started")
    assert capsys.readouterr().out.splitlines()[0].split() == list(heads)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    for width in range(65, 140):
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(["runs", "list", str(tmp_path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3, width
        assert all(len(line) <= width for line in lines[1:]) and "3.500 -> 2.500" in lines[2]
        if width == 80:
            assert "sft-lora-long-name-2" in lines[2] and "3/400" in lines[2] and "memory" not in lines[0]
    assert "memory" in lines[0] and "started" in lines[0]


GRADED = [
    {"kind": "eval", "step": 0, "eval_loss": 0.7, "eval_loss_stderr": 0.1, "eval_accuracy": 0.5, "eval_kl": 0.0},
    {"kind": "eval", "step": 2, "eval_loss": 0.4, "eval_loss_stderr": 0.1, "eval_accuracy": 0.8125, "eval_kl": 0.1, "best": True},
]


def test_the_figures_of_an_objective_are_listed_shown_and_compared(tmp_path, capsys):
    one = written(tmp_path / "one", {}, GRADED)
    result = {"figures": ["eval_loss", "eval_accuracy"], "eval_loss": 0.3, "eval_accuracy_before": 0.5, "eval_accuracy": 0.9}
    two = written(tmp_path / "two", {"result": result, "finished": "now"})
    assert run_list.read(one).facts()["figures"] == {"eval_accuracy": [0.5, 0.8125], "eval_kl": [0.0, 0.1]}
    assert "accuracy 0.500 -> 0.812, kl 0.000 -> 0.100" in shown(one, capsys)
    assert main(["runs", "list", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "accuracy 0.500 -> 0.812" in listed and "accuracy 0.500 -> 0.900" in listed
    assert main(["runs", "compare", str(one), str(two), "--out", str(tmp_path / "c.png")]) == 0
    table = capsys.readouterr().out
    assert "eval_accuracy_before" in table and "0.9" in table and "perplexity" not in table
