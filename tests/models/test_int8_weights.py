"""Decoding with int8 weights: the logits of the rounded weights, for answers only, and never for training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.models.test_decode_step import LENGTHS, filled
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tunesmith.cli.main import main
from tunesmith.errors import ModelError
from tunesmith.models.fast import kernels
from tunesmith.models.generate import int8_weights
from tunesmith.models.generate.engine import Engine
from tunesmith.models.generate.forward_passes import SlotPass, difference
from tunesmith.models.generate.int8_weights import int8_forward, rounded_to_int8
from tunesmith.models.generate.running_rows import Request
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.models.generate.slot_cache import Piece

needs_compiler = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")


def test_rounding_is_symmetric_with_a_scale_for_each_output() -> None:
    weight = torch.tensor([[1.27, -0.64, 0.004, 0.0], [-254.0, 4.8, 0.9, 127.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[1.27, -0.64, 0.0, 0.0], [-254.0, 4.0, 0.0, 128.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(rounded_to_int8(weight), expected, atol=1e-6)
    drawn = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    scale = drawn.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((rounded_to_int8(drawn) - drawn).abs() <= 0.5001 * scale).all())


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3, 4, 6, 11, 20, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_the_logits_are_those_of_weights_rounded_in_torch(dtype: torch.dtype, rows: int) -> None:
    """And close to those of the stored weights: off by less than 2% of the largest logit."""
    changes = {"hidden_size": 40, "intermediate_size": 72, "attention_bias": True, "vocab_size": 500}
    model = tiny_model("qwen3", **changes).to(dtype)
    run, lengths = filled(model, LENGTHS[:rows]), LENGTHS[:rows]
    assert run.step is not None
    step = run.step.in_int8()
    pieces = [Piece([7 + slot], slot + 1, length) for slot, length in enumerate(lengths)]
    run.cache.begin(pieces, model.device)
    stored = run._forward(pieces)
    head = model.get_input_embeddings().weight  # tied: the embedding of a token is not rounded
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and parameter is not head:
            model.get_parameter(name).copy_(rounded_to_int8(parameter))
    with int8_forward([model.lm_head]):
        expected = run._forward(pieces)
    logits = step(torch.tensor([piece.ids[0] for piece in pieces]), run.cache)
    if dtype is torch.float32:
        assert torch.allclose(logits, expected, atol=1e-5, rtol=1e-5)
        assert 1e-3 < difference(logits, stored) < 2e-2
    else:
        assert difference(logits, expected) < 2e-2 and difference(logits, stored) < 4e-2


@torch.inference_mode()
def test_the_forward_with_rounded_weights_takes_a_part_of_a_matrix_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = torch.nn.Linear(6, 2500), torch.randn(3, 6)
    expected = torch.nn.functional.linear(x, rounded_to_int8(linear.weight), linear.bias)
    rounded: list[int] = []
    own = int8_weights.rounded_to_int8

    def recorded(weight: torch.Tensor) -> torch.Tensor:
        rounded.append(len(weight))
        return own(weight)

    monkeypatch.setattr(int8_weights, "rounded_to_int8", recorded)
    with int8_forward([linear]):
        assert torch.allclose(linear(x), expected, atol=1e-6)
    assert max(rounded) <= int8_weights.OUTPUTS < sum(rounded) == 2500
    assert not torch.allclose(linear(x), expected, atol=1e-4)


@needs_compiler
@torch.inference_mode()
def test_prompts_are_read_with_the_weights_as_stored_and_changed_weights_are_rounded_anew() -> None:
    notes: list[str] = []
    model = tiny_model("llama")
    run = SlotPass(model, notes.append, decode_weights="int8")
    run.resize(2, 64)
    run([Piece([5, 6, 7, 8], 0, 0)])
    of_prompt, of_answer = [Piece([9], 0, 4)], [Piece([9], 0, 4, drawn=True)]
    stored = run(of_prompt)
    assert difference(stored, run._forward(of_prompt)) < 1e-5 and run.packed_step is None
    before = run(of_answer)
    assert run.packed_step is not None and run.packed_step.weights == "int8"
    assert not notes, "the first result is compared with the rounded weights, not with the stored ones"
    assert 1e-4 < difference(before, stored) < 2e-2
    model.model.layers[1].mlp.down_proj.weight[3] *= -20
    run.forget()
    after = run(of_answer)
    assert difference(after, before) > 3 * difference(after, run._forward(of_answer))


@needs_compiler
@torch.inference_mode()
def test_a_step_that_differs_from_the_rounded_weights_is_not_used() -> None:
    notes: list[str] = []
    run = SlotPass(tiny_model("llama"), notes.append, decode_weights="int8")
    run.resize(1, 64)
    run([Piece([5, 6, 7, 8], 0, 0)])
    assert run.step is not None
    packed = run.packed_step = run.step.in_int8()
    panels = packed.panels[id(packed.layers[0][1])]
    panels.view(torch.uint8)[3] ^= 0x40  # one weight of a query
    piece = [Piece([9], 0, 4, drawn=True)]
    answered = run(piece)
    assert run.step is None and "differ by" in notes[0]
    assert torch.equal(answered, run._forward(piece))


@needs_compiler
def test_an_engine_with_int8_weights_is_another_policy() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer("chatml")
    request = Request((5, 6, 7, 8), SamplingParams(max_new_tokens=9, stop=frozenset()))
    stored = Engine(model, tokenizer).answers([request])[0]
    notes: list[str] = []
    rounded = Engine(model, tokenizer, note=notes.append, decode_weights="int8").answers([request])[0]
    assert not notes and rounded.fingerprint == f"{stored.fingerprint}-int8"
    assert rounded.logprobs[0] == stored.logprobs[0], "the first token is that of the prompt"
    assert 0 < max(abs(a - b) for a, b in zip(rounded.logprobs[1:3], stored.logprobs[1:3], strict=True)) < 0.05


def test_a_model_that_the_step_in_c_cannot_run_is_refused() -> None:
    with pytest.raises(ModelError, match="decode_weights int8 is not supported for GPT2LMHeadModel in float32 on cpu"):
        Engine(tiny_model("gpt2"), tiny_tokenizer("chatml"), decode_weights="int8")


@needs_compiler
def test_an_adapter_that_the_step_in_c_cannot_add_is_refused_and_a_lora_is_added() -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    dora = get_peft_model(tiny_model("llama"), dataclasses.replace(lora, use_dora=True))
    with pytest.raises(ModelError, match="decode_weights int8 is not supported with this adapter: default is not a plain LoRA"):
        Engine(dora, tiny_tokenizer("chatml"), decode_weights="int8")
    notes: list[str] = []
    engine = Engine(get_peft_model(tiny_model("llama"), lora), tiny_tokenizer("chatml"), note=notes.append, decode_weights="int8")
    engine.answers([Request((5, 6, 7, 8), SamplingParams(max_new_tokens=3, stop=frozenset()))])
    run = engine.slots._pass
    assert isinstance(run, SlotPass) and run.packed_step is not None and run.packed_step.weights == "int8" and not notes


@needs_compiler
def test_commands_take_them_and_print_them(tmp_path: Path, capsys: Any) -> None:
    model, rows = str(save_tiny("llama", tmp_path / "model")), tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "What is it?", "completion": "the lazy dog"}\n' * 2)
    flags = ["--max-new-tokens", "4", "--decode-weights", "int8", "--json"]
    assert main(["generate", model, "--prompt", "What is it?", *flags]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["decode_weights"] == "int8" and "decoding with int8 weights" in shown.err
    assert main(["evaluate", model, "--data", str(rows), "--generate", "2", *flags]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["generated"]["decode_weights"] == "int8" and "decoding with int8 weights" in shown.err
    assert main(["evaluate", model, "--data", str(rows), *flags]) == 2
    assert "add --generate 50" in capsys.readouterr().err
    assert main(["generate", model, "--prompt", "a", "--engine", "vllm", *flags]) == 2
    assert "--decode-weights is not supported with --engine" in capsys.readouterr().err
