"""The engine's answers are those of transformers, one by one, whatever else runs, and whatever the rows share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.adapters import base_and_adapter
from tests.tiny import TINY, save_tiny, tiny_model, tiny_tokenizer
from tunesmith.errors import ModelError, UserError
from tunesmith.models.generate import sampling, slots
from tunesmith.models.generate.decode import generate, generate_ids, stream
from tunesmith.models.generate.engine import Engine
from tunesmith.models.generate.forward_passes import CHECKED_TOKENS, PlainPass, SlotPass
from tunesmith.models.generate.running_rows import Answer, Request
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.models.generate.stop_tokens import stop_ids
from tunesmith.models.load.load import load, load_model, locate

TOKENIZER = tiny_tokenizer("chatml", pad_is_eos=True)
NEVER = frozenset[int]()


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 500, (length,), generator=drawn).tolist() for length in lengths]


def requests(rows: list[list[int]], params: SamplingParams) -> list[Request]:
    return [Request(tuple(row), params, number) for number, row in enumerate(rows)]


def answers(engine: Engine, wanted: list[Request], **keys: Any) -> dict[tuple[int, int], Answer]:
    return {(answer.prompt, answer.sample): answer for answer in engine.run(wanted, **keys)}


def ids(engine: Engine, wanted: list[Request]) -> list[list[int]]:
    found = answers(engine, wanted)
    return [found[request.prompt, request.sample].ids for request in wanted]


def by_transformers(model: Any, rows: list[list[int]], count: int, stop: list[int]) -> list[list[int]]:
    answered = []
    for row in rows:
        out = model.generate(torch.tensor([row]), max_new_tokens=count, do_sample=False, eos_token_id=stop, pad_token_id=0)
        answered.append(out[0, len(row) :].tolist())
    return answered


@pytest.mark.parametrize("name", TINY)
def test_greedy_answers_are_those_of_transformers_whatever_runs_at_once(name: str) -> None:
    model, rows = tiny_model(name), prompts(3, 30, 1, 17)  # longer than the sliding window of mistral and gemma3
    plain = by_transformers(model, rows, 20, [2, 4])
    for most in (1, 3, 64):
        engine = Engine(model, TOKENIZER, max_running=most)
        assert ids(engine, requests(rows, SamplingParams(max_new_tokens=20))) == plain
        assert isinstance(engine.slots._pass, SlotPass)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_log_probabilities_are_those_of_a_full_forward_pass(name: str) -> None:
    model, rows = tiny_model(name), prompts(3, 20)
    params = SamplingParams(max_new_tokens=12, temperature=0.8, seed=3, stop=NEVER, top_logprobs=3)
    for answer in Engine(model, TOKENIZER).run(requests(rows, params)):
        row = rows[answer.prompt]
        with torch.no_grad():
            logits = model(torch.tensor([row + answer.ids])).logits[0, len(row) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(answer.logprobs), expected, atol=1e-5)
        likeliest = logits.topk(3)
        assert [[token for token, _ in step] for step in answer.top] == likeliest.indices.tolist()
        scaled = (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(answer.rule_logprobs), scaled, atol=1e-5)


@pytest.fixture(scope="module")
def two_loras() -> Any:
    """A model with two LoRAs, an engine that answers one request at a time, and one for each number of slots."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    made = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_alpha=32, init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), made, "one")
    model.add_adapter("two", made)
    model.eval()
    return [Engine(model, TOKENIZER, most) for most in (1, 1, 2, 3, 4)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_that_join_and_leave_change_nothing(two_loras: list[Engine], data: st.DataObject) -> None:
    """Prompts of any length, with limits and adapters of their own, in any order, in any number of slots."""
    single, *engines = two_loras
    count = data.draw(st.integers(1, 7))
    rows = prompts(*data.draw(st.lists(st.integers(1, 40), min_size=count, max_size=count)), seed=count)
    wanted = []
    for number, row in enumerate(rows):
        limit, warm = data.draw(st.integers(0, 9)), data.draw(st.sampled_from([0.0, 1.0]))
        params = SamplingParams(max_new_tokens=limit, temperature=warm, seed=3, stop=frozenset(range(0, 512, 9)))
        wanted.append(Request(tuple(row), params, number, adapter=data.draw(st.sampled_from(["one", "two", None]))))
    alone = []
    for request in wanted:
        single.release()
        alone += ids(single, [request])
    engine, order = data.draw(st.sampled_from(engines)), data.draw(st.permutations(wanted))
    found = answers(engine, order)
    assert [found[request.prompt, 0].ids for request in wanted] == alone


def test_a_limit_of_0_and_the_window_end_an_answer_and_are_its_reason() -> None:
    model = tiny_model("gpt2", n_positions=16)
    none, short, long = prompts(3, 3, 14)
    rows = [
        Request(tuple(none), SamplingParams(max_new_tokens=0), 0),
        Request(tuple(short), SamplingParams(max_new_tokens=9, stop=NEVER), 1),
        Request(tuple(long), SamplingParams(max_new_tokens=9, stop=NEVER), 2),
    ]
    found = answers(Engine(model, TOKENIZER), rows)
    assert [(len(found[n, 0].ids), found[n, 0].reason) for n in range(3)] == [(0, "length"), (9, "length"), (2, "window")]
    with pytest.raises(UserError, match="window is 16"):
        generate_ids(model, TOKENIZER, prompts(16), SamplingParams())
    with pytest.raises(UserError, match="empty"):
        generate_ids(model, TOKENIZER, [[]], SamplingParams())


def test_rows_stop_exactly_at_their_stop_token() -> None:
    model, rows = tiny_model("llama"), prompts(4, 9, 6)
    free = generate_ids(model, TOKENIZER, rows, SamplingParams(max_new_tokens=30, stop=NEVER))
    stop = free[1][10]
    for answer in Engine(model, TOKENIZER).run(requests(rows, SamplingParams(max_new_tokens=30, stop=frozenset({stop})))):
        whole = free[answer.prompt]
        assert answer.ids == (whole[: whole.index(stop) + 1] if stop in whole else whole)
        assert answer.reason == ("stop" if stop in whole else "length")


def test_a_stop_string_ends_the_answer_before_itself() -> None:
    model, (row,) = tiny_model("llama"), prompts(8)
    (free,) = Engine(model, TOKENIZER).run(requests([row], SamplingParams(max_new_tokens=30, stop=NEVER)))
    end = free.text[9:12]
    (cut,) = Engine(model, TOKENIZER).run(
        requests([row], SamplingParams(max_new_tokens=30, stop=NEVER, stop_strings=(end, "never")))
    )
    assert cut.reason == "stop_string" and cut.text == free.text[: free.text.index(end)]
    assert len(cut.ids) < len(free.ids)


def test_samples_of_one_prompt_share_its_prefill_and_equal_separate_ones() -> None:
    model, rows = tiny_model("llama"), prompts(40, 33)
    params = SamplingParams(max_new_tokens=10, temperature=1.0, seed=5, stop=NEVER)
    wanted = [Request(tuple(row), params, number, sample) for number, row in enumerate(rows) for sample in range(4)]
    engine = Engine(model, TOKENIZER)
    together = ids(engine, wanted)
    assert engine.timing.shared_tokens == 3 * (39 + 32)
    assert together == [ids(Engine(model, TOKENIZER), [request])[0] for request in wanted]
    assert len({tuple(answer) for answer in together[:4]}) == 4


def test_a_chat_computes_only_what_is_new() -> None:
    """The second turn's prompt begins with the first turn and its answer, which the slot still holds."""
    model, (first, more) = tiny_model("llama"), prompts(30, 8)
    params = SamplingParams(max_new_tokens=6, stop=NEVER)
    engine = Engine(model, TOKENIZER)
    (answered,) = ids(engine, [Request(tuple(first), params)])
    second = [*first, *answered, *more]
    before = engine.timing.prefill_tokens
    assert ids(engine, [Request(tuple(second), params)]) == by_transformers(model, [second], 6, [511])
    assert engine.timing.prefill_tokens - before == len(more) + 1  # the last token of the answer was not run


def test_changed_weights_are_seen() -> None:
    model, rows = tiny_model("llama"), prompts(30)
    engine, wanted = Engine(model, TOKENIZER), requests(rows, SamplingParams(max_new_tokens=6, stop=NEVER))
    (before,) = engine.run(wanted)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    (after,) = engine.run(wanted)
    (fresh,) = Engine(model, TOKENIZER).run(wanted)
    assert after.ids == fresh.ids != before.ids
    assert after.fingerprint == fresh.fingerprint != before.fingerprint


def test_one_engine_serves_all_iterations_of_a_training_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass is checked once, no memory is kept between two calls, and a step of training is seen."""
    checks: list[int] = []
    choose = slots.choose_pass
    monkeypatch.setattr(slots, "choose_pass", lambda *args: checks.append(1) or choose(*args))
    model, rows = tiny_model("llama"), prompts(30, 9)
    engine = Engine(model, TOKENIZER)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    wanted = [
        Request(tuple(row), SamplingParams(max_new_tokens=6, temperature=1.0, seed=2, stop=NEVER), n, k)
        for n, row in enumerate(rows)
        for k in (0, 1)
    ]
    seen: list[str] = []
    for _ in range(3):
        found = engine.answers(wanted)
        engine.release()
        run = engine.slots._pass
        assert isinstance(run, SlotPass) and not any(part.numel() for part in (*run.cache.keys, *run.cache.values))
        assert [answer.ids for answer in found] == ids(Engine(model, TOKENIZER), wanted)
        seen.append(found[0].fingerprint)
        model(torch.tensor([rows[0]]), labels=torch.tensor([rows[0]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(set(seen)) == 3 and len(checks) == 1 + 3  # three of the fresh engines


def test_the_check_of_a_new_engine_runs_the_model_once_and_copies_no_weights() -> None:
    model = tiny_model("llama").to(torch.bfloat16).float()
    alone: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: alone.append(kwargs["input_ids"].shape[1]) if "slots" not in kwargs else None,
        with_kwargs=True,
    )
    engine = Engine(model, TOKENIZER)
    ids(engine, requests(prompts(60), SamplingParams(max_new_tokens=1, stop=NEVER)))
    run = engine.slots._pass
    assert isinstance(run, SlotPass) and run.packed_step is None and alone == [CHECKED_TOKENS]


def test_a_layer_that_is_replaced_is_seen() -> None:
    """The tensors of the C step are those of the layers that it was made for."""
    from peft import LoraConfig, get_peft_model

    model, (row,) = tiny_model("llama"), prompts(30)
    engine, wanted = Engine(model, TOKENIZER), [Request(tuple(row), SamplingParams(max_new_tokens=6, stop=NEVER))]
    before = ids(engine, wanted)
    get_peft_model(model, LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    (again,), (fresh,) = engine.run(wanted), Engine(model, TOKENIZER).run(wanted)
    assert again.ids == fresh.ids != before[0]
    assert again.logprobs == pytest.approx(fresh.logprobs, abs=1e-5)


def test_a_switched_adapter_is_seen(tmp_path: Path) -> None:
    _, adapter = base_and_adapter(tmp_path)
    model, (row,) = load(adapter)[0], prompts(30)
    engine, wanted = Engine(model, TOKENIZER), [Request(tuple(row), SamplingParams(max_new_tokens=6, stop=NEVER))]
    (adapted,) = engine.run(wanted)
    model.base_model.disable_adapter_layers()
    (plain,) = engine.run(wanted)
    (fresh,) = Engine(model, TOKENIZER).run(wanted)
    assert plain.ids == fresh.ids != adapted.ids and plain.fingerprint != adapted.fingerprint


def test_out_of_memory_lowers_the_rows_at_once_and_loses_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("llama"), prompts(3, 9, 4, 12, 7)
    wanted = requests(rows, SamplingParams(max_new_tokens=12, temperature=1.0, seed=1, stop=NEVER))
    expected = ids(Engine(model, TOKENIZER), wanted)
    notes: list[str] = []
    engine, run, calls = Engine(model, TOKENIZER, note=notes.append), SlotPass.__call__, 0

    def full(self: SlotPass, pieces: Any) -> torch.Tensor:
        nonlocal calls
        calls += len(pieces) > 2
        if calls > 5 and len(pieces) > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")
        return run(self, pieces)

    monkeypatch.setattr(SlotPass, "__call__", full)
    assert ids(engine, wanted) == expected
    assert notes == ["out of memory with 5 rows at once; going on with 2"] and engine.slots.most == 2


def out_of_memory(*args: Any, **keys: Any) -> Any:
    raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")


@pytest.mark.parametrize("place", ["forward", "draw"])
def test_rows_that_have_ended_when_memory_runs_out_are_answered_too(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step has a row that may have no token, and rows of two sampling rules."""
    model, rows = tiny_model("llama"), prompts(3, 9, 4, 12)
    rules = [
        SamplingParams(max_new_tokens=count, temperature=heat, seed=1, stop=NEVER)
        for count, heat in ((0, 1.0), (4, 1.0), (4, 0.0), (4, 0.0))
    ]
    wanted = [Request(tuple(row), rule, number) for number, (row, rule) in enumerate(zip(rows, rules))]
    expected = ids(Engine(model, TOKENIZER), wanted)
    engine, target = (Engine(model, TOKENIZER), SlotPass) if place == "forward" else (Engine(model, TOKENIZER), Engine)
    name = "__call__" if place == "forward" else "_draw"
    run = getattr(target, name)

    def full(self: Any, pieces: Any, *args: Any) -> Any:
        greedy = place == "draw" and args[1].temperature == 0 and len(pieces) > 1
        return out_of_memory() if greedy or (place == "forward" and len(pieces) > 2) else run(self, pieces, *args)

    monkeypatch.setattr(target, name, full)
    assert ids(engine, wanted) == expected and engine.slots.most < 4


def test_memory_that_runs_out_for_more_slots_makes_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, notes = tiny_model("llama"), prompts(3, 9, 4, 12), list[str]()
    engine, params, resize = (
        Engine(model, TOKENIZER, note=notes.append),
        SamplingParams(max_new_tokens=6, stop=NEVER),
        SlotPass.resize,
    )
    first = ids(engine, requests(rows[:1], params))
    monkeypatch.setattr(SlotPass, "resize", lambda self, slots, size: out_of_memory() if slots > 2 else resize(self, slots, size))
    assert ids(engine, requests(rows, params)) == by_transformers(model, rows, 6, [511]) and first
    assert notes == ["out of memory with 4 rows at once; going on with 2"] and engine.slots.count == 2


def test_an_exception_in_a_callback_ends_that_row_alone() -> None:
    model, rows = tiny_model("llama"), prompts(5, 6)
    wanted = requests(rows, SamplingParams(max_new_tokens=8, stop=NEVER))

    def read(request: Request, token: int, text: str) -> None:
        if request.prompt == 0:
            raise ValueError("the reader failed")

    found = answers(Engine(model, TOKENIZER), wanted, on_token=read)
    assert (found[0, 0].reason, len(found[0, 0].ids), str(found[0, 0].error)) == ("callback", 1, "the reader failed")
    assert (found[1, 0].reason, len(found[1, 0].ids)) == ("length", 8)


def test_the_pieces_that_a_callback_gets_are_the_text() -> None:
    model, rows = tiny_model("llama"), prompts(5, 6)
    pieces: dict[int, str] = {0: "", 1: ""}

    def read(request: Request, token: int, text: str) -> None:
        pieces[request.prompt] += text

    for answer in Engine(model, TOKENIZER).run(requests(rows, SamplingParams(max_new_tokens=15, stop=NEVER)), on_token=read):
        assert pieces[answer.prompt] == answer.text == TOKENIZER.decode(answer.ids, skip_special_tokens=True)


def test_a_queue_is_read_only_as_far_as_slots_are_free() -> None:
    """10,000 prompts need the memory of the rows that run."""
    taken = 0

    def queue() -> Iterator[Request]:
        nonlocal taken
        for number, row in enumerate(prompts(*[3] * 50)):
            taken += 1
            yield Request(tuple(row), SamplingParams(max_new_tokens=2, stop=NEVER), number)

    engine = Engine(tiny_model("llama"), TOKENIZER, max_running=4)
    for done, _ in enumerate(engine.run(queue()), 1):
        assert taken <= done + 4 + 1
    assert taken == 50 and engine.slots.count == 4


def test_prompts_wait_until_one_pass_serves_several() -> None:
    """An eighth of 16 slots is 2. One row ends in each step, and the last prompt of a queue may be alone."""
    engine, rows, sizes = Engine(tiny_model("llama"), TOKENIZER, max_running=16), prompts(*[5] * 31), []
    forward = engine.slots.forward

    def counted(running: Any) -> torch.Tensor:
        if not running[0].ids:
            sizes.append(len(running))
        return forward(running)

    engine.slots.forward = counted  # type: ignore[method-assign]
    limits = [1 + number % 16 for number in range(31)]
    wanted = [Request(tuple(row), SamplingParams(max_new_tokens=limit, stop=NEVER), number)
              for number, (row, limit) in enumerate(zip(rows, limits, strict=True))]  # fmt: skip
    assert len(engine.answers(wanted)) == 31
    assert sizes[0] == 16 and sum(sizes) == 31 and min(sizes[1:-1]) == 2


def test_rows_that_differ_in_length_and_seed_alone_are_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over the logits of each step, and the tokens of each row alone."""
    engine, draw, drawn = Engine(tiny_model("llama"), TOKENIZER), sampling.draw, []

    def counted(logits: torch.Tensor, *given: Any, **named: Any) -> sampling.Drawn:
        drawn.append(len(logits))
        return draw(logits, *given, **named)

    params = [SamplingParams(max_new_tokens=9 + seed, temperature=1.0, seed=seed, stop=NEVER) for seed in range(3)]
    wanted = [Request(tuple(row), rule, number) for number, (row, rule) in enumerate(zip(prompts(3, 9, 4), params, strict=True))]
    alone = [ids(engine, [request])[0] for request in wanted]
    monkeypatch.setattr(sampling, "draw", counted)
    assert ids(engine, wanted) == alone and drawn == [3] * 9 + [2, 1]


def test_no_more_slots_are_made_than_there_are_rows() -> None:
    model, rows = tiny_model("llama"), prompts(3, 9, 4)
    engine, params = Engine(model, TOKENIZER), SamplingParams(max_new_tokens=4)
    assert ids(engine, requests(rows[:1], params)) == by_transformers(model, rows[:1], 4, [2, 4])
    assert engine.slots.count == 1
    assert ids(engine, requests(rows, params)) == by_transformers(model, rows, 4, [2, 4])
    assert engine.slots.count == 3 and engine.slots.capacity == slots.BLOCK


def test_memory_bounds_the_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    one_row = slots.BLOCK * 2 * 2 * 2 * 8 * 4  # tokens, keys and values, layers, key heads, width, bytes
    monkeypatch.setattr(slots.machine, "free_bytes", lambda device: int(3 * one_row / slots.MEMORY_SHARE))
    engine = Engine(model, TOKENIZER)
    rows = prompts(3, 9, 4, 12, 7)
    assert ids(engine, requests(rows, SamplingParams(max_new_tokens=6))) == by_transformers(model, rows, 6, [2, 4])
    assert engine.slots.count == 3


def tiny_bloom() -> Any:
    """A model whose attention needs a position bias, so that it runs row by row."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("bloom", vocab_size=512, hidden_size=32, n_layer=2, n_head=4)
    return AutoModelForCausalLM.from_config(config).eval()


def test_slots_that_hold_nothing_are_freed_before_longer_ones_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, params = Engine(tiny_model("llama"), TOKENIZER, 2), SamplingParams(max_new_tokens=2, stop=NEVER)
    resize, found = SlotPass.resize, list[tuple[int, int]]()

    def recorded(run: SlotPass, slots: int, capacity: int) -> None:
        found.append((sum(keys.numel() for keys in run.cache.keys), slots))
        resize(run, slots, capacity)

    ids(engine, requests(prompts(20, 20), params))
    engine.slots.forget()
    monkeypatch.setattr(SlotPass, "resize", recorded)
    ids(engine, requests(prompts(200, 200), params))
    assert found[-1] == (0, 2)
    ids(engine, requests(prompts(400, 400, seed=2), params))
    assert found[-1][0] > 0, "tokens that are held may be the prefix of a prompt"


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_row_longer_than_the_slots_joins_the_running_rows(name: str) -> None:
    """The long prompt comes third, needs more than the slots have, and is answered first."""
    model, rows = tiny_bloom() if name == "bloom" else tiny_model(name), prompts(5, 4, 150, 6)
    counts = [40, 40, 3, 60]
    wanted = [
        Request(tuple(row), SamplingParams(max_new_tokens=count, stop=NEVER), number)
        for number, (row, count) in enumerate(zip(rows, counts))
    ]
    alone = [ids(Engine(model, TOKENIZER), [request])[0] for request in wanted]
    engine = Engine(model, TOKENIZER, max_running=3)
    found = list(engine.run(iter(wanted)))
    assert [answer.prompt for answer in found] == [2, 0, 1, 3]
    assert [answer.ids for answer in sorted(found, key=lambda answer: answer.prompt)] == alone
    assert engine.slots.capacity == 2 * slots.BLOCK and engine.slots.count == 3


@pytest.mark.parametrize(("affordable", "order"), [(3, [2, 1, 0, 3]), (1, [1, 0, 2, 3])])
def test_a_long_row_takes_the_memory_of_free_slots_and_waits_where_there_is_too_little(
    affordable: int, order: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With memory for three slots of twice the length, one of four is given up; with less, running rows end first."""
    model, rows = tiny_model("llama"), prompts(5, 4, 150, 6)
    wanted = [
        Request(tuple(row), SamplingParams(max_new_tokens=count, stop=NEVER), number)
        for number, (row, count) in enumerate(zip(rows, [40, 30, 3, 40]))
    ]
    alone = [ids(Engine(model, TOKENIZER), [request])[0] for request in wanted]
    engine = Engine(model, TOKENIZER, max_running=4)
    engine.slots._affordable = lambda capacity: 4 if capacity == slots.BLOCK else affordable  # type: ignore[method-assign]
    found = list(engine.run(iter(wanted)))
    assert [answer.prompt for answer in found] == order
    assert [answer.ids for answer in sorted(found, key=lambda answer: answer.prompt)] == alone


def test_a_model_that_slots_cannot_serve_runs_row_by_row_and_this_is_reported() -> None:
    model, rows, notes = tiny_bloom(), prompts(3, 9), list[str]()
    engine = Engine(model, TOKENIZER, note=notes.append)
    assert ids(engine, requests(rows, SamplingParams(max_new_tokens=8, stop=NEVER))) == by_transformers(model, rows, 8, [511])
    assert isinstance(engine.slots._pass, PlainPass) and len(notes) == 1 and notes[0].startswith("generating row by row: ")


@pytest.mark.parametrize("kind", ["mamba", "openai-gpt"])
def test_a_cache_that_does_not_continue_the_model_s_own_forward_is_not_used(kind: str) -> None:
    """mamba takes its cache under another name, openai-gpt none at all: both ignore what is passed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "openai-gpt" else {"hidden_size": 32, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=512, **sizes)).eval()
    (row,), notes = prompts(9), []
    engine = Engine(model, TOKENIZER, note=notes.append)
    (answered,) = ids(engine, requests([row], SamplingParams(max_new_tokens=6, stop=NEVER)))
    whole = list(row)
    for _ in range(6):
        with torch.no_grad():
            whole.append(int(model(torch.tensor([whole]), use_cache=False).logits[0, -1].argmax()))
    assert answered == whole[len(row) :] and "without a cache" in notes[0]


def test_attention_that_differs_is_found_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.models.generate import slot_cache

    attend = slot_cache.attend
    monkeypatch.setattr(slot_cache, "attend", lambda *args: attend(*args) * 1.01)
    monkeypatch.setattr(slot_cache.kernels, "available", lambda tensor: False)
    notes: list[str] = []
    engine = Engine(tiny_model("llama"), TOKENIZER, note=notes.append)
    ids(engine, requests(prompts(9), SamplingParams(max_new_tokens=2)))
    assert isinstance(engine.slots._pass, PlainPass) and "differ by" in notes[0]


def test_stop_tokens_come_from_tokenizer_config_and_template() -> None:
    model = tiny_model("llama")  # eos id 2
    gemma_like = tiny_tokenizer("{% for m in messages %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}")
    assert stop_ids(model, gemma_like) == {2, gemma_like.convert_tokens_to_ids("<|im_end|>")}
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id and TOKENIZER.eos_token_id in stop_ids(model, TOKENIZER)


def test_mode_and_attention_of_the_model_are_restored_and_dropout_is_off() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    attention = model.config._attn_implementation
    first = generate_ids(model, TOKENIZER, prompts(4), SamplingParams(max_new_tokens=5))
    assert model.training and model.config._attn_implementation == attention
    assert first == generate_ids(model, TOKENIZER, prompts(4), SamplingParams(max_new_tokens=5))


def test_an_attached_adapter_takes_part(tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tmp_path)
    params, rows = SamplingParams(max_new_tokens=20, stop=NEVER), prompts(4, 8)
    trained = generate_ids(load(adapter)[0], TOKENIZER, rows, params)
    assert trained != generate_ids(load(base)[0], TOKENIZER, rows, params)
    assert by_transformers(load(adapter)[0].get_base_model(), rows, 20, [511]) == trained


def test_prompt_tuning_by_peft_is_refused(tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    base = load_model(locate(save_tiny("llama", tmp_path)))
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="virtual tokens"):
        generate_ids(model, TOKENIZER, prompts(3), SamplingParams())


def test_generate_and_stream_answer_alike(tmp_path: Path) -> None:
    pair = load(save_tiny("llama", tmp_path))
    said: list[int] = []
    texts = generate(pair, ["what is", "안녕하세요 the answer"], max_new_tokens=9, on_answer=lambda row, text: said.append(row))
    assert sorted(said) == [0, 1]
    assert texts == ["".join(stream(pair, prompt, max_new_tokens=9)) for prompt in ("what is", "안녕하세요 the answer")]


def test_a_prompt_that_is_too_long_costs_no_answer(tmp_path: Path) -> None:
    answered: list[int] = []
    with pytest.raises(UserError, match="prompt 1 has"):
        generate(
            load(save_tiny("llama", tmp_path)), ["short", "long " * 600], plain=True, max_new_tokens=2,
            on_answer=lambda row, text: answered.append(row),
        )  # fmt: skip
    assert answered == []
