"""Scores of single answers: expectations under the digits, verdicts on pairs, the same examination."""

from __future__ import annotations

import json

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from tunesmith.cli.main import main
from tunesmith.data.encode import conversations
from tunesmith.errors import JudgeError, UserError
from tunesmith.http_json import TRIES
from tunesmith.judge import examination, judge_run, rubric
from tunesmith.judge.endpoint import Endpoint
from tunesmith.judge.judges import Pair
from tunesmith.judge.rubric import EndpointScorer, Item, LanguageModelScorer, Rubric, RubricJudge, Score
from tunesmith.judge.verdicts import Verdicts

KNOWN = examination.built_in()
GOOD = {(one.prompt, one.better) for one in KNOWN}


class Rule:
    """A scorer that follows a rule; ``asked`` are the items that it scored."""

    def __init__(self, rule):
        self.name = self.identity = "rule"
        self.rule, self.asked = rule, []

    def __call__(self, items):
        for place, item in enumerate(items):
            self.asked.append(item)
            yield place, Score(self.rule(item), 3)


def right(item):
    return 4.5 if (item.prompt, item.answer) in GOOD else 2.0


@pytest.mark.parametrize("template", ["chatml", None])
def test_a_score_is_the_expectation_under_the_digits(template):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(template)
    items = [Item("What?", "Yes."), Item("날씨가 어떻습니까?", "좋네요.")]
    found = dict(LanguageModelScorer("tiny", model, tokenizer, Rubric())(items))
    for place, item in enumerate(items):
        ids = conversations.prompt_ids(Rubric().question(item), tokenizer, system=None)
        logps = model(torch.tensor([ids])).logits[0, -1].log_softmax(0)
        space = "" if template else " "
        digits = [tokenizer(space + digit, add_special_tokens=False)["input_ids"] for digit in "12345"]
        if all(len(one) == 1 for one in digits):
            shares = logps[[one[0] for one in digits]].softmax(0)
            expected = float((shares * torch.arange(1, 6)).sum().detach())
            assert found[place].value == pytest.approx(expected, abs=1e-4) and found[place].tokens == len(ids) + 1
        assert 1 <= found[place].value <= 5


def test_equal_probabilities_give_the_middle_and_a_certain_digit_gives_itself():
    assert rubric.expected_score(dict.fromkeys(range(5), -7.0)) == pytest.approx(3)
    assert rubric.expected_score({0: -900.0, 1: -900.0, 2: -900.0, 3: 0.0, 4: -900.0}) == pytest.approx(4)


def test_the_higher_score_is_better_in_both_orders_and_each_answer_is_scored_once():
    scorer = Rule(lambda item: {"bad": 1.0, "good": 5.0, "fair": 3.0}[item.answer])
    pairs = [Pair("p", "bad", "good"), Pair("p", "good", "fair"), Pair("p", "fair", "fair")]
    both = Verdicts(RubricJudge(scorer), None).ask(pairs)
    assert [one.outcome for one in both] == ["second", "first", "tie"]
    assert both[0].forward.scores == (1.0, 5.0) and both[0].backward.scores == (5.0, 1.0)
    assert len(scorer.asked) == 3 and both[0].forward.first_better == 0
    assert sum(one.forward.tokens + one.backward.tokens for one in both) == 9


def test_a_rubric_passes_the_same_examination_and_chance_does_not():
    assert examination.examine(Verdicts(RubricJudge(Rule(right)), None), KNOWN).passed
    long = examination.examine(Verdicts(RubricJudge(Rule(lambda item: min(5.0, len(item.answer) / 60))), None), KNOWN)
    assert not long.passed and any("prefers the longer" in failure for failure in long.failures)


def test_scores_are_kept_and_read_again(tmp_path):
    path, pairs = tmp_path / "judgements.jsonl", [Pair("p", "x", "y")]
    first = Verdicts(RubricJudge(Rule(lambda item: 2.0 + (item.answer == "y"))), path).ask(pairs)
    again = Verdicts(RubricJudge(Rule(None)), path).ask(pairs)
    assert first == again and json.loads(path.read_text().splitlines()[0])["scores"] == [2.0, 3.0]


# ------------------------------------------------------------------------------------------------- a server


def scorer_of(*replies):
    waiting = list(replies)

    def send(address, body, headers):
        one = waiting.pop(0)
        if isinstance(one, Exception):
            raise one
        return {"choices": [{"message": {"content": one}}], "usage": {"total_tokens": 5}}

    return EndpointScorer(Endpoint("http://127.0.0.1:1/v1", "big", send=send, sleep=lambda seconds: None), Rubric())


@pytest.mark.parametrize(
    "text, expected",
    [("4", 4.0), ("I think:\n**5**", 5.0), ("3.", 3.0), ("6", None), ("4 or 5", None), ("", None), ("3.5", None)],
)
def test_only_a_digit_alone_is_a_score(text, expected):
    ((_, score),) = scorer_of(text)([Item("p", "x")])
    assert score.value == expected and score.tokens == 5
    assert (score.reason == "") == (expected is not None)


def test_nonsense_is_a_missing_verdict_and_silence_stops_with_the_verdicts_kept(tmp_path):
    judge = RubricJudge(scorer_of("4", "nonsense", "4", "2", *[TimeoutError("timed out")] * TRIES))
    path, pairs = tmp_path / "judgements.jsonl", [Pair("p", "x", "y"), Pair("q", "x", "y"), Pair("r", "x", "y")]
    with pytest.raises(JudgeError, match="does not answer: timed out, 4 times") as error:
        Verdicts(judge, path).ask(pairs)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert error.value.exit_code == 3 and [one["first_better"] for one in lines] == [None, None, 0.75, 0.25]


# ---------------------------------------------------------------------------------------------- the command


def test_criteria_are_read_from_a_file(tmp_path):
    (tmp_path / "mine.txt").write_text("Short answers are good.")
    own = rubric.read_rubric(str(tmp_path / "mine.txt"))
    assert "Short answers are good." in own.question(Item("p", "x")) and own.identity != Rubric().identity
    assert "내용이 맞고" in Rubric().question(Item("오늘 날씨는 어떻습니까?", "x"))
    (tmp_path / "empty.txt").write_text(" ")
    for name, words in [("empty.txt", "the file is empty"), ("none.txt", "the file cannot be read")]:
        with pytest.raises(UserError, match=words):
            rubric.read_rubric(str(tmp_path / name))


def test_the_command_prints_mean_scores(monkeypatch, tmp_path, capsys):
    def score(item):
        return right(item) if item.prompt in {one.prompt for one in KNOWN} else 2.0 + 2 * item.answer.startswith("sure")

    monkeypatch.setattr(judge_run, "_open_judge", lambda *arguments: RubricJudge(Rule(score)))
    monkeypatch.setattr(judge_run, "_check_judge", lambda *given: None)
    names = []
    for name, words in [("wrong", "no idea"), ("right", "sure")]:
        path = tmp_path / f"{name}.jsonl"
        rows = [{"row": row, "prompt": f"Say {row}", "answer": f"{words} {row}" + " x" * (row % 3)} for row in range(1, 31)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        names.append(str(path))
    out = tmp_path / "out"
    assert main(["judge", *names, "--judge", "any", "--rubric", "general", "--out", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "mean score 2.00 -> 4.00 of 5, a difference of +2.00 (+2.00 to +2.00)" in printed and "is better than" in printed
    assert json.loads((out / "figures.json").read_text())["comparisons"][0]["scores"]["answers"] == 30
    assert "mean score" in (out / "report.html").read_text()
