"""Translate values that are written as in other programs to values of a recipe; see ``foreign_keys``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tunesmith.train.train_config import TRACKERS

Given = Mapping[str, object]
"""Maps every key of the recipe, at any depth, to its value."""


class Unset:
    """Marks a key that the user should leave out, because tunesmith behaves in that way by default."""


LEAVE_OUT = Unset()

Translate = Callable[[object, Given], object]
"""Maps (value, all keys) to the recipe's value; None = no translation, LEAVE_OUT = the key is not needed."""


PER_DEVICE = ("per_device_train_batch_size", "micro_batch_size", "per_gpu_train_batch_size")


def same(value: object, given: Given) -> object:
    return value


def unknown(value: object, given: Given) -> object:
    return None


def if_true(wanted: object) -> Translate:
    """Translate true to ``wanted``, and false to LEAVE_OUT."""
    return lambda value, given: wanted if value is True else LEAVE_OUT if value in (False, None) else None


def one_of(values: Mapping[object, object]) -> Translate:
    def translate(value: object, given: Given) -> object:
        key = value.strip().lower() if isinstance(value, str) else value
        return values.get(key) if isinstance(key, str | int | float | None) else None

    return translate


def rows_per_step(value: object, given: Given) -> object:
    rows = next((given[name] for name in PER_DEVICE if is_count(given.get(name))), None)
    steps = given.get("gradient_accumulation_steps", 1)
    return rows * steps if isinstance(rows, int) and isinstance(steps, int) and is_count(steps) else None


def is_count(value: object) -> bool:
    return type(value) is int and value > 0


def symmetric(value: object, given: Given) -> object:
    """Translate ``[-10, 10]`` to 10; limits of other sizes to nothing."""
    low, high = value if isinstance(value, list | tuple) and len(value) == 2 else (None, None)
    return high if isinstance(high, int | float) and low == -high else None


def sources(value: object, given: Given) -> object:
    """Translate ``x.json`` and Axolotl's ``[{path: x.json, type: alpaca}]`` to ``[{path: x.json}]``."""
    listed = value if isinstance(value, list) else value.split(",") if isinstance(value, str) else []
    paths = [one.get("path") if isinstance(one, dict) else one for one in listed]
    return [{"path": path.strip()} for path in paths if isinstance(path, str) and path.strip()] or None


def path(value: object, given: Given) -> object:
    listed = sources(value, given)
    return listed[0]["path"] if isinstance(listed, list) and len(listed) == 1 else None


def modules(value: object, given: Given) -> object:
    if isinstance(value, str):
        names = [name.strip() for name in value.split(",")]
        return "all-linear" if names in (["all"], ["all-linear"], ["all_linear"]) else names
    return value if isinstance(value, list) else None


def share(value: object, given: Given) -> object:
    return value if isinstance(value, int | float) and 0 <= value < 1 else None


def warmup(value: object, given: Given) -> object:
    return value if isinstance(value, int | float) and value >= 0 else None


def every(value: object, given: Given) -> object:
    """Translate the strategy ``epoch``. For the strategy ``steps``, another key has the number of steps."""
    return "epoch" if str(value).lower() == "epoch" else None


def betas(value: object, given: Given) -> object:
    first, second = given.get("adam_beta1", 0.9), given.get("adam_beta2", 0.999)
    eps = {"eps": given["adam_epsilon"]} if "adam_epsilon" in given else {}
    return {"type": "adamw", "betas": [first, second], **eps}


def schedule(value: object, given: Given) -> object:
    name = next((given[key] for key in ("lr_scheduler_type", "lr_scheduler") if key in given), "linear")
    return {"type": name, **value} if isinstance(value, dict) and value else LEAVE_OUT


def adapter_init(value: object, given: Given) -> object:
    return "pissa" if value is True else LEAVE_OUT


OPTIMIZERS: Mapping[object, object] = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_hf", "adamw_torch_fused", "adamw_32bit"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw", "paged_adamw_32bit"), "paged_adamw"), "paged_adamw_8bit": "paged_adamw_8bit",
    **dict.fromkeys(("lion", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"), "lion"),
    "adafactor": "adafactor", "sgd": "sgd",
}  # fmt: skip
DTYPES: Mapping[object, object] = {
    "bfloat16": "bf16", "bf16": "bf16", "torch.bfloat16": "bf16", "float16": "fp16", "fp16": "fp16", "half": "fp16",
    "torch.float16": "fp16", "float32": "fp32", "fp32": "fp32", "float": "fp32", "torch.float32": "fp32", "auto": "auto",
    "no": "fp32",
}  # fmt: skip
STAGES: Mapping[object, object] = {
    "pt": "cpt", "pretrain": "cpt", "pretraining": "cpt", "clm": "cpt", "completion": "cpt", "instruct": "sft", "chat": "sft",
    "rm": "reward", "reward_model": "reward", "reward_modeling": "reward", "rlhf_dpo": "dpo", "bradley_terry": "reward",
    "sequence_classification": "classify", "text-classification": "classify", "seq_cls": "classify",
    "token-classification": "tag", "ner": "tag", "question-answering": "qa", "squad": "qa",
    **{name: name for name in ("sft", "cpt", "dpo", "kto", "reward", "ppo", "grpo")},
    "rloo": {"type": "grpo", "advantage": "rloo"}, "dr_grpo": {"type": "grpo", "advantage": "dr_grpo"},
    **{loss: {"type": "dpo", "loss_type": loss} for loss in ("orpo", "simpo", "ipo")},
}  # fmt: skip
KL_ESTIMATORS: Mapping[object, object] = {"kl": "k1", "mse": "k2"}
SCALES: Mapping[object, object] = {True: "grpo", "group": "grpo", False: "dr_grpo", "none": "dr_grpo"}
AGGREGATIONS: Mapping[object, object] = {
    "grpo": "sequence", "dapo": "token", "bnpo": "token", "dr_grpo": "constant"
}  # fmt: skip
INT8 = {"type": "qlora", "quant_type": "int8"}
BITS: Mapping[object, object] = {
    True: "qlora",
    4: "qlora",
    8: INT8,
    False: LEAVE_OUT,
    16: LEAVE_OUT,
    None: LEAVE_OUT,
}
METHODS: Mapping[object, object] = {
    "none": "full", "freeze": "features", "frozen": "features", "linear_probe": "features", "adapters": "bottleneck",
    "houlsby": "bottleneck", "p_tuning": "prompt", "ptuning": "prompt", "prompt_tuning": "prompt", "prefix_tuning": "prefix",
    "dora": {"type": "lora", "use_dora": True}, "rslora": {"type": "lora", "use_rslora": True},
    "pissa": {"type": "lora", "init_lora_weights": "pissa"},
    **{name: name for name in ("full", "lora", "qlora", "ia3")},
}  # fmt: skip


def held_out(value: object, given: Given) -> object:
    """Translate ``data.eval: x.json`` and ``data.eval: 0.1`` to mappings with ``path`` and ``fraction``."""
    if isinstance(value, str):
        return {"path": value}
    return {"fraction": value} if isinstance(value, float) and 0 <= value < 1 else None


def patterns(key: str, default: int) -> Translate:
    """Merge peft's mapping of patterns with ``given[key]``, the number for all other layers."""
    return lambda value, given: (
        {"default": given.get(key, default), **value} if isinstance(value, dict) else None
    )


def reporters(value: object, given: Given) -> object:
    if value in (None, False, "none", "None", []):
        return LEAVE_OUT
    names = value if isinstance(value, list) else [value]
    return names if all(name in TRACKERS for name in names) else None


VALUES: Mapping[str, Translate] = {
    "train.packing": one_of({True: "auto", False: "off"}),
    "train.precision": one_of(DTYPES),
    "train.optim": one_of(OPTIMIZERS),
    "train.report_to": reporters,
    "train.max_steps": lambda value, given: LEAVE_OUT if value in (-1, 0) else None,
    "data.train": sources,
    "data.eval": held_out,
    "adaptation.target_modules": modules,
    "adaptation.modules_to_save": modules,
    "add_tokens": lambda value, given: [value] if isinstance(value, str) else None,
    "adapter": one_of(METHODS),
    "objective": one_of(STAGES),
    "adaptation": one_of(METHODS),
}  # fmt: skip
"""Maps a key of the recipe to the translation of its value."""


def value_here(key: str, value: object) -> tuple[str, object]:
    """Return the recipe's key and value for a ``value`` in another program's form; None = no translation."""
    translate = VALUES.get(key, unknown)
    return "adaptation" if key == "adapter" else key, translate(value, {})
