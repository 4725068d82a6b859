"""Every key a recipe may hold. A new key is a new promise: it is added here on purpose, with a test that it does something."""

ROOT = {
    "model",
    "adapter",
    "add_tokens",
    "device_map",
    "trust_remote_code",
    "task",
    "objective",
    "adaptation",
    "data",
    "train",
    "samples",
    "seed",
}

DATA = {"train", "eval", "template", "template_kwargs", "special_tokens", "bad_rows", "max_unlearnable", "cache"}
SOURCE = {
    "path",
    "split",
    "name",
    "streaming",
    "format",
    "columns",
    "separator",
    "prompt_template",
    "numbers_as_text",
    "weight",
    "limit",
}
EVAL = {"fraction", "limit", "path", "sets", "generate"}  # each set is a SOURCE
GENERATE = {"rows", "max_new_tokens", "metrics", "folder"}

TRAIN = {
    "learning_rate", "epochs", "max_steps", "max_minutes", "batch_size", "micro_batch_tokens", "max_length", "shuffle", "packing", "precision",
    "lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
    "metric_for_best_model", "early_stopping_patience", "early_stopping_threshold", "gradient_checkpointing", "neftune_noise_alpha", "optim",
    "head_learning_rate", "report_to", "torch_compile",
}  # fmt: skip
SAMPLES = {"prompts", "count", "max_new_tokens"}

OBJECTIVES = {
    "sft": {"train_on", "expand_turns", "overlong"},
    "cpt": {"overlong"},
    "tag": {"labels", "label_all", "stride"},
    "qa": {"window", "stride", "max_answer_tokens"},
    "dpo": {"loss_type", "beta", "label_smoothing", "simpo_gamma", "overlong"},
    "kto": {"loss_type", "beta", "desirable_weight", "undesirable_weight", "overlong"},
    "grpo": {
        "rewards",
        "num_generations",
        "rollout_batch_size",
        "update_epochs",
        "max_new_tokens",
        "temperature",
        "top_p",
        "overlong",
        "advantage",
        "loss_aggregation",
        "clip_range",
        "clip_range_high",
        "beta",
        "use_kl_in_reward",
        "resample",
    },
    "ppo": {
        "rewards",
        "num_generations",
        "rollout_batch_size",
        "update_epochs",
        "max_new_tokens",
        "temperature",
        "top_p",
        "overlong",
        "kl_coef",
        "kl_estimator",
        "target_kl",
        "horizon",
        "gamma",
        "gae_lambda",
        "clip_range",
        "clip_range_value",
        "vf_coef",
        "entropy_coef",
        "value_stop_gradient",
        "whiten_advantages",
        "missing_eos_penalty",
        "reward_normalization",
        "reward_clip",
        "early_stop_kl",
    },
    "reward": {"margin", "center_rewards_coefficient", "overlong"},
    "classify": {"problem_type", "labels", "class_weights", "label_smoothing", "pooling", "overlong"},
}
ADAPTATIONS = {
    "full": set(),
    "features": {"train_last", "target_modules"},
    "bottleneck": {"variant", "bottleneck_size", "reduction_factor", "non_linearity", "dropout", "modules_to_save"},
    "ia3": set(),
    "lora": {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "use_rslora",
        "use_dora",
        "bias",
        "modules_to_save",
        "loraplus_lr_ratio",
        "init_lora_weights",
        "layers_to_transform",
    },
    "prefix": {"num_virtual_tokens", "prefix_projection", "encoder_hidden_size"},
    "prompt": {"num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text"},
}
ADAPTATIONS["qlora"] = ADAPTATIONS["lora"] | {"quant_type", "use_double_quant"}

EITHER_OR = [
    ("epochs", "max_steps"),
    ("warmup_ratio", "warmup_steps"),
    ("prompts", "count"),
    ("fraction", "path"),
    ("device_map", "adapter"),
    ("device_map", "torch_compile"),
    ("torch_compile", "lora_dropout"),
    ("torch_compile", "dropout"),
    ("use_dora", "init_lora_weights"),
    ("trust_remote_code", "add_tokens"),
    ("path", "sets"),
    ("fraction", "sets"),
    ("streaming", "cache"),
    ("expand_turns", "train_on"),
    ("separator", "label_smoothing"),
    ("label_smoothing", "simpo_gamma"),
    ("desirable_weight", "undesirable_weight"),
]
"""Keys that no run can hold together: `recipe.conflicts`, or the part itself, refuses the pair."""

NO_TURNS = {"template": "data", "template_kwargs": "data", "special_tokens": "data"}
WRITES_NOTHING = {**NO_TURNS, "generate": "data.eval", "prompts": "samples", "count": "samples", "max_new_tokens": "samples"}
JUDGED = {"separator": "data.train.0", "max_unlearnable": "data", "neftune_noise_alpha": "train", "lora_dropout": "adaptation"}
IDLE = {
    "sft": {"separator": "data.train.0"},
    "cpt": {"separator": "data.train.0", "generate": "data.eval", **NO_TURNS},
    "classify": {**WRITES_NOTHING, "max_unlearnable": "data"},
    "tag": {**WRITES_NOTHING, "max_unlearnable": "data", "separator": "data.train.0"},
    "dpo": JUDGED,
    "kto": JUDGED,
    "grpo": JUDGED,
    "ppo": JUDGED,
    "reward": {**JUDGED, "generate": "data.eval", "prompts": "samples", "count": "samples", "max_new_tokens": "samples"},
    "qa": {**WRITES_NOTHING, "max_unlearnable": "data", "separator": "data.train.0"},
}
"""Keys of a part that an objective refuses, because they would do nothing."""
