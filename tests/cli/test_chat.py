"""``tunesmith chat``: turns reuse the cache, characters stream whole, Ctrl-C ends an answer and not the program."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest

from tests.tiny import save_tiny, tiny_tokenizer
from tunesmith.cli.main import main
from tunesmith.data.encode import conversations

KOREAN = "한국의 수도는 서울입니다"
"""Few of its characters are one token."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("model")))


class Recorder(io.StringIO):
    """stdout that keeps each write, and is interrupted at the ``interrupted``-th one."""

    def __init__(self, interrupted: int = 0) -> None:
        super().__init__()
        self.writes: list[str] = []
        self.interrupted = interrupted

    def write(self, text: str) -> int:
        self.writes.append(text)
        if len(self.writes) == self.interrupted:
            raise KeyboardInterrupt
        return super().write(text)


def chat(model: str, monkeypatch: pytest.MonkeyPatch, said: str, *words: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    assert main(["chat", model, "--temperature", "0", "--precision", "fp32", *words]) == 0


def test_a_turn_computes_only_what_is_new(model: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    chat(model, monkeypatch, "What is it?\nAnd then?\n", "--choice", "the lazy dog", "--json", "--system", "user question " * 20)
    found = json.loads(capsys.readouterr().out)
    tokenizer = tiny_tokenizer("chatml")
    first, second = (len(conversations.prompt_ids([turn for turn in found["messages"][:end]], tokenizer)) for end in (2, 4))
    answers = found["answers"]
    assert answers[0]["prefill_tokens"] == first
    held = first + answers[0]["tokens"] - 1  # the last token of an answer is drawn, and computed when a turn follows
    assert answers[1]["prefill_tokens"] == second - held < first / 2
    assert answers[1]["reason"] == "stop" and answers[1]["decode_seconds"] >= 0


def test_characters_stream_whole(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorder()
    monkeypatch.setattr(sys, "stdout", recorded)
    chat(model, monkeypatch, "뭐라고?\n", "--choice", KOREAN)
    assert "".join(recorded.writes) == KOREAN + "\n"
    assert "\ufffd" not in "".join(recorded.writes) and len([text for text in recorded.writes if text.strip()]) > 5


def test_ctrl_c_ends_the_answer_and_not_the_program(model: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    recorded = Recorder(interrupted=5)
    monkeypatch.setattr(sys, "stderr", recorded)  # under --json the answers stream there
    monkeypatch.setattr("tunesmith.cli.chat.print_stderr", lambda *lines: None)
    chat(model, monkeypatch, "one\ntwo\n", "--choice", KOREAN, "--json")
    found = json.loads(capsys.readouterr().out)
    answers = [turn["content"] for turn in found["messages"] if turn["role"] == "assistant"]
    assert [one["reason"] for one in found["answers"]] == ["interrupted", "stop"]
    assert 0 < len(answers[0]) < len(KOREAN) and KOREAN.startswith(answers[0]) and answers[1] == KOREAN


def test_commands_are_in_the_help_and_unknown_ones_are_named(model: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    chat(model, monkeypatch, "/help\n/what is it\n/exit\n")
    said = capsys.readouterr().err
    assert "there is no command /what\n" in said and said.count("there is no command") == 1
    assert main(["chat", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    for command in ("/reset", "/system TEXT", "/adapter NAME", "/help", "/exit"):
        assert command in page, command
    for command in ("/reset", "/system TEXT", "/help", "/exit"):
        assert command in said


def test_logprobs_of_a_turn_are_in_the_json(model: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    chat(model, monkeypatch, "one\n", "--max-new-tokens", "3", "--top-logprobs", "2", "--json")
    (found,) = json.loads(capsys.readouterr().out)["answers"]
    assert found["tokens"] == len(found["logprobs"]) and len(found["logprobs"][0]["top_logprobs"]) == 2
