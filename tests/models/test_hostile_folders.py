"""Hostile model folders end every verb with one typed error, within seconds and 2 GB."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from tests.runs import recipe
from tests.tiny import save_tiny
from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.find import config_bounds, headers
from tunesmith.models.find.headers import TensorHeader
from tunesmith.recipe import text

DEEP = "[" * 100_000 + "]" * 100_000


def setting(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        read = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps(read | changes))

    return change


def written(file: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(content) and None


def header(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content) and None


FOLDERS = {
    "ten million layers": setting("config.json", num_hidden_layers=10_000_000),
    "a googol of layers": setting("config.json", num_hidden_layers=10**100),
    "ten million labels": setting("config.json", num_labels=10_000_000),
    "a wide layer": setting("config.json", intermediate_size=10_000_000),
    "a deep config": written("config.json", f'{{"model_type": "llama", "a": {DEEP}}}'),
    "a config of 900 levels": written("config.json", '{"a": ' * 900 + "1" + "}" * 900),
    "a number of a million digits": written("config.json", '{"model_type": "llama", "a": ' + "9" * 10**6 + "}"),
    "a deep tokenizer config": written("tokenizer_config.json", f'{{"a": {DEEP}}}'),
    "a deep tokenizer": written("tokenizer.json", f'{{"a": {DEEP}}}'),
    "a deep generation config": written("generation_config.json", f'{{"a": {DEEP}}}'),
    "a deep header": header(b'{"a": ' + DEEP.encode() + b"}"),
    "a header of a million digits": header(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10**6 + b'], "data_offsets": [0, 0]}}'),
    "a deep record": written("tunesmith.json", f'{{"a": {DEEP}}}'),
    "many extra ids": setting("tokenizer_config.json", extra_ids=10**9),
}  # fmt: skip
ENDLESS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set ns = namespace(x='a') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
TEMPLATES = {
    "an endless template": ENDLESS,
    "a template of gigabytes": DOUBLED,
    "3,000 nested ifs": "{% if true %}" * 3000 + "{% endif %}" * 3000,
}
FOLDERS |= {
    name: written("chat_template.jinja", part + "{% for m in messages %}{{ m.content }}{% endfor %}")
    for name, part in TEMPLATES.items()
}
RENDERING = (
    "train", "check", "generate", "evaluate", "data lint", "data preview", "generate --data", "compare", "judge", "pipeline",
)  # fmt: skip
"""Verbs that render turns; the others end well where the template alone is hostile, and chat prints the error."""

NOT_READ = {"a wide layer": ("show", "data lint", "data preview"), "a deep tokenizer": ("show",)}
"""Verbs that make no network of the config, or do not open the tokenizer."""

VERBS = """
import contextlib, io, json, os, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from tunesmith.cli.main import main
from tunesmith.data.encode import template_limits
from tunesmith.models.load import load
load.quiet()
template_limits.SECONDS = 0.3
root, rows, recipe, asked, stages, tiny = sys.argv[1:7]
folders = json.loads(sys.argv[7])
done = []
for name, folder in folders.items():
    verbs = {
        "train": ["train", recipe, f"model={folder}", "--out", f"{root}/run-{len(done)}"],
        "check": ["check", recipe, f"model={folder}"],
        "show": ["show", folder],
        "generate": ["generate", folder, "--prompt", "Hi", "--max-new-tokens", "1"],
        "chat": ["chat", folder, "--max-new-tokens", "1"],
        "evaluate": ["evaluate", folder, "--data", rows],
        "predict": ["predict", folder, "--data", rows],
        "score": ["score", folder, "--data", rows],
        "merge": ["merge", folder, "--out", f"{root}/merged"],
        "data lint": ["data", "lint", rows, "--model", folder],
        "generate --data": ["generate", folder, "--data", asked, "--max-new-tokens", "1", "--out", f"{root}/{len(done)}.jsonl"],
        "compare": ["compare", folder, tiny, "--data", rows, "--generate", "0"],
        "judge": ["judge", asked, asked.replace("asked", "again"), "--judge", folder, "--out", f"{root}/judged-{len(done)}"],
        "pipeline": ["pipeline", stages, f"sft.model={folder}", "--out", f"{root}/stages-{len(done)}"],
        "data preview": ["data", "preview", rows, "--model", folder],
    }
    for verb, words in verbs.items():
        sys.stdin, errors, begun = io.StringIO("Hi\\n"), io.StringIO(), time.process_time()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = main(words)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        done.append([name, verb, code, time.process_time() - begun, peak, errors.getvalue()[-400:]])
print(json.dumps(done))
"""


SHORT = (
    "ten million layers", "a wide layer", "a deep config", "a number of a million digits", "a deep header", "an endless template",
)  # fmt: skip


@pytest.mark.parametrize("names", [SHORT, pytest.param(tuple(FOLDERS), marks=pytest.mark.long)], ids=["some", "all"])
def test_every_verb_ends_with_a_typed_error(names: tuple[str, ...], tmp_path: Path) -> None:
    tiny, folders = save_tiny("llama", tmp_path / "tiny"), {}
    for number, name in enumerate(names):
        folders[name] = str(shutil.copytree(tiny, tmp_path / f"folder-{number}"))
        FOLDERS[name](Path(folders[name]))
    made = recipe(tmp_path, max_steps=1) | {"model": "tiny"}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns * 2}) + "\n")
    (tmp_path / "recipe.yaml").write_text(text.dump(made))
    answers = [{"row": n, "prompt": f"Hi {n}", "answer": "Hello"} for n in (1, 2)]
    for name in ("asked", "again"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
    (tmp_path / "stages.yaml").write_text(text.dump({"stages": {"sft": {"recipe": str(tmp_path / "recipe.yaml")}}}))
    files = [str(tmp_path / name) for name in ("rows.jsonl", "recipe.yaml", "asked.jsonl", "stages.yaml")]
    words = [str(tmp_path), *files, str(tiny), json.dumps(folders)]
    done = processes.run([sys.executable, "-c", VERBS, *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, verb, code, seconds, megabytes, error in json.loads(done.stdout.splitlines()[-1]):
        case = f"{name}, {verb}: {code}, {seconds:.1f} s, {megabytes} MB: {error}"
        assert "bug in tunesmith" not in error and seconds < 5 and megabytes < 2000, case
        unread = NOT_READ.get(name, ())
        ends_well = (name in TEMPLATES and verb not in RENDERING) or verb in unread
        assert code == 2 or (ends_well and code == 0), case


def test_sizes_are_compared_with_the_weights(tmp_path: Path) -> None:
    tensors = [TensorHeader("F32", (512, 32), tmp_path, 0, 0)] * 20
    config_bounds.check_counts({"num_hidden_layers": 64, "text_config": {"num_labels": 512}}, tensors, tmp_path)
    config_bounds.check_counts({"max_window_layers": 10**6, "rope_theta": 10**9, "tie": True}, tensors, tmp_path)
    for config in (
        {"num_hidden_layers": 65},
        {"text_config": {"n_layer": 65}},
        {"num_labels": 513},
        {"rank_pattern": {"q": 999}},
    ):
        with pytest.raises(ModelError, match="and the weights have 20 tensors of at most 512 rows"):
            config_bounds.check_counts(config, tensors, tmp_path)
    config_bounds.check_parameters(2**24 + 400_000, tensors, False, tmp_path)
    with pytest.raises(ModelError, match="a network of 99,000,000 parameters, and the weights have 327,680"):
        config_bounds.check_parameters(99_000_000, tensors, False, tmp_path)


def test_a_header_or_a_json_file_beyond_the_limits_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "LARGEST_JSON", 10)
    (tmp_path / "a.json").write_text(" " * 20 + "{}")
    with pytest.raises(ModelError, match="has 22 bytes; expected at most 10"):
        headers.read_json(tmp_path / "a.json")
    monkeypatch.setattr(headers, "LARGEST_HEADER", 10)
    with pytest.raises(ModelError, match=r"has a header of .* bytes; expected at most 10"):
        headers.read_header(save_tiny("llama", tmp_path / "m") / "model.safetensors")


RECIPES = {
    "nested lists": "a: " + "[" * 100_000,
    "nested mappings": "a: " + "{a: " * 100_000,
    "nested dashes": "- " * 100_000,
    "many values": "a: [" + "1," * 200_000 + "]",
    "a number of a million digits": "a: " + "9" * 1_000_000,
    "a long text": "a: " + "x" * 2_000_000,
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_hostile_recipe_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"expected (a number of )?at most"):
        text.read(RECIPES[name], "r.yaml")


def test_a_key_of_many_parts_is_refused() -> None:
    with pytest.raises(RecipeError, match="expected KEY=VALUE"):
        text.apply({}, ".".join("a" * 100_000) + "=1")
