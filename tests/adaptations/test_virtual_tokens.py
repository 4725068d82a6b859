"""prefix and prompt: what is trained, what is refused before weights load, what the files hold, training them on."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import tunesmith
from tests.models.virtual_tokens import COUNT, KINDS, adapted
from tests.runs import recipe
from tests.tiny import tiny_model
from tunesmith.adaptations import prefix, prompt
from tunesmith.errors import ModelError, RecipeError, UserError
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.find import record, saved_files
from tunesmith.models.find.folder_summary import show

KEYS = {"llama": 16, "qwen3": 16, "gemma": 16, "gpt2": 32, "mistral": 16, "gemma3": 16}
"""Numbers in the keys of one layer and position: key heads times their size."""


def trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", KEYS)
def test_trained_parameters_are_those_of_the_closed_form(name: str) -> None:
    width, layers = KEYS[name], 2
    assert trained(adapted(name, "prefix")) == COUNT * 2 * layers * width
    inner = 7
    projection = (width * inner + inner) + (inner + 1) * 2 * layers * width
    assert trained(adapted(name, "prefix", prefix_projection=True, encoder_hidden_size=inner)) == COUNT * width + projection
    assert trained(adapted(name, "prompt")) == COUNT * 32


@dataclass(frozen=True)
class Run:
    """A run of two steps on ``rows``: its recipe, its outcome, its model folder."""

    kind: str
    made: dict[str, Any]
    outcome: dict[str, Any]
    folder: Path
    rows: Path

    def copy(self, target: Path) -> Path:
        """A copy of the model folder, to be damaged."""
        return Path(shutil.copytree(self.folder, target / "model"))


def train(folder: Path, kind: str, **keys: Any) -> Run:
    made = recipe(folder, "llama", "sft", {"type": kind, "num_virtual_tokens": COUNT, **keys}, max_steps=2)
    outcome = tunesmith.train(made, out=folder / "run")
    return Run(kind, made, outcome, Path(outcome["model_dir"]), folder / "rows.jsonl")


@pytest.fixture(scope="module", params=KINDS)
def run(request: Any, tmp_path_factory: Any) -> Run:
    return train(tmp_path_factory.mktemp(request.param), request.param)


def test_the_files_are_in_pefts_format_and_show_describes_them(run: Run) -> None:
    kind, outcome, folder = run.kind, run.outcome, run.folder
    stored = load_file(folder / "adapter_model.safetensors")
    assert set(stored) == {"prompt_embeddings"} and stored["prompt_embeddings"].dtype is torch.float32
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == f"{kind.upper()}_TUNING"
    facts = show(folder)
    assert facts["adapter"]["type"] == f"{kind}_tuning" and facts["adapter"]["num_virtual_tokens"] == COUNT
    assert facts["parameters"]["adapter"]["count"] == stored["prompt_embeddings"].numel() == outcome["trainable_parameters"]


def test_training_further_starts_from_the_saved_values(run: Run, tmp_path: Path) -> None:
    first, data = run.outcome, {**run.made["data"], "eval": {"path": str(run.rows)}}
    further = {"model": str(run.folder), "adapter": "continue", "adaptation": {"type": run.kind}, "data": data}
    again = tunesmith.train({**run.made, **further}, out=tmp_path / "on")
    figures = tunesmith.evaluate(run.folder, run.rows, precision="fp32")
    assert again["eval_loss_before"] == pytest.approx(figures["eval_loss"], rel=1e-6)
    assert again["eval_loss"] < again["eval_loss_before"] and again["trainable_parameters"] == first["trainable_parameters"]


def test_a_prefix_with_a_projection_is_not_continued(tmp_path: Path) -> None:
    first = train(tmp_path, "prefix", prefix_projection=True)
    made = {**first.made, "model": str(first.folder), "adapter": "continue", "adaptation": {"type": "prefix"}}
    with pytest.raises(RecipeError, match=r"adapter: continue: this prefix was trained with prefix_projection"):
        tunesmith.check(made)


def test_a_damaged_file_is_an_error_that_names_the_tensor(run: Run, tmp_path: Path) -> None:
    folder = run.copy(tmp_path)
    file = folder / "adapter_model.safetensors"
    rows = load_file(file)["prompt_embeddings"]
    for tensors, expected in (
        ({"prompt_embedding": rows}, "unexpected: prompt_embedding"),
        ({"prompt_embeddings": rows, "more": rows.clone()}, "unexpected: more"),
        ({"prompt_embeddings": rows[:-1]}, rf"prompt_embeddings has the shape \(4, {rows.shape[1]}\); 5 virtual tokens of Llama"),
        ({"prompt_embeddings": rows[:, :-2].contiguous()}, "prompt_embeddings has the shape"),
    ):
        save_file(tensors, file)
        saved_files.accept(folder)
        with pytest.raises(ModelError, match=expected):
            tunesmith.load(folder)


def test_the_probe_notices_other_numbers(run: Run, tmp_path: Path) -> None:
    folder = run.copy(tmp_path)
    tunesmith.load(folder)
    file = folder / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(file)["prompt_embeddings"].roll(1, 0) * 2}, file)
    record.write(folder, record.read(folder) | {"files": None})  # the logits alone are to tell
    with pytest.raises(ModelError, match="does not answer as it did"):
        tunesmith.load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_files_cannot_hold_is_refused_before_weights_load(kind: str, tmp_path: Path) -> None:
    made = recipe(tmp_path, "llama", "sft", kind) | {"add_tokens": ["<tool>"]}
    with pytest.raises(RecipeError, match=rf"add_tokens: the files of adaptation={kind} have no room .*\n.*adaptation=lora"):
        tunesmith.check(made)
    made = recipe(tmp_path, "llama", "sft", {"type": kind, "num_virtual_tokens": 512})
    with pytest.raises(RecipeError, match=r"num_virtual_tokens is 512, and the model's window is 512"):
        tunesmith.check(made)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_leave_room_for_virtual_tokens(kind: str, tmp_path: Path) -> None:
    """gpt2 has no position beyond its 512th: a row of 13 tokens would end the run."""
    made = recipe(tmp_path, "gpt2", "cpt", {"type": kind, "num_virtual_tokens": 500}, max_steps=1)
    assert tunesmith.train(made, out=tmp_path / "run")["steps"] == 1


def test_there_is_nothing_to_merge(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"a {run.kind}_tuning adapter adds inputs, not weights"):
        tunesmith.merge(run.folder, tmp_path / "merged")


def test_words_are_repeated_or_cut_to_the_number_asked_for() -> None:
    table = tiny_model("llama").get_input_embeddings().weight
    for count in (2, 9):
        model = adapted(
            "llama", "prompt", 0, num_virtual_tokens=count, prompt_tuning_init="TEXT", prompt_tuning_init_text="the fox"
        )
        first, second = model.prompt_encoder["default"].embedding.weight[:2]
        assert virtual_tokens.count(model) == count
        assert (first == table).all(dim=1).any() and (second == table).all(dim=1).any()


@pytest.mark.parametrize(
    ("config", "keys", "expected"),
    [
        (prompt.Config, {"prompt_tuning_init_text": ""}, "is empty"),
        (prompt.Config, {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": "x"}, "does nothing with .* RANDOM"),
        (prompt.Config, {"num_virtual_tokens": 0}, "greater than 0"),
        (prefix.Config, {"encoder_hidden_size": 8}, "prefix_projection: true"),
        (prefix.Config, {"num_virtual_tokens": -1}, "greater than 0"),
    ],
)
def test_keys_without_effect_are_refused(config: Any, keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        config(**keys)
