"""models, show, generate, chat and merge on the command line: results on stdout, exit codes, nothing overwritten."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import tunesmith
from tests.models.adapters import base_and_adapter, save_adapter
from tests.tiny import save_tiny, tiny_config
from tunesmith.cli import options
from tunesmith.cli.main import main
from tunesmith.models.generate import decode
from tunesmith.models.load import compute_dtype, load
from tunesmith.train.train_config import TrainConfig


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save_tiny("llama", tmp_path / "model"))


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The one JSON object that a verb prints under --json."""
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_models_list(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "models", "list")
    assert {row["name"]: row["present"] for row in found["models"]} == {
        "smollm2-135m": False,
        "smollm2-135m-15l": False,
        "minilm-l6": False,
    }
    assert main(["models", "list"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out


def test_models_pull_of_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "pull", "smollm2"]) == 2
    assert "smollm2-135m" in capsys.readouterr().err


def test_show(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "show", model)["path"] == str(Path(model).resolve())
    assert main(["show", model]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_show_of_a_model_not_pulled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "smollm2-135m"]) == 2
    assert "tunesmith models pull smollm2-135m" in capsys.readouterr().err


def test_generate_a_prompt(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "generate", model, "--prompt", "Hi", "--max-new-tokens", "6")
    assert main(["generate", model, "--prompt", "Hi", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == found["answers"][0]["answer"] + "\n"


FILES = {
    "prompts.txt": "Hi\n\nWhat is it?\n",
    "prompts.jsonl": '{"prompt": "Hi"}\n{"prompt": "What is it?"}\n',
    "prompts.csv": "id,question\n1,Hi\n2,What is it?\n",
    "alpaca.json": '[{"instruction": "Hi", "output": "x"}, {"instruction": "What", "input": "is it?", "output": "y"}]',
    "chat.jsonl": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}]}\n'
    '{"messages": [{"role": "user", "content": "What is it?"}]}\n',
}


@pytest.mark.parametrize("name", FILES)
def test_generate_from_a_file(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / name).write_text(FILES[name])
    out = tmp_path / "answers.jsonl"
    found = answer(capsys, "generate", model, "--data", str(tmp_path / name), "--max-new-tokens", "4", "--out", str(out))
    assert [json.loads(line) for line in out.read_text().splitlines()] == found["first"] and found["rows"] == 2
    assert main(["generate", model, "--data", str(tmp_path / name), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


BAD = {
    "no column": ('{"a": "x", "b": "y"}\n', "no column is a prompt"),
    "a number": ('{"prompt": 3}\n', ":1:prompt"),
    "only answers": ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "a turn to answer"),
    "broken": ('{"prompt": \n', ":1:"),
    "empty": ("", "has no rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_in_prompt_files_name_row_and_field(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    (tmp_path / "p.jsonl").write_text(BAD[case][0])
    assert main(["generate", model, "--data", str(tmp_path / "p.jsonl")]) == 2
    assert BAD[case][1] in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--prompt", "x", "--data", "y"], ["--prompt", "x", "--top-p", "0"]])
def test_wrong_arguments_of_generate(model: str, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(["generate", model, *arguments]) == 2
    assert not capsys.readouterr().out


def test_rows_of_a_file_name_their_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each answer is that of a command with the row's adapter alone; base has none."""
    base = save_tiny("llama", tmp_path / "base")
    folders = {"one": tmp_path / "one", "two": tmp_path / "two", "base": base}
    for seed, name in enumerate(("one", "two")):
        save_adapter(base, folders[name], seed=seed)
    voices = ["two", "base", "one", "two"]
    rows = [{"prompt": "What is it?", "voice": voice} for voice in voices]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rule = ["--max-new-tokens", "6", "--precision", "fp32", "--logprobs"]
    given = ["--data", str(data), "--adapter", f"one={folders['one']}", "--adapter", f"two={folders['two']}"]
    found = answer(capsys, "generate", str(base), *given, "--adapter-column", "voice", *rule)["answers"]
    assert [one["adapter"] for one in found] == voices
    for one in found:
        alone = answer(capsys, "generate", str(folders[one["adapter"]]), "--prompt", one["prompt"], *rule)
        assert one["answer"] == alone["answers"][0]["answer"]
        assert [entry["id"] for entry in one["logprobs"]] == [entry["id"] for entry in alone["answers"][0]["logprobs"]]
    assert len({one["logprobs"][0]["logprob"] for one in found}) == 3
    assert main(["generate", str(base), *given]) == 2
    assert "--adapter-column COLUMN" in capsys.readouterr().err
    data.write_text(json.dumps({"prompt": "Hi", "voice": "three"}) + "\n" + json.dumps({"prompt": "Hi"}) + "\n")
    assert main(["generate", str(base), *given, "--adapter-column", "voice"]) == 2
    told = capsys.readouterr().err
    assert ":1:voice" in told and "one, two, base" in told and "1 more row: 2" in told


def chat(model: str, monkeypatch: pytest.MonkeyPatch, said: str, *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    return main(["chat", model, "--max-new-tokens", "5", "--temperature", "0", *arguments])


def test_chat_keeps_the_history(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(model, monkeypatch, "one\n\ntwo\n", "--json") == 0
    turns = json.loads(capsys.readouterr().out)["messages"]
    assert [(turn["role"], turn["content"]) for turn in turns[::2]] == [("user", "one"), ("user", "two")]
    assert len(turns) == 4


@pytest.mark.parametrize(
    "network", [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering]
)
def test_a_model_with_a_task_head_cannot_chat(
    network: Any, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network.from_config(tiny_config("llama")).save_pretrained(model)
    found = model
    assert chat(found, monkeypatch, "one\n") == 2
    assert "this model is a LlamaFor" in (said := capsys.readouterr().err) and "tunesmith predict" in said
    assert main(["generate", found, "--prompt", "one"]) == 2


def test_chat_commands(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(model, monkeypatch, "one\n/reset\n/system Be brief.\n/what\ntwo\n/exit\nthree\n", "--json") == 0
    captured = capsys.readouterr()
    turns = json.loads(captured.out)["messages"]
    assert [turn["content"] for turn in turns[:2]] == ["Be brief.", "two"] and len(turns) == 3
    assert captured.err.count("Commands:") == 2


def test_chat_streams_to_stdout(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(model, monkeypatch, "one\n") == 0
    found = answer(capsys, "generate", model, "--prompt", "one", "--max-new-tokens", "5")["answers"][0]["answer"]
    assert chat(model, monkeypatch, "one\n") == 0
    assert capsys.readouterr().out == found + "\n"


def test_a_variable_of_the_template_reaches_generate_and_chat(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(model) / "chat_template.jinja"
    file.write_text(file.read_text() + "{% if add_generation_prompt %}{{ opening }}{% endif %}")
    plain = answer(capsys, "generate", model, "--prompt", "one", "--max-new-tokens", "5")["answers"][0]["answer"]
    given = "--template-kwarg", "opening=the fox"
    opened = answer(capsys, "generate", model, "--prompt", "one", "--max-new-tokens", "5", *given)["answers"][0]["answer"]
    assert chat(model, monkeypatch, "one\n", *given) == 0
    assert capsys.readouterr().out.strip() == opened.strip() and opened != plain
    assert main(["generate", model, "--prompt", "one", "--template-kwarg", "openin=x"]) == 2
    assert "It reads opening" in capsys.readouterr().err


def test_chat_needs_a_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("llama", tmp_path, template=None)
    assert chat(str(tmp_path), monkeypatch, "one\n") == 2
    assert "no chat template" in capsys.readouterr().err


VERBS = {
    "generate": ["--prompt", "Hi", "--max-new-tokens", "2"],
    "chat": ["--max-new-tokens", "2"],
    "evaluate": ["--data", "rows.jsonl"],
    "predict": ["--data", "rows.jsonl"],
    "score": ["--data", "rows.jsonl"],
}
LABELS = {"predict": 2, "score": 1}


@pytest.fixture(scope="module")
def stored_in_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models stored in bf16, and rows for them."""
    folder = tmp_path_factory.mktemp("bf16")
    for name, labels in {"writes": 0, "predict": 2, "score": 1}.items():
        save_tiny("llama", folder / name)
        network = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
        network.from_config(tiny_config("llama", num_labels=labels or 2)).bfloat16().save_pretrained(folder / name)
    (folder / "rows.jsonl").write_text('{"prompt": "Hi", "completion": "you", "text": "Hi you"}\n' * 2)
    return folder


@pytest.mark.parametrize(
    ("isa", "flag", "expected"),
    [([], "auto", "float32"), (["amx_bf16"], "auto", "bfloat16"), ([], "bf16", "bfloat16"), (["amx_bf16"], "fp32", "float32")],
)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_computes_in_the_fastest_format_and_prints_it(
    verb: str, isa: list[str], flag: str, expected: str, stored_in_bf16: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    opened = []
    monkeypatch.chdir(stored_in_bf16)
    monkeypatch.setattr(compute_dtype.machine, "describe", lambda: {"isa": isa})
    monkeypatch.setattr(load, "load", lambda path, found=load.load: opened.append(found(path)) or opened[-1])
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    columns = ["--column", "text=text"] if verb == "predict" else []
    model = verb if verb in ("predict", "score") else "writes"
    assert main([verb, f"./{model}", *VERBS[verb], *columns, "--precision", flag, "--json"]) == 0
    said = capsys.readouterr()
    why = "asked for" if flag != "auto" else "this processor"
    assert f"computing in {expected}: {why}" in said.err
    assert json.loads(said.out)["precision"]["compute"] == expected
    assert {str(parameter.dtype) for parameter in opened[0][0].parameters()} == {f"torch.{expected}"}


def test_the_python_function_computes_in_the_fastest_format_too(stored_in_bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(compute_dtype.machine, "describe", lambda: {"isa": []})
    monkeypatch.setattr(decode, "load", lambda path: opened.append(load.load(path)) or opened[-1])
    tunesmith.generate(stored_in_bf16 / "writes", ["Hi"], max_new_tokens=1)
    assert opened[0][0].dtype is torch.float32
    tunesmith.generate(stored_in_bf16 / "writes", ["Hi"], max_new_tokens=1, precision="bf16")
    assert opened[1][0].dtype is torch.bfloat16


def test_precision_has_the_same_values_everywhere() -> None:
    flag = get_args(get_args(options.Precision)[0])
    assert flag == get_args(compute_dtype.Wanted) == get_args(TrainConfig.model_fields["precision"].annotation)


def test_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = base_and_adapter(tmp_path)
    out = tmp_path / "merged"
    found = answer(capsys, "merge", str(adapter), "--out", str(out))
    assert found["path"] == str(out.resolve()) and found["max_logit_difference"] < 1e-4
    assert main(["merge", str(adapter), "--out", str(out)]) == 2
    assert main(["merge", str(base), "--out", str(tmp_path / "other")]) == 2
    assert "nothing to merge" in capsys.readouterr().err
