"""A long queue of prompts: rows in memory, what each answer holds, and equality with the engine alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.tiny import CHATML, tiny_model, tiny_tokenizer
from tunesmith.data.read.prompts import AskedPrompt
from tunesmith.data.rows import Chat
from tunesmith.errors import DataError, UserError
from tunesmith.evaluate.answer_prompts import Queue, speed
from tunesmith.models.generate import decode
from tunesmith.models.generate.engine import Engine
from tunesmith.models.generate.running_rows import Request
from tunesmith.models.generate.sampling import SamplingParams

PAIR = tiny_model("llama"), tiny_tokenizer("chatml")
DRAWN = SamplingParams(max_new_tokens=6, temperature=1.0, top_logprobs=2)


def asked(count: int) -> list[AskedPrompt]:
    return [AskedPrompt(n + 1, f"question {n}", f"answer {n}") for n in range(count)]


class Counted:
    """Prompts that are counted as they are read."""

    def __init__(self, count: int) -> None:
        self.prompts, self.read = asked(count), 0

    def __iter__(self) -> Iterator[AskedPrompt]:
        for prompt in self.prompts:
            self.read += 1
            yield prompt


@pytest.mark.parametrize("samples", [1, 3])
def test_only_the_running_rows_are_in_memory(samples: int) -> None:
    prompts = Counted(60)
    queue = Queue(PAIR, prompts, 60, DRAWN, samples=samples, max_running=4)
    ended, live = 0, 0
    for _ in queue.run():
        live = max(live, prompts.read * samples - ended)
        ended += 1
    assert ended == 60 * samples
    assert live <= 4 + 1 + samples, "the running rows, one that waits for a slot, and the samples of its prompt"


def test_the_answers_are_those_of_the_engine_alone_whatever_the_blocks() -> None:
    engine = Engine(*PAIR, 2)
    ids = [tuple(decode.prompt_ids(one.prompt, PAIR[1], None, False)) for one in asked(7)]
    alone = {}
    for number, row in enumerate(ids):
        for sample in range(2):
            ((answer),) = engine.run([Request(row, DRAWN, number, sample)])
            alone[2 * number + sample] = answer.text
    for most in (1, 3, 64):
        queue = Queue(PAIR, asked(7), 7, DRAWN, samples=2, max_running=most)
        assert {index: line["answer"] for index, line in queue.run()} == alone


def test_a_line_describes_its_answer() -> None:
    queue = Queue(PAIR, asked(2), 2, DRAWN, samples=2, logprobs=True)
    lines = dict(queue.run())
    assert list(lines[3]) == ["row", "sample", "prompt", "answer", "tokens", "reason", "logprobs", "reference"]
    assert (lines[3]["row"], lines[3]["sample"], lines[3]["reference"]) == (2, 2, "answer 1")
    entries: list[dict[str, Any]] = lines[3]["logprobs"]
    assert len(entries) == lines[3]["tokens"] == 6 and lines[3]["reason"] == "length"
    ids = [*decode.prompt_ids("question 1", PAIR[1], None, False), *(entry["id"] for entry in entries)]
    with torch.no_grad():
        expected = PAIR[0](torch.tensor([ids])).logits[0].log_softmax(-1)
    for place, entry in enumerate(entries, start=len(ids) - 7):
        assert entry["logprob"] == pytest.approx(float(expected[place, entry["id"]]), abs=2e-5)
        assert entry["rule_logprob"] == pytest.approx(entry["logprob"], abs=2e-5)  # temperature 1 filters nothing
        assert [one["id"] for one in entry["top_logprobs"]] == expected[place].topk(2).indices.tolist()
    timing = speed(queue.timing)
    assert timing["prefill_seconds"] > 0 < timing["decode_tokens_per_second"]


def test_a_prompt_that_cannot_be_answered_is_named_by_its_row_before_any_answer() -> None:
    long = AskedPrompt(7, "word " * 600, None)
    with pytest.raises(UserError, match=r"prompt 7 has \d+ tokens; the model's window is 512"):
        Queue(PAIR, [*asked(2), long], 3, DRAWN).check()
    strict = tiny_tokenizer("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML)
    refused = AskedPrompt(3, Chat(({"role": "system", "content": "a"}, {"role": "user", "content": "b"})), None)
    with pytest.raises(DataError, match="row 3: the chat template refuses"):
        Queue((PAIR[0], strict), [refused], 1, DRAWN).check()
