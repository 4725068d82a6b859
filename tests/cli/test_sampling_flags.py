"""The flags of the sampling rule: each reaches the rule of both verbs, and a wrong value is an error that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tunesmith.cli.main import load, main
from tunesmith.cli.sampling_flags import FLAGS, SamplingFlags, flag_name
from tunesmith.models.generate.sampling import SamplingParams

PAGE = Path(__file__).parents[2] / "docs" / "generate.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def pair() -> Any:
    return tiny_model("llama"), tiny_tokenizer("chatml")


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_both_verbs_have_every_flag_with_help(verb: str) -> None:
    options = {param.name: param for param in load(verb).params}
    for name, flag in FLAGS.items():
        assert options[name].opts == [flag_name(name)] and options[name].help == flag.help
    assert options["temperature"].default == (0.0 if verb == "generate" else 0.7)


def test_the_table_covers_the_rule_and_the_page_covers_the_table() -> None:
    by_model = {"stop"}  # the stop tokens of tokenizer and template
    assert {flag.field for flag in FLAGS.values() if flag.field} == SamplingParams.__dataclass_fields__.keys() - by_model
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in FLAGS if f"`{flag_name(name)}" not in text] == []


VALUES: dict[str, tuple[Any, Any]] = {
    "max_new_tokens": (5, 5),
    "min_new_tokens": (2, 2),
    "temperature": (0.5, 0.5),
    "top_k": (3, 3),
    "top_p": (0.5, 0.5),
    "min_p": (0.1, 0.1),
    "typical_p": (0.6, 0.6),
    "repetition_penalty": (1.2, 1.2),
    "presence_penalty": (0.3, 0.3),
    "frequency_penalty": (0.4, 0.4),
    "bad_word": (["fox"], "tokens of ' fox' and 'fox'"),
    "logit_bias": (["fox=3", "7=-2", " fox=1e1"], "the ids of 'fox' and ' fox', and 7"),
    "stop": (["a", "나"], ("a", "나")),
    "choice": (["yes", "no", "yes"], "tokens of 'yes' and 'no'"),
    "seed": (4, 4),
    "top_logprobs": (2, 2),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_flag_sets_its_field(name: str, pair: Any) -> None:
    tokenizer = pair[1]

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    expected = VALUES[name][1]
    if name == "bad_word":
        expected = (ids("fox"), ids(" fox"))
    elif name == "choice":
        expected = (ids("yes"), ids("no"))
    elif name == "logit_bias":
        (alone,) = ids("fo")  # a token of the tiny vocabulary
        expected = {alone: 3.0, 7: -2.0, ids(" ")[0]: 10.0}
    given = {"logit_bias": ["fo=3", "7=-2", " =1e1"]}.get(name, VALUES[name][0])
    flags = SamplingFlags({**{key: flag.default for key, flag in FLAGS.items()}, name: given})
    flags.check()
    field = FLAGS[name].field
    assert field is not None and vars(flags.params(pair))[field] == expected != getattr(SamplingParams(), field)


def test_biases_come_from_a_file_too(pair: Any, tmp_path: Path) -> None:
    (tmp_path / "bias.json").write_text(json.dumps({"7": -1.5, "8": 2}))
    flags = SamplingFlags(
        {**{key: flag.default for key, flag in FLAGS.items()}, "logit_bias": [str(tmp_path / "bias.json"), "9=1"]}
    )
    assert flags.params(pair).logit_bias == {7: -1.5, 8: 2.0, 9: 1.0}


BEFORE_LOADING = {
    "--temperature -1": "--temperature is -1.0; expected 0 (greedy) or more",
    "--top-k -2": "--top-k is -2; expected 0 (off) or more",
    "--top-p 0": "--top-p is 0.0; expected above 0 and at most 1",
    "--min-p 2": "--min-p is 2.0; expected from 0 to 1",
    "--typical-p 0": "--typical-p is 0.0; expected above 0 and at most 1",
    "--repetition-penalty 0": "--repetition-penalty is 0.0; expected above 0",
    "--presence-penalty inf": "--presence-penalty is inf; expected a finite number",
    "--frequency-penalty nan": "--frequency-penalty is nan; expected a finite number",
    "--max-new-tokens -1": "--max-new-tokens is -1; expected 0 or more",
    "--min-new-tokens 9 --max-new-tokens 5": "--min-new-tokens is 9; expected at most --max-new-tokens, 5",
    "--top-logprobs -1": "--top-logprobs is -1; expected 0 or more",
    "--stop ''": "--stop is ''; expected a text that is not empty",
    "--logit-bias 7=x": "--logit-bias 7=x: expected a finite number",
    "--logit-bias missing.json": "--logit-bias missing.json: expected TOKEN=NUMBER, or a JSON file",
}
WITH_THE_MODEL = {
    "--top-logprobs 513": "--top-logprobs is 513; expected at most 512",
    "--logit-bias 512=1": "expected a token id below 512",
    "--logit-bias zebra=1": "expected one token, and this is",
    "--choice abcdefgh --max-new-tokens 2": "--max-new-tokens is 2; expected at least",
}


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize("given", [*BEFORE_LOADING, *WITH_THE_MODEL])
def test_a_wrong_value_names_its_flag_and_the_range(
    verb: str, given: str, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("''", "") for word in given.split(" ")]
    assert main([verb, model, *(["--prompt", "Hi"] if verb == "generate" else []), *words]) == 2
    said = capsys.readouterr().err
    assert {**BEFORE_LOADING, **WITH_THE_MODEL}[given] in said
    assert ("loading" in said) is (given in WITH_THE_MODEL)


def answer(model: str, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["generate", model, "--prompt", "Hi", "--precision", "fp32", "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_flags_change_the_answer(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = answer(model, capsys, "--max-new-tokens", "6")["answers"][0]
    assert (plain["tokens"], plain["reason"]) == (6, "length")
    biased = answer(model, capsys, "--max-new-tokens", "3", "--logit-bias", "the=1000")["answers"][0]
    assert biased["answer"] == "thethethe"
    other = answer(model, capsys, "--max-new-tokens", "3", "--logit-bias", "the=1000", "--bad-word", "the")["answers"][0]
    assert "the" not in other["answer"]
    stopped = answer(model, capsys, "--logit-bias", "the=1000", "--stop", "ethe")["answers"][0]
    assert (stopped["answer"], stopped["reason"]) == ("th", "stop_string")
    chosen = answer(model, capsys, "--choice", "the end", "--choice", "the fox")["answers"][0]
    assert chosen["answer"] in ("the end", "the fox") and chosen["reason"] == "stop"
