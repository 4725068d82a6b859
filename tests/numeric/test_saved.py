"""What was saved is what was trained, for somebody who has transformers (and peft) and has never heard of tunesmith."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import tunesmith
from tests import processes
from tests.runs import recipe
from tunesmith.train import setup

CASES = {
    "full-llama": ("llama", "full"),
    "full-gpt2": ("gpt2", "full"),
    "full-gemma3": ("gemma3", "full"),
    "lora-llama": ("llama", {"type": "lora", "r": 4}),
    "lora-gpt2": ("gpt2", {"type": "lora", "r": 4}),
    "lora-qwen3": ("qwen3", {"type": "lora", "r": 4, "use_rslora": True}),
    "dora-llama": ("llama", {"type": "lora", "r": 4, "use_dora": True}),
    "bias-gpt2": ("gpt2", {"type": "lora", "r": 4, "bias": "all", "target_modules": ["c_attn"]}),
    "head-llama": ("llama", {"type": "lora", "r": 4, "modules_to_save": ["lm_head"]}),
    "embeddings-gemma": ("gemma", {"type": "lora", "r": 4, "modules_to_save": ["embed_tokens"]}),
    "names-mistral": ("mistral", {"type": "lora", "r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "prefix-llama": ("llama", {"type": "prefix", "num_virtual_tokens": 5}),
    "projected-gpt2": ("gpt2", {"type": "prefix", "num_virtual_tokens": 5, "prefix_projection": True}),
    "prefix-gemma3": ("gemma3", {"type": "prefix", "num_virtual_tokens": 5}),
    "prompt-gemma": ("gemma", {"type": "prompt", "num_virtual_tokens": 5}),
    "prompt-qwen3": ("qwen3", {"type": "prompt", "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "the fox"}),
}
IDS = [[5, 6, 7, 8, 9, 10], [40, 41, 42, 43]]
ANSWER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
for folder, base, target in json.loads(sys.argv[1]):
    if base:
        from peft import PeftModel
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    model.eval()
    found = {}
    for number, ids in enumerate(%s):
        ids = torch.tensor([ids])
        found[f"logits{number}"] = model(input_ids=ids).logits.detach().float()
        found[f"greedy{number}"] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, min_new_tokens=24, do_sample=False)
    save_file({name: value.contiguous() for name, value in found.items()}, target)
assert "tunesmith" not in sys.modules
""" % json.dumps(IDS)  # noqa: UP031


def in_memory(model):
    """Logits and 24 greedy tokens of the model that was trained."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    inner.set_attn_implementation("sdpa")
    model.eval()
    found = {}
    for number, ids in enumerate(IDS):
        given = torch.tensor([ids])
        with torch.no_grad():
            found[f"logits{number}"] = model(input_ids=given).logits
        found[f"greedy{number}"] = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=24, min_new_tokens=24, do_sample=False
        )
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Train every case, then load them all in one fresh process."""
    root = tmp_path_factory.mktemp("saved")
    build, kept, jobs = setup.build, [], []

    def keep(*args):
        made = build(*args)
        kept.append(made.model)
        return made

    patch = pytest.MonkeyPatch()
    patch.setattr(setup, "build", keep)
    for name, (architecture, adaptation) in CASES.items():
        folder = root / name
        folder.mkdir()
        made = recipe(folder, architecture, "sft", adaptation, max_steps=3)
        tunesmith.train(made, out=folder / "run")
        save_file({key: value.contiguous() for key, value in in_memory(kept.pop()).items()}, folder / "trained.safetensors")
        adapter = (folder / "run" / "model" / "adapter_config.json").exists()
        jobs.append((str(folder / "run" / "model"), made["model"] if adapter else None, str(folder / "fresh.safetensors")))
    patch.undo()
    done = processes.run([sys.executable, "-c", ANSWER, json.dumps(jobs)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_gives_the_same_logits_and_tokens(name, saved):
    trained, fresh = (load_file(saved / name / f"{side}.safetensors") for side in ("trained", "fresh"))
    for key, value in trained.items():
        if key.startswith("greedy"):
            assert torch.equal(fresh[key], value)
        else:
            found = fresh[key][:, -value.shape[1] :]  # of prompt tuning peft gives out the virtual places too
            assert float((found - value).abs().max()) <= 1e-5 * float(value.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_something_was_learnt(name, saved):
    """Else equal logits would prove nothing."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(saved / name / f"model-{CASES[name][0]}")
    with torch.no_grad():
        before = base(input_ids=torch.tensor([IDS[0]])).logits
    after = load_file(saved / name / "trained.safetensors")["logits0"]
    assert float((after - before).abs().max()) > 1e-3


def test_an_adapter_folder_is_small_and_has_no_optimiser(saved):
    folder = saved / "lora-llama" / "run" / "model"
    trained = sum(tensor.numel() * 4 for tensor in load_file(folder / "adapter_model.safetensors").values())
    assert (folder / "adapter_model.safetensors").stat().st_size < 2 * trained
    assert not any("optim" in path.name for path in folder.iterdir())


def test_the_saved_tokenizer_is_the_one_that_was_trained_with(saved):
    from transformers import AutoTokenizer

    base, after = (AutoTokenizer.from_pretrained(saved / "lora-llama" / part) for part in ("model-llama", "run/model"))
    turns = [{"role": "user", "content": "안녕 the fox"}, {"role": "assistant", "content": "x"}]
    assert base.apply_chat_template(turns) == after.apply_chat_template(turns)
    assert (base.padding_side, base.pad_token, base.eos_token) == (after.padding_side, after.pad_token, after.eos_token)
