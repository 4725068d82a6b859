"""The decoding step in C: the model's own logits and keys, for the structures that it takes, and for no other."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tiny import tiny_model
from tunesmith import machine
from tunesmith.models.fast import kernels
from tunesmith.models.generate import forward_passes, slot_cache
from tunesmith.models.generate.decode_step import COPIED_SLOTS, KERNEL_ROWS, PROMPT_TOKENS, decode_step
from tunesmith.models.generate.forward_passes import SlotPass
from tunesmith.models.generate.row_adapters import RowAdapters
from tunesmith.models.generate.slot_cache import Piece, attend

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")

LENGTHS = tuple(1 + 13 * row % 31 for row in range(70))


def filled(model: Any, lengths: tuple[int, ...], capacity: int = 64) -> SlotPass:
    """A pass whose slot ``n`` holds ``lengths[n]`` tokens; slot 0 of each pass is left empty."""
    run = SlotPass(model)
    run.resize(len(lengths) + 1, capacity)
    drawn = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, 500, (length,), generator=drawn).tolist() for length in lengths]
    run([Piece(row, slot + 1, 0) for slot, row in enumerate(rows)])
    return run


@pytest.mark.parametrize("rows", [1, 3, 4, 6, 11, 70])  # 70: in blocks of 64 or 16 rows, and a rest
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True}),
        ("qwen3", {}),
        ("mistral", {}),
        ("llama", {"tie_word_embeddings": False}),
    ],
)
@torch.inference_mode()
def test_logits_keys_and_values_are_those_of_the_forward_pass(name: str, changes: dict[str, Any], rows: int) -> None:
    model = tiny_model(name, **changes)
    for parameter in model.parameters():  # biases and norms are not 0 and 1
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    run, lengths = filled(model, LENGTHS[:rows]), LENGTHS[:rows]
    step = run.step
    assert step is not None
    pieces = [Piece([7 + slot], slot + 1, length) for slot, length in enumerate(lengths)]
    run.cache.begin(pieces, model.device)
    expected = run._forward(pieces)
    wanted = [x.clone() for x in (*run.cache.keys, *run.cache.values)]
    for layer in (*run.cache.keys, *run.cache.values):
        layer[torch.arange(1, rows + 1), :, torch.tensor(lengths)] = 0
    logits = step(torch.tensor([piece.ids[0] for piece in pieces]), run.cache)
    assert torch.allclose(logits, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip((*run.cache.keys, *run.cache.values), wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5, equal_nan=True)  # places without a token hold anything


def rounded(model: Any) -> Any:
    """``model`` in fp32 with weights that are bf16 numbers, as after loading a bf16 checkpoint."""
    return model.to(torch.bfloat16).float()


@pytest.mark.parametrize("rows", [1, 3, 4, 6, 11, 20, 70])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.inference_mode()
def test_bf16_copies_of_fp32_weights_give_the_logits_of_fp32(name: str, rows: int) -> None:
    model = rounded(tiny_model(name, hidden_size=40, intermediate_size=72, attention_bias=True))
    run, lengths = filled(model, LENGTHS[:rows]), LENGTHS[:rows]
    assert run.step is not None
    step = run.step.packed()
    assert step.panels
    pieces = [Piece([7 + slot], slot + 1, length) for slot, length in enumerate(lengths)]
    run.cache.begin(pieces, model.device)
    expected = run._forward(pieces)
    logits = step(torch.tensor([piece.ids[0] for piece in pieces]), run.cache)
    assert torch.allclose(logits, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_weights_that_bf16_cannot_hold_have_no_copies_and_changed_ones_have_new_copies() -> None:
    model = rounded(tiny_model("llama"))
    run = filled(model, (3, 3))
    piece = [Piece([7], 1, 3, drawn=True)]
    run(piece)
    assert run.packed_step is not None and run.packed_step.panels
    up = model.model.layers[1].mlp.up_proj.weight
    up[0] *= 2  # still bf16 numbers
    run.forget()
    assert torch.allclose(run(piece), run._forward(piece), atol=1e-5)
    assert run.packed_step is not None and run.packed_step.panels
    up[3, 5] += 1e-6
    run.forget()
    assert torch.allclose(run(piece), run._forward(piece), atol=1e-5)
    assert run.packed_step is run.step and not run.packed_step.panels


@torch.inference_mode()
def test_the_copies_that_few_slots_read_are_dropped_when_there_are_many() -> None:
    run = filled(rounded(tiny_model("llama")), (3, 3))
    piece = [Piece([7], 1, 3, drawn=True)]
    run(piece)
    assert run.packed_step is not None and run.packed_step.panels
    run.resize(COPIED_SLOTS, 64)
    assert run.packed_step is not None and run.packed_step.panels
    run.resize(COPIED_SLOTS + 1, 64)
    assert torch.allclose(run(piece), run._forward(piece), atol=1e-5)
    assert run.packed_step is run.step and not run.packed_step.panels


@pytest.mark.parametrize("rows", [1, 6, 20])
@pytest.mark.parametrize("copies", [False, True])
@torch.inference_mode()
def test_threads_share_a_step(rows: int, copies: bool) -> None:
    """They wait for one another between the products of each layer. With copies, no bit depends on their number."""
    model = rounded(tiny_model("llama", num_hidden_layers=8))
    run, lengths = filled(model, LENGTHS[:rows]), LENGTHS[:rows]
    assert run.step is not None
    step = run.step.packed() if copies else run.step
    run.cache.begin([Piece([7 + slot], slot + 1, length) for slot, length in enumerate(lengths)], model.device)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 3, 3, 3):
            torch.set_num_threads(threads)
            found.append(step(torch.arange(7, 7 + rows), run.cache))
    finally:
        torch.set_num_threads(before)
    assert all(torch.allclose(logits, found[0], atol=0 if copies else 1e-5, rtol=0) for logits in found)


AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@pytest.mark.skipif(
    "avx512f" not in machine.instruction_sets(), reason="this processor has no more than AVX2, or it is emulated already"
)
def test_the_steps_of_a_processor_with_avx2_alone() -> None:
    """The variables are read once by a process, before its first product."""
    chosen = "(bf16_copies_of and llama) or rounded_in_torch"
    files = __file__, str(Path(__file__).with_name("test_int8_weights.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen]
    done = subprocess.run(command, env=os.environ | AVX2, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]  # 5 if no test was chosen


@pytest.mark.parametrize("rows", [1, 4, 6, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "bf16 copies"])
@pytest.mark.parametrize("several", [False, True])
@torch.inference_mode()
def test_the_loras_of_the_rows_take_part(several: bool, dtype: torch.dtype | str, rows: int) -> None:
    """Ranks differ by adapter and layer, some layers have none, and each row has its own adapter."""
    torch.manual_seed(0)
    one = LoraConfig(r=3, lora_alpha=48, target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False)
    two = LoraConfig(r=20, rank_pattern={"v_proj": 5}, target_modules="all-linear", lora_alpha=40, init_lora_weights=False)
    copies = dtype == "bf16 copies"
    with torch.inference_mode(False):
        tiny = rounded(tiny_model("qwen3")) if copies else tiny_model("qwen3")
        model = get_peft_model(tiny, one, "one")
        model.add_adapter("two", two)
        core = model.eval().to(torch.bfloat16 if dtype is torch.bfloat16 else torch.float32).get_base_model()
    lengths = [(1, 7, 3)[row % 3] for row in range(rows)]
    run = filled(core, tuple(lengths))
    assert run.step is not None
    names = [("one", None, "two")[row % 3] if several else "one" for row in range(rows)]
    pieces = [Piece([7 + row], row + 1, length, names[row]) for row, length in enumerate(lengths)]
    loras = run.adapters.stack(["one", "two"] if several else names)
    run.cache.begin(pieces, core.device)
    step = run.step.packed()
    assert bool(step.panels) == copies
    logits = step(torch.tensor([piece.ids[0] for piece in pieces]), run.cache, loras, loras.keep(names) if several else None)
    expected = run._in_turns(pieces)
    off = float((logits - expected).abs().max() / expected.abs().max())
    assert off < (3e-2 if dtype is torch.bfloat16 else 1e-5)
    run.cache.begin(pieces, core.device)
    bare = step(torch.tensor([piece.ids[0] for piece in pieces]), run.cache)
    assert float((bare - expected).abs().max() / expected.abs().max()) > 0.1


PIECES = [
    ((5, 0),),  # tokens of a piece, and those that its slot holds
    ((2, 7), (1, 3), (3, 0)),
    ((9, 12), (30, 2), (1, 0), (11, 20)),
    ((205, 33), (7, 1), (60, 0), (1, 9)),  # blocks of 192 queries, more rows than MANY_ROWS
]


@pytest.mark.parametrize("shapes", PIECES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "changes"),
    [("llama", {}), ("llama", {"head_dim": 16}), ("mistral", {"sliding_window": 6, "head_dim": 16}), ("qwen3", {})],
)
@torch.inference_mode()
def test_pieces_of_prompts_are_those_of_the_forward_pass(
    name: str, changes: dict[str, Any], dtype: torch.dtype, shapes: tuple[tuple[int, int], ...]
) -> None:
    """Each token sees those before it in its piece and in its slot; logits are those of the last tokens."""
    model = tiny_model(name, **changes).to(dtype)
    run = filled(model, tuple(max(1, ahead) for _, ahead in shapes), 256)
    assert run.step is not None
    drawn = torch.Generator().manual_seed(2)
    pieces = [
        Piece(torch.randint(5, 500, (tokens,), generator=drawn).tolist(), slot + 1, ahead)
        for slot, (tokens, ahead) in enumerate(shapes)
    ]
    run.cache.begin(pieces, model.device)
    expected = run._forward(pieces)
    wanted = [x.clone() for x in (*run.cache.keys, *run.cache.values)]
    for layer in (*run.cache.keys, *run.cache.values):
        layer[run.cache.slot_of_token, :, run.cache.place_of_token] = 0
    ends = torch.tensor([len(piece.ids) for piece in pieces]).cumsum(0) - 1
    logits = run.step(torch.tensor([token for piece in pieces for token in piece.ids]), run.cache, last=ends)
    limit = 1e-5 if dtype is torch.float32 else 3e-2
    assert logits.shape == expected.shape and forward_passes.difference(logits, expected) < limit
    limit = 1e-5 if dtype is torch.float32 else 0.1  # of 273 tokens, one is rounded more often than most
    for ours, theirs in zip((*run.cache.keys, *run.cache.values), wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=limit, rtol=limit, equal_nan=True)


@pytest.mark.parametrize("tokens", [(4, 2), (140, 9)])
@pytest.mark.parametrize("names", [("one", "one"), ("one", "two"), (None, "two")])
@torch.inference_mode()
def test_pieces_of_several_adapters(names: tuple[str | None, str | None], tokens: tuple[int, int]) -> None:
    """Each token of a piece keeps the ranks of its own adapter; without a step in C, the pieces run in turns."""
    with torch.inference_mode(False):
        config = LoraConfig(r=3, lora_alpha=48, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(tiny_model("llama", head_dim=16), config, "one")
        model.add_adapter("two", config)
        run = filled(model.eval().get_base_model(), (4, 9), 256)
    ids = [[7 + place % 90 for place in range(count)] for count in tokens]
    pieces = [Piece(ids[0], 1, 4, names[0]), Piece(ids[1], 2, 9, names[1])]
    found = run(pieces)
    assert run.step is not None and run.checked_steps
    assert forward_passes.difference(found, run._in_turns(pieces)) < 1e-5
    others = [replace(piece, adapter=None if piece.adapter else "one") for piece in pieces]
    assert forward_passes.difference(run(others), found) > 0.1


@pytest.mark.parametrize(
    ("name", "changes", "dtype", "in_blocks"),
    [
        ("llama", {"head_dim": 16}, torch.float32, True),
        ("llama", {"head_dim": 16}, torch.bfloat16, False),
        ("llama", {}, torch.float32, False),
        ("mistral", {"head_dim": 16, "sliding_window": 9}, torch.float32, False),
    ],
)
@torch.inference_mode()
def test_many_tokens_of_prompts_are_a_step_in_c_where_it_attends_in_blocks(
    name: str, changes: dict[str, Any], dtype: torch.dtype, in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name, **changes).to(dtype)
    run, own = SlotPass(model), []
    run.resize(1, 3 * PROMPT_TOKENS)
    forward = run._forward
    monkeypatch.setattr(run, "_forward", lambda pieces: own.append(pieces[0].end) or forward(pieces))
    run.is_checked = True  # as in choose_pass: nothing else calls the model's own forward
    ids = [5 + place % 400 for place in range(3 * PROMPT_TOKENS)]
    for end, ahead in ((4, 0), (PROMPT_TOKENS, 4), (3 * PROMPT_TOKENS - 1, PROMPT_TOKENS)):
        last = run([Piece(ids[ahead:end], 0, ahead)])
    assert own == ([4] if in_blocks and kernels.vector_floats() == 8 else [4, 3 * PROMPT_TOKENS - 1])
    expected = model(torch.tensor([ids])).logits[0, 3 * PROMPT_TOKENS - 2]
    assert forward_passes.difference(last[0], expected.float()) < forward_passes.TOLERANCE[dtype]


def test_a_step_that_fails_the_check_of_a_new_engine_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, notes = tiny_model("llama"), list[str]()
    right = decode_step(model)
    assert right is not None
    monkeypatch.setattr(forward_passes, "decode_step", lambda core: replace(right, scale=3 * right.scale))
    chosen = forward_passes.choose_pass(model, RowAdapters(model), range(5, 40), notes.append)
    assert isinstance(chosen, SlotPass) and chosen.step is None
    assert len(notes) == 1 and "without the C step: its logits differ by" in notes[0]


def test_decoding_by_the_models_own_forward_is_checked_where_the_step_cannot_take_the_adapter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes: list[str] = []
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["v_proj"], use_dora=True)).eval().get_base_model()
    monkeypatch.setattr(
        slot_cache, "_decode_by_kernel", lambda query, *given: query.new_ones(1, query.shape[2], *query.shape[1::2])
    )
    chosen = forward_passes.choose_pass(model, RowAdapters(model), range(5, 40), notes.append)
    assert not isinstance(chosen, SlotPass)
    assert len(notes) == 1 and "row by row: its logits differ by" in notes[0]


def test_other_structures_keep_their_own_forward() -> None:
    assert all(decode_step(tiny_model(name)) is None for name in ("gemma", "gemma3", "gpt2"))
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["lm_head"]))
    assert decode_step(adapted.get_base_model()) is None


def test_a_step_that_differs_is_switched_off_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_passes, "decode_step", lambda core: wrong)
    right = decode_step(tiny_model("llama"))
    assert right is not None
    wrong = replace(right, scale=3 * right.scale)
    notes: list[str] = []
    run = SlotPass(tiny_model("llama"), notes.append)
    run.resize(1, 64)
    with torch.inference_mode():
        run([Piece([5, 6, 7, 8], 0, 0)])
        answered = run([Piece([9], 0, 4, drawn=True)])
        expected = tiny_model("llama")(torch.tensor([[5, 6, 7, 8, 9]])).logits[0, -1]
    assert run.step is None and "differ by" in notes[0]
    assert torch.allclose(answered[0], expected, atol=1e-5)


@pytest.mark.parametrize("few", KERNEL_ROWS)
@torch.inference_mode()
def test_many_rows_are_compared_as_few_rows_were(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are multiplied in another way, so that one comparison does not cover the other."""
    notes: list[str] = []
    run = filled(tiny_model("llama"), (3,) * (few + 1))
    run.note = notes.append
    run([Piece([7], slot + 1, 3, drawn=True) for slot in range(few)])
    assert run.step is not None
    run.step = replace(run.step, scale=3 * run.step.scale)
    run.forget()
    run([Piece([7], slot + 1, 4, drawn=True) for slot in range(few)])
    assert run.step is not None and not notes
    run([Piece([7], slot + 1, 5, drawn=True) for slot in range(few + 1)])
    assert run.step is None and "differ by" in notes[0]


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 13, 15, 16, 24, 30, 45, 64, 100])
@torch.inference_mode()
def test_a_row_is_what_it_is_alone_in_bf16(rows: int) -> None:
    """Every layout of rows, whole and in part, against fp32 arithmetic on the same weights and rounded activations."""
    model = tiny_model("llama", hidden_size=40, intermediate_size=72).to(torch.bfloat16)
    run = filled(model, LENGTHS[:10] * 10)
    assert run.step is not None
    pieces = [Piece([7 + slot], slot + 1, LENGTHS[slot % 10]) for slot in range(rows)]
    run.cache.begin(pieces, model.device)
    expected = run._forward(pieces)
    logits = run.step(torch.tensor([piece.ids[0] for piece in pieces]), run.cache)
    assert float((logits - expected).abs().max()) < 0.02 * float(expected.abs().max())


@pytest.mark.parametrize(("window", "softcap"), [(0, None), (9, None), (0, 2.0), (9, 2.0)])
@pytest.mark.parametrize(
    ("rows", "ahead", "dim", "value_dim"),
    [
        (1, 4, 8, 8),
        (5, 0, 8, 8),
        (64, 3, 8, 6),
        (150, 21, 8, 8),
        (1, 4, 16, 16),
        (5, 0, 32, 32),
        (250, 21, 32, 32),
        (49, 9, 32, 16),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_attention_of_a_prompt_by_kernel_and_by_torch(
    dtype: torch.dtype,
    rows: int,
    ahead: int,
    dim: int,
    value_dim: int,
    window: int,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What lies in the slot after the prompt is not read: it may be anything."""
    generator = torch.Generator().manual_seed(0)
    seen = rows + ahead
    query = torch.randn(rows, 6, dim, generator=generator).to(dtype).transpose(0, 1)
    keys, values = (torch.full((2, seen + 40, wide), float("nan"), dtype=dtype)[:, :seen] for wide in (dim, value_dim))
    for stored in (keys, values):
        stored.copy_(torch.randn(stored.shape, generator=generator))
    found = attend(query, keys, values, 0.5, window, softcap)
    monkeypatch.setattr(slot_cache.kernels, "available", lambda tensor: False)
    expected = attend(query.float(), keys.float(), values.float(), 0.5, window, softcap)
    assert torch.allclose(found.float(), expected, atol=1e-5 if dtype is torch.float32 else 3e-2)


def test_attention_of_a_prompt_in_fp32_is_that_of_training_where_nothing_else_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []
    call = kernels.call_in_memory
    monkeypatch.setattr(kernels, "call_in_memory", lambda name, *given: called.append(name) or call(name, *given))
    x = torch.randn(6, 20, 16)
    for window, softcap, given in ((0, None, x), (20, None, x), (19, None, x), (0, 2.0, x), (0, None, x.bfloat16())):
        attend(given, given[:2], given[2:4], 0.5, window, softcap)
    assert called == ["causal_attention_of_slot"] * 2 + ["prefill_attention"] * 3


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (9, 0.0), (0, 2.0), (9, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_one_token_a_row_by_kernel_and_by_torch(dtype: torch.dtype, window: int, softcap: float) -> None:
    drawn = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(4, 2, 32, 8, generator=drawn).to(dtype) for _ in range(2))
    query = torch.randn(3, 6, 8, generator=drawn).to(dtype)
    slots, lengths = torch.tensor([2, 0, 3]), torch.tensor([5, 32, 17])
    out = torch.empty(3, 6, 8, dtype=dtype)
    kernels.call("decode_attention", dtype, query, keys, values, slots, lengths, out, 0.3, softcap, window, 3, 6, 2, 32, 8, 8)
    for row in range(3):
        seen = (x[slots[row], :, : lengths[row]].float() for x in (keys, values))
        expected = attend(query[row][:, None].float(), *seen, 0.3, window, softcap or None)[0]
        assert torch.allclose(out[row].float(), expected, atol=1e-5 if dtype is torch.float32 else 2e-2)
