"""features: only the chosen weights are trained, layers below them need no backward pass, and the saved folder equals the base elsewhere."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith
from tests import processes
from tests.numeric.test_parity import CPU, PACKS, examples, take_gradients
from tests.runs import apart, history, killed_before, model_folder, recipe, weights
from tests.tiny import TINY, tiny_config, tiny_model, tiny_tokenizer
from tunesmith.adaptations import features
from tunesmith.data.batch.pack import PACKED
from tunesmith.errors import RecipeError, UserError
from tunesmith.models.fast import torch_compile
from tunesmith.models.find import headers
from tunesmith.models.find.folder_summary import show
from tunesmith.models.load import load, vocabulary
from tunesmith.objectives import sft
from tunesmith.train import fast_path

SFT = sft.Objective(sft.Config())
WIDTH, INNER, VOCABULARY = 32, 64, 512


def adaptation(**keys):
    return features.Adaptation(features.Config(**keys))


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


SWIGLU = 3 * WIDTH * INNER
ATTENTION = 2 * WIDTH * 32 + 2 * WIDTH * 16
"""q and o for four heads of eight numbers, k and v for two."""
BLOCK = {
    "llama": ATTENTION + SWIGLU + 2 * WIDTH,
    "mistral": ATTENTION + SWIGLU + 2 * WIDTH,
    "gemma": ATTENTION + SWIGLU + 2 * WIDTH,
    "qwen3": ATTENTION + SWIGLU + 2 * WIDTH + 2 * 8,
    "gemma3": ATTENTION + SWIGLU + 4 * WIDTH + 2 * 8,
    "gpt2": 4 * WIDTH + (WIDTH + 1) * 3 * WIDTH + (WIDTH + 1) * WIDTH + (WIDTH + 1) * 4 * WIDTH + (4 * WIDTH + 1) * WIDTH,
}
NORM = {name: 2 * WIDTH if name == "gpt2" else WIDTH for name in TINY}


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("name", TINY)
def test_the_number_of_trained_parameters_in_closed_form(name, blocks):
    more = {"layer_types": ["sliding_attention", "full_attention"] * 2} if name == "gemma3" else {}
    model = tiny_model(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": 4}, **more)
    assert count(adaptation(train_last=blocks).apply(model, "lm")) == blocks * BLOCK[name] + NORM[name]
    model = adaptation(target_modules=["lm_head"]).apply(tiny_model(name), "lm")
    assert count(model) == WIDTH * VOCABULARY


def test_the_default_is_the_last_two_blocks_and_the_final_norm():
    model = adaptation().apply(tiny_model("llama", num_hidden_layers=5), "lm")
    assert {name.rpartition(".layers.")[2].partition(".")[0] for name in trained_names(model) if "layers" in name} == {"3", "4"}
    assert {name for name in trained_names(model) if "layers" not in name} == {"model.norm.weight"}


def test_names_and_patterns_choose_what_is_trained():
    def chosen(**keys):
        return trained_names(adaptation(**keys).apply(tiny_model("llama"), "lm"))

    assert chosen(target_modules=["model.norm"]) == {"model.norm.weight"}
    assert chosen(target_modules=["q_proj"]) == {f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)}
    assert chosen(target_modules=["layers.0.mlp.up_proj.weight"]) == {"model.layers.0.mlp.up_proj.weight"}
    assert chosen(target_modules=r".*layers\.1\..*(gate|up)_proj") == {
        f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up")
    }
    both = chosen(train_last=1, target_modules=["embed_tokens"])
    assert both > {"model.embed_tokens.weight", "model.norm.weight"} and not any(".layers.0." in name for name in both)


@pytest.mark.parametrize("head", ["score", "token"])
def test_a_new_head_is_always_trained_and_enough(head):
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    kind = AutoModelForSequenceClassification if head == "score" else AutoModelForTokenClassification
    model = kind.from_config(tiny_model("llama").config)
    assert trained_names(adaptation().apply(model, head)) == {n for n, _ in model.named_parameters() if n.startswith("score")}
    assert ".layers.1." in "".join(trained_names(adaptation(train_last=1).apply(model, head)))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_blocks_of_encoders_are_found_by_class(kind):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    model = adaptation(train_last=1).apply(AutoModelForSequenceClassification.from_config(config), "score")
    names = trained_names(model)
    top = 16 * 17 + 2 * 17  # the answer, and the layer before it: bert's pooler, roberta's own
    assert count(model) == 4 * 16 * 17 + (17 * 32 + 33 * 16) + 4 * 16 + top
    assert {name.partition("layer.")[2].partition(".")[0] for name in names if ".encoder." in name} == {"2"}
    assert {name.partition(".")[0] for name in names if ".encoder." not in name} == (
        {"classifier", "bert"} if kind == "bert" else {"classifier"}
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"train_last": 3}, "train_last=3: this model has 2 blocks"),
        ({"train_last": 0}, "train_last=0 leaves nothing to train"),
        (
            {"target_modules": ["q_porj", "lm_head"]},
            r"target_modules matches nothing that can be trained: `q_porj` \(nearest: `q_proj`",
        ),
        ({"target_modules": ["rotary_emb"]}, "`rotary_emb`"),
        ({"target_modules": r".*layers\.9\..*"}, "target_modules matches nothing"),
    ],
)
def test_bad_input_is_named_before_the_model_is_changed(keys, words):
    with torch.device("meta"):
        model = tiny_model_on_meta()
    before = trained_names(model)
    with pytest.raises(RecipeError, match=words):
        adaptation(**keys).apply(model, "lm")
    assert trained_names(model) == before and model.config.tie_word_embeddings


def tiny_model_on_meta():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(tiny_config("llama"))


def test_the_backward_pass_ends_at_the_first_trained_layer():
    model = adaptation(train_last=2).apply(tiny_model("llama", num_hidden_layers=6), "lm")
    rows = examples(SFT, tiny_tokenizer())
    chosen = fast_path.choose(model, SFT, rows, 200, "auto", CPU)
    assert chosen.packed and not chosen.notes
    blocks, packed, seen = torch_compile.layers(model), [], {}
    for number, block in enumerate(blocks):

        def note(module, given, number=number):
            seen[number] = (len(packed), given[0].requires_grad)

        block.register_forward_pre_hook(note)
    asked = []
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor):
        loss, _ = SFT.loss(model, SFT.collate(rows, PACKED))
    blocks[3].register_full_backward_hook(lambda *given: asked.append(3))
    blocks[4].register_full_backward_hook(lambda *given: asked.append(4))
    loss.backward()
    assert [seen[n] for n in range(5)] == [(0, False)] * 5, "nothing of the frozen layers is kept, nothing wants a gradient"
    assert seen[5][0] > 0 and seen[5][1]
    assert all(parameter.grad is None for block in blocks[:4] for parameter in block.parameters())
    assert all(parameter.grad is not None for block in blocks[4:] for parameter in block.parameters())


@pytest.mark.parametrize("name", TINY)
def test_gradients_are_those_of_full_training_and_the_same_computed_again(name):
    rows = examples(SFT, tiny_tokenizer())
    found = []
    for keys, again in ((None, False), ({"train_last": 1}, False), ({"train_last": 1}, True)):
        model = tiny_model(name)
        model = model.requires_grad_(True) if keys is None else adaptation(**keys).apply(model, "lm")
        chosen = fast_path.choose(model, SFT, rows, max(len(row["input_ids"]) for row in rows), "auto", CPU)
        assert chosen.packed is PACKS[name]
        if again:
            fast_path.recompute(chosen)
            assert chosen.recomputed, chosen.notes
        model.train()
        SFT.loss(model, SFT.collate(rows, chosen.layout))[0].backward()
        found.append(take_gradients(model))
    full, plain, recomputed = found
    assert plain.keys() == recomputed.keys() < full.keys()
    for key, value in plain.items():
        scale = float(full[key].abs().max())
        assert float((value - full[key]).abs().max()) <= 1e-6 * max(1.0, scale)
        assert float((value - recomputed[key]).abs().max()) <= 1e-6 * max(1.0, scale)


# --------------------------------------------------------------------------------------------------------------- saving


def in_dtype(folder, dtype):
    """Rewrite a model folder in ``dtype``."""
    model, _ = tunesmith.load(folder)
    model.config.dtype = dtype
    model.to(dtype).save_pretrained(folder)


def bytes_of(folder):
    found = {}
    for name, tensor in headers.read_tensors(folder).items():
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            found[name] = (tensor.dtype, tensor.shape, file.read(tensor.size))
    return found


@pytest.mark.parametrize(
    ("keys", "stored", "computed"),
    [
        ({"train_last": 1}, "bfloat16", "fp32"),
        ({"train_last": 1}, "float32", "bf16"),
        ({"target_modules": ["lm_head"]}, "bfloat16", "bf16"),
    ],
)
def test_frozen_bytes_are_the_base_s_and_what_was_trained_is_saved_in_fp32(keys, stored, computed, tmp_path):
    made = recipe(tmp_path, "llama", "sft", {"type": "features", **keys}, precision=computed, learning_rate=1e-3)
    in_dtype(made["model"], getattr(torch, stored))
    outcome = tunesmith.train(made, out=tmp_path / "run")
    base, saved = bytes_of(tmp_path / "model-llama"), bytes_of(tmp_path / "run" / "model")
    state = load_file(tmp_path / "run" / "checkpoints" / "step-4" / "state.safetensors")
    masters = {name.removeprefix("master."): value for name, value in state.items() if name.startswith("master.")}
    assert saved.keys() == base.keys() | masters.keys()
    for name, value in saved.items():
        if name not in masters:
            assert value == base[name], name
    values = weights(outcome["model_dir"])
    assert all(values[name].equal(master) and values[name].dtype is torch.float32 for name, master in masters.items())

    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(outcome["model_dir"])
    ours, _ = tunesmith.load(tmp_path / "run")
    for model in (plain, ours):
        assert all(one.equal(values[name].float()) for name, one in model.named_parameters())
    shown = show(tmp_path / "run")
    assert shown["kind"] == "full" and shown["tied_embeddings"] is ("train_last" in keys)
    assert shown["parameters"]["embedding"]["dtypes"] == ["BF16" if stored == "bfloat16" else "F32"]
    with pytest.raises(UserError, match="nothing to merge"):
        tunesmith.merge(tmp_path / "run", tmp_path / "merged")


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
ids, *folders = torch.tensor([[5, 6, 7, 8]]), *sys.argv[2:]
models = {folder: AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders}
save_file({folder: model(input_ids=ids).logits.detach().contiguous() for folder, model in models.items()}, sys.argv[1])
assert "tunesmith" not in sys.modules
"""


def test_a_tied_output_layer_is_trained_apart_and_a_fresh_process_sees_the_same(tmp_path, monkeypatch):
    from tunesmith.train import setup

    build, built = setup.build, []
    monkeypatch.setattr(setup, "build", lambda *given: built.append(build(*given)) or built[-1])
    ids, expected = torch.tensor([[5, 6, 7, 8]]), {}
    for name in ("gpt2", "gemma3"):
        made = recipe(tmp_path, name, "sft", {"type": "features", "target_modules": ["lm_head"]})
        folder = tunesmith.train(made, out=tmp_path / name)["model_dir"]
        with fast_path.plain_attention(built[-1].model, built[-1].fast_path), torch.no_grad():
            expected[folder] = built[-1].model(input_ids=ids).logits
        config = json.loads((tmp_path / name / "model" / "config.json").read_text())
        assert config["tie_word_embeddings"] is False and config["dtype"] == "float32"
        notes = json.loads((tmp_path / name / "manifest.json").read_text())["notes"]
        for said in (notes, tunesmith.check(made)["notes"]):
            assert any("shared its weights with the embedding" in note for note in said)
        base, _ = tunesmith.load(made["model"])
        after, _ = tunesmith.load(tmp_path / name)
        assert after.get_input_embeddings().weight.equal(base.get_input_embeddings().weight)
        assert not after.get_output_embeddings().weight.equal(base.get_output_embeddings().weight)
    command = [sys.executable, "-c", FRESH, str(tmp_path / "logits.safetensors"), *expected]
    done = processes.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, logits in load_file(tmp_path / "logits.safetensors").items():
        assert float((logits - expected[folder]).abs().max()) <= 1e-5 * float(expected[folder].abs().max()), folder


def test_an_embedding_that_is_named_stays_tied():
    model = adaptation(target_modules=["embed_tokens"]).apply(tiny_model("llama"), "lm")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight and model.config.tie_word_embeddings
    model = adaptation(target_modules=["embed_tokens", "lm_head"]).apply(tiny_model("llama"), "lm")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_frozen_tensor_that_the_base_no_longer_holds_is_saved_as_it_was_used(tmp_path):
    model, _ = tunesmith.load(model_folder(tmp_path, "llama"))
    chosen = adaptation(train_last=1)
    model = chosen.apply(model, "lm")
    used = model.model.layers[0].mlp.up_proj.weight.clone()
    file = tmp_path / "model-llama" / "model.safetensors"
    changed = load_file(file)
    changed["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(changed, file, metadata={"format": "pt"})
    chosen.save(model, tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].equal(used)


@pytest.mark.parametrize(
    ("changes", "dtypes", "expected"),
    [
        ({"dtype": "float32"}, ("BF16", "F32"), torch.float32),
        ({"dtype": "bfloat16"}, ("BF16", "F32"), torch.bfloat16),
        ({"dtype": "float32"}, ("BF16",), torch.bfloat16),
        ({"torch_dtype": "float32"}, ("BF16", "F32"), torch.float32),
        ({"dtype": "bfloat16"}, ("F32",), torch.float32),
        ({}, ("BF16", "F32"), torch.bfloat16),
    ],
)
def test_a_folder_is_loaded_in_the_dtype_it_names_if_it_holds_it(changes, dtypes, expected, tmp_path):
    kinds = {"BF16": torch.bfloat16, "F32": torch.float32}
    tensors = {name: torch.zeros(9 if name == "BF16" else 3, dtype=kinds[name]) for name in dtypes}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(changes))
    assert load.checkpoint_dtype(tmp_path) is expected


# ----------------------------------------------------------------------------------------------------- beside the others

KNOWN = len(tiny_tokenizer("chatml"))


@pytest.mark.parametrize(
    ("keys", "changes"),
    [({}, {}), ({"target_modules": ["lm_head"]}, {}), ({"target_modules": ["lm_head"]}, {"tie_word_embeddings": False})],
)
def test_new_tokens_are_refused_where_their_rows_would_stay_frozen(keys, changes):
    model = tiny_model("llama", **changes)
    rows = vocabulary.grow(model, vocabulary.NewTokens({"<a>": KNOWN}, KNOWN))
    with pytest.raises(RecipeError, match=r"add_tokens: model\.embed_tokens.* is frozen.*\n.*adaptation=lora"):
        adaptation(**keys).apply(model, "lm", rows)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_trained_where_the_embedding_is_named(tied, tmp_path):
    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    made = recipe(tmp_path, adaptation={"type": "features", "target_modules": names})
    model_folder(tmp_path / "own", "llama", tie_word_embeddings=tied)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "call a <tool> now", "completion": " <tool> x"}))
    made |= {"model": str(tmp_path / "own" / "model-llama"), "add_tokens": ["<tool>"]}
    outcome = tunesmith.train(made, out=tmp_path / "run")
    model, tokenizer = tunesmith.load(outcome["model_dir"])
    base, _ = tunesmith.load(made["model"])
    number = tokenizer.convert_tokens_to_ids("<tool>")
    for layer, old in zip(
        (model.get_input_embeddings(), model.get_output_embeddings()),
        (base.get_input_embeddings(), base.get_output_embeddings()),
        strict=True,
    ):
        assert not layer.weight[number].equal(old.weight[:KNOWN].double().mean(0).float())


def test_an_adapter_is_not_continued_but_merged(tmp_path):
    """``check`` measures the saved size on the merged base, too."""
    adapter = tunesmith.train(recipe(tmp_path, adaptation={"type": "lora", "r": 4}), out=tmp_path / "adapter")
    made = {**recipe(tmp_path, adaptation="features"), "model": adapter["model_dir"]}
    with pytest.raises(RecipeError, match=r"adaptation: features trains the model's own weights\. Use adapter: merge"):
        tunesmith.check({**made, "adapter": "continue"})
    merging = {**made, "adapter": "merge"}
    assert tunesmith.check(merging, measure=True)["forecast"]["saving_seconds"] > 0
    tunesmith.train(merging, out=tmp_path / "run")
    tunesmith.load(tmp_path / "run")


def test_what_was_trained_is_trained_on_from_its_fp32_numbers(tmp_path):
    made = recipe(tmp_path, adaptation="features", precision="bf16", max_steps=2)
    in_dtype(made["model"], torch.bfloat16)
    first = tunesmith.train(made, out=tmp_path / "first")
    on = {**made, "model": first["model_dir"], "train": {**made["train"], "max_steps": 1, "learning_rate": 1e-12}}
    second = tunesmith.train(on, out=tmp_path / "second")
    assert apart(weights(first["model_dir"]), weights(second["model_dir"])) < 1e-9


@pytest.mark.parametrize(
    ("keys", "precision"), [({"train_last": 1}, "bf16"), ({"target_modules": ["lm_head"]}, "fp32")], ids=["blocks", "head"]
)
def test_resumed_bit_for_bit(keys, precision, tmp_path):
    made = recipe(tmp_path, "llama", "sft", {"type": "features", **keys}, max_steps=5, save_steps=2, precision=precision)
    tunesmith.train(made, out=tmp_path / "straight")
    killed_before(4, made, tmp_path / "run")
    tunesmith.train(made, out=tmp_path / "run", resume=True)
    assert apart(weights(tmp_path / "run" / "model"), weights(tmp_path / "straight" / "model")) == 0
    assert history(tmp_path / "run") == history(tmp_path / "straight")
