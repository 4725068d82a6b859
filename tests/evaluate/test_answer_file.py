"""``generate --out``: killed at any moment and continued to the same bytes; never continued with other settings."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.kill_points import in_fork
from tests.tiny import save_tiny
from tunesmith.cli.main import main
from tunesmith.errors import UserError
from tunesmith.evaluate.answer_file import AnswerFile, partial_path


def killed_at(method: str, call: int, words: list[str]) -> str:
    """Run the program in a fork that SIGKILL ends after so many calls of a method of AnswerFile. Returns its stderr."""
    function, calls = getattr(AnswerFile, method), []

    def counted(self: AnswerFile, *args: Any) -> Any:
        if method == "add":
            function(self, *args)
        calls.append(method)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    with tempfile.NamedTemporaryFile("w+", buffering=1) as errors, pytest.MonkeyPatch.context() as patch:

        def run() -> int:
            with contextlib.redirect_stderr(errors):
                return main(words)

        patch.setattr(AnswerFile, method, counted)
        assert in_fork(run) == (-signal.SIGKILL, None)
        return Path(errors.name).read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("answers")
    save_tiny("llama", place / "model")
    (place / "p.jsonl").write_text("".join(json.dumps({"prompt": "What is it? " * (n % 5) + str(n)}) + "\n" for n in range(11)))
    return place


def command(folder: Path, out: Path, *more: str, model: Path | None = None) -> list[str]:
    words = ["generate", str(model or folder / "model"), "--data", str(folder / "p.jsonl"), "-k", "2", "--temperature", "1"]
    return [*words, "--max-new-tokens", "9", "--max-running", "2", "--out", str(out), *more]


@pytest.mark.parametrize(("precision", "kept"), [("fp32", 11), ("bf16", 8)])
def test_a_killed_file_goes_on_to_the_same_bytes(
    precision: str, kept: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--precision", precision, "--top-p", "0.9"
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    assert main(command(folder, whole, *flags)) == 0
    killed_at("add", 11, command(folder, out, *flags))
    assert not out.exists()
    assert len(partial_path(out).read_bytes().splitlines()) == 12  # with the header
    partial_path(out).open("ab").write(b'{"index": 3, "li')  # a write that a kill cut in two
    again = killed_at("finish", 1, command(folder, out, *flags))  # all answered, not yet published
    assert not out.exists()
    assert f"continuing {partial_path(out)}: {kept} of 22 answers are there" in again.replace("\n", " ")
    capsys.readouterr()
    assert main(command(folder, out, *flags)) == 0
    assert "22 of 22 answers are there" in capsys.readouterr().err
    assert out.read_bytes() == whole.read_bytes()
    assert json.loads(Path(f"{out}.manifest.json").read_text()) == json.loads(Path(f"{whole}.manifest.json").read_text())
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["row"], row["sample"]) for row in rows] == [(n, k) for n in range(1, 12) for k in (1, 2)]
    assert not partial_path(out).exists()
    assert main(command(folder, out, *flags)) == 0
    assert "is complete" in capsys.readouterr().err


@pytest.fixture
def made(folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "a.jsonl"
    assert main(command(folder, out, "--precision", "fp32")) == 0
    return out


def test_other_settings_are_refused_with_what_changed(folder: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = made.read_bytes()

    def refused(*more: str) -> str:
        capsys.readouterr()
        assert main(command(folder, made, "--precision", "fp32", *more)) == 2
        assert made.read_bytes() == before
        return capsys.readouterr().err

    assert "sampling.temperature: 1.0 -> 0.5" in refused("--temperature", "0.5")
    assert 'precision: "float32" -> "bfloat16"' in refused("--precision", "bf16")
    assert 'system: null -> "Be brief."' in refused("--system", "Be brief.")
    said = refused("--limit", "3")
    assert "prompts: 11 -> 3" in said and "data.limit: null -> 3" in said and "--restart" in said
    data = (folder / "p.jsonl").read_text()
    (folder / "p.jsonl").write_text(data.replace("What", "Who", 1))
    assert "data.sha256" in refused()
    (folder / "p.jsonl").write_text(data)
    other = folder / "other" / "model"
    save_tiny("llama", other, seed=5)
    words = command(folder, made, "--precision", "fp32", model=other)
    assert main(words) == 2 and "weights: " in capsys.readouterr().err and made.read_bytes() == before
    assert main([*words, "--restart"]) == 0 and made.read_bytes() != before


def test_another_prompt_or_template_is_refused_too(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.jsonl"
    words = ["generate", str(folder / "model"), "--max-new-tokens", "2", "--out", str(out), "--prompt"]
    assert main([*words, "Hi"]) == 0 and main([*words, "Hi"]) == 0 and main([*words, "Ho"]) == 2
    assert 'prompt: "Hi" -> "Ho"' in capsys.readouterr().err


def test_a_file_that_generate_did_not_write_is_never_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "notes.jsonl"
    for file in (out, partial_path(out)):
        file.write_text("mine")
        for more in ([], ["--restart"]):
            assert main(command(folder, out, *more)) == 2
            assert "exists already" in capsys.readouterr().err and file.read_text() == "mine"
        file.unlink()


def test_the_manifest_names_no_folder_of_the_machine(folder: Path, made: Path) -> None:
    text = Path(f"{made}.manifest.json").read_text()
    assert str(folder) not in text and json.loads(text)["model"] == "model" and json.loads(text)["data"]["path"] == "p.jsonl"


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    def opened() -> Any:
        return AnswerFile(tmp_path / "a.jsonl", {"a": 1}, 4, 2, exact=True)

    with opened() as first:
        first.add(1, {"x": 1})
        with pytest.raises(UserError, match="being written by another process"), opened():
            pass
    with opened() as second:
        assert second.done == 1 and second.has(1) and not second.has(0)


def test_damaged_ends_of_a_partial_file_are_cut_off(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    for damage in (b"", b"\0\0\0\n", b'{"made_with": {"a'):
        partial_path(out).write_bytes(damage if damage.startswith(b"{") else b"")
        with AnswerFile(out, {"a": 1}, 3, 3, exact=True) as file:
            assert file.done == 0
            file.add(0, {"x": 0})
        with partial_path(out).open("ab") as end:
            end.write(damage)
        with AnswerFile(out, {"a": 1}, 3, 3, exact=True) as file:
            assert file.done == 1
            file.add(2, {"x": float("nan")})
            file.add(1, {"x": 1})
            file.finish()
        assert out.read_text() == '{"x": 0}\n{"x": 1}\n{"x": null}\n'
        out.unlink()
        Path(f"{out}.manifest.json").unlink()
