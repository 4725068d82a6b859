"""New tokens are one id each, start as the mean, are learnt under every adaptation, and are still there for anybody else."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith
from tests import processes
from tests.runs import apart, history, killed_before, model_folder, recipe, rows, weights
from tests.tiny import tiny_model, tiny_tokenizer
from tunesmith import adaptations, objectives
from tunesmith.data.store.encode_source import shared_key
from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.load import vocabulary
from tunesmith.models.load.load import load_tokenizer, locate
from tunesmith.train import setup

TOKENS = ["<tool>", "</tool>"]
LORA = {"type": "lora", "r": 4}
KNOWN = len(tiny_tokenizer("chatml"))
FULL = {"vocab_size": KNOWN}  # as many rows as tokens: the matrix has to grow
UNTIED = {**FULL, "tie_word_embeddings": False}
CASES = {
    "full-tied-llama": ("llama", "full", FULL),
    "full-untied-llama": ("llama", "full", UNTIED),
    "full-gpt2": ("gpt2", "full", FULL),
    "full-spare-rows": ("llama", "full", {}),
    "lora-tied-llama": ("llama", LORA, FULL),
    "lora-untied-llama": ("llama", LORA, UNTIED),
    "lora-gpt2": ("gpt2", LORA, FULL),
    "lora-gemma": ("gemma", LORA, FULL),
    "lora-gemma3": ("gemma3", LORA, FULL),
    "lora-spare-rows": ("llama", LORA, {}),
    "lora-head-whole": ("llama", {**LORA, "modules_to_save": ["lm_head"]}, UNTIED),
    "lora-tied-whole": ("llama", {**LORA, "modules_to_save": ["embed_tokens"]}, FULL),
}
ADAPTERS = [name for name, case in CASES.items() if case[1] != "full"]
ROWS_ONLY = [name for name in ADAPTERS if "whole" not in name]


def made(folder, architecture="llama", adaptation=LORA, changes=FULL, **train):
    model_folder(folder, architecture, **changes)
    built = recipe(folder, architecture, "sft", adaptation, **{"max_steps": 3, **train})
    data = [{**row, "completion": f" <tool>{row['completion']}</tool>"} for row in rows()]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in data), encoding="utf-8")
    return {**built, "add_tokens": TOKENS}


FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from safetensors.torch import save_file
for folder, target in json.loads(sys.argv[1]):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if target.endswith("merged.safetensors") or "full-" in folder:
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        from peft import AutoPeftModelForCausalLM
        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    ids = torch.tensor([tokenizer.encode("the <tool> fox </tool>", add_special_tokens=False)])
    save_file({"ids": ids, "logits": model(input_ids=ids).logits.detach().float().contiguous()}, target)
assert "tunesmith" not in sys.modules
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train every case, merge the adapters, and load all that was saved in one fresh process that has no tunesmith."""
    root = tmp_path_factory.mktemp("new-tokens")
    build, built, jobs = setup.build, [], []

    def keep(*args):
        built.append(build(*args))
        return built[-1]

    patch = pytest.MonkeyPatch()
    patch.setattr(setup, "build", keep)
    for name, (architecture, adaptation, changes) in CASES.items():
        folder = root / name
        folder.mkdir()
        tunesmith.train(made(folder, architecture, adaptation, changes), out=folder / "run")
        model = built.pop().model
        (model.get_base_model() if hasattr(model, "peft_config") else model).set_attn_implementation("sdpa")
        tokenizer = load_tokenizer(locate(folder / "run"))
        ids = torch.tensor([tokenizer.encode("the <tool> fox </tool>", add_special_tokens=False)])
        with torch.no_grad():
            save_file({"ids": ids, "logits": model.eval()(input_ids=ids).logits.contiguous()}, folder / "trained.safetensors")
        jobs.append((str(folder / "run" / "model"), str(folder / "fresh.safetensors")))
        if adaptation != "full":
            tunesmith.merge(folder / "run", folder / "merged")
            jobs.append((str(folder / "merged"), str(folder / "merged.safetensors")))
    patch.undo()
    done = processes.run([sys.executable, "-c", FRESH, json.dumps(jobs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def same_answers(folder, side):
    here, there = (load_file(folder / f"{which}.safetensors") for which in ("trained", side))
    assert torch.equal(here["ids"], there["ids"])
    assert {KNOWN, KNOWN + 1} <= set(here["ids"].flatten().tolist())
    assert float((here["logits"] - there["logits"]).abs().max()) <= 1e-5 * float(here["logits"].abs().max())


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_gives_the_same_logits(name, trained):
    same_answers(trained / name, "fresh")


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merged_model_keeps_the_new_tokens(name, trained):
    same_answers(trained / name, "merged")
    model, _ = tunesmith.load(trained / name / "merged")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (CASES[name][2].get("tie_word_embeddings", True)) == model.config.tie_word_embeddings


@pytest.mark.parametrize("name", CASES)
def test_new_rows_were_learnt_and_tied_layers_stay_one(name, trained):
    architecture, _, changes = CASES[name]
    before, _ = tunesmith.load(trained / name / f"model-{architecture}")
    vocabulary.grow(before, vocabulary.NewTokens({"a": KNOWN, "b": KNOWN + 1}, KNOWN))
    after, _ = tunesmith.load(trained / name / "run")
    after = after.get_base_model() if hasattr(after, "peft_config") else after
    ends = [after.get_input_embeddings(), after.get_output_embeddings()]
    first, last = (end.weight for end in ends)
    assert torch.equal(first, last) == changes.get("tie_word_embeddings", True)
    for new, old in zip((first, last), (before.get_input_embeddings(), before.get_output_embeddings()), strict=True):
        assert all(not torch.equal(new[row], old.weight[row]) for row in (KNOWN, KNOWN + 1))


@pytest.mark.parametrize("name", ROWS_ONLY)
def test_a_lora_trains_and_saves_only_the_new_rows_beside_itself(name, trained):
    folder = trained / name / "run" / "model"
    saved = load_file(folder / "adapter_model.safetensors")
    beside = {key: value.shape[0] for key, value in saved.items() if ".lora_" not in key}
    assert beside and all("trainable_tokens_delta" in key and rows == 2 for key, rows in beside.items())
    assert len(beside) == (2 if CASES[name][2] is UNTIED else 1)
    assert (folder / "adapter_model.safetensors").stat().st_size < 2 * 4 * sum(value.numel() for value in saved.values())
    before, _ = tunesmith.load(trained / name / f"model-{CASES[name][0]}")
    after, _ = tunesmith.load(trained / name / "run")
    assert torch.equal(before.get_input_embeddings().weight[:KNOWN], after.get_base_model().get_input_embeddings().weight[:KNOWN])


@pytest.mark.parametrize("name", ["full-tied-llama", "lora-tied-llama", "lora-untied-llama", "lora-spare-rows"])
def test_the_fast_paths_hold(name, trained):
    manifest = json.loads((trained / name / "run" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["route"]["batches"] == "packed" and manifest["route"]["notes"] == []
    assert f"new tokens: <tool> = {KNOWN}, </tool> = {KNOWN + 1}" in manifest["notes"]


def test_the_parameters_that_are_said_to_train_are_those_that_do(trained):
    for name in ("lora-tied-llama", "lora-untied-llama", "full-tied-llama"):
        manifest = json.loads((trained / name / "run" / "manifest.json").read_text(encoding="utf-8"))
        (file,) = (trained / name / "run" / "model").glob("*.safetensors")
        assert manifest["parameters"]["trainable"] == sum(value.numel() for value in load_file(file).values())


def test_a_new_row_is_the_mean_of_the_known_ones():
    for changes in ({}, UNTIED, {"vocab_size": KNOWN + 1}):
        model = tiny_model("llama", **changes)
        before = [end.weight[:KNOWN].clone() for end in (model.get_input_embeddings(), model.get_output_embeddings())]
        random = torch.get_rng_state()
        assert vocabulary.grow(model, vocabulary.NewTokens({"a": KNOWN, "b": KNOWN + 1}, KNOWN)) == [KNOWN, KNOWN + 1]
        for end, old in zip((model.get_input_embeddings(), model.get_output_embeddings()), before, strict=True):
            mean = old.double().mean(0).float()
            assert torch.equal(end.weight[KNOWN], mean) and torch.equal(end.weight[KNOWN + 1], mean)
            assert torch.equal(end.weight[:KNOWN], old) and len(end.weight) == max(KNOWN + 2, changes.get("vocab_size", 512))
        assert torch.equal(torch.get_rng_state(), random)


def test_the_tokenizer_keeps_a_new_token_whole_and_shows_it():
    tokenizer = tiny_tokenizer("chatml")
    sft = objectives.module("sft")
    key = shared_key(sft.Objective(sft.Config()), tokenizer)
    new = vocabulary.add_tokens(tokenizer, TOKENS)
    ids = tokenizer.encode("the<tool>fox", add_special_tokens=False)
    assert ids.count(new.ids["<tool>"]) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<tool>fox"
    assert shared_key(sft.Objective(sft.Config()), tokenizer) != key


@pytest.mark.parametrize(
    ("token", "words"), [("<|im_end|>", "'<|im_end|>' is one token"), ("the", "'the' is one token"), ("<é>", "decodes '<é>' to")]
)
def test_a_token_that_is_there_or_does_not_come_back_is_refused_by_name(token, words):
    with pytest.raises(RecipeError) as error:
        vocabulary.add_tokens(tiny_tokenizer("chatml"), ["<tool>", token])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"add_tokens": ["<a>", " "]}, "only spaces"),
        ({"add_tokens": ["<a>", "<a>"]}, "'<a>' is listed twice"),
        ({"add_tokens": ["<a>"], "adapter": "continue"}, "adapter: merge"),
        ({"adaptation": {**LORA, "target_modules": ["q_proj", "embed_tokens"]}}, "modules_to_save instead"),
    ],
)
def test_what_cannot_work_is_refused(changes, words, tmp_path):
    with pytest.raises(RecipeError, match=words):
        tunesmith.check({**made(tmp_path), **changes})


def test_an_output_layer_with_a_bias_is_refused_under_lora():
    model = tiny_model("llama", **UNTIED)
    model.lm_head = torch.nn.Linear(32, KNOWN)
    rows = vocabulary.grow(model, vocabulary.NewTokens({"a": KNOWN}, KNOWN))
    assert torch.allclose(model.lm_head.bias[KNOWN], model.lm_head.bias[:KNOWN].mean())
    lora = adaptations.module("lora")
    with pytest.raises(RecipeError, match="has a bias"):
        lora.Adaptation(lora.Config()).apply(model, "lm", rows)


def test_a_token_that_no_row_holds_is_said(tmp_path):
    given = {**made(tmp_path), "add_tokens": [*TOKENS, "<never>"]}
    tunesmith.train(given, out=tmp_path / "run")
    notes = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))["notes"]
    assert "no training row contains <never>: their embeddings will not be trained" in notes
    assert "no training row contains <never>: their embeddings will not be trained" in tunesmith.check(given)["notes"]


@pytest.mark.parametrize(("adaptation", "precision"), [("full", "fp32"), (LORA, "fp32"), (LORA, "bf16")])
def test_resumed_bit_for_bit(adaptation, precision, tmp_path, monkeypatch):
    given = made(tmp_path, adaptation=adaptation, max_steps=5, save_steps=2, precision=precision)
    tunesmith.train(given, out=tmp_path / "straight")
    killed_before(4, given, tmp_path / "run")
    tunesmith.train(given, out=tmp_path / "run", resume=True)
    assert apart(weights(tmp_path / "run" / "model"), weights(tmp_path / "straight" / "model")) == 0
    assert history(tmp_path / "run") == history(tmp_path / "straight")


def test_an_adapter_with_new_tokens_is_trained_on_merged_or_left_out(trained, tmp_path):
    before = trained / "lora-tied-llama"
    start = {**made(tmp_path, adaptation="lora"), "model": str(before / "run")}
    on = tunesmith.train({**start, "add_tokens": [], "adapter": "continue"}, out=tmp_path / "on")
    assert apart(weights(on["model_dir"]), weights(before / "run" / "model")) > 0
    tunesmith.load(on["model_dir"])
    more = tunesmith.train({**start, "add_tokens": ["<more>"], "adapter": "merge"}, out=tmp_path / "more")
    model, tokenizer = tunesmith.load(more["model_dir"])
    assert tokenizer.convert_tokens_to_ids([*TOKENS, "<more>"]) == [KNOWN, KNOWN + 1, KNOWN + 2]
    assert model.get_input_embeddings().weight.shape[0] == KNOWN + 3
    anew = tunesmith.train({**start, "add_tokens": ["<other>"], "adapter": "new"}, out=tmp_path / "anew")
    assert tunesmith.load(anew["model_dir"])[1].convert_tokens_to_ids("<other>") == KNOWN


def test_an_adapter_that_lacks_a_new_row_is_refused(trained, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    source = trained / "lora-tied-llama" / "run" / "model"
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["trainable_token_indices"] = {name: ids[1:] for name, ids in config["trainable_token_indices"].items()}
    config["base_model_name_or_path"] = str(trained / "lora-tied-llama" / "model-llama")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tunesmith.verify(folder, accept=True)
    with pytest.raises(ModelError, match=f"lacks row {KNOWN} of model.embed_tokens"):
        tunesmith.load(folder)
