"""vLLM behind the engine's interface: the engine's answers from a server that the engine drives, and what goes wrong on the way."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import tunesmith
from tests import vllm_server
from tests.tiny import save_tiny
from tests.vllm_server import VllmServer
from tunesmith import http_json
from tunesmith.cli.main import main
from tunesmith.errors import MissingExtra, ServerError, SettingError, UserError
from tunesmith.evaluate import answer_file
from tunesmith.models.generate import vllm_backend
from tunesmith.models.generate.engine import Engine
from tunesmith.models.generate.running_rows import Request
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.models.generate.vllm_backend import HERE, in_threads, open_vllm, read_choice
from tunesmith.models.load.load import load

WINDOW = 60
PROMPTS = [[5, 6, 7], list(range(5, 45)), [9], [100, 200], list(range(20, 20 + WINDOW - 4))]
RULES = {
    "greedy": SamplingParams(max_new_tokens=8),
    "window": SamplingParams(max_new_tokens=30),
    "nothing": SamplingParams(max_new_tokens=0),
    "likeliest": SamplingParams(max_new_tokens=5, top_logprobs=3),
    "stop tokens": SamplingParams(max_new_tokens=30, stop=frozenset(range(0, 500, 5)), min_new_tokens=2),
    "penalties": SamplingParams(max_new_tokens=8, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    "bias": SamplingParams(max_new_tokens=8, logit_bias={7: 50.0, 9: -5.5}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("tiny"), max_position_embeddings=WINDOW)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(*load(folder))


@pytest.fixture
def server(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmServer]:
    monkeypatch.delenv(vllm_backend.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(http_json, "WAIT", 0.0)
    with VllmServer(engine) as made:
        yield made


@pytest.fixture
def in_process(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package ``vllm`` with as much of its interface as is used; its LLM answers by the engine."""

    class LLM:
        def __init__(self, **settings: Any) -> None:
            assert settings["dtype"] == "float32"

        def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
            return [self.output(*one) for one in zip(prompts, params, strict=True)]

        def output(self, prompt: Any, params: Any) -> Any:
            found = vllm_server.answer(engine, prompt["prompt_token_ids"], vars(params))
            logprobs = [
                {token: SimpleNamespace(logprob=value) for token, value in place.items()}
                for place in vllm_server.places(found, params.logprobs)
            ]
            output = SimpleNamespace(token_ids=tuple(found.ids), logprobs=logprobs, finish_reason=vllm_server.finish(found))
            return SimpleNamespace(outputs=[output])

    module, version = ModuleType("vllm"), importlib.metadata.version
    vars(module).update(LLM=LLM, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "vllm" else version(name))


def opened(kind: str, folder: Path, request: pytest.FixtureRequest) -> vllm_backend.Vllm:
    if kind == HERE:
        if not [one for one in importlib.metadata.distributions() if one.name == "vllm"]:
            pytest.skip("vLLM is not installed")
        return open_vllm(HERE, str(folder), precision="fp32")
    if kind == "in this process":
        request.getfixturevalue("in_process")
        return open_vllm(HERE, str(folder), precision="fp32")
    served = request.getfixturevalue("server")
    served.gives_ids = kind != "an old server"
    return open_vllm(served.address, str(folder))


@pytest.mark.parametrize("kind", ["a server", "an old server", "in this process", HERE])
def test_the_answers_are_those_of_the_engine(kind: str, folder: Path, engine: Engine, request: pytest.FixtureRequest) -> None:
    vllm = opened(kind, folder, request)
    for name, rule in RULES.items():
        asked = [Request(tuple(ids), rule, number, sample=3) for number, ids in enumerate(PROMPTS)]
        vllm.check(asked)
        found = {answer.prompt: answer for answer in vllm.run(iter(asked))}
        for expected in engine.answers(asked):
            got = found[expected.prompt]
            assert (got.ids, got.text, got.reason, got.sample) == (expected.ids, expected.text, expected.reason, 3), (name, got)
            assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-4) and got.rule_logprobs == []
            assert [[token for token, _ in place] for place in got.top] == [
                [token for token, _ in place] for place in expected.top
            ]
    reasons = {answer.reason for rule in RULES.values() for answer in engine.run([Request((5, 6, 7), rule)])}
    assert {"stop", "length"} <= reasons and vllm.timing.decode_tokens > 0


def test_a_stop_string_is_no_part_of_an_answer(server: VllmServer, folder: Path, engine: Engine) -> None:
    (whole,) = engine.run([Request((5, 6, 7), RULES["greedy"])])
    for stop in (whole.text[3:5], whole.text[-2:]):
        asked = [Request((5, 6, 7), SamplingParams(max_new_tokens=8, stop_strings=(stop,)))]
        (got,), (expected,) = open_vllm(server.address, str(folder)).run(iter(asked)), engine.run(asked)
        assert (got.ids, got.text, got.reason) == (expected.ids, expected.text, expected.reason)
        assert got.reason == "stop_string" and stop not in got.text


def test_each_sample_has_its_own_random_numbers(server: VllmServer, folder: Path) -> None:
    """They depend on seed, prompt and sample alone, so a continued file has the answers of an undisturbed one."""
    vllm = open_vllm(f"{server.address}/v1/", str(folder), most=2)
    rule = SamplingParams(max_new_tokens=6, temperature=1.0, seed=4)
    asked = [Request((5, 6, 7), rule, prompt, sample) for prompt in range(3) for sample in range(3)]
    first, again = ({(one.prompt, one.sample): one.ids for one in vllm.run(iter(asked[::step]))} for step in (1, -1))
    assert first == again and len({tuple(ids) for ids in first.values()}) == 9
    assert len({body["seed"] for body in server.asked}) == 9


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": "a"}) + "\n" for n in range(7)))
    return file


def generate(folder: Path, rows: Path, out: str, *words: str) -> int:
    few = ["--max-new-tokens", "4", "--precision", "auto" if "--engine" in words else "fp32"]
    return main(["generate", str(folder), "--data", str(rows), "--out", str(rows.with_name(out)), *few, *words])


def test_a_file_of_answers_is_the_engines(
    server: VllmServer, folder: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(folder, rows, "own.jsonl") == 0
    assert generate(folder, rows, "vllm.jsonl", "--engine", server.address) == 0
    assert rows.with_name("vllm.jsonl").read_text() == rows.with_name("own.jsonl").read_text()
    made_with = json.loads(answer_file.manifest_path(rows.with_name("vllm.jsonl")).read_text())
    assert made_with["address"] == f"{server.address}/v1" and made_with["served_model"] == "tiny"
    server.asked.clear()
    assert generate(folder, rows, "vllm.jsonl", "--engine", server.address) == 0 and server.asked == []
    assert generate(folder, rows, "vllm.jsonl") == 2 and "engine" in capsys.readouterr().err


def test_a_server_that_dies_costs_no_answer(
    server: VllmServer, folder: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the engine would generate a block again because its rounding depends on what runs together."""
    words = ["--engine", server.address, "--max-running", "2", "--logprobs"]
    assert generate(folder, rows, "whole.jsonl", *words) == 0
    server.asked.clear()
    server.dies_after = 4
    assert generate(folder, rows, "out.jsonl", *words) == 3
    said = capsys.readouterr().err
    assert "4 of 7 answers are kept" in said and "HTTP 500" in said and "bug" not in said
    server.dies_after = 10**9
    server.asked.clear()
    assert generate(folder, rows, "out.jsonl", *words) == 0 and len(server.asked) == 3
    whole, continued = (list(answer_file.read_lines(rows.with_name(name))) for name in ("whole.jsonl", "out.jsonl"))
    assert [line["answer"] for line in continued] == [line["answer"] for line in whole]
    assert all("rule_logprob" not in one for line in whole for one in line["logprobs"])


def test_figures_of_answers_are_those_of_the_engines_answers(server: VllmServer, folder: Path, rows: Path) -> None:
    keys = {"generate": 5, "max_new_tokens": 4, "precision": "fp32"}
    own = tunesmith.evaluate(str(folder), rows, **keys)["generated"]
    found = tunesmith.evaluate(str(folder), rows, **keys, engine=server.address, out=rows.with_name("kept"))["generated"]
    assert found["figures"] == own["figures"] and len(server.asked) == 5
    again = tunesmith.evaluate(str(folder), rows, **keys, engine=server.address, out=rows.with_name("kept"))["generated"]
    assert again["figures"] == own["figures"] and len(server.asked) == 5, "the answers were kept"
    for model, wrong in ((str(folder), {"engine": server.address, "generate": 0}), (load(folder), {"engine": server.address})):
        with pytest.raises(UserError, match="--engine and --served-model"):
            tunesmith.evaluate(model, rows, **{**keys, **wrong})


def test_a_busy_server_is_asked_again(server: VllmServer, folder: Path, rows: Path) -> None:
    server.failures = [503, 429, 500]
    assert generate(folder, rows, "out.jsonl", "--engine", server.address, "--max-running", "1") == 0
    assert len(server.asked) == 7 + 3


def test_the_key_comes_from_the_environment_alone(
    server: VllmServer, folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.key = "very-secret"
    assert generate(folder, rows, "out.jsonl", "--engine", server.address, "--max-running", "1") == 3
    assert vllm_backend.KEY_VARIABLE in capsys.readouterr().err and len(server.asked) == 1
    monkeypatch.setenv(vllm_backend.KEY_VARIABLE, server.key)
    assert generate(folder, rows, "out.jsonl", "--engine", server.address) == 0
    assert server.keys == {"", "Bearer very-secret"}
    caught = capsys.readouterr()
    written = "".join(path.read_text() for path in rows.parent.iterdir())
    assert server.key not in caught.out + caught.err + written


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--served-model", "large"], "serves tiny, not 'large'"),
        (["--typical-p", "0.5"], "typical_p is 0.5; expected no value with --engine"),
        (["--precision", "bf16"], "has a precision of its own"),
        (["--engine", "ftp://x"], "expected vllm, or an address"),
        (["--engine", "vllm"], "pip install 'tunesmith[vllm]'"),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_anything_is_asked(
    server: VllmServer, folder: Path, rows: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "vllm", None)  # not installed
    assert main(["generate", str(folder), "--data", str(rows), "--engine", server.address, *words]) == 2
    assert expected in capsys.readouterr().err and server.asked == []


# ------------------------------------------------------------------------------------------------ what may come back


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ({"choices": [{"text": "words alone", "finish_reason": "stop"}]}, "gives no tokens"),
        ({"choices": []}, "gives no tokens"),
        ({"choices": [{"token_ids": [8, 9], "finish_reason": "abort"}]}, r"after 2 tokens \(abort\)"),
    ],
)
def test_a_reply_that_is_no_answer_is_an_error(
    reply: dict[str, Any], expected: str, server: VllmServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "complete", lambda body: reply)
    with pytest.raises(ServerError, match=expected):
        list(open_vllm(server.address, str(folder)).run(iter([Request((5, 6), RULES["greedy"])])))


def test_the_sampled_token_is_no_likeliest_one_where_vllm_adds_it() -> None:
    places = [{"token_id:9": -5.0, "token_id:3": -0.1, "token_id:4": -2.0}, {"token_id:3": -0.1, "token_id:9": -0.5}]
    choice = {"logprobs": {"tokens": ["token_id:9"] * 2, "token_logprobs": [-5.0, -0.5], "top_logprobs": places}}
    assert read_choice(choice, 2).top == [[(3, -0.1), (4, -2.0)], [(3, -0.1), (9, -0.5)]]
    assert read_choice(choice, 2).ids == [9, 9] and read_choice(choice, 0).top == []


def test_a_redirect_gets_no_key(server: VllmServer, folder: Path) -> None:
    server.failures = [302]
    with pytest.raises(ServerError, match="HTTP 302"):
        list(open_vllm(server.address, str(folder)).run(iter([Request((5, 6), RULES["greedy"])])))


def test_a_smaller_window_of_the_server_is_the_window(server: VllmServer, folder: Path) -> None:
    server.window = 10
    vllm = open_vllm(server.address, str(folder))
    (answer,) = vllm.run(iter([Request((5, 6, 7), SamplingParams(max_new_tokens=20))]))
    assert (len(answer.ids), answer.reason) == (7, "window")
    with pytest.raises(UserError, match="has 10 tokens; the model's window is 10"):
        vllm.check([Request(tuple(range(5, 15)), RULES["greedy"])])


def test_what_would_be_sampled_otherwise_is_refused(server: VllmServer, folder: Path) -> None:
    vllm = open_vllm(server.address, str(folder))
    for name, value in {"bad_words": ((7,),), "choices": ((7, 8),), "logit_bias": {7: 150.0}}.items():
        with pytest.raises(SettingError, match=name):
            vllm.check([Request((5, 6), SamplingParams(**{name: value}))])


def test_without_vllm_the_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # not installed
    with pytest.raises(MissingExtra, match="vllm"):
        open_vllm(HERE, str(folder))


def test_results_under_way_survive_an_error_and_items_are_taken_one_by_one() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    def call(number: int) -> int:
        if number == 5:
            raise ServerError("gone")
        return number

    found = []
    with pytest.raises(ServerError, match="gone"):
        for number in in_threads(call, items(), 3):
            assert len(taken) <= len(found) + 4, "three run, and one ended"
            found.append(number)
    assert sorted(found) == [number for number in taken if number != 5] and len(taken) < 12
