"""A flipped bit, weights that are not finite, and a full disk: every verb that opens a model or writes a file."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith
from tests.kill_points import in_fork
from tests.runs import labelled, preferences, recipe
from tunesmith.cli.main import main
from tunesmith.recipe import text as recipe_text

KINDS = {"base": ("llama", "sft", "full"), "adapter": ("llama", "sft", "lora"), "other": ("llama", "sft", "lora"),
         "reward": ("llama", "reward", "full"), "classes": ("bert", "classify", "full")}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished models by kind, data files, and the file of a pipeline."""
    folder = tmp_path_factory.mktemp("made")
    for kind, (name, objective, adaptation) in KINDS.items():
        work = folder / kind if kind != "other" else folder / "adapter"  # on one base
        work.mkdir(exist_ok=True)
        settings = recipe(work, name, objective, adaptation, max_steps=1, seed=int(kind == "other"))
        tunesmith.train(settings | {"seed": settings["train"].pop("seed")}, out=folder / f"{kind}-run")
    asked = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(4)]
    answers = [[{"row": n + 1, "prompt": f"question {n}", "answer": f"{name} {n}"} for n in range(4)] for name in "ab"]
    for name, rows in {"asked": asked, "pairs": preferences(4), "texts": labelled(4), "a": answers[0], "b": answers[1]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def run(words: list[str]) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(words)
    return code, out.getvalue()


def verbs(made: Path, models: dict[str, str], out: Path) -> dict[str, tuple[str, list[str]]]:
    """Verb -> (kind of the model that it opens, its command line)."""
    base, reward, adapter = models["base"], models["reward"], models["adapter"]
    few = ["--limit", "2", "--max-new-tokens", "2"]
    asked, stages = str(made / "asked.jsonl"), out.parent / f"{out.name}-pipe.yaml"
    stage = recipe(out.parent, max_steps=1) | {"model": base}
    stages.write_text(recipe_text.dump({"stages": {"sft": {"recipe": json.loads(json.dumps(stage))}}}), encoding="utf-8")
    to, page = ["--out", f"{out}.jsonl"], ["--out", str(out)]
    return {
        "train": ("base", ["train", str(stages.with_name("stage.yaml")), *page]),
        "generate": ("base", ["generate", base, "--data", asked, "--max-new-tokens", "2", *to]),
        "evaluate": ("base", ["evaluate", base, "--data", asked]),
        "evaluate a head": ("classes", ["evaluate", models["classes"], "--data", str(made / "texts.jsonl"), *page]),
        "predict": ("classes", ["predict", models["classes"], "--data", str(made / "texts.jsonl"), *to]),
        "score": ("reward", ["score", reward, "--data", str(made / "pairs.jsonl"), *to]),
        "compare": ("base", ["compare", base, adapter, "--data", asked, "--generate", "2", *few, *page]),
        "compare heads": ("classes", ["compare", models["classes"], str(made / "classes-run"), "--data", str(made / "texts.jsonl"), *page]),
        "judge": ("base", ["judge", base, "reference", "--judge", reward, "--data", asked, *few, *page]),
        "judge by": ("reward", ["judge", str(made / "a.jsonl"), str(made / "b.jsonl"), "--judge", reward, *page]),
        "merge": ("adapter", ["merge", adapter, *page]),
        "combine": ("adapter", ["adapters", "combine", adapter, models["other"], *page]),
        "pipeline": ("base", ["pipeline", str(stages), *page]),
    }  # fmt: skip


NAMES = (
    "train", "generate", "evaluate", "evaluate a head", "predict", "score", "compare", "compare heads", "judge", "judge by", "merge",
    "combine", "pipeline",
)  # fmt: skip
SHORT = ("generate", "predict", "judge by", "merge", "pipeline")
"""Verbs that the short suite tries; the others take minutes together."""


def marked(names: tuple[str, ...]) -> list[Any]:
    return [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in names]


def command(made: Path, models: dict[str, str], out: Path, verb: str) -> list[str]:
    words = verbs(made, models, out)[verb][1]
    if verb == "train":
        Path(words[1]).write_text(recipe_text.dump(recipe(out.parent, max_steps=1) | {"model": models["base"]}), encoding="utf-8")
    return words


def damaged(made: Path, tmp_path: Path, verb: str, change: Any) -> tuple[list[str], Path]:
    """The command line of a verb whose model is a changed copy, and that copy's file of weights."""
    models = {kind: str(made / f"{kind}-run" / "model") for kind in KINDS}
    kind = verbs(made, models, tmp_path / "out")[verb][0]
    copy = shutil.copytree(models[kind], tmp_path / f"a {kind}")
    (file,) = copy.glob("*.safetensors")
    change(file)
    return command(made, models | {kind: str(copy)}, tmp_path / "out", verb), file


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out")) and "pipe.yaml" not in path.name)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1000] ^= 4
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("verb", marked(NAMES))
def test_a_flipped_bit_is_found_at_every_door(verb: str, made: Path, tmp_path: Path) -> None:
    words, file = damaged(made, tmp_path, verb, flip)
    code, said = run(words)
    assert code == 2 and f"{file.name} changed since the model was saved" in " ".join(said.split()), said
    assert left(tmp_path) in ([], ["out"]) and not list((tmp_path / "out").glob("**/model*")), left(tmp_path)


def not_finite(file: Path) -> None:
    """As a diverged run of another program saves it: with no record to compare."""
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if tensors[name].dim() == 2 and "embed" not in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    record = json.loads((file.parent / "tunesmith.json").read_text())
    record.pop("sha256", None)
    (file.parent / "tunesmith.json").write_text(json.dumps(record))
    assert main(["verify", str(file.parent), "--accept"]) == 0


@pytest.mark.parametrize("verb", marked(NAMES))
def test_weights_that_are_not_finite_are_named(verb: str, made: Path, tmp_path: Path) -> None:
    words, _ = damaged(made, tmp_path, verb, not_finite)
    code, said = run(words)
    assert code in (2, 3) and "not finite" in said and "bug in tunesmith" not in said, (code, said)


WRITES = tuple(name for name in NAMES if name not in ("evaluate", "generate", "train", "merge"))
"""Verbs that write; the others are in ``tests/train/test_full_disk.py``."""


def limited(size: int, words: list[str]) -> tuple[int, str]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return run(words)


@pytest.mark.parametrize("verb", marked(WRITES))
@pytest.mark.parametrize("size", [10, pytest.param(2_500, marks=pytest.mark.long)])
def test_a_full_disk_is_named_and_nothing_half_written_stays(verb: str, size: int, made: Path, tmp_path: Path) -> None:
    models = {kind: str(made / f"{kind}-run" / "model") for kind in KINDS}
    words = command(made, models, tmp_path / "out", verb)
    code, answer = in_fork(lambda: limited(size, words))
    assert code == 0 and answer[0] in ((3,) if size == 10 else (0, 3)), answer
    assert answer[0] == 0 or ("disk" in answer[1] and "bug in tunesmith" not in answer[1]), answer
    assert [path for path in tmp_path.rglob(".*") if path.name != ".lock"] == []
    if answer[0] == 3:
        assert run(words)[0] == 0  # the same command goes on, or begins again


FILES = {
    "init": ["init", "sft", "--out", "r.yaml"],
    "build": ["data", "build", "docstrings", "--rows", "20", "--out", "d.jsonl"],
    "lint": ["data", "lint", "{made}/asked.jsonl", "--near-duplicates", "--write", "w.jsonl"],
    "runs compare": ["runs", "compare", "{made}/base-run", "{made}/adapter-run"],
    "runs reproduce": ["runs", "reproduce", "{made}/base-run", "--out", "again"],
}


@pytest.mark.parametrize("verb", FILES)
def test_a_full_disk_leaves_no_part_of_a_file(verb: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.format(made=made) for word in FILES[verb]]
    code, answer = in_fork(lambda: limited(20, words))  # the chart of a test is one pixel
    assert (code, answer[0]) == (0, 3) and "no room" in answer[1], answer
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []


def test_a_full_disk_leaves_the_record_of_a_model_as_it_was(made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made / "base-run" / "model", tmp_path / "model")
    (copy / "note.txt").write_text("new")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    code, answer = in_fork(lambda: limited(200, ["verify", str(copy), "--accept"]))
    assert (code, answer[0]) == (0, 3) and "tunesmith.json" in answer[1], answer
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
