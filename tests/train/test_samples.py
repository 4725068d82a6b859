"""Sample prompts and answers as a person reads them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import tunesmith
from tests.runs import recipe
from tests.tiny import tiny_tokenizer
from tunesmith.data.encode import conversations, rankings
from tunesmith.data.rows import Chat, Ranking
from tunesmith.models.generate import slots
from tunesmith.models.generate.engine import Engine
from tunesmith.train import samples, setup
from tunesmith.train.session import RunSession
from tunesmith.train.train_config import SampleConfig

ASKED = [
    {"role": "user", "content": "which city?"},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "why?"},
]
ANSWER = {"role": "assistant", "content": "because"}


class Held(list):
    """Held-out examples."""


@pytest.mark.parametrize("kind", ["pair", "chat"])
def test_the_prompt_of_a_dialogue_is_shown_whole(kind):
    tokenizer = tiny_tokenizer("chatml")
    if kind == "pair":
        other = {"role": "assistant", "content": "no idea"}
        row = Ranking(tuple(ASKED), ((ANSWER,), (other,)), (0, 1))
        ((example,),) = rankings.encode([row], tokenizer, max_length=None, overlong="error")
    else:
        ((example,),) = conversations.encode([Chat((*ASKED, ANSWER))], tokenizer)
    (prompt,) = samples.prompts(SampleConfig(), Held([example]), tokenizer)
    assert prompt.text == "user\nwhich city?\nassistant\nParis\nuser\nwhy?"
    assert prompt.reference.strip() == "because"


def test_a_single_question_is_shown_without_its_role():
    tokenizer = tiny_tokenizer("chatml")
    ((example,),) = conversations.encode([Chat((ASKED[0], ANSWER))], tokenizer)
    (prompt,) = samples.prompts(SampleConfig(), Held([example]), tokenizer)
    assert prompt.text == "which city?"


def test_an_answer_that_did_not_stop_is_marked_as_cut():
    found = [SimpleNamespace(text="a", ids=[7, 8, 9], reason="length"), SimpleNamespace(text="b", ids=[7], reason="stop")]
    released = []
    engine = SimpleNamespace(answers=lambda requests: found, release=lambda: released.append(True))
    prompts = [samples.Prompt([3, 4], "a", None), samples.Prompt([5, 6], "b", None)]
    assert samples.answer(engine, prompts, 3) == [samples.Answer("a", 3), samples.Answer("b", None)]
    assert released, "the memory of the slots is free for training"


def test_all_answers_of_a_run_come_from_one_engine_that_is_checked_once(tmp_path, monkeypatch):
    """Of sample prompts and of held-out prompts. Each answer is that of an engine made for it alone."""

    class New(RunSession):
        engine = property(lambda self: Engine(self.model, self.tokenizer))

    made = recipe(tmp_path, max_steps=3, eval_steps=1, learning_rate=0.01)
    made["data"]["eval"] = {
        "path": made["data"]["train"][0]["path"],
        "generate": {"rows": 2, "max_new_tokens": 3, "metrics": ["exact_match"]},
    }
    made["samples"] = {"count": 3, "max_new_tokens": 4}
    checks, choose = [], slots.choose_pass
    monkeypatch.setattr(slots, "choose_pass", lambda *given: checks.append(1) or choose(*given))
    tunesmith.train(made, out=tmp_path / "one")
    assert len(checks) == 1
    monkeypatch.setattr(setup, "RunSession", New)
    tunesmith.train(made, out=tmp_path / "new")
    one, new = ((tmp_path / name / "samples.jsonl").read_text() for name in ("one", "new"))
    assert one == new and len({json.loads(line)["answer"] for line in one.splitlines()}) > 2


def test_the_report_and_the_terminal_show_where_a_sample_was_cut(tmp_path):
    from tunesmith.cli.train import summary

    made = recipe(tmp_path, max_steps=1, eval_steps=1, learning_rate=1e-6)
    made["data"]["eval"] = {"path": made["data"]["train"][0]["path"]}
    made["samples"] = {"count": 3, "max_new_tokens": 2}
    found = tunesmith.train(made, out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    cut = [line for line in lines if "cut" in line]
    assert cut and {line["cut"] for line in cut} == {2}
    assert np.count_nonzero(["before_cut" in one for one in found["samples"]]) == sum(one["step"] == 0 for one in cut)
    assert "cut at 2 tokens" in (tmp_path / "run" / "report.html").read_text("utf-8")
    table = summary(found)[1]
    assert any("cut at 2 tokens" in str(cell) for cell in table.columns[1].cells)
