"""Generation gives the tokens of one-by-one generation with plain transformers, whatever the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.adapters import base_and_adapter
from tests.tiny import TINY, save_tiny, tiny_model, tiny_tokenizer
from tunesmith.errors import ModelError, UserError
from tunesmith.models.generate.decode import Settings, choose, generate, generate_ids, pieces, stop_ids, stream
from tunesmith.models.load.load import load, load_model, locate

TOKENIZER = tiny_tokenizer("chatml", pad_is_eos=True)


def prompts(*lengths: int) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.randint(5, 500, (length,), generator=drawn).tolist() for length in lengths]


def alone(model: Any, rows: list[list[int]], settings: Settings) -> list[list[int]]:
    return [generate_ids(model, TOKENIZER, [row], settings, rows=[number])[0] for number, row in enumerate(rows)]


@pytest.mark.parametrize("name", TINY)
def test_a_padded_batch_equals_plain_transformers_one_by_one(name: str) -> None:
    model, rows = tiny_model(name), prompts(3, 30, 1)  # longer than the sliding window of mistral and gemma3
    plain = [
        model.generate(torch.tensor([row]), max_new_tokens=20, do_sample=False, eos_token_id=[2, 4], pad_token_id=0)[
            0, len(row) :
        ].tolist()
        for row in rows
    ]
    settings = Settings(max_new_tokens=20)
    assert generate_ids(model, TOKENIZER, rows, settings) == plain == alone(model, rows, settings)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_sampling_does_not_depend_on_the_batch(name: str) -> None:
    model, rows = tiny_model(name), prompts(3, 20, 1)
    often = frozenset(range(0, 512, 6))  # rows leave the batch at different steps
    settings = Settings(max_new_tokens=12, temperature=1.0, top_p=0.95, top_k=100, seed=3, stop=often)
    batch = generate_ids(model, TOKENIZER, rows, settings)
    assert len({len(answer) for answer in batch}) > 1
    assert batch == alone(model, rows, settings) == generate_ids(model, TOKENIZER, rows, settings)
    assert batch != generate_ids(model, TOKENIZER, rows, Settings(max_new_tokens=12, temperature=1.0, seed=4))


def test_rows_stop_exactly_at_their_stop_token_and_leave_the_batch() -> None:
    model, rows = tiny_model("llama"), prompts(4, 9, 6)
    free = generate_ids(model, TOKENIZER, rows, Settings(max_new_tokens=30, stop=frozenset()))
    stop = free[1][10]
    stopped = generate_ids(model, TOKENIZER, rows, Settings(max_new_tokens=30, stop=frozenset({stop})))
    for answer, whole in zip(stopped, free, strict=True):
        assert answer == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    assert len(stopped[1]) <= 11


def test_stop_tokens_come_from_tokenizer_config_and_template() -> None:
    model = tiny_model("llama")  # eos id 2
    gemma_like = tiny_tokenizer("{% for m in messages %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}")
    assert stop_ids(model, gemma_like) == {2, gemma_like.convert_tokens_to_ids("<|im_end|>")}
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id and TOKENIZER.eos_token_id in stop_ids(model, TOKENIZER)


def test_the_training_mode_is_put_back_and_dropout_is_off() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    settings = Settings(max_new_tokens=5)
    first = generate_ids(model, TOKENIZER, prompts(4), settings)
    assert model.training and first == generate_ids(model, TOKENIZER, prompts(4), settings)


def test_an_attached_adapter_takes_part(tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tmp_path)
    settings, rows = Settings(max_new_tokens=20, stop=frozenset()), prompts(4, 8)
    trained = generate_ids(load(adapter)[0], TOKENIZER, rows, settings)
    assert trained != generate_ids(load(base)[0], TOKENIZER, rows, settings)
    plain = load(adapter)[0].generate(input_ids=torch.tensor([rows[1]]), max_new_tokens=20, do_sample=False, eos_token_id=511)
    assert plain[0, 8:].tolist() == trained[1]


def test_prompt_tuning_is_refused(tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    base = load_model(locate(save_tiny("llama", tmp_path)))
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="virtual tokens"):
        generate_ids(model, TOKENIZER, prompts(3), Settings())


def test_the_window_ends_an_answer_and_refuses_a_prompt_that_fills_it() -> None:
    model = tiny_model("gpt2", n_positions=16)
    long, short = generate_ids(model, TOKENIZER, prompts(14, 3), Settings(max_new_tokens=9, stop=frozenset()))
    assert (len(long), len(short)) == (2, 9)
    with pytest.raises(UserError, match="window is 16"):
        generate_ids(model, TOKENIZER, prompts(16), Settings())
    with pytest.raises(UserError, match="empty"):
        generate_ids(model, TOKENIZER, [[]], Settings())


LOGITS = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 0), (0.49, 0), (0.51, 1), (0.71, 2), (0.95, 3), (0.9999, 3)])
def test_a_token_is_looked_up_in_the_cumulative_distribution(uniform: float, token: int) -> None:
    assert choose(LOGITS, Settings(temperature=1.0), torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (Settings(temperature=1.0, top_k=1), {0}),
        (Settings(temperature=1.0, top_p=0.5), {0}),
        (Settings(temperature=1.0, top_p=0.6), {0, 1}),
        (Settings(temperature=1.0, top_p=0.89), {0, 1, 2}),
        (Settings(temperature=0.01), {0}),
    ],
)
def test_filters_keep_the_likeliest_tokens(settings: Settings, kept: set[int]) -> None:
    uniform = torch.linspace(0, 0.9999, 500, dtype=torch.float64)
    logits = torch.tensor([[0.5, 0.22, 0.18, 0.1]]).log().expand(500, 4)
    assert set(choose(logits, settings, uniform).tolist()) == kept


def test_frequencies_follow_the_model() -> None:
    uniform = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(choose(LOGITS.expand(20_000, 4), Settings(temperature=1.0), uniform), minlength=4) / 20_000
    assert torch.allclose(counts, torch.tensor([0.5, 0.2, 0.2, 0.1]), atol=0.015)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}])
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Settings(**wrong)


@pytest.mark.parametrize("text", ["안녕하세요 👋🏽 ok", "def f():\n    return 'é'", " leading and   many spaces "])
def test_pieces_joined_are_the_text(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    found = list(pieces(TOKENIZER, ids))
    assert "".join(found) == text and not any("\ufffd" in piece for piece in found)


def test_a_character_that_is_never_finished_is_not_lost() -> None:
    ids = TOKENIZER("ok 👋", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(pieces(TOKENIZER, ids)) == TOKENIZER.decode(ids)


def test_generate_answers_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    asked: list[Any] = ["What is the capital of France?", [{"role": "user", "content": "a"}], "def add(a, b):", "x"]
    seen: dict[int, str] = {}
    together = generate(str(tmp_path), asked, batch_size=3, max_new_tokens=12, on_answer=seen.__setitem__)
    pair = load(tmp_path)
    assert together == [generate(pair, [prompt], max_new_tokens=12)[0] for prompt in asked]
    assert seen == dict(enumerate(together))
    assert "".join(stream(pair, asked[0], max_new_tokens=12)) == together[0]
    assert generate(pair, "x", system="Be brief.", max_new_tokens=12) != generate(pair, "x", max_new_tokens=12)


def test_plain_prompts_have_no_template(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model, tokenizer = load(tmp_path)
    ids = tokenizer("def add", add_special_tokens=False)["input_ids"]
    expected = tokenizer.decode(generate_ids(model, tokenizer, [ids], Settings(max_new_tokens=8))[0], skip_special_tokens=True)
    assert generate((model, tokenizer), "def add", plain=True, max_new_tokens=8) == [expected]
    with pytest.raises(UserError, match="plain"):
        generate((model, tokenizer), [[{"role": "user", "content": "x"}]], plain=True)
