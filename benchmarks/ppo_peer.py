#!/usr/bin/env python
"""The peer of benchmarks/ppo.py: TRL 0.24's PPOTrainer. Called by ppo.py, each run a fresh process in the peer's own environment.

``ppo_peer.py SETTING.json`` prints one line of JSON: seconds of each phase of each iteration, and the peak memory. Nothing of
tunesmith is imported. The policy has a LoRA and no reference model (TRL switches the adapter off), the value model and the reward
model are two more copies of the base, as the trainer asks for; the value model has a LoRA of the same rank and a trained head, which
is faster than training it whole. Answers are padded; TRL computes the logits of whole answers.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import PPOConfig, PPOTrainer
from trl.trainer import ppo_trainer


def high_water() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def config_of(folder: str, **keys: Any) -> Any:
    """The config of a folder that a later transformers wrote: this one would not find the base of its rotary embedding."""
    written = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    theta = (written.get("rope_parameters") or {}).get("rope_theta")
    return AutoConfig.from_pretrained(folder, **keys, **({} if theta is None else {"rope_theta": theta}))


class Clock(TrainerCallback):
    """Seconds of the phases of an iteration: the times of TRL's own functions, and what is left between them."""

    def __init__(self) -> None:
        self.phases: list[dict[str, float]] = []
        self.now = {"rollout": 0.0, "scoring": 0.0, "update": 0.0}
        self.began = self.update_began = 0.0

    def watch(self, name: str, function: Any) -> Any:
        def timed(*args: Any, **keywords: Any) -> Any:
            if name == "rollout":
                self.began = time.perf_counter()
            started = time.perf_counter()
            if name == "forward":
                if torch.is_grad_enabled() and not self.update_began:
                    self.update_began = started
                return function(*args, **keywords)
            out = function(*args, **keywords)
            if name == "rollout" or args[0] is self.reward_model:
                self.now[name] += time.perf_counter() - started
            return out

        return timed

    reward_model: Any = None

    def on_step_end(self, *args: Any, **keywords: Any) -> None:
        ended = time.perf_counter()
        whole, update = ended - self.began, ended - self.update_began
        found = {**self.now, "update": update, "logps": whole - update - self.now["rollout"] - self.now["scoring"]}
        self.phases.append({**found, "iteration": whole})
        self.now, self.update_began = {"rollout": 0.0, "scoring": 0.0, "update": 0.0}, 0.0


def main() -> None:
    setting = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[setting["precision"]]
    # the class that the folder names may be one of a later transformers
    tokenizer = PreTrainedTokenizerFast.from_pretrained(setting["model"], padding_side="left")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):  # TRL masks every token that equals it
        tokenizer.pad_token = tokenizer.unk_token
    rows = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
        for text in setting["prompts"]
    ]
    before = high_water()
    lora = {"r": setting["rank"], "lora_alpha": 2 * setting["rank"], "target_modules": "all-linear"}
    policy = AutoModelForCausalLM.from_pretrained(setting["model"], config=config_of(setting["model"]), dtype=dtype)
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(
            setting["reward"], config=config_of(setting["reward"], num_labels=1), dtype=dtype
        )
        for _ in range(2)
    )
    value = inject_adapter_in_model(LoraConfig(task_type="SEQ_CLS", **lora), value)
    value.score.requires_grad_(True)
    reward.requires_grad_(False)
    clock = Clock()
    clock.reward_model = reward
    for phase, name in (("rollout", "batch_generation"), ("scoring", "get_reward"), ("forward", "forward")):
        setattr(ppo_trainer, name, clock.watch(phase, getattr(ppo_trainer, name)))
    answers, micro = setting["answers"], setting["micro_batch"]
    with tempfile.TemporaryDirectory() as out:
        config = PPOConfig(
            output_dir=out, use_cpu=True, bf16=False, report_to=[], save_strategy="no", eval_strategy="no", num_sample_generations=0,
            per_device_train_batch_size=micro, gradient_accumulation_steps=answers // micro, num_mini_batches=setting["mini_batches"],
            local_rollout_forward_batch_size=setting["rollout_batch"], num_ppo_epochs=setting["epochs"],
            total_episodes=answers * setting["iterations"], response_length=setting["max_new_tokens"], stop_token="eos",
            temperature=0.7, learning_rate=setting["learning_rate"], missing_eos_penalty=1.0, disable_tqdm=True, seed=0,
            dataloader_pin_memory=False,
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": rows})
        trainer = PPOTrainer(
            args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward, value_model=value,
            train_dataset=data, eval_dataset=data.select(range(1)), peft_config=LoraConfig(task_type="CAUSAL_LM", **lora), callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    print(json.dumps({
        "phases": clock.phases, "peak_memory_bytes": high_water() - before, "process_memory_bytes": high_water(),
        "parameters": sum(p.numel() for p in [*trainer.model.parameters(), *reward.parameters()]),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
