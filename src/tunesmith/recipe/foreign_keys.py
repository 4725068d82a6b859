"""Translate the keys of other programs to keys of a recipe.

One table covers transformers (``TrainingArguments``), TRL, PEFT, bitsandbytes, LLaMA-Factory, Axolotl,
Unsloth and ms-swift; ``foreign_values`` translates their values. ``validation`` uses both for the errors of
unknown keys, wrong values and unknown command-line flags.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tunesmith.recipe.foreign_values import (
    AGGREGATIONS,
    BITS,
    DTYPES,
    INT8,
    KL_ESTIMATORS,
    LEAVE_OUT,
    METHODS,
    OPTIMIZERS,
    PER_DEVICE,
    SCALES,
    STAGES,
    Given,
    Translate,
    adapter_init,
    betas,
    every,
    if_true,
    is_count,
    modules,
    one_of,
    path,
    patterns,
    reporters,
    rows_per_step,
    same,
    schedule,
    share,
    sources,
    symmetric,
    unknown,
    warmup,
)


@dataclass(frozen=True)
class Pointer:
    """Translation of another program's key.

    ``place``: the recipe's key, or ``--flag`` of the command line; None = there is none, for the reason in
    ``note``. ``value``: None = not translated."""

    place: str | None
    value: object = None
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """``names``: keys of other programs, separated by spaces."""

    names: str
    place: str | None
    translate: Translate
    note: str = ""


STEP = "rows of one optimiser step: rows per device x accumulation x processes; train.micro_batch_tokens bounds the memory"
SHORTENED = "rows above it are an error, unless objective.overlong says otherwise"
ATTENTION = "the fastest attention that a check shows equal is chosen by itself"
BY_ITSELF = "this is done by itself"
LOCAL = "nothing is uploaded"

TABLE = (
    # the model
    Entry("model_name_or_path base_model model_name model_id model_path pretrained_model_name_or_path "
          "base_model_name_or_path",
          "model", same),
    Entry("adapter_name_or_path lora_model_dir peft_model_id adapter_path",
          "model", same, "a folder with an adapter; `adapter` says how to use it"),
    Entry("create_new_adapter", "adapter", if_true("new")),
    Entry("merge_lora merge_adapter", None, unknown, "type tunesmith merge RUN after training"),
    Entry("tokenizer tokenizer_name tokenizer_name_or_path tokenizer_type tokenizer_config model_type processor_type "
          "base_model_config",
          None, unknown, "tokenizer and classes are those of the model's folder"),
    Entry("special_tokens tokens new_special_tokens additional_special_tokens add_special_tokens",
          "add_tokens", lambda value, given: value if isinstance(value, list) else None),
    Entry("torch_dtype dtype compute_dtype mixed_precision bnb_4bit_compute_dtype", "train.precision", one_of(DTYPES)),
    Entry("bf16 bfloat16",
          "train.precision", lambda value, given: "bf16" if value is True else "auto" if value == "auto" else LEAVE_OUT),
    Entry("fp16 float16 half", "train.precision", if_true("fp16")),
    Entry("pure_bf16 tf32 bf16_full_eval fp16_full_eval", None, unknown, "train.precision chooses the number format"),
    Entry("load_in_4bit quantization_bit bits quantization_bits", "adaptation", one_of(BITS)),
    Entry("load_in_8bit", "adaptation", if_true(INT8)),
    Entry("quantization_config quantization_method quant_method",
          "adaptation", unknown, "qlora; its bits are set by adaptation.quant_type"),
    Entry("bnb_4bit_quant_type quantization_type", "adaptation.quant_type", same),
    Entry("bnb_4bit_use_double_quant use_bnb_nested_quant double_quantization", "adaptation.use_double_quant", same),
    Entry("flash_attention flash_attn flash_attn_2 use_flash_attention use_flash_attention_2 use_flash_attn "
          "attn_implementation attn_impl sdp_attention xformers_attention eager_attention s2_attention shift_attn",
          None, unknown, ATTENTION),
    Entry("use_liger_kernel enable_liger_kernel liger_kernel use_unsloth unsloth_lora_mlp unsloth_lora_qkv "
          "unsloth_lora_o lora_mlp_kernel lora_qkv_kernel lora_o_kernel cut_cross_entropy use_liger_loss",
          None, unknown, "fused layers are used where a check shows them equal"),
    Entry("use_cache", None, unknown, BY_ITSELF),
    # the method
    Entry("stage task_type rl rlhf_type rl_type trainer_type", "objective", one_of(STAGES)),
    Entry("finetuning_type train_type tuner_type sft_type peft_type peft_method tuning_method fine_tuning_type",
          "adaptation", one_of(METHODS)),
    Entry("use_peft use_lora peft",
          "adaptation", lambda value, given: "lora" if value is True else "full" if value is False else None),
    Entry("full_finetuning", "adaptation", if_true("full")),
    Entry("lora_r lora_rank rank lora_dim rank_dimension", "adaptation.r", same),
    Entry("alpha", "adaptation.lora_alpha", same),
    Entry("dropout lora_drop", "adaptation.lora_dropout", same),
    Entry("lora_target lora_target_modules target lora_modules peft_target_modules", "adaptation.target_modules", modules),
    Entry("lora_target_linear target_all_linear", "adaptation.target_modules", if_true("all-linear")),
    Entry("lora_modules_to_save additional_target", "adaptation.modules_to_save", modules),
    Entry("lora_bias", "adaptation.bias", same),
    Entry("rslora lora_use_rslora peft_use_rslora", "adaptation.use_rslora", same),
    Entry("dora lora_use_dora peft_use_dora", "adaptation.use_dora", same),
    Entry("pissa_init", "adaptation.init_lora_weights", adapter_init),
    Entry("peft_init_lora_weights", "adaptation.init_lora_weights", same),
    Entry("peft_layers_to_transform", "adaptation.layers_to_transform", same),
    Entry("rank_pattern", "adaptation.r", patterns("r", 8), "a mapping, such as {default: 8, PATTERN: 16}"),
    Entry("alpha_pattern", "adaptation.lora_alpha", patterns("lora_alpha", 16), "a mapping, such as {default: 16, PATTERN: 32}"),
    Entry("fan_in_fan_out lora_fan_in_fan_out inference_mode lora_task_type", None, unknown, BY_ITSELF),
    Entry("freeze_trainable_layers num_trainable_layers", "adaptation.train_last", same),
    # the loss
    Entry("pref_beta dpo_beta kto_beta rl_beta orpo_alpha orpo_beta orpo_lambda cpo_alpha", "objective.beta", same),
    Entry("pref_loss dpo_loss dpo_loss_type preference_loss", "objective.loss_type", same),
    Entry("dpo_label_smoothing label_smoothing_factor cdpo_label_smoothing rl_label_smoothing",
          "objective.label_smoothing", same),
    Entry("gamma", "objective.gamma", same),
    Entry("gamma gamma_beta_ratio cpo_simpo_gamma", "objective.simpo_gamma", same),
    Entry("kto_chosen_weight kto_desirable_weight", "objective.desirable_weight", same),
    Entry("kto_rejected_weight kto_undesirable_weight", "objective.undesirable_weight", same),
    Entry("train_on_inputs train_on_prompt",
          "objective.train_on", lambda value, given: "all" if value is True else "assistant" if value is False else None),
    Entry("completion_only_loss mask_history",
          "objective.train_on", lambda value, given: "completion" if value is True else None),
    Entry("assistant_only_loss", "objective.train_on", if_true("assistant")),
    Entry("roles_to_train train_on_responses_only response_template",
          "objective.train_on", unknown, "completion, assistant or all"),
    Entry("ref_model ref_model_path precompute_ref_log_probs reference_free disable_dropout sync_ref_model "
          "force_use_ref_model ref_adapter_name model_adapter_name ref_model_mixup_alpha ref_model_sync_steps",
          None, unknown, "the reference is the model before its first step, computed once"),
    Entry("max_completion_length response_length completion_length", "objective.max_new_tokens", same),
    Entry("max_prompt_length max_completion_length max_target_length truncation_mode truncation",
          "objective.overlong", unknown, "cuts only what train.max_length does not hold"),
    # sampled answers: PPO, GRPO, RLOO
    Entry("beta", "objective.beta", same),
    Entry("beta kl_coef init_kl_coef", "objective.kl_coef", same),
    Entry("kl_coef init_kl_coef", "objective.beta", same),
    Entry("kl_penalty", "objective.kl_estimator", one_of(KL_ESTIMATORS)),
    Entry("adap_kl_ctrl", "objective.target_kl", unknown, "a KL in nats; with it kl_coef is adapted"),
    Entry("ppo_target", "objective.target_kl", same),
    Entry("num_ppo_epochs ppo_epochs num_iterations mu", "objective.update_epochs", same),
    Entry("cliprange epsilon clip_epsilon clip_param eps_clip", "objective.clip_range", same),
    Entry("epsilon_high clip_range_max", "objective.clip_range_high", same),
    Entry("cliprange_value value_clip", "objective.clip_range_value", same),
    Entry("lam gae_lam", "objective.gae_lambda", same),
    Entry("value_loss_coef vf_loss_coef", "objective.vf_coef", same),
    Entry("normalize_advantages", "objective.whiten_advantages", same),
    Entry("scale_rewards normalize_advantages", "objective.advantage", one_of(SCALES), "grpo, rloo or dr_grpo"),
    Entry("loss_type", "objective.loss_aggregation", one_of(AGGREGATIONS), "token, sequence or constant"),
    Entry("loss_type", "objective.loss_type", same),
    Entry("whiten_rewards ppo_whiten_rewards normalize_reward ppo_score_norm use_score_scaling use_score_norm",
          "objective.reward_normalization", if_true("mean_std")),
    Entry("reward_clip_range", "objective.reward_clip", symmetric, "one limit for both directions"),
    Entry("reward_model reward_model_path reward_model_name_or_path", "objective.rewards",
          lambda value, given: [{"type": "model", "path": value}] if isinstance(value, str) else None),
    Entry("reward_funcs reward_fn reward_functions reward_processing_classes", "objective.rewards", unknown,
          "a list such as [{type: length, max: 30, unit: words}, {type: model, path: FOLDER}]"),
    Entry("reward_weights", "objective.rewards", unknown, "each reward of the list has its own weight"),
    Entry("rloo_k num_return_sequences num_samples_per_prompt group_size", "objective.num_generations", same),
    Entry("generation_batch_size steps_per_generation num_mini_batches ppo_buffer_size", "objective.rollout_batch_size",
          unknown, "prompts of an iteration, whose answers are divided into steps of train.batch_size answers"),
    Entry("mini_batch_size local_mini_batch_size", "train.batch_size", unknown, "answers of one optimiser step"),
    Entry("local_rollout_forward_batch_size", "train.micro_batch_tokens", unknown, "bounds the memory of every forward pass"),
    Entry("total_episodes num_total_batches", "train.max_steps", unknown,
          "optimiser steps; an episode is an answer, and a step has train.batch_size of them"),
    Entry("sft_model_path policy_model", "model", same),
    Entry("num_sample_generations num_completions_to_print", "samples.count", same),
    Entry("log_completions wandb_log_unique_prompts", None, unknown, "samples.jsonl and the report show answers"),
    Entry("use_vllm vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_guided_decoding_regex vllm_server_base_url "
          "vllm_server_host vllm_server_port vllm_server_timeout vllm_gpu_memory_utilization vllm_tensor_parallel_size "
          "vllm_device vllm_dtype vllm_max_model_len vllm_enable_prefix_caching vllm_importance_sampling_correction "
          "vllm_importance_sampling_cap gpu_memory_utilization use_transformers_paged cache_implementation "
          "ds3_gather_for_generation",
          None, unknown, "answers are sampled by an engine in the same process, with the weights of the step; "
          "vLLM answers for generate --engine alone"),
    Entry("generation_kwargs top_k min_p repetition_penalty do_sample", None, unknown,
          "answers are those of the policy itself: objective.temperature and objective.top_p are all that changes them"),
    Entry("stop_token stop_token_id", None, unknown, "an answer ends with the token that closes a turn of the template"),
    Entry("mask_truncated_completions delta importance_sampling_level top_entropy_quantile token_level_kl",
          None, unknown, "there is no such variant; objective.clip_range bounds the change of each token"),
    # the rows
    Entry("dataset datasets dataset_name dataset_path train_file train_data train_dataset training_data data_path "
          "data_files dataset_name_or_path train_files train_path",
          "data.train", sources),
    Entry("dataset_dir", "data.train", unknown, "paths are relative to the folder in which you type the command"),
    Entry("dataset_config dataset_config_name subset", "data.train.0.name", same),
    Entry("dataset_split dataset_train_split train_split", "data.train.0.split", same),
    Entry("dataset_format data_format dataset_type", "data.train.0.format", same),
    Entry("dataset_text_field text_column text_field",
          "data.train.0.columns", lambda value, given: {"text": value} if isinstance(value, str) else None),
    Entry("dataset_streaming", "data.train.0.streaming", same),
    Entry("interleave_probs mix_strategy mixing_ratio interleave_prob",
          "data.train.0.weight", unknown, "passes over a source in an epoch"),
    Entry("max_samples max_train_samples num_samples", "data.train.0.limit", same),
    Entry("eval_dataset val_dataset validation_file eval_file val_file test_file eval_path validation_data "
          "test_datasets eval_data_path",
          "data.eval.path", path),
    Entry("val_set_size val_size test_size validation_split_percentage split_dataset_ratio eval_split_ratio "
          "test_split_size validation_split validation_ratio",
          "data.eval.fraction", share, "a share below 1; data.eval.limit bounds the number of rows"),
    Entry("max_eval_samples", "data.eval.limit", same),
    Entry("chat_template chat_template_jinja chat_template_path custom_chat_template prompt_style "
          "conversation_template",
          "data.template", same),
    Entry("shuffle_dataset shuffle_data dataset_shuffle", "train.shuffle", same),
    Entry("tokenized_path dataset_prepared_path overwrite_cache cache_dir dataset_num_proc dataset_processes "
          "preprocessing_num_workers num_proc preprocessing_batch_size dataloader_num_workers dataloader_pin_memory "
          "dataloader_prefetch_factor dataloader_drop_last remove_unused_columns buffer_size lazy_tokenize",
          None, unknown, "rows are processed once and kept; data.cache=false keeps none"),
    # the steps
    Entry("lr base_lr lr_rate", "train.learning_rate", same),
    Entry("num_train_epochs num_epochs n_epochs epoch_num train_epochs max_epochs", "train.epochs", same),
    Entry("max_train_steps num_train_steps total_steps num_steps", "train.max_steps", same),
    Entry(f"{' '.join(PER_DEVICE)} gradient_accumulation_steps gradient_accumulation grad_accum",
          "train.batch_size", rows_per_step, STEP),
    Entry("train_batch_size total_batch_size global_batch_size effective_batch_size",
          "train.batch_size", same, "rows of one optimiser step"),
    Entry("per_device_eval_batch_size eval_batch_size auto_find_batch_size",
          "train.micro_batch_tokens", lambda value, given: "auto" if value is True else None,
          "tokens of a forward pass; never changes the result"),
    Entry("cutoff_len max_seq_length max_seq_len sequence_len seq_len model_max_length max_source_length block_size "
          "context_length max_context_length sequence_length",
          "train.max_length", same, SHORTENED),
    Entry("sample_packing eval_sample_packing multipack neat_packing eval_packing padding_free pad_to_sequence_len "
          "group_by_length pad_to_multiple_of packing_strategy train_sampling_strategy length_column_name "
          "use_packing",
          "train.packing", lambda value, given: "auto" if value is True else None,
          "auto or off; packed rows never see each other"),
    Entry("optimizer optimizer_type optim_type", "train.optim", one_of(OPTIMIZERS)),
    Entry("adam_beta1 adam_beta2 adam_epsilon optim_args optimizer_params betas", "train.optim", betas),
    Entry("lr_scheduler scheduler scheduler_type lr_schedule lr_decay_style", "train.lr_scheduler_type", same),
    Entry("lr_scheduler_kwargs lr_scheduler_args", "train.lr_scheduler_type", schedule),
    Entry("warmup num_warmup_steps warmup_iters", "train.warmup_steps", warmup),
    Entry("warmup_fraction warmup_proportion", "train.warmup_ratio", share),
    Entry("gradient_clipping grad_clip clip_grad_norm max_norm gradient_clip_val",
          "train.max_grad_norm", same, "0 = no clipping"),
    Entry("neftune_alpha noisy_embedding_alpha", "train.neftune_noise_alpha", same),
    Entry("use_gradient_checkpointing activation_checkpointing enable_gradient_checkpointing",
          "train.gradient_checkpointing", lambda value, given: True if value in (True, "true",
          "unsloth") else LEAVE_OUT if value in (False, None) else None),
    Entry("gradient_checkpointing_kwargs activation_offloading offload_activations",
          "train.gradient_checkpointing", unknown, "true or false"),
    Entry("compile torch_compile_backend torch_compile_mode", "train.torch_compile", if_true(True)),
    Entry("random_state random_seed data_seed", "seed", same),
    # logs, evaluations, checkpoints
    Entry("eval_strategy evaluation_strategy do_eval eval_epochs evals_per_epoch",
          "train.eval_steps", every, "a number of steps, a share of the run below 1, or epoch"),
    Entry("save_strategy saves_per_epoch save_epochs",
          "train.save_steps", every, "a number of steps, a share of the run below 1, or epoch"),
    Entry("logging_strategy logging_first_step log_steps",
          "train.logging_steps", every, "a number of steps, a share of the run below 1, or epoch"),
    Entry("load_best_model_at_end save_best_model eval_on_start do_train do_predict",
          None, unknown, "step 0 and every train.eval_steps are evaluated, and model/ is always the best"),
    Entry("greater_is_better", None, unknown, "the direction of every figure is known"),
    Entry("early_stopping early_stopping_steps early_stop_interval",
          "train.early_stopping_patience", lambda value, given: value if is_count(value) else None),
    Entry("tracker trackers log_with logger", "train.report_to", reporters),
    Entry("use_wandb", "train.report_to", if_true(["wandb"])),
    Entry("exp_name wandb_project wandb_entity wandb_name wandb_run_name wandb_watch wandb_log_model run_name project "
          "logging_dir mlflow_experiment_name",
          None, unknown,
          "a run is called after its folder (--out); trackers read their own environment variables, such as WANDB_PROJECT"),
    Entry("push_to_hub hub_model_id hub_token hub_strategy hub_private_repo push_dataset_to_hub", None, unknown, LOCAL),
    Entry("output_dir save_path save_dir output_path outdir output_folder",
          "--out", same, "the run folder, on the command line"),
    Entry("overwrite_output_dir", None, unknown, "a run is never overwritten: name another folder with --out"),
    Entry("save_safetensors save_only_model plot_loss save_full_model", None, unknown, BY_ITSELF),
    Entry("resume resume_from_checkpoint auto_resume_from_checkpoints restore_from",
          "--resume", lambda value, given: True, "on the command line"),
    # the machine
    Entry("deepspeed deepspeed_config", "--deepspeed", same, "on the command line"),
    Entry("fsdp fsdp_config fsdp_version tensor_parallel_size context_parallel_size sequence_parallel_size",
          None, unknown, "processes share the rows of a step: tunesmith launch, with --deepspeed for ZeRO-2"),
    Entry("local_rank ddp_timeout ddp_find_unused_parameters ddp_backend world_size num_gpus gpus use_cpu no_cuda "
          "nproc_per_node",
          None, unknown, "tunesmith launch starts the processes and finds the devices"),
)  # fmt: skip
"""All entries, in the order of a recipe's keys."""

ENTRIES: dict[str, list[Entry]] = {}
"""The entries of each name: several where its place depends on the objective."""
for _entry in TABLE:
    for _name in _entry.names.split():
        ENTRIES.setdefault(_name.replace("-", "_"), []).append(_entry)


def find(name: str, value: object, given: Given, is_here: Callable[[str], bool]) -> Pointer | None:
    """Return the translation of another program's key ``name`` with ``value``; None = the key is unknown.

    ``is_here``: whether the recipe, with its objective and adaptation, has a key. Of several translations the
    first to such a key is returned."""
    entries = ENTRIES.get(name.strip().lower().replace("-", "_"))
    if entries is None:
        return None
    entry = next((one for one in entries if one.place and is_here(one.place)), entries[0])
    return Pointer(entry.place, entry.translate(value, given), entry.note)
