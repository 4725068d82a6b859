"""Bottleneck adapters through whole runs: what is trained and kept, equal by every way, refused where it cannot be."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith
from tests import processes
from tests.numeric.test_parity import CPU, PACKS, examples, plain_loss_and_gradients, take_gradients
from tests.runs import apart, history, killed_before, model_folder, recipe, rows, weights
from tests.tiny import TINY, tiny_model, tiny_tokenizer
from tunesmith.adaptations import bottleneck
from tunesmith.data.batch.pack import PACKED, PADDED
from tunesmith.errors import ModelError, RecipeError, UserError
from tunesmith.models.find.folder_summary import show
from tunesmith.models.heads import noise
from tunesmith.objectives import sft
from tunesmith.train import fast_path

SFT = sft.Objective(sft.Config())
BOTTLENECK = {"type": "bottleneck", "bottleneck_size": 4}
HOULSBY = {**BOTTLENECK, "variant": "houlsby", "non_linearity": "gelu"}
DROPOUT = {**HOULSBY, "dropout": 0.3}


def prepared(name: str, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    """An adapted model whose up-projections are no longer zero, so that gradients reach everything."""
    config = bottleneck.Config(**{"bottleneck_size": 4, "variant": "houlsby", "non_linearity": "gelu", **keys})
    model = bottleneck.Adaptation(config).apply(tiny_model(name), "lm")
    generator = torch.Generator().manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad and ".bottleneck_" in parameter_name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.to(dtype)


def routed(name: str, dtype: torch.dtype, packing: str = "auto", **keys: Any) -> tuple[Any, ...]:
    """(model, rows, chosen route, noise), as a run has them before its first step."""
    model = prepared(name, dtype, **keys)
    drawn, _ = noise.install(model, 0)
    rows_ = examples(SFT, tiny_tokenizer())
    chosen = fast_path.choose(model, SFT, rows_, max(len(row["input_ids"]) for row in rows_), packing, CPU)
    assert not any("differed" in note for note in chosen.notes), chosen.notes
    return model, rows_, chosen, drawn


def loss_and_gradients(model: Any, rows_: Any, packed: bool, drawn: Any = None) -> tuple[float, dict[str, torch.Tensor]]:
    if drawn is not None:
        drawn.step, drawn.packed = 3, packed
        drawn.rows, drawn.lengths = range(len(rows_)), [len(row["input_ids"]) for row in rows_]
    batch = SFT.collate(rows_, PACKED if packed else PADDED)
    loss, _ = SFT.loss(model, batch)
    (loss / SFT.count(batch)).backward()
    if drawn is not None:
        drawn.rows, drawn.lengths = (), ()
    return loss.item() / int(SFT.count(batch)), take_gradients(model)


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference of any gradient, as a share of its tensor's largest."""
    assert ours.keys() == theirs.keys() and ours
    return max(float((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max()) for key in ours)


@pytest.mark.parametrize("name", TINY)
def test_the_routed_batch_has_the_loss_and_gradients_of_the_plain_forward(name: str) -> None:
    model = prepared(name, torch.float64)
    truth = plain_loss_and_gradients(model, examples(SFT, tiny_tokenizer()))
    model, rows_, chosen, _ = routed(name, torch.float32)
    assert chosen.packed is PACKS[name]
    loss, gradients = loss_and_gradients(model, rows_, chosen.packed)
    assert loss == pytest.approx(truth[0], rel=1e-6)
    assert all(".bottleneck_" in key for key in gradients)
    assert furthest(gradients, truth[1]) < 1e-4


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma"])
def test_packed_equals_padded(name: str, dropout: float) -> None:
    found = []
    for packing in ("auto", "off"):
        model, rows_, chosen, drawn = routed(name, torch.float64, packing, dropout=dropout)
        assert chosen.packed is (packing == "auto")
        found.append(loss_and_gradients(model.train(), rows_, chosen.packed, drawn))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-9)
    assert furthest(found[0][1], found[1][1]) < 1e-7


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", TINY)
def test_gradients_are_the_same_when_layers_are_computed_again(name: str, dropout: float) -> None:
    model, rows_, chosen, drawn = routed(name, torch.float32, dropout=dropout)
    before = loss_and_gradients(model.train(), rows_, chosen.packed, drawn)
    fast_path.recompute(chosen)
    assert chosen.recomputed, chosen.notes
    after = loss_and_gradients(model.train(), rows_, chosen.packed, drawn)
    assert after[0] == before[0]
    assert furthest(after[1], before[1]) < 1e-6
    assert all(gradient.any() for gradient in after[1].values())


def test_bf16_gradients_are_those_of_fp64() -> None:
    truth = plain_loss_and_gradients(prepared("llama", torch.bfloat16).double(), examples(SFT, tiny_tokenizer()))[1]
    model, rows_, chosen, _ = routed("llama", torch.bfloat16)
    ours = loss_and_gradients(model, rows_, chosen.packed)[1]
    apart_ = sum(float((ours[key].double() - truth[key]).square().sum()) for key in truth) ** 0.5
    assert apart_ < 0.05 * sum(float(value.square().sum()) for value in truth.values()) ** 0.5


# ---------------------------------------------------------------------------------------------------------------- runs


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps; its base is in the same folder."""
    root = tmp_path_factory.mktemp("bottleneck")
    made = recipe(root, "llama", adaptation=HOULSBY)
    before = digests(Path(made["model"]))
    tunesmith.train(made, out=root / "run")
    assert digests(Path(made["model"])) == before, "the base was touched"
    return root


def test_only_the_adapters_are_trained_and_saved(trained: Path) -> None:
    saved = weights(trained / "run" / "model")
    assert {name.rpartition(".bottleneck_")[2] for name in saved} == {"down.weight", "down.bias", "up.weight", "up.bias"}
    assert sum(value.numel() for value in saved.values()) == 2 * 2 * (2 * 4 * 32 + 32 + 4)
    assert all(value.dtype is torch.float32 and value.any() for value in saved.values())
    losses = [record["loss"] for record in history(trained / "run") if record["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_a_loaded_adapter_can_be_disabled(trained: Path) -> None:
    model, tokenizer = tunesmith.load(trained / "run")
    ids = tokenizer("the quick brown fox", return_tensors="pt").input_ids
    base, _ = tunesmith.load(trained / "model-llama")
    assert not model(input_ids=ids).logits.allclose(base(input_ids=ids).logits)
    with model.disable_adapter():
        assert model(input_ids=ids).logits.equal(base(input_ids=ids).logits)


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda stored: stored.pop(min(stored)), "missing: base_model.*bottleneck_down.bias"),
        (
            lambda stored: stored.update({"base_model.model.x.bottleneck_up.weight": torch.ones(1)}),
            "unexpected: base_model.model.x",
        ),
        (lambda stored: stored.update({min(stored): torch.ones(5)}), "size mismatch|shape"),
        (lambda stored: [value.mul_(3) for value in stored.values()], None),
    ],
    ids=["missing", "unexpected", "shape", "values"],
)
def test_loading_is_strict(change: Any, expected: str | None, trained: Path, tmp_path: Path) -> None:
    folder = copied(trained / "run" / "model", tmp_path / "changed")
    stored = load_file(folder / "adapter_model.safetensors")
    change(stored)
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="changed since the model was saved"):
        tunesmith.load(folder)
    if expected:
        tunesmith.verify(folder, accept=True)
        with pytest.raises(ModelError, match=expected):
            tunesmith.load(folder)


FRESH = """
import json, sys, torch
import tunesmith.peft
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode("the <tool> fox", add_special_tokens=False)])
    new = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    print(json.dumps({"logits": model(input_ids=ids).logits[0, -1].tolist(), "new": new[0].tolist()}))
"""


def fresh(folders: list[Path]) -> list[dict[str, Any]]:
    """The last logits and a generation of each model folder, by plain peft in one new process."""
    done = processes.run([sys.executable, "-c", FRESH, *map(str, folders)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()[-len(folders) :]]


def here(folder: Path) -> dict[str, Any]:
    model, tokenizer = tunesmith.load(folder)
    ids = torch.tensor([tokenizer.encode("the <tool> fox", add_special_tokens=False)])
    new = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return {"logits": model(input_ids=ids).logits[0, -1].tolist(), "new": new[0].tolist()}


def test_it_generates(trained: Path) -> None:
    (answer,) = tunesmith.generate(trained / "run", ["question 1:"], max_new_tokens=4)
    assert isinstance(answer, str)


def test_show_describes_the_adapter(trained: Path) -> None:
    adapter = show(trained / "run")["adapter"]
    assert {key: value for key, value in adapter.items() if value is not None} == {
        "type": "bottleneck",
        "target_modules": ["down_proj", "o_proj"],
        "variant": "houlsby",
        "bottleneck_size": 4,
        "non_linearity": "gelu",
    }
    assert show(trained / "run")["parameters"]["adapter"]["count"] == 2 * 2 * (2 * 4 * 32 + 32 + 4)


def test_merging_is_refused_with_the_reason(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"non-linearity.*cannot be merged"):
        tunesmith.merge(trained / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    made = {**recipe(tmp_path, adaptation="full"), "model": str(trained / "run"), "adapter": "merge"}
    with pytest.raises(UserError, match="cannot be merged"):
        tunesmith.check(made)


def test_a_saved_adapter_is_trained_further(trained: Path, tmp_path: Path) -> None:
    made = {**recipe(tmp_path, adaptation={"type": "bottleneck"}), "model": str(trained / "run"), "adapter": "continue"}
    tunesmith.train(made, out=tmp_path / "more")
    before, after = weights(trained / "run" / "model"), weights(tmp_path / "more" / "model")
    assert before.keys() == after.keys() and all(not before[name].equal(after[name]) for name in before)
    first = next(record for record in history(tmp_path / "more") if record["kind"] == "train")
    assert first["loss"] < next(record for record in history(trained / "run") if record["kind"] == "train")["loss"]


def test_killed_and_resumed_is_the_undisturbed_run(tmp_path: Path) -> None:
    made = recipe(
        tmp_path, adaptation=DROPOUT, count=14, max_steps=5, save_steps=2, precision="bf16", gradient_checkpointing=True
    )
    straight = tunesmith.train(made, out=tmp_path / "straight")
    killed_before(4, made, tmp_path / "killed")
    resumed = tunesmith.train(made, out=tmp_path / "killed", resume=True)
    assert apart(weights(resumed["model_dir"]), weights(straight["model_dir"])) == 0
    assert history(tmp_path / "killed") == history(tmp_path / "straight")


def test_a_run_does_not_depend_on_how_a_step_is_split(tmp_path: Path) -> None:
    outcomes = []
    for number, budget in enumerate((4096, 30)):
        made = recipe(tmp_path, adaptation=DROPOUT, micro_batch_tokens=budget)
        outcomes.append(weights(tunesmith.train(made, out=tmp_path / str(number))["model_dir"]))
    assert apart(*outcomes) < 1e-5


TOKENS = ["<tool>", "</tool>"]
GROWN = {
    "tied": ("llama", BOTTLENECK, {}),
    "untied": ("llama", BOTTLENECK, {"tie_word_embeddings": False}),
    "gpt2": ("gpt2", HOULSBY, {}),
    "whole": ("llama", {**BOTTLENECK, "modules_to_save": ["lm_head"]}, {"tie_word_embeddings": False}),
    "tied-whole": ("llama", {**BOTTLENECK, "modules_to_save": ["embed_tokens"]}, {}),
}


def grow(case: str, folder: Path) -> Path:
    """Train a case with new tokens in its rows; returns the run folder."""
    name, adaptation, changes = GROWN[case]
    folder.mkdir()
    model_folder(folder, name, vocab_size=len(tiny_tokenizer("chatml")), **changes)
    made = {**recipe(folder, name, adaptation=adaptation, max_steps=2), "add_tokens": TOKENS}
    data = [{**row, "completion": f" <tool>{row['completion']}</tool>"} for row in rows()]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in data), encoding="utf-8")
    tunesmith.train(made, out=folder / "run")
    return folder / "run"


def test_plain_peft_in_a_fresh_process_opens_what_is_saved_new_tokens_included(trained: Path, tmp_path: Path) -> None:
    runs = {"none": trained / "run", **{case: grow(case, tmp_path / case) for case in GROWN}}
    found = fresh([run / "model" for run in runs.values()])
    for (case, run), theirs in zip(runs.items(), found, strict=True):
        ours = here(run)
        assert torch.tensor(ours["logits"]).allclose(torch.tensor(theirs["logits"]), atol=1e-5), case
        assert ours["new"] == theirs["new"], case
        if case != "none":
            check_saved_tokens(case, run)


def check_saved_tokens(case: str, run: Path) -> None:
    name, _, changes = GROWN[case]
    beside = {key.removeprefix("base_model.model.") for key in weights(run / "model") if ".bottleneck_" not in key}
    ends = {"llama": ("model.embed_tokens", "lm_head"), "gpt2": ("transformer.wte", "lm_head")}[name]
    if "whole" not in case:
        tied = changes.get("tie_word_embeddings", True)
        assert beside == {f"{end}.token_adapter.trainable_tokens_delta" for end in (ends[:1] if tied else ends)}
    _, tokenizer = tunesmith.load(run)
    assert set(TOKENS) <= set(tokenizer.get_vocab())


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"bottleneck_size": 0}, "adaptation.bottleneck_size.*greater than 0.*got 0"),
        ({"bottleneck_size": 33}, "adaptation.bottleneck_size=33: the layers of this model are 32 wide"),
        ({"reduction_factor": 33}, "adaptation.reduction_factor=33: the layers of this model are 32 wide"),
        ({"bottleneck_size": 4, "reduction_factor": 8}, "adaptation: bottleneck_size and reduction_factor both"),
        ({"non_linearity": "swish"}, "adaptation.non_linearity.*'relu', 'gelu', 'silu' or 'tanh'.*got 'swish'"),
        ({"variant": "parallel"}, "adaptation.variant.*'pfeiffer' or 'houlsby'.*got 'parallel'"),
        ({"dropout": 1.0}, "adaptation.dropout.*less than 1"),
        ({"modules_to_save": ["lm_hed"]}, "adaptation.modules_to_save matches no module.*lm_head"),
    ],
    ids=str,
)
def test_one_message_names_the_key(keys: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=expected) as caught:
        tunesmith.check(recipe(tmp_path, adaptation={"type": "bottleneck", **keys}))
    assert str(caught.value).count("adaptation") <= 2


def test_a_network_that_is_not_recognised_is_named_before_weights_load(tmp_path: Path) -> None:
    made = recipe(tmp_path, adaptation={"type": "bottleneck"})
    config = Path(made["model"]) / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "model_type": "mixtral", "architectures": ["MixtralForCausalLM"]})
    )
    with pytest.raises(RecipeError, match="sublayers of MixtralForCausalLM are not recognised"):
        tunesmith.check(made)


@pytest.mark.parametrize(
    ("keys", "size"), [({}, 32), ({"reduction_factor": 8}, 4), ({"reduction_factor": 9}, 3), ({"bottleneck_size": 5}, 5)]
)
def test_how_large_an_adapter_is(keys: dict[str, Any], size: int) -> None:
    """The default of 64 is at most the width, 32 here."""
    model = bottleneck.Adaptation(bottleneck.Config(**keys)).apply(tiny_model("llama"), "lm")
    assert model.peft_config["default"].bottleneck_size == size
