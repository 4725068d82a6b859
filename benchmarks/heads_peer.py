#!/usr/bin/env python
"""The peers of benchmarks/heads.py: a plain padded loop for classification, transformers.Trainer for tags and answers.

Called by heads.py, each run a fresh process: ``heads_peer.py SETTING.json`` prints one line of JSON with what the model says of the
test rows, the seconds of training alone and the peak memory. Nothing of tunesmith is imported. The recipes are the ones that
transformers' own examples teach: labels on a word's first token, -100 elsewhere; windows of a context with the answer at place 0
where a window has none, and the best pair of 20 starts and 20 ends. In bf16, full fine-tuning is autocast over fp32
weights, and LoRA is peft's on a frozen body of bf16, its new head in fp32 under the same autocast; in fp32 all is fp32. Padding goes to
the longest row of a batch.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WINDOW, STRIDE, LONGEST, BEST = 384, 128, 30, 20


def high_water() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def network(setting: dict[str, Any], auto: Any, **head: Any) -> Any:
    """The model with a new head on the folder's body, which is checked to be there: stock llama classes for answers lose it."""
    folder, lora = setting["model"], setting["adaptation"] == "lora"
    config = AutoConfig.from_pretrained(folder, **head)
    model = auto.from_config(config).float()
    body = AutoModel.from_pretrained(folder, dtype=torch.float32).state_dict()
    wrong = getattr(model, model.base_model_prefix).load_state_dict(body, strict=False)
    assert not wrong.missing_keys and all(name.startswith("pooler.") for name in wrong.unexpected_keys), wrong
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    kind = "TOKEN_CLS" if setting["task"] == "tag" else "QUESTION_ANS"
    plan = LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS, task_type=kind)
    model = get_peft_model(model.bfloat16() if setting["precision"] == "bf16" else model, plan)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def autocast(setting: dict[str, Any]) -> torch.autocast:
    """bf16 in the run's precision."""
    return torch.autocast("cpu", torch.bfloat16, enabled=setting["precision"] == "bf16")


def trained(setting: dict[str, Any], model: Any, rows: list[dict[str, Any]], collator: Any) -> float:
    """Seconds of Trainer.train."""
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), num_train_epochs=setting["epochs"], learning_rate=setting["learning_rate"],
        per_device_train_batch_size=setting["batch_size"], lr_scheduler_type="linear", warmup_steps=setting["warmup_ratio"],
        weight_decay=0.0, bf16=setting["precision"] == "bf16", use_cpu=not torch.cuda.is_available(), seed=setting["seed"],
        save_strategy="no", report_to="none", logging_steps=10_000, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def logits_of(
    setting: dict[str, Any], model: Any, rows: list[dict[str, Any]], collator: Any, names: tuple[str, ...]
) -> list[tuple[torch.Tensor, ...]]:
    """The named outputs for each row, without padding; on the right side batches of 16."""
    model.eval()
    found = []
    with torch.no_grad(), autocast(setting):
        for start in range(0, len(rows), 16):
            some = rows[start : start + 16]
            out = model(**collator(some))
            for place, row in enumerate(some):
                found.append(tuple(out[name][place, : len(row["input_ids"])].float() for name in names))
    return found


def classify(setting: dict[str, Any]) -> tuple[float, list[Any]]:
    """A loop by hand: rows in random order, padded to the longest of the batch, AdamW, clipping at 1."""
    tokenizer = AutoTokenizer.from_pretrained(setting["model"])
    train, test = (
        [json.loads(line) for line in Path(setting[name]).read_text("utf-8").splitlines()] for name in ("train", "test")
    )
    train, test = train[: setting.get("limit")], test[: setting.get("limit")]
    names = sorted({row["label"] for row in train})
    model = AutoModelForSequenceClassification.from_pretrained(
        setting["model"], num_labels=len(names), dtype=torch.float32
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting["learning_rate"], weight_decay=0.0)
    size = setting["batch_size"]
    steps = setting["epochs"] * -(-len(train) // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order = list(range(len(train)))
    started = time.perf_counter()
    for _ in range(setting["epochs"]):
        random.shuffle(order)
        for start in range(0, len(order), size):
            some = [train[number] for number in order[start : start + size]]
            batch = tokenizer([row["text"] for row in some], padding=True, return_tensors="pt")
            labels = torch.tensor([names.index(row["label"]) for row in some])
            with autocast(setting):
                loss = model(**batch, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    seconds = time.perf_counter() - started
    model.eval()
    said = []
    with torch.no_grad(), autocast(setting):
        for start in range(0, len(test), 64):
            batch = tokenizer([row["text"] for row in test[start : start + 64]], padding=True, return_tensors="pt")
            said += [names[number] for number in model(**batch).logits.argmax(-1).tolist()]
    return seconds, said


def sentences(path: str) -> list[tuple[list[str], list[str]]]:
    found: list[tuple[list[str], list[str]]] = [([], [])]
    for line in Path(path).read_text("utf-8").split("\n"):
        word, _, tag = line.rstrip().partition("\t")
        if word:
            found[-1][0].append(word)
            found[-1][1].append(tag)
        elif found[-1][0]:
            found.append(([], []))
    return [one for one in found if one[0]]


def tag(setting: dict[str, Any]) -> tuple[float, list[Any]]:
    causal = setting["adaptation"] == "lora"
    tokenizer = AutoTokenizer.from_pretrained(setting["model"], **({"add_prefix_space": True} if causal else {}))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    train, test = sentences(setting["train"]), sentences(setting["test"])
    names = sorted({name for _, tags in train for name in tags})

    def encoded(rows: list[tuple[list[str], list[str]]]) -> tuple[list[dict[str, Any]], list[list[int]]]:
        made, firsts = [], []
        for words, tags in rows:
            one = tokenizer(words, is_split_into_words=True, truncation=True, max_length=512)
            of, before, labels, first = one.word_ids(), None, [], []
            for place, word in enumerate(of):
                begins = word is not None and word != before
                labels.append(names.index(tags[word]) if begins else -100)
                if begins:
                    first.append(place)
                before = word
            made.append({"input_ids": one["input_ids"], "attention_mask": one["attention_mask"], "labels": labels})
            firsts.append(first)
        return made, firsts

    rows, _ = encoded(train)
    held_out, firsts = encoded([(words, ["O"] * len(words)) for words, _ in test])
    model = network(setting, AutoModelForTokenClassification, num_labels=len(names))
    collator = DataCollatorForTokenClassification(tokenizer)
    seconds = trained(setting, model, rows, collator)
    said = []
    for (logits,), first, (words, _) in zip(
        logits_of(setting, model, held_out, collator, ("logits",)), firsts, test, strict=True
    ):
        tags = [names[int(logits[place].argmax())] for place in first]
        said.append(tags + ["O"] * (len(words) - len(tags)))
    return seconds, said


def questions(path: str) -> list[dict[str, Any]]:
    return [
        {"question": qa["question"], "context": paragraph["context"], "answers": qa["answers"]}
        for article in json.loads(Path(path).read_text("utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]


def qa(setting: dict[str, Any]) -> tuple[float, list[Any]]:
    tokenizer = AutoTokenizer.from_pretrained(setting["model"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    train, test = questions(setting["train"]), questions(setting["test"])

    def windows(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[int, list[Any]]]]:
        """Model inputs, and for each its row and the places in the context of its tokens (None outside of it)."""
        made, places = [], []
        for number, row in enumerate(rows):
            one = tokenizer(
                row["question"].strip(), row["context"], truncation="only_second", max_length=WINDOW, stride=STRIDE,
                return_overflowing_tokens=True, return_offsets_mapping=True,
            )  # fmt: skip
            for index in range(len(one["input_ids"])):
                inside = one.sequence_ids(index)
                offsets = [pair if part == 1 else None for pair, part in zip(one["offset_mapping"][index], inside, strict=True)]
                answer = row["answers"][0]
                begin, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
                starts = [place for place, pair in enumerate(offsets) if pair and pair[0] <= begin < pair[1]]
                ends = [place for place, pair in enumerate(offsets) if pair and pair[0] < end <= pair[1]]
                found = (starts[0], ends[-1]) if starts and ends else (0, 0)
                fields = {name: one[name][index] for name in ("input_ids", "attention_mask", "token_type_ids") if name in one}
                made.append({**fields, "start_positions": found[0], "end_positions": found[1]})
                places.append((number, offsets))
        return made, places

    rows, _ = windows(train)
    held_out, places = windows(test)
    model = network(setting, AutoModelForQuestionAnswering)
    collator = DataCollatorWithPadding(tokenizer)
    seconds = trained(setting, model, rows, collator)
    best: list[tuple[float, str]] = [(float("-inf"), "")] * len(test)
    for (start, end), (number, offsets) in zip(
        logits_of(setting, model, held_out, collator, ("start_logits", "end_logits")), places, strict=True
    ):
        for first in start.argsort(descending=True)[:BEST].tolist():
            for last in end.argsort(descending=True)[:BEST].tolist():
                if offsets[first] is None or offsets[last] is None or not first <= last < first + LONGEST:
                    continue
                score = float(start[first] + end[last])
                if score > best[number][0]:
                    best[number] = (score, test[number]["context"][offsets[first][0] : offsets[last][1]])
    return seconds, [text for _, text in best]


def main() -> None:
    setting = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    before = high_water()
    set_seed(setting["seed"])
    if setting["precision"] == "bf16":
        torch.set_float32_matmul_precision("medium")
    seconds, said = {"classify": classify, "tag": tag, "qa": qa}[setting["task"]](setting)
    print(json.dumps({"train_seconds": seconds, "peak_memory_bytes": high_water() - before, "said": said}))


if __name__ == "__main__":
    main()
