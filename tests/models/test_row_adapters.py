"""Every adaptation on slots, and several adapters in one batch: the answers are those of transformers, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.matrix.cells import ADAPTATIONS
from tests.models.test_engine import NEVER, TOKENIZER, by_transformers, ids, prompts, requests
from tests.tiny import save_tiny, tiny_model
from tunesmith import adaptations
from tunesmith.errors import UserError
from tunesmith.models.adapters import bottleneck_tuner
from tunesmith.models.adapters.bottleneck_tuner import BottleneckConfig
from tunesmith.models.fast import fused_layers, kernels
from tunesmith.models.generate.engine import Engine
from tunesmith.models.generate.forward_passes import PlainPass, SlotPass
from tunesmith.models.generate.row_adapters import ACTIVE
from tunesmith.models.generate.running_rows import Request
from tunesmith.models.generate.sampling import SamplingParams
from tunesmith.models.generate.slot_cache import Piece
from tunesmith.models.load.load import load_model, locate
from tunesmith.models.network import base

UNSTOPPED = SamplingParams(max_new_tokens=6, stop=NEVER)
NO_STOP = [511]
"""An id that no tiny model prefers: transformers wants one."""


def shake(model: Any, seed: int = 3, only: str = "") -> None:
    """Add noise to the trained parameters: a fresh adapter changes nothing."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and only in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=drawn))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def adapted(folder: Path, adaptation: str) -> Any:
    chosen = ADAPTATIONS[adaptation]
    keys = {"type": chosen} if isinstance(chosen, str) else dict(chosen)
    module = adaptations.module(keys.pop("type"))
    made = module.Adaptation(module.Config(**keys))
    loaded = load_model(locate(folder), dtype=torch.float32, trainable=True, **made.load_kwargs())
    model = made.apply(loaded, "lm", (), TOKENIZER).eval()
    shake(model)
    return model


WINDOWED = [(name, kind) for name in ("mistral", "gemma3") for kind in ("prefix", "prompt")]
EVERY = [(name, kind) for name in ("llama", "gpt2", "gemma", "qwen3") for kind in ADAPTATIONS]
SOME = {*EVERY[: len(ADAPTATIONS)], *EVERY[::3]}
"""Every adaptation on llama, and each of the others on one more architecture."""


@pytest.mark.parametrize(
    ("name", "adaptation"),
    [*(pair if pair in SOME else pytest.param(*pair, marks=pytest.mark.long) for pair in EVERY), *WINDOWED],
)
def test_greedy_answers_are_those_of_transformers_whatever_is_trained(name: str, adaptation: str, folders: Any) -> None:
    if adaptation == "qlora":
        pytest.importorskip("bitsandbytes")
    model, rows = adapted(folders(name), adaptation), prompts(30, 1, 17)
    virtual = adaptation in ("prefix", "prompt")
    expected = by_transformers(model if virtual else base(model), rows, 6, NO_STOP)
    for most in (1, 2, 64):
        engine = Engine(model, TOKENIZER, max_running=most)
        assert ids(engine, requests(rows, UNSTOPPED)) == expected
        run = engine.slots._pass
        assert isinstance(run, SlotPass)
        in_c = name in ("llama", "qwen3", "mistral") and adaptation not in ("qlora", "bottleneck", "ia3")
        assert kernels.library() is None or (run.step is not None) == in_c


LORAS = [
    peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_alpha=16),
    peft.LoraConfig(r=20, target_modules="all-linear", use_rslora=True, lora_dropout=0.1, init_lora_weights=False),
]
GPT2_LORAS = [peft.LoraConfig(r=4, target_modules=["c_attn"]), peft.LoraConfig(r=3, target_modules=["c_fc", "lm_head"])]
DORAS = [peft.LoraConfig(r=4, target_modules=["v_proj"]), peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)]
IA3S = [peft.IA3Config(target_modules=names, feedforward_modules=[]) for names in (["q_proj"], ["k_proj", "v_proj"])]
COPIES = [
    peft.LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"]),
    peft.LoraConfig(r=4, target_modules=["v_proj"]),
]
BOTTLENECKS = [BottleneckConfig(bottleneck_size=size, target_modules=["down_proj"]) for size in (4, 6)]


def two_adapters(model: Any, configs: list[Any]) -> Any:
    bottleneck_tuner.register()
    model = peft.get_peft_model(model, configs[0], "one")
    model.add_adapter("two", configs[1])
    for seed, name in enumerate(("one", "two")):
        model.set_adapter(name)
        shake(model, seed, name)
    return model.eval()


@contextmanager
def switched(model: Any, name: str | None) -> Iterator[None]:
    if name is None:
        with model.disable_adapter():
            yield
    else:
        before = model.active_adapter
        model.set_adapter(name)
        yield
        model.set_adapter(before)


def logprobs(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """Log-probability of each token of the answer, by one forward pass of peft over prompt and answer."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return [float(row[token]) for row, token in zip(logits, answer, strict=True)]


@pytest.mark.parametrize(
    ("name", "configs", "turns"),
    [
        pytest.param("llama", LORAS, False, id="lora"),
        pytest.param("gpt2", GPT2_LORAS, False, id="lora-gpt2"),
        pytest.param("gemma3", LORAS, False, id="lora-gemma3"),
        pytest.param("llama", DORAS, True, id="dora"),
        pytest.param("llama", IA3S, True, id="ia3"),
        pytest.param("llama", COPIES, True, id="modules-to-save"),
        pytest.param("llama", BOTTLENECKS, True, id="bottleneck"),
    ],
)
def test_rows_of_several_adapters_and_of_the_base_are_those_of_separate_runs(name: str, configs: list[Any], turns: bool) -> None:
    model, rows = two_adapters(tiny_model(name), configs), prompts(30, 9)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    wanted = [
        Request(tuple(row), UNSTOPPED, number, sample, adapter)
        for sample, adapter in enumerate(("one", None, "two", ACTIVE))
        for number, row in enumerate(rows)
    ]
    expected, alone = [], []
    for adapter in ("one", None, "two", "two"):  # two is active
        with switched(model, adapter):
            expected += by_transformers(model.get_base_model(), rows, 6, NO_STOP)
            alone += [logprobs(model, row, answer) for row, answer in zip(rows, expected[-2:], strict=True)]
    assert len({tuple(row) for row in alone[:6]}) == 6
    notes: list[str] = []
    for most in (3, 64):
        engine = Engine(model, TOKENIZER, max_running=most, note=notes.append)
        found = engine.answers(wanted)
        assert [answer.ids for answer in found] == expected
        assert torch.allclose(torch.tensor([answer.logprobs for answer in found]), torch.tensor(alone), atol=1e-5)
        run = engine.slots._pass
        assert isinstance(run, SlotPass) and run.can_stack != turns
        assert kernels.library() is None or (run.step is not None) == (configs is LORAS and name == "llama")
    assert len(notes) == 2 * turns and all("in turns" in note for note in notes)
    assert model.active_adapter == "two" and trained == [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize("several", [1, 7])
def test_rows_that_meet_only_when_they_decode_have_their_own_adapters(several: int) -> None:
    """The first pass of several adapters is compared with turns, and then the step in C runs all rows."""
    model = two_adapters(tiny_model("llama"), LORAS)
    core, rows = model.get_base_model(), prompts(20, 12)
    names, slots = ["one", "two"] * several, range(2 * several)
    found = []
    for together in (True, False):
        run = SlotPass(core)
        run.resize(len(slots), 32)
        begun = [Piece(rows[slot % 2], slot, 0, name) for slot, name in zip(slots, names, strict=True)]
        next_tokens = [Piece([7], piece.slot, piece.end, piece.adapter) for piece in begun]
        for piece in begun:
            run([piece])
        found.append(run(next_tokens) if together else torch.stack([run([piece])[0] for piece in next_tokens]))
    assert torch.allclose(*found, atol=1e-5)


def test_a_model_that_runs_row_by_row_has_adapters_too() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("bloom", vocab_size=512, hidden_size=32, n_layer=2, n_head=4)
    configs = [peft.LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False) for _ in range(2)]
    model, (row,) = two_adapters(AutoModelForCausalLM.from_config(config), configs), prompts(9)
    wanted = [Request(tuple(row), UNSTOPPED, 0, sample, adapter) for sample, adapter in enumerate(("one", None, "two"))]
    engine, expected = Engine(model, TOKENIZER), []
    for adapter in ("one", None, "two"):
        with switched(model, adapter):
            expected += by_transformers(model.get_base_model(), [row], 6, NO_STOP)
    assert ids(engine, wanted) == expected and isinstance(engine.slots._pass, PlainPass)


def test_layers_that_are_fused_for_training_do_not_hide_the_adapter_of_a_row() -> None:
    """A fused layer reads the factors of the adapter that is trained."""
    model, (row,) = two_adapters(tiny_model("llama"), LORAS), prompts(20)
    wanted = [Request(tuple(row), UNSTOPPED, 0, sample, adapter) for sample, adapter in enumerate(("one", None, "two"))]
    expected = ids(Engine(model, TOKENIZER), wanted)
    model.set_adapter("one")
    fused = fused_layers.install(model)
    assert ids(Engine(model, TOKENIZER), wanted) == expected
    assert fused.kinds and all(module.forward == forward for module, forward in fused.replaced)


def test_factors_that_were_trained_between_two_calls_are_seen() -> None:
    model, (row,) = two_adapters(tiny_model("llama"), LORAS), prompts(20)
    wanted = [Request(tuple(row), UNSTOPPED, 0, sample, adapter) for sample, adapter in enumerate(("one", "two"))]
    engine = Engine(model, TOKENIZER)
    before = engine.answers(wanted)
    shake(model, 9, "two")
    after = engine.answers(wanted)
    assert after[0].ids == before[0].ids and after[1].ids == ids(Engine(model, TOKENIZER), wanted)[1] != before[1].ids


def test_virtual_tokens_that_were_trained_between_two_calls_are_seen(folders: Any) -> None:
    for kind in ("prefix", "prompt"):
        model, wanted = adapted(folders("llama"), kind), requests(prompts(20), UNSTOPPED)
        engine = Engine(model, TOKENIZER)
        before = ids(engine, wanted)
        shake(model, 9)
        assert ids(engine, wanted) == ids(Engine(model, TOKENIZER), wanted) != before
        with model.disable_adapter():
            plain = ids(engine, wanted)
            assert plain == by_transformers(base(model), [list(wanted[0].ids)], 6, NO_STOP)


def test_an_adapter_that_is_not_loaded_is_named() -> None:
    model = two_adapters(tiny_model("llama"), LORAS)
    request = Request((7, 8), UNSTOPPED, adapter="three")
    with pytest.raises(UserError, match="'three' is loaded: expected one of 'one', 'two', None"):
        Engine(model, TOKENIZER).check([request])
    with pytest.raises(UserError, match="'three'"):
        list(Engine(model, TOKENIZER).run([request]))


def test_virtual_tokens_cannot_be_turned_off_for_a_row(folders: Any) -> None:
    model = adapted(folders("llama"), "prompt")
    with pytest.raises(UserError, match="virtual tokens"):
        Engine(model, TOKENIZER).check([Request((7, 8), UNSTOPPED, adapter=None)])
