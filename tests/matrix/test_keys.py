"""Every key of a recipe does something: a tiny run with it and one without differ where the key says they do (no dead options)."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from tests import recipe_keys
from tests.runs import history, judged, model_folder, preferences, questions, recipe, tagged
from tests.tiny import CHATML
from tunesmith.data.data_config import Source
from tunesmith.data.read import hub_set
from tunesmith.errors import TunesmithError
from tunesmith.hub import local_store
from tunesmith.models.heads import lm_head
from tunesmith.runs import assessment, metrics_file

LOSS = lm_head.lm_loss


@dataclass(frozen=True)
class Case:
    """``key`` set to ``value`` on top of ``base`` changes what is ``seen``. Paths are dotted; a number is a place in a list."""

    key: str
    value: Any
    seen: str
    base: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    """Optional packages."""

    def __str__(self) -> str:
        return self.key


LORA = {"adaptation": {"type": "lora", "r": 4, "lora_alpha": 8}}
FEATURES = {"adaptation": {"type": "features"}}
BOTTLENECK = {"adaptation": {"type": "bottleneck", "bottleneck_size": 4}}
PREFIX = {"adaptation": {"type": "prefix", "num_virtual_tokens": 4}}
PROJECTED = {"adaptation": {**PREFIX["adaptation"], "prefix_projection": True}}
PROMPT = {"adaptation": {"type": "prompt"}}
WORDS = {
    "adaptation": {"type": "prompt", "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "the fox", "num_virtual_tokens": 4}
}
QLORA = {"adaptation": {"type": "qlora", "r": 4}}
EVAL = {"data.eval": {"fraction": 0.3}}
ANSWERS = {"data.eval": {"fraction": 0.3, "generate": {"rows": 1, "max_new_tokens": 6, "metrics": ["length", "chrf"]}}}
CLASSIFY = {"objective": {"type": "classify"}, "data.train.0.path": "LABELLED", "samples": None}
TAG = {"objective": {"type": "tag"}, "data.train.0.path": "TAGGED", "samples": None, "train.max_length": 9}
QA = {"objective": {"type": "qa", "window": 32, "stride": 0}, "data.train.0.path": "QUESTIONS", "samples": None}
DPO = {"objective": {"type": "dpo"}, "data.train.0.path": "PREFERENCES"}
KTO = {"objective": {"type": "kto"}, "data.train.0.path": "JUDGED"}
CHARACTERS = [{"type": "length", "target": 4, "unit": "characters"}]
GROUPS = {"type": "grpo", "num_generations": 5, "max_new_tokens": 4, "rewards": CHARACTERS}
GRPO = {"objective": GROUPS}
TWICE = {"objective": {**GROUPS, "update_epochs": 2}}
VALUED = {"type": "ppo", "max_new_tokens": 4, "rewards": CHARACTERS, "update_epochs": 1}
PPO = {"objective": VALUED}
PASSES = {"objective": {**VALUED, "update_epochs": 4}}
REWARD = {"objective": {"type": "reward"}, "data.train.0.path": "PREFERENCES", "samples": None}
FIELDS = {"format": "question_answer", "columns": {"question": "prompt", "answer": "completion"}}

CASES = [
    Case("model", "OTHER", "weights"),
    Case("adapter", "merge", "weights", {**LORA, "model": "ADAPTER", "adapter": "new"}),
    Case("seed", 1, "history"),
    Case("objective", "cpt", "error"),
    Case("objective.train_on", "all", "history", {"objective": {"type": "sft"}}),
    Case("objective.expand_turns", True, "data", {"objective": {"type": "sft"}, "data.train.0.path": "CHATS"}),
    Case("objective.overlong", "drop", "error", {"objective": {"type": "sft"}, "train.max_length": 16}),
    Case("objective.overlong", "truncate", "data", {"objective": {"type": "cpt"}, "data.train.0.path": "TEXTS", "train.max_length": 9}),
    Case("objective.problem_type", "multi_label_classification", "history", CLASSIFY),
    Case("objective.class_weights", "balanced", "history", CLASSIFY),
    Case("objective.label_smoothing", 0.2, "history", CLASSIFY),
    Case("objective.pooling", "mean", "history", CLASSIFY),
    Case("objective.labels", ["O", "B-LOC", "I-LOC", "B-PER"], "parameters", TAG),
    Case("objective.label_all", True, "history", TAG),
    Case("objective.stride", 3, "history", TAG),
    Case("objective.window", 384, "history", QA),
    Case("objective.stride", 12, "history", {**QA, "objective": {**QA["objective"], "max_answer_tokens": 1}}),
    Case("objective.max_answer_tokens", 2, "history", QA),
    Case("objective.loss_type", "hinge", "history", DPO),
    Case("objective.beta", 0.5, "history", DPO),
    Case("objective.label_smoothing", 0.2, "history", DPO),
    Case("objective.simpo_gamma", 1.5, "history", {**DPO, "objective": {"type": "dpo", "loss_type": "simpo"}}),
    Case("objective.overlong", "error", "error", {**DPO, "train.max_length": 12}),
    Case("objective.loss_type", "apo_zero_unpaired", "history", KTO),
    Case("objective.beta", 0.5, "history", KTO),
    Case("objective.desirable_weight", 1.5, "history", KTO),
    Case("objective.undesirable_weight", 1.5, "history", KTO),
    Case("objective.overlong", "error", "error", {**KTO, "train.max_length": 12}),
    Case("objective.rewards", [{"type": "length", "target": 9, "unit": "characters"}], "history", GRPO),
    Case("objective.num_generations", 10, "history", {"objective": {**GROUPS, "rollout_batch_size": 1}}),
    Case("objective.rollout_batch_size", 2, "history", GRPO),
    Case("objective.update_epochs", 2, "history", GRPO),
    Case("objective.max_new_tokens", 6, "history", GRPO),
    Case("objective.temperature", 0.5, "history", GRPO),
    Case("objective.top_p", 0.5, "history", GRPO),
    Case("objective.overlong", "drop", "error", {**GRPO, "train.max_length": 14}),
    Case("objective.advantage", "dr_grpo", "history", GRPO),
    Case("objective.loss_aggregation", "constant", "history", GRPO),
    Case("objective.clip_range", 0.001, "history", TWICE),
    Case("objective.clip_range_high", 0.001, "history", TWICE),
    Case("objective.beta", 0.5, "history", TWICE),
    Case("objective.use_kl_in_reward", True, "history", {"objective": {**TWICE["objective"], "beta": 0.5}}),
    Case("objective.resample", 1, "history", {"objective": {**GROUPS, "rewards": [{"type": "length", "max": 9}]}}),
    Case("objective.kl_coef", 0.5, "history", PPO),
    Case("objective.kl_estimator", "k3", "history", PPO),
    Case("objective.target_kl", 6.0, "history", PPO),
    Case("objective.horizon", 10.0, "history", {"objective": {**VALUED, "target_kl": 6.0}}),
    Case("objective.gamma", 0.5, "history", PPO),
    Case("objective.gae_lambda", 0.0, "history", PPO),
    Case("objective.clip_range_value", 1e-4, "history", PASSES),
    Case("objective.vf_coef", 1.0, "history", PPO),
    Case("objective.entropy_coef", 0.1, "history", PPO),
    Case("objective.value_stop_gradient", True, "history", PPO),
    Case("objective.whiten_advantages", False, "history", PPO),
    Case("objective.missing_eos_penalty", 9.0, "history", PPO),
    Case("objective.reward_normalization", "std", "history", PPO),
    Case("objective.reward_clip", 0.5, "history", PPO),
    Case("objective.early_stop_kl", 1e-9, "history", PASSES),
    Case("objective.margin", True, "error", REWARD),
    Case("objective.center_rewards_coefficient", 0.1, "history", REWARD),
    Case("objective.overlong", "error", "error", {**REWARD, "train.max_length": 12}),
    Case("adaptation", "lora", "files"),
    Case("adaptation.r", 2, "parameters", LORA),
    Case("adaptation.lora_alpha", 2, "weights", LORA),
    Case("adaptation.lora_dropout", 0.5, "history", LORA),
    Case("adaptation.target_modules", ["q_proj"], "parameters", LORA),
    Case("adaptation.use_rslora", True, "history", LORA),
    Case("adaptation.use_dora", True, "parameters", LORA),
    Case("adaptation.bias", "all", "parameters", {**LORA, "model": "GPT2"}),
    Case("adaptation.modules_to_save", ["lm_head"], "parameters", {**LORA, "model": "UNTIED"}),
    Case("adaptation.train_last", 1, "parameters", FEATURES),
    Case("adaptation.target_modules", ["lm_head"], "parameters", FEATURES),
    Case("adaptation.variant", "houlsby", "parameters", BOTTLENECK),
    Case("adaptation.bottleneck_size", 6, "parameters", BOTTLENECK),
    Case("adaptation.reduction_factor", 8, "parameters", {"adaptation": {"type": "bottleneck"}}),
    Case("adaptation.non_linearity", "tanh", "history", BOTTLENECK),
    Case("adaptation.dropout", 0.5, "history", BOTTLENECK),
    Case("adaptation.num_virtual_tokens", 3, "parameters", PREFIX),
    Case("adaptation.prefix_projection", True, "parameters", PREFIX),
    Case("adaptation.encoder_hidden_size", 7, "parameters", PROJECTED),
    Case("adaptation.prompt_tuning_init", "RANDOM", "history", PROMPT),
    Case("adaptation.prompt_tuning_init_text", "a lazy dog", "history", WORDS),
    Case("adaptation.init_lora_weights", "pissa", "history", LORA),
    Case("adaptation.r", {"default": 4, "q_proj": 2}, "parameters", LORA),
    Case("adaptation.lora_alpha", {"default": 8, "q_proj": 2}, "weights", LORA),
    Case("adaptation.layers_to_transform", [1], "parameters", LORA),
    Case("adaptation.quant_type", "fp4", "history", QLORA, needs=("bitsandbytes",)),
    Case("adaptation.use_double_quant", False, "quantization", QLORA, needs=("bitsandbytes",)),
    Case("data.train", [{"path": "OTHER_ROWS"}], "data"),
    Case("data.train.0.path", "OTHER_ROWS", "data"),
    Case("data.train.0.split", "test", "data", {"data.train.0.path": "hub:some/data"}),
    Case("data.train.0.name", "other", "data", {"data.train.0.path": "hub:some/data"}),
    Case("data.train.0.streaming", True, "error", {"data.train.0.path": "hub:some/data", "data.cache": True}),
    Case("data.train.0.format", "question_answer", "error"),
    Case("data.train.0.columns", FIELDS["columns"], "data"),
    Case("data.train.0.separator", "|", "error", {"objective": "classify", "data.train.0.path": "MARKED", "samples": None}),
    Case("data.train.0.prompt_template", "Q: {prompt} A:", "weights"),
    Case("data.train.0.weight", 0.5, "steps", {"train.max_steps": None}),
    Case("data.train.0.limit", 6, "data"),
    Case("data.eval", {"fraction": 0.4}, "data"),
    Case("data.eval.fraction", 0.5, "data", EVAL),
    Case("data.eval.limit", 1, "data", EVAL),
    Case("data.eval.path", "OTHER_ROWS", "data", {"data.eval": {}}),
    Case("data.eval.sets", {"others": {"path": "OTHER_ROWS"}}, "data", {"data.eval": {}}),
    Case("data.template", "roles", "weights", {"data.train.0.path": "CHATS"}),
    Case("data.template_kwargs", {"tone": "kind"}, "weights", {"data.train.0.path": "CHATS", "data.template": "TONED"}),
    Case("data.special_tokens", "error", "error", {"data.train.0.path": "TYPED"}),
    Case("data.train.0.numbers_as_text", True, "error", {"data.train.0.path": "NUMBERS"}),
    Case("adaptation.loraplus_lr_ratio", 16.0, "weights", LORA),
    Case("data.bad_rows", "skip", "error", {"data.train.0.path": "BAD"}),
    Case("data.max_unlearnable", 1.0, "error", {"data.train.0.path": "EMPTY", "train.max_length": 14, "objective": {"type": "sft", "overlong": "truncate"}}),
    Case("data.cache", True, "cache"),
    Case("train.learning_rate", 3e-3, "weights"),
    Case("train.epochs", 2.0, "steps", {"train.max_steps": None}),
    Case("train.max_steps", 2, "steps"),
    Case("train.max_minutes", 0.001, "steps"),
    Case("train.batch_size", 3, "weights"),
    Case("train.micro_batch_tokens", 40, "passes"),
    Case("train.max_length", 30, "error", {"data.train.0.path": "CHATS"}),
    Case("train.shuffle", False, "history"),
    Case("train.packing", "off", "route"),
    Case("train.precision", "bf16", "precision"),
    Case("train.gradient_checkpointing", True, "kept"),
    Case("train.torch_compile", True, "error"),
    Case("train.neftune_noise_alpha", 5.0, "history"),
    Case("train.optim", "sgd", "weights"),
    Case("train.optim", {"type": "adamw", "betas": [0.5, 0.9]}, "weights", {"train.optim": "adamw"}),
    Case("train.head_learning_rate", 1e-4, "weights", {"model": "UNTIED"}),
    Case("train.lr_scheduler_type", "constant", "history"),
    Case("train.lr_scheduler_type", {"type": "polynomial", "lr_end": 1e-3}, "history", {"train.lr_scheduler_type": "polynomial"}),
    Case("train.warmup_ratio", 0.5, "history"),
    Case("train.warmup_steps", 2, "history"),
    Case("train.weight_decay", 0.5, "weights"),
    Case("train.max_grad_norm", 0.01, "weights"),
    Case("train.logging_steps", 2, "history"),
    Case("train.eval_steps", 1, "history", EVAL),
    Case("train.save_steps", 1, "files"),
    Case("train.save_total_limit", 1, "files", {"train.save_steps": 1, "train.save_total_limit": 3}),
    Case("train.metric_for_best_model", "no_such_figure", "error", EVAL),
    Case("train.early_stopping_patience", 1, "steps", {**EVAL, "train.eval_steps": 1, "train.learning_rate": 5.0, "train.max_steps": 8}),
    Case("train.early_stopping_threshold", 10.0, "steps", {**EVAL, "train.eval_steps": 1, "train.early_stopping_patience": 1, "train.max_steps": 8}),
    Case("train.report_to", ["tensorboard"], "files", needs=("tensorboard",)),
    Case("task", "summarise", "history", EVAL),
    Case("data.eval.generate", {"rows": 2, "max_new_tokens": 4}, "history", EVAL),
    Case("data.eval.generate.rows", 2, "held_out", ANSWERS),
    Case("data.eval.generate.max_new_tokens", 2, "history", ANSWERS),
    Case("data.eval.generate.metrics", ["rougeL"], "history", ANSWERS),
    Case("data.eval.generate.folder", "elsewhere", "error", {"data.eval": {"fraction": 0.3, "generate": {"metrics": ["nowhere_module:f"]}}}),
    Case("samples.prompts", ["hello"], "samples", {**EVAL, "samples": {}}),
    Case("samples.count", 2, "samples", EVAL),
    Case("samples.max_new_tokens", 2, "samples", {**EVAL, "model": "GPT2", "samples": {"prompts": ["the quick brown"], "max_new_tokens": 9}}),
    Case("add_tokens", ["<tool>"], "weights"),
    Case("device_map", {"": 7}, "error"),
    Case("trust_remote_code", True, "error"),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the words in capitals stand for."""
    folder = tmp_path_factory.mktemp("places")

    def file(name, rows):
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return str(path)

    def chat(n):
        return [
            {"role": role, "content": f"{text} {n}"}
            for role, text in (("user", "what is"), ("assistant", "Paris"), ("user", "the capital"), ("assistant", "a lazy dog"))
        ]

    def pulled(rows, **keys):
        """A split of a data set of the Hub, as ``data pull`` leaves it."""
        source = Source(path="hub:some/data", **keys)
        room = local_store.partial(hub_set.store_folder(source), "a" * 40, 0)
        (room / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        local_store.install(
            room, hub_set.store_folder(source), source.label, {"revision": "a" * 40, "data_files": ["rows.jsonl"], **keys}
        )

    pairs = [{"prompt": f"question {n}: what", "completion": f" answer {n} fox"} for n in range(12)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_HOME", str(folder))
        for count, keys in enumerate(({}, {"split": "test"}, {"name": "other"})):
            pulled(pairs[count:], **keys)
    toned = str(folder / "toned.jinja")
    Path(toned).write_text(CHATML.replace("message['role'] +", "message['role'] + (tone | default('')) +"))
    (folder / "other").mkdir()
    adapter = recipe(folder, adaptation=LORA["adaptation"])
    outcome = tunesmith.train(adapter, out=folder / "adapter")
    return {
        "DATASETS": str(folder / "datasets"),
        "OTHER": str(model_folder(folder / "other", "llama", num_hidden_layers=1)),
        "GPT2": str(model_folder(folder, "gpt2")),
        "UNTIED": str(model_folder(folder, "qwen3", tie_word_embeddings=False)),
        "ADAPTER": outcome["model_dir"],
        "CHATS": file("chats", [{"messages": chat(n)} for n in range(12)]),
        "TONED": toned,
        "TYPED": file(
            "typed", [{"messages": [*chat(n)[:1], {"role": "assistant", "content": f"<|im_end|> {n}"}]} for n in range(8)]
        ),
        "NUMBERS": file("numbers", [{"prompt": f"the fox {n}", "completion": n} for n in range(8)]),
        "TEXTS": file("texts", [{"text": f"the quick brown fox jumps over the lazy dog {n}"} for n in range(8)]),
        "MARKED": file("marked", [{"text": f"the fox {n}", "labels": "a|b" if n % 2 else "a"} for n in range(12)]),
        "LABELLED": file("labelled", [{"text": f"the fox {n}", "label": "b" if n % 4 == 0 else "a"} for n in range(12)]),
        "TAGGED": file("tagged", tagged(12)),
        "QUESTIONS": file("questions", questions(12)),
        "PREFERENCES": file("preferences", preferences(12)),
        "JUDGED": file("judged", judged(12)),
        "OTHER_ROWS": file("others", pairs),
        "BAD": file("bad", [*pairs, {"prompt": 3, "completion": None}]),
        "EMPTY": file("empty", [*pairs[:4], *[{"prompt": "a long question " * 9, "completion": " x"} for _ in range(6)]]),
    }


def put(made: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted key; None takes it away."""
    *parents, last = path.split(".")
    node: Any = made
    for part in parents:
        node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
    if value is None:
        node.pop(last, None)
    else:
        node[last] = value


def filled(value: Any, places: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: filled(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, places) for item in value]
    return places.get(value, value) if isinstance(value, str) else value


def observe(made: dict[str, Any], folder: Path, datasets: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Everything a user could see of a run, by name. ``datasets``: what was pulled before."""
    home = folder / "home"
    shutil.copytree(datasets, home / "datasets")
    monkeypatch.setenv("TUNESMITH_HOME", str(home))
    passes, kept = [], []

    def loss(model, batch):
        if not model.training:
            return LOSS(model, batch)
        passes.append(tuple(batch["input_ids"].shape))
        sizes = []

        def note(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            value = LOSS(model, batch)
        kept.append(sum(sizes))
        return value

    monkeypatch.setattr(lm_head, "lm_loss", loss)
    run = folder / "run"
    try:
        outcome = tunesmith.train(made, out=run)
    except TunesmithError as error:
        return {"error": f"{type(error).__name__}: {error}".replace(str(folder), "")}
    manifest = json.loads((run / "manifest.json").read_text())
    model = {path.name: path for path in (run / "model").glob("*.safetensors")}
    report = manifest["data"]
    return {
        "error": None,
        "weights": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in model.items()},
        "files": sorted(_stable(path.relative_to(run)) for path in run.rglob("*") if path.is_file()),
        "history": history(run),
        "steps": outcome["steps"],
        "parameters": (outcome["trainable_parameters"], outcome["total_parameters"]),
        "samples": metrics_file.read(run / "samples.jsonl"),
        "held_out": assessment.read(run),
        "data": [(one["sha256"], one["rows_kept"], one["format"]) for one in report["sources"]]
        + [report["train"], report["eval"]],
        "route": manifest["route"],
        "precision": manifest["precision"],
        "quantization": manifest["quantization"],
        "passes": passes,
        "kept": sum(kept),
        "cache": sorted(path.name for path in home.rglob("*") if path.is_file()),
    }


def _stable(path: Path) -> str:
    """A tracker puts the time and the machine into its file names."""
    return str(path.parent if "tfevents" in path.name else path)


@pytest.fixture(scope="module")
def baselines():
    """What was observed of a recipe without the key of a case: base -> (folder of the run, observation)."""
    return {}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_key_changes_what_it_says(case, places, baselines, tmp_path_factory, monkeypatch):
    for package in case.needs:
        pytest.importorskip(package)
    base = json.dumps(case.base, sort_keys=True)
    if base not in baselines:
        folder = tmp_path_factory.mktemp("baseline")
        made = recipe(folder)
        for key, value in case.base.items():
            put(made, key, filled(value, places))
        with monkeypatch.context() as patch:
            baselines[base] = made, observe(made, folder / "without", places["DATASETS"], patch)
    made, without = baselines[base]
    changed = copy.deepcopy(made)
    put(changed, case.key, filled(case.value, places))
    with monkeypatch.context() as patch:
        with_key = observe(changed, tmp_path_factory.mktemp("with"), places["DATASETS"], patch)
    if case.seen != "error":
        assert not without["error"] and not with_key["error"], (without["error"], with_key["error"])
    assert without.get(case.seen) != with_key.get(case.seen), f"{case.key} changed nothing of {case.seen}"


def test_no_key_is_left_out():
    covered = {case.key for case in CASES}
    expected = {
        *(recipe_keys.ROOT - {"data", "train", "samples"}),
        *(f"data.{key}" for key in recipe_keys.DATA),
        *(f"data.train.0.{key}" for key in recipe_keys.SOURCE),
        *(f"data.eval.{key}" for key in recipe_keys.EVAL),
        *(f"data.eval.generate.{key}" for key in recipe_keys.GENERATE),
        *(f"train.{key}" for key in recipe_keys.TRAIN),
        *(f"samples.{key}" for key in recipe_keys.SAMPLES),
        *(f"objective.{key}" for keys in recipe_keys.OBJECTIVES.values() for key in keys),
        *(f"adaptation.{key}" for keys in recipe_keys.ADAPTATIONS.values() for key in keys),
    }
    assert covered == expected
