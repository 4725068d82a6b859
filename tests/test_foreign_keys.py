"""Keys and values of other programs are refused with tunesmith's name for them."""

import re

import pytest

from tests.test_recipe import SMALL, refused
from tunesmith import recipe
from tunesmith.cli.main import main
from tunesmith.recipe.foreign_keys import ENTRIES, TABLE
from tunesmith.recipe.schema import Recipe

HERE = re.compile(r"Here it is `'?([\w.]+): (.+?)`( |$)|Leave it out: |Here it is `(--\w+)")

LLAMA_FACTORY = {
    "model_name_or_path": "m", "stage": "dpo", "do_train": True, "finetuning_type": "lora", "lora_rank": 16, "lora_target": "all",
    "pref_beta": 0.2, "pref_loss": "orpo", "dataset": "x.json", "cutoff_len": 512, "max_samples": 100, "overwrite_cache": True,
    "preprocessing_num_workers": 16, "output_dir": "saves/x", "plot_loss": True, "overwrite_output_dir": True, "bf16": True,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 3.0, "ddp_timeout": 1, "val_size": 0.1,
    "flash_attn": "fa2", "save_strategy": "epoch", "resume_from_checkpoint": None, "additional_target": "embed_tokens,lm_head",
}  # fmt: skip
AXOLOTL = {
    "base_model": "m", "model_type": "AutoModelForCausalLM", "load_in_8bit": False, "load_in_4bit": True, "datasets": [{"path": "x.json", "type": "alpaca"}],
    "val_set_size": 0.05, "sequence_len": 2048, "sample_packing": True, "lora_r": 32, "lora_target_linear": True, "lora_modules_to_save": ["lm_head"],
    "micro_batch_size": 2, "gradient_accumulation_steps": 8, "num_epochs": 2, "optimizer": "adamw_bnb_8bit", "lr_scheduler": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 2}, "train_on_inputs": False, "tf32": False, "flash_attention": True, "warmup": 10, "wandb_project": "p",
    "tokens": ["<x>"], "noisy_embedding_alpha": 5.0, "use_gradient_checkpointing": "unsloth", "random_state": 1, "deepspeed": "z.json",
}  # fmt: skip


TRL_PPO = {
    "sft_model_path": "m", "reward_model_path": "r", "num_ppo_epochs": 3, "whiten_rewards": False, "init_kl_coef": 0.1,
    "cliprange": 0.3, "cliprange_value": 0.4, "lam": 0.9, "response_length": 40, "kl_penalty": "mse", "stop_token": "eos",
    "local_rollout_forward_batch_size": 16, "num_mini_batches": 2, "mini_batch_size": 8, "total_episodes": 1000,
    "num_sample_generations": 3, "ref_adapter_name": "x", "ds3_gather_for_generation": True, "exp_name": "e",
}  # fmt: skip
TRL_GRPO = {
    "max_completion_length": 64, "beta": 0.04, "num_iterations": 2, "epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "dr_grpo",
    "scale_rewards": False, "reward_weights": [1.0], "reward_funcs": "f", "use_vllm": True, "vllm_mode": "colocate",
    "vllm_gpu_memory_utilization": 0.3, "steps_per_generation": 2, "generation_batch_size": 8, "mask_truncated_completions": True,
    "log_completions": True, "repetition_penalty": 1.0, "sync_ref_model": False, "delta": 1.5, "kl_coef": 0.04, "rloo_k": 4,
}  # fmt: skip
REWARDS = {"rewards": [{"type": "length", "max": 30, "unit": "words"}]}


@pytest.mark.parametrize(("kind", "theirs"), [("ppo", TRL_PPO), ("grpo", TRL_GRPO)])
@pytest.mark.parametrize("nested", [False, True], ids=["above", "in the objective"])
def test_keys_of_trl_lead_to_those_of_the_same_objective(kind, theirs, nested):
    """At the top of the recipe, and below ``objective``: every pointer is a key that this objective has."""
    own = {"type": kind, **REWARDS}
    theirs = {key: value for key, value in theirs.items() if not nested or key not in ("sft_model_path", "exp_name", "beta")}
    raw = {"model": "m", "objective": {**own, **theirs}} if nested else {"model": "m", "objective": own, **theirs}
    lines = [line for line in refused(raw=raw | {"data": SMALL["data"]}).splitlines() if "unknown key" in line]
    assert len(lines) == len(theirs) and all(HERE.search(line) or "Here it is `" in line for line in lines), lines
    assert not [line for line in lines if "with `objective.type" in line or "Did you mean" in line], lines
    typed = [match.groups()[:2] for line in lines if (match := HERE.search(line)) and match[1]]
    assert len(typed) >= 6
    built = recipe.parse(SMALL | {"objective": own}, [f"{key}={value}" for key, value in dict(typed).items()])
    keys = built.objective
    assert keys.max_new_tokens == (40 if kind == "ppo" else 64) and keys.update_epochs == (3 if kind == "ppo" else 2)
    if kind == "ppo":
        assert (keys.clip_range, keys.clip_range_value, keys.kl_coef, keys.gae_lambda) == (0.3, 0.4, 0.1, 0.9)
        assert keys.kl_estimator == "k2" and keys.rewards[0].path == "r" and (nested or built.samples.count == 3)
    else:
        assert (keys.beta if not nested else 0.04, keys.clip_range, keys.clip_range_high, keys.num_generations) == (
            0.04,
            0.2,
            0.28,
            4,
        )
        assert (keys.advantage, keys.loss_aggregation) == ("dr_grpo", "constant")


@pytest.mark.parametrize(
    ("objective", "key", "place"),
    [
        ("dpo", "gamma", "objective.simpo_gamma"), ("ppo", "discount", None), ("dpo", "max_completion_length", "objective.overlong"),
        ("grpo", "max_completion_length", "objective.max_new_tokens"), ("ppo", "objective.beta", "objective.kl_coef"),
        ("kto", "objective.kl_coef", "objective.beta"), ("classify", "num_ppo_epochs", "objective.update_epochs"),
        ("grpo", "objective.loss_type", "objective.loss_aggregation"), ("sft", "stage", "objective"),
    ],
)  # fmt: skip
def test_a_key_leads_to_the_one_that_the_objective_has(objective, key, place):
    rewards = REWARDS if objective in ("ppo", "grpo") else {}
    message = refused(f"{key}=1", raw=SMALL | {"objective": {"type": objective, **rewards}})
    if place is None:
        assert "Here it is" not in message
    else:
        assert re.search(rf"Here it is `{place}\b", message), message
    if (objective, key) == ("classify", "num_ppo_epochs"):
        assert "with `objective.type: grpo` or `objective.type: ppo`" in message


@pytest.mark.parametrize("theirs", [LLAMA_FACTORY, AXOLOTL], ids=["llama-factory", "axolotl"])
def test_a_recipe_of_another_program_is_translated_key_by_key(theirs):
    """Each unknown key has one line, and all that the lines say to type is a recipe that loads."""
    lines = [line for line in refused(raw=theirs).splitlines() if "unknown key" in line]
    assert len(lines) == len(theirs) and all(HERE.search(line) for line in lines), lines
    typed = dict(match.groups()[:2] for line in lines if (match := HERE.search(line)) and match[1])
    first = [f"{key}={typed.pop(key)}" for key in ("objective", "adaptation") if key in typed]
    built = recipe.parse(SMALL, [*first, *(f"{key}={value}" for key, value in typed.items())])
    assert built.train.batch_size == theirs.get("micro_batch_size", 2) * theirs["gradient_accumulation_steps"]
    assert built.adaptation.r == theirs.get("lora_r", 16) and built.data.train[0].path == "x.json"
    assert built.adaptation.target_modules == "all-linear"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lr=1.0e-4", "Here it is `train.learning_rate=0.0001`"),
        ("train.per_device_train_batch_size=4", "Here it is `train.batch_size=4`"),
        ("train.gradient_accumulation_steps=4", "Here it is `train.batch_size` (rows of one optimiser step"),
        ("objective={type: dpo, dpo_beta: 0.3}", "Here it is `objective.beta=0.3`"),
        (
            "adaptation={type: full, lora_rank: 4}",
            "Here it is `adaptation.r=4` with `adaptation.type: lora` or `adaptation.type: qlora`",
        ),
        ("adaptation={type: lora, dropout: 0.1}", "Here it is `adaptation.lora_dropout=0.1`"),
        ("load_in_8bit=true", "Here it is `'adaptation={type: qlora, quant_type: int8}'`"),
        ("val_set_size=200", "Here it is `data.eval.fraction` (a share below 1"),
        ("fp16=false", "Leave it out"),
        ("adam_beta2=0.95", "'train.optim={type: adamw, betas: [0.9, 0.95]}'"),
        ("Max-Seq-Length=9", "Here it is `train.max_length=9`"),
        ("train.packing=true", "expected 'auto' or 'off', got True. Type train.packing=auto"),
        ("train.optim=adamw_torch", "unknown optimiser 'adamw_torch'. Type train.optim=adamw"),
        ("train.report_to=wandb", "Type 'train.report_to=[wandb]'"),
        ("train.report_to=none", "Leave the key out"),
        ("train.report_to=clearml", "expected a valid list, got 'clearml'"),
        ("train.max_steps=-1", "Leave the key out"),
        ("data.train=a.json", "Type 'data.train=[{path: a.json}]'"),
        ("data.eval=0.1", "Type 'data.eval={fraction: 0.1}'"),
        ("objective=rloo", "Type 'objective={type: grpo, advantage: rloo}'"),
        ("stage=ppo", "Here it is `objective=ppo`"),
        ("objective=simpo", "Type 'objective={type: dpo, loss_type: simpo}'"),
        ("adaptation=dora", "Type 'adaptation={type: lora, use_dora: true}'"),
        ("adapter=qlora", "Type adaptation=qlora"),
    ],
)
def test_a_key_or_a_value_of_another_program_is_named_as_what_it_is_here(override, said):
    message = refused(override)
    assert said in message and "Did you mean" not in message, message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lr", "2e-4"], "--lr: no such option. Here it is `train.learning_rate=0.0002`"),
        (["--learning_rate=2e-4"], "typed without dashes: train.learning_rate=2e-4"),
        (["--train.epochs", "2"], "typed without dashes: train.epochs=2"),
        (["--bf16"], "Here it is `train.precision=bf16`"),
        (["--output_dir", "runs/x"], "Here it is `--out runs/x`"),
        (["--resume_from_checkpoint", "c"], "Here it is `--resume`"),
        (["--do_train"], "Leave it out"),
        (["--lr", "@{"], "--lr: no such option. Here it is `"),  # no YAML
    ],
)
@pytest.mark.parametrize("verb", ["train", "check"])
def test_flags_of_other_programs_are_named_as_what_they_are_here(verb, flags, said, capsys):
    assert main([verb, "r.yaml", *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["train", "r.yaml", "--nonsense"], ["train", "r.yaml", "-lr=1"], ["evaluate", "m", "--data", "x", "--lora_rank", "8"]],
)
def test_other_flags_and_other_verbs_are_left_to_the_parser(words, capsys):
    assert main(words) == 2 and "No such option" in capsys.readouterr().err


def test_every_name_leads_to_a_place_once_and_is_no_key_of_the_recipe():
    names = [(name, entry.place) for entry in TABLE for name in entry.names.split()]
    assert len(names) == len(set(names)) and not set(ENTRIES) & set(Recipe.model_fields)


def test_every_pointer_leads_to_a_key_of_the_recipe():
    for place in {entry.place for entry in TABLE} - {None, "--out", "--resume", "--deepspeed"}:
        part, _, key = place.partition(".")
        types = {"adaptation": ["full", "features", "qlora"], "objective": ["sft", "dpo", "kto", "classify", "ppo", "grpo"]}.get(
            part, [""]
        )
        overrides = [[f"{part}.type={name}"] if name and key else [] for name in types]
        messages = [refused(*given, f"{place}={{no: {{value: 1}}}}") for given in overrides]
        unknown = (f"unknown key `{place}`", f"`{place}` belongs to")
        assert any(not any(words in message for words in unknown) for message in messages), (place, messages)
