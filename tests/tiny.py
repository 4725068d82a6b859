"""Tiny random models and tokenizers, made from configs in milliseconds."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog and the model answers the user with a short sentence.",
    "What is the capital of France? Paris is the capital of France. system user assistant question answer",
    "def add(a, b):\n    return a + b\n\n### Instruction:\n### Response:\n 0123456789",
    "안녕하세요 질문 답변 오늘 날씨가 좋네요. 하루가 또 가네요. 위로해 드립니다.",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 512


@lru_cache
def _backend(adds_bos: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    post: Any = processors.ByteLevel(trim_offsets=True)
    if adds_bos:
        post = processors.Sequence([post, processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])])
    tokenizer.post_processor = post
    return tokenizer.to_str()


def tiny_tokenizer(template: str | None = None, pad_is_eos: bool = False, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 500 tokens. ``template`` is "chatml", a Jinja string, or None."""
    eos = "<|im_end|>" if template == "chatml" else "</s>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(adds_bos)),
        bos_token="<s>",
        eos_token=eos,
        pad_token=eos if pad_is_eos else "<pad>",
    )
    tokenizer.chat_template = CHATML if template == "chatml" else template
    return tokenizer


SMALL = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, head_dim=8, tie_word_embeddings=True,
)  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen3": SMALL,
    "gemma": SMALL,
    "mistral": {**SMALL, "sliding_window": 16},
    "gemma3": {**SMALL, "model_type": "gemma3_text", "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
                 attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
}  # fmt: skip

ENCODER = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {**ENCODER, "type_vocab_size": 2},
    "roberta": {
        **ENCODER,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "max_position_embeddings": 130,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
}


def encoder_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The same pieces between [CLS] and [SEP] with token types (bert), or between <s> and </s> (roberta)."""
    backend = Tokenizer.from_str(_backend(False))
    first, last, pad = ("<|im_start|>", "<|im_end|>", "<pad>") if name == "bert" else ("<pad>", "</s>", "<s>")
    ids = {token: backend.token_to_id(token) for token in SPECIAL}
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1" if name == "bert" else f"{first} $A {last} {last} $B {last}",
        special_tokens=[(first, ids[first]), (last, ids[last])],
    )
    inputs = ["input_ids", *(["token_type_ids"] if name == "bert" else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token=first, sep_token=last, pad_token=pad, unk_token="<|im_end|>", model_input_names=inputs
    )


def save_tiny_encoder(name: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A tiny masked language model, as encoders are published: a body and a head that no task of ours takes."""
    values = {**ENCODERS[name], **changes}

    def write(target: Path) -> None:
        torch.manual_seed(seed)
        model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(name, **values))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(5.0)
        model.save_pretrained(target)
        encoder_tokenizer(name).save_pretrained(target)

    return _saved(f"{name} {seed} {values}", Path(folder), write)


def tiny_config(name: str, **changes: Any) -> Any:
    values = {"model_type": name, **TINY[name], **changes}
    return AutoConfig.for_model(values.pop("model_type"), **values)


def tiny_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A 2-layer random fp32 causal language model in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes))
    with torch.no_grad():  # larger than the default initialisation, so that attention matters
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
        table = model.get_input_embeddings().weight
        empty = (table == 0).all(
            dim=1
        )  # the padding word starts as zeros; where padding and end are one, that is no model of life
        table[empty] = torch.randn(int(empty.sum()), table.shape[1]) * 0.1
    return model.eval()


def save_tiny(name: str, folder: Path, template: str | None = "chatml", **changes: Any) -> Path:
    """Write a tiny model with its tokenizer, as a plain transformers folder."""

    def write(target: Path) -> None:
        tokenizer = tiny_tokenizer(template)
        tiny_model(name, **{"eos_token_id": tokenizer.eos_token_id, **changes}).save_pretrained(target)
        tokenizer.save_pretrained(target)

    return _saved(f"{name} {TINY[name]} {template} {changes}", Path(folder), write)


_WRITTEN: dict[str, tuple[Path, torch.Tensor]] = {}
"""What describes a model -> its folder, and torch's random state after it was made."""


def _saved(key: str, folder: Path, write: Callable[[Path], None]) -> Path:
    """Write a model once for each key; copy it from then on, which takes a tenth of the time and leaves the same random state."""
    if key not in _WRITTEN:
        made = Path(tempfile.mkdtemp(prefix="tunesmith-tiny-"))
        owner = os.getpid()
        atexit.register(lambda: shutil.rmtree(made, ignore_errors=True) if os.getpid() == owner else None)
        write(made)
        _WRITTEN[key] = made, torch.get_rng_state()
    made, state = _WRITTEN[key]
    shutil.copytree(made, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    torch.set_rng_state(state)
    return folder
