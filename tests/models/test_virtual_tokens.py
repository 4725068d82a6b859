"""Virtual tokens: each packed segment, padded row and generated answer equals what peft computes for that row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models import standin
from tests.models.virtual_tokens import COUNT, KINDS, TOKENIZER, adapted, by_peft, ids_of, rows
from tests.tiny import TINY, tiny_model
from tunesmith.data.batch.pack import PACKED, PADDED
from tunesmith.data.batch.shared_prompts import with_targets
from tunesmith.errors import ModelError, UserError
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.fast import attention, kernels, varlen
from tunesmith.models.generate.decode import generate_ids, stream
from tunesmith.models.generate.engine import Engine
from tunesmith.models.generate.running_rows import Request
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.models.heads import lm_head, noise
from tunesmith.objectives import sft
from tunesmith.train import fast_path
from tunesmith.train.parity_check import ParityCheck

SFT = sft.Objective(sft.Config())
CPU = torch.device("cpu")
ROWS = rows(7, 23, 1, 9)  # one is longer than the window of mistral and gemma3
PROMPTS = [[5, 6, 7, 8], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49], [9]]
WINDOWED = ("mistral", "gemma3")


def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**lm_head.inputs(model, batch)).logits
    return found


def close(ours: torch.Tensor, theirs: torch.Tensor, limit: float) -> bool:
    return float((ours - theirs).abs().max()) <= limit * float(theirs.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TINY)
def test_rows_alone_padded_and_packed_equal_pefts_own_forward(name: str, kind: str) -> None:
    model = adapted(name, kind)
    plain = by_peft(name, model)
    with torch.no_grad():
        theirs = [plain(input_ids=ids_of(row)).logits[0, -len(row["input_ids"]) :] for row in ROWS]
        alone = [model(input_ids=ids_of(row)).logits[0] for row in ROWS]
    padded = [out[: len(one)] for out, one in zip(logits(model, with_targets(ROWS, PADDED)), theirs, strict=True)]
    found = [alone, padded]
    attention.register()
    model.get_base_model().set_attn_implementation(attention.NAME)
    if name in WINDOWED:
        with pytest.raises(attention.CannotPack, match=rf"slides over 16 tokens and a row has {23 + COUNT}"):
            logits(model, with_targets(ROWS, PACKED))
    else:
        found.append(list(logits(model, with_targets(ROWS, PACKED))[0].split([len(one) for one in theirs])))
    for ours in found:
        assert all(close(one, other, 1e-5) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_to_one_segment_changes_nothing_in_another(kind: str) -> None:
    model = adapted("llama", kind)
    fast_path.choose(model, SFT, ROWS[:2], 23, "auto", CPU)
    other = [ROWS[0], {**ROWS[1], "input_ids": ROWS[1]["input_ids"] + 7}, *ROWS[2:]]
    before, after = (logits(model, with_targets(examples, PACKED))[0].split([7, 23, 1, 9]) for examples in (ROWS, other))
    assert [one.equal(two) for one, two in zip(before, after, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_on_either_side(name: str, kind: str, side: str) -> None:
    model, lengths = adapted(name, kind), [3, 8]
    ids, mask, positions = (torch.zeros(2, 8, dtype=torch.long) for _ in range(3))
    alone = []
    for row, length in enumerate(lengths):
        where = slice(8 - length, 8) if side == "left" else slice(0, length)
        ids[row, where], mask[row, where], positions[row, where] = torch.arange(20, 20 + length), 1, torch.arange(length)
        with torch.no_grad():
            alone.append((where, model(input_ids=ids[row : row + 1, where]).logits[0]))
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert all(close(together[row, where], one, 1e-5) for row, (where, one) in enumerate(alone))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TINY)
def test_a_route_is_found_and_layers_computed_again_give_the_same_gradients(name: str, kind: str, precision: torch.dtype) -> None:
    model = adapted(name, kind).to(precision)
    chosen = fast_path.choose(model, SFT, ROWS[:2], 23, "auto", CPU)
    assert chosen.packed is (name not in WINDOWED)
    assert [note for note in chosen.notes if "padded" not in note] == []
    if kernels.available(model.prompt_encoder["default"].embedding.weight):
        assert chosen.fused.kinds.get("attention", 0) == (2 if name in ("llama", "gemma") else 0)
    model.train()
    loss, gradients = ParityCheck(model, SFT, ROWS, CPU).measure(chosen.layout)
    fast_path.recompute(chosen)
    model.train()
    again, recomputed = ParityCheck(model, SFT, ROWS, CPU).measure(chosen.layout)
    assert chosen.recomputed and loss == again
    assert all(one.equal(two) and one.abs().max() > 0 for one, two in zip(gradients, recomputed, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_of_a_gpu_gets_longer_segments(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(varlen, "torch_kernel", lambda: varlen.with_gqa(standin.varlen_attn))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "available", lambda tensor: False)
    for name in ("llama", "mistral"):
        model = adapted(name, kind)
        expected = ParityCheck(model, SFT, ROWS, CPU).measure(PADDED)
        chosen = fast_path.choose(model, SFT, ROWS[:2], 23, "auto", CPU)
        assert (chosen.packed_attention, chosen.packed, chosen.notes) == ("varlen", True, [])
        got = ParityCheck(model, SFT, ROWS, CPU).measure(PACKED)
        assert abs(expected[0] - got[0]) < 1e-5 and close(got[1][0], expected[1][0], 1e-5)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gpt2", "gemma3"])
def test_a_prefix_of_words_is_these_words_before_the_text(name: str, projected: bool) -> None:
    words, text = [11, 12, 13, 14, 15], torch.arange(30, 42)
    model = adapted(name, "prefix", noise=0, prefix_projection=projected)
    start = virtual_tokens.words_as_prefix(tiny_model(name), words)
    virtual_tokens.start_from(model.prompt_encoder["default"], start)
    with torch.no_grad():
        expected = tiny_model(name)(input_ids=torch.tensor([[*words, *text.tolist()]])).logits[0, len(words) :]
        assert close(model(input_ids=text[None]).logits[0], expected, 2e-6)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_a_prompt_of_words_is_these_words_before_the_text(name: str) -> None:
    text = torch.arange(30, 42)
    model = adapted(
        name, "prompt", noise=0, num_virtual_tokens=None, prompt_tuning_init="TEXT", prompt_tuning_init_text="the answer is "
    )
    words = TOKENIZER("the answer is ", add_special_tokens=False)["input_ids"]
    assert virtual_tokens.count(model) == len(words)
    with torch.no_grad():
        expected = tiny_model(name)(input_ids=torch.tensor([[*words, *text.tolist()]])).logits[0, len(words) :]
        assert close(model(input_ids=text[None]).logits[0], expected, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TINY)
def test_generation_in_a_batch_equals_one_by_one_and_pefts_own(name: str, kind: str) -> None:
    model = adapted(name, kind)
    greedy, drawn = (SamplingParams(max_new_tokens=9, stop=frozenset(), temperature=one) for one in (0.0, 1.0))
    batch = generate_ids(model, TOKENIZER, PROMPTS, greedy)
    for runs in (by_peft(name, model), model):
        plain = [
            runs.generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=9,
                min_new_tokens=9, do_sample=False,
            )[0, len(ids) :].tolist()
            for ids in PROMPTS
        ]  # fmt: skip
        assert batch == plain
    sampled = generate_ids(model, TOKENIZER, PROMPTS, drawn)
    alone = (next(Engine(model, TOKENIZER).run([Request(tuple(ids), drawn, row)])) for row, ids in enumerate(PROMPTS))
    assert sampled == [answer.ids for answer in alone]
    assert batch != generate_ids(tiny_model(name), TOKENIZER, PROMPTS, greedy), "the virtual tokens say nothing"


@pytest.mark.parametrize("name", WINDOWED)
def test_padding_between_a_prefix_and_its_text_is_refused_where_a_window_slides(name: str) -> None:
    """In a padded batch of transformers' own generate, the short row would lose its prefix."""
    model, (short, long) = adapted(name, "prefix", noise=2.0), (PROMPTS[2], PROMPTS[1])
    pad, settings = len(long) - len(short), {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch = {
        "input_ids": torch.tensor([[0] * pad + short, long]),
        "attention_mask": torch.tensor([[0] * pad + [1] * len(short), [1] * len(long)]),
    }
    with pytest.raises(ModelError, match="one row at a time"):
        model.generate(**batch, max_new_tokens=6, **settings)  # the window of 16 ends on the way
    near = model.generate(**batch, max_new_tokens=1, **settings)
    both = model.generate(input_ids=torch.tensor([long, long]), max_new_tokens=6, **settings)
    alone = model.generate(input_ids=torch.tensor([long]), max_new_tokens=6, **settings)
    assert near[1, -1] == alone[0, len(long)] and both[0].equal(alone[0]) and both[1].equal(alone[0])


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_gives_the_same_text(kind: str) -> None:
    model = adapted("llama", kind)
    ids = TOKENIZER("the quick", add_special_tokens=False)["input_ids"]
    (whole,) = generate_ids(model, TOKENIZER, [ids], SamplingParams(max_new_tokens=12, stop=frozenset()))
    said = "".join(stream((model, TOKENIZER), "the quick", plain=True, max_new_tokens=12, stop=frozenset()))
    assert said == TOKENIZER.decode(whole, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens_take_room_in_the_window(kind: str) -> None:
    model = adapted("gpt2", kind, changes={"n_positions": 32})
    settings = SamplingParams(max_new_tokens=40, stop=frozenset())
    (answer,) = generate_ids(model, TOKENIZER, [[7] * 20], settings)
    assert len(answer) == 32 - COUNT - 20
    with pytest.raises(UserError, match=rf"window is {32 - COUNT} \({COUNT} more are taken by virtual tokens\)"):
        generate_ids(model, TOKENIZER, [[7] * (32 - COUNT)], settings)


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_they_leave_the_base(kind: str) -> None:
    model, ids = adapted("llama", kind), torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        own, expected = model(input_ids=ids).logits, tiny_model("llama")(input_ids=ids).logits
        with model.disable_adapter():
            assert model(input_ids=ids).logits.equal(expected) and virtual_tokens.count(model) == 0
        assert model(input_ids=ids).logits.equal(own) and not own.equal(expected)


@pytest.mark.parametrize("packed", [True, False])
def test_dropout_of_a_row_covers_its_virtual_tokens_and_depends_on_nothing_else(packed: bool) -> None:
    model = adapted("gpt2", "prompt", changes={"resid_pdrop": 0.3, "embd_pdrop": 0.1})
    drawn, _ = noise.install(model, 0)
    assert drawn is not None
    attention.register()
    model.train()

    def loss(places: list[int], packed: bool) -> float:
        model.get_base_model().set_attn_implementation(attention.NAME if packed else "sdpa")
        drawn.packed, drawn.rows, drawn.lengths = packed, places, [len(ROWS[place]["input_ids"]) for place in places]
        return SFT.loss(model, SFT.collate([ROWS[place] for place in places], PACKED if packed else PADDED))[0].item()

    together = loss([0, 1, 3], packed)
    assert together == pytest.approx(sum(loss([place], False) for place in (0, 1, 3)), rel=1e-5)
    drawn.step += 1
    assert loss([0, 1, 3], packed) != pytest.approx(together, rel=1e-3)


def test_what_is_not_ours_is_refused_by_name() -> None:
    from peft import PromptEncoderConfig, get_peft_model

    other = get_peft_model(tiny_model("llama"), PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ModelError, match="p_tuning is not available"):
        virtual_tokens.install(other)
    with pytest.raises(ModelError, match=r"virtual tokens. Load it with tunesmith"):
        generate_ids(by_peft("llama", adapted("llama", "prompt")), TOKENIZER, PROMPTS, SamplingParams())
    model = adapted("llama", "prefix")
    with pytest.raises(ModelError, match="attention mask of"):
        model(input_ids=torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 1, 2, 2))


def test_a_network_whose_attention_is_not_found_is_refused() -> None:
    model = tiny_model("llama")
    del model.model.layers[1].self_attn.layer_idx
    with pytest.raises(ModelError, match=r"prefix tuning is not available for LlamaForCausalLM: it has 2 layers, and 1 causal"):
        virtual_tokens.attentions(model)
