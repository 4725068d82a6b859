"""Every text architecture of transformers, built tiny from its config class with random weights, through the train path.

python -m tests.matrix.architectures           # examine each architecture and print what came of it: minutes
python -m tests.matrix.architectures --write   # and write architectures.json and docs/architectures.md
python -m tests.matrix.architectures --write laguna   # examine only these, and keep what is recorded of the others
python -m tests.matrix.architectures --page    # write docs/architectures.md alone, from architectures.json; runs nothing
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.models.auto import modeling_auto as auto

import tunesmith
from tests.runs import recipe
from tests.tiny import VOCABULARY, encoder_tokenizer, tiny_tokenizer
from tunesmith.data.data_config import DataConfig, EvalConfig, Source
from tunesmith.data.store.prepare import prepare
from tunesmith.errors import UserError
from tunesmith.evaluate import open_model
from tunesmith.models.heads import head_types
from tunesmith.models.load import head_loading
from tunesmith.models.network import is_causal

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architectures.md"
RECORDED = Path(__file__).with_name("architectures.json")

VALUES: dict[int, str] = {
    VOCABULARY: "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size"
    " entity_vocab_size ngram_vocab_size_base encoder_hash_byte_group_vocab",
    128: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length sliding_window window_size"
    " original_max_position_embeddings sliding_window_size local_attention attention_chunk_size keep_window_size"
    " attention_window_size index_topk",
    64: "intermediate_size ffn_dim d_ff dff dim_ff n_inner hidden_dim d_inner decoder_ffn_dim encoder_ffn_dim"
    " ffn_hidden_size intermediate_size_mlp dense_intermediate_size feed_forward_size",
    32: "hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim moe_intermediate_size attention_hidden_size"
    " shared_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size pooler_hidden_size input_embedding_size"
    " output_embedding_size mamba_d_ssm lru_width true_hidden_size pronunciation_embed_dim shape_embed_dim entity_emb_size"
    " shared_experts_intermediate_size moe_shared_expert_intermediate_size prediction_head_size embedding_dim router_hidden_size"
    " expert_intermediate_size",
    16: "kv_lora_rank q_lora_rank state_size ssm_state_size mamba_d_state chunk_size mamba_chunk_size laurel_rank o_lora_rank"
    " linear_key_head_dim linear_value_head_dim linear_head_dim adapter_rank qk_head_dim hidden_size_per_layer_input index_head_dim"
    " attention_head_dim embedding_rank intra_bottleneck_size hc_lowrank",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_channels d_head d_kv dim_head swa_head_dim mamba_d_head"
    " attention_head_size rotary_dim mamba_head_dim mamba_headdim mamba_dt_rank time_step_rank",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads num_experts"
    " num_local_experts n_routed_experts moe_num_experts linear_num_value_heads linear_num_heads swa_num_attention_heads"
    " mamba_n_heads mamba_num_heads n_mamba_heads index_n_heads",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks num_decoder_layers num_key_value_heads"
    " num_kv_heads num_experts_per_tok num_experts_per_token moe_topk moe_k linear_num_key_heads swa_num_key_value_heads"
    " full_attention_interval num_encoder_layers max_window_layers",
    1: "n_group topk_group num_expert_group first_k_dense_replace num_shared_experts n_shared_experts moe_num_shared_experts"
    " num_dense_layers n_groups mamba_n_groups",
}
"""Number -> keys that get it, in configs that have them."""
GIVEN = {key: number for number, keys in VALUES.items() for key in keys.split()}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "cls_token_id": 1, "mask_token_id": 4}

ROPE = {"rope_type": "default", "rope_theta": 1e4}
MLA = {"num_key_value_heads": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32}},
    "deepseek_v2": {"topk_group": 1, "n_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {**MLA, "head_dim": 16, "swa_head_dim": 16},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 4, "emb_layer_norm_before": False},
    "esmc": MLA,
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96, "intermediate_size": 192},
    "mamba2": {"head_dim": 16},
    "mistral4": {**MLA, "head_dim": 16},
    "mpnet": {"pad_token_id": 0},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32},
    "nemotron": {"num_key_value_heads": 2},
    "neomme": {"head_dim": 16, "hidden_size": 64},
    "perceiver": {"d_latents": 32, "num_latents": 16, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
                  "num_cross_attention_heads": 4},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
                       "indexer_compress_ratio": 4, "ple_embed_dim": 32, "ngram_vocab_size_base": 100, "split_ngram_parts": 4},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_hidden_layers": 4,
              "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"mamba_headdim": 16, "attention_hidden_size": 64, "num_hidden_layers": 4,
               "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What a config needs in addition, because two of its keys must agree."""


LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")
"""Keys with a kind for each layer: a tiny model has one layer of each kind."""
CLASSES = {
    "lm": (AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": (AutoModelForMaskedLM, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "score": (AutoModelForSequenceClassification, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
}
ADAPTATIONS = ("full", "lora")
"""With their defaults."""
STEPS = 2
SECONDS = 60
"""After which a process that examines one architecture is ended."""
CLOSE = 1e-4
"""Largest relative difference of a loss, and of logits as a share of the largest one."""


def names() -> list[str]:
    """Return every ``model_type`` with a class for causal or masked language models, or for classification."""
    return sorted({name for _, mapping in CLASSES.values() for name in mapping})


def why_left_out(name: str) -> str | None:
    """Return why an architecture is no model of text alone, or None."""
    if name.endswith("_assistant"):
        return "drafts tokens for another model, whose cache it reads"
    default = AutoConfig.for_model(name)
    parts = {"vision_config", "audio_config", "audio_encoder_config", "audio_encoder", "vq_config"}
    if parts & default.sub_configs.keys() or "num_channels" in default.to_dict() or name in ("whisper", "trocr"):
        return "reads images or sound"
    return None


def tiny_config(name: str) -> Any:
    return AutoConfig.for_model(name, **{**_shrink(AutoConfig.for_model(name).to_dict()), **SETTINGS.get(name, {})})


def _shrink(default: dict[str, Any]) -> dict[str, Any]:
    """Return small values for the keys of a config that decide its size."""
    values = {key: number for key, number in GIVEN.items() if isinstance(default.get(key), int)}
    values |= {key: number for key, number in SPECIAL.items() if key in default}
    values |= {key: _shrink(part) for key, part in default.items() if key.endswith("er_config") and isinstance(part, dict)}
    if "kv_lora_rank" in values:
        values |= MLA
    if "head_dim" in default:
        values["head_dim"] = 8
    if "pad_token_id" in default:
        values["pad_token_id"] = 1 if default["pad_token_id"] == 1 else 0
    kinds = {key: list(dict.fromkeys(default[key])) for key in LISTS if default.get(key)}
    if kinds:
        count = max(2, *map(len, kinds.values()))
        values |= {"num_hidden_layers": count, **{key: (given * count)[:count] for key, given in kinds.items()}}
    return values


def objective_of(name: str) -> str:
    """Return sft, or classify for an encoder."""
    return "sft" if name in CLASSES["lm"][1] and is_causal(tiny_config(name)) else "classify"


def save(name: str, folder: Path) -> None:
    """Write a tiny model with random weights and a tokenizer, as a folder of plain transformers."""
    config, causal = tiny_config(name), objective_of(name) == "sft"
    kind = next(kind for kind in (("lm",) if causal else ("masked", "score")) if name in CLASSES[kind][1])
    torch.manual_seed(0)
    model = CLASSES[kind][0].from_config(config)
    with torch.no_grad():  # larger than the default initialisation, so that attention matters
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
    model.save_pretrained(folder)
    style = "roberta" if getattr(config, "pad_token_id", None) == 1 else "bert"
    (tiny_tokenizer("chatml") if causal else encoder_tokenizer(style)).save_pretrained(folder)


def examine(name: str, folder: Path) -> dict[str, Any]:
    """Return what happens to an architecture; ``why`` is the first line of a message."""
    if (why := why_left_out(name)) is not None:
        return {"outcome": "left out", "why": why}
    if AutoConfig.for_model(name).is_encoder_decoder:
        try:
            for kind in ("lm", "score"):
                head_types.require_class(AutoConfig.for_model(name), kind)
        except UserError as error:
            return {"outcome": "refused", "why": _first_line(error)}
    try:
        save(name, folder / "base")
    except Exception as error:  # noqa: BLE001 - whatever a config class says
        return {"outcome": "not built", "why": f"{type(error).__name__}: {_first_line(error)}"}
    return {"objective": objective_of(name), **{one: _train(name, one, folder) for one in ADAPTATIONS}}


def _train(name: str, adaptation: str, folder: Path) -> dict[str, Any]:
    """Train, open what was saved in plain transformers, and compare losses and logits."""
    target = folder / adaptation
    target.mkdir()
    made = recipe(target, objective=objective_of(name), adaptation=adaptation, max_steps=STEPS, learning_rate=1e-3)
    made["model"] = str(folder / "base")
    try:
        outcome = tunesmith.train(made, out=target / "run")
    except UserError as error:
        return {"outcome": "refused", "why": _first_line(error)}
    except Exception as error:  # noqa: BLE001 - to be listed as a fault
        return {"outcome": "fault", "why": f"{type(error).__name__}: {_first_line(error)}"}
    manifest = json.loads((target / "run" / "manifest.json").read_text(encoding="utf-8"))
    found = {"outcome": "trained", "batches": manifest["route"]["batches"]}
    found["notes"] = [note for note in manifest["notes"] if "rows are padded" in note or note.startswith("no LoRA on")]
    try:
        differs = _differences(outcome, folder / "base", target / "rows.jsonl")
    except Exception as error:  # noqa: BLE001 - to be listed as a fault
        differs = [f"{type(error).__name__}: {_first_line(error)}"]
    return {**found, **({"outcome": "fault", "why": "; ".join(differs)} if differs else {})}


def _differences(outcome: dict[str, Any], base: Path, rows: Path) -> list[str]:
    """Compare tunesmith's loss and logits with those of transformers and peft alone."""
    opened = open_model.open_model(outcome["model_dir"])
    data = DataConfig(train=[Source(path=str(rows))], eval=EvalConfig(fraction=0.0))
    examples = prepare(data, opened.objective, opened.tokenizer, max_length=None, window=128, seed=0).train
    stock = _open_stock(opened.name, base, outcome)
    ours = tunesmith.evaluate(outcome["model_dir"], rows, precision="fp32")["eval_loss"]
    theirs = _stock_loss(stock, [examples[row] for row in range(len(examples))])
    found = [] if abs(ours - theirs) <= CLOSE * abs(theirs) else [f"the loss is {ours:.4f}, in plain transformers {theirs:.4f}"]
    ids = torch.tensor([[5, 6, 7, 300, 41, 9]])
    with torch.no_grad():
        mine, plain = head_loading.row_logits(opened.network.float(), ids), stock(input_ids=ids).logits
    if (distance := float((mine - plain).abs().max() / plain.abs().max().clamp_min(1.0))) > CLOSE:
        found.append(f"logits differ by {distance:.1e}")
    return found


def _open_stock(objective: str, base: Path, outcome: dict[str, Any]) -> Any:
    from peft import PeftModel

    cls = CLASSES["lm" if objective == "sft" else "score"][0]
    saved = Path(outcome.get("merged_dir") or outcome["model_dir"])
    if (saved / "adapter_config.json").exists():
        return PeftModel.from_pretrained(cls.from_pretrained(base, dtype=torch.float32), saved).eval()
    return cls.from_pretrained(saved, dtype=torch.float32).eval()


@torch.no_grad()
def _stock_loss(model: Any, rows: list[Any]) -> float:
    """Return the mean loss by the stock forward: one row at a time, its tokens alone."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor(row["input_ids"].astype("int64"))[None]
        logits = model(input_ids=ids).logits.float()
        if "supervised" in row:
            at = [place for place in range(1, ids.shape[1]) if row["supervised"][place]]
            logits, wanted = logits[0, [place - 1 for place in at]], ids[0, at]
        else:
            wanted = torch.tensor([int(row["target"][0])])
        total += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        count += len(wanted)
    return total / count


def _first_line(error: BaseException) -> str:
    """Return the first line of a message, and the second where the first one only introduces it, without folders."""
    lines = str(error).splitlines() or [""]
    text = " ".join(line.strip() for line in lines[: 2 if lines[0].startswith("Class validation") else 1])
    return re.sub(r"/\S*/(base|model)\b", r"\1", text)


def examine_apart(name: str, folder: Path) -> dict[str, Any]:
    """:func:`examine` in a forked process, which is ended after ``SECONDS``."""
    target, started = folder / "found.json", time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            target.write_text(json.dumps(examine(name, folder)), encoding="utf-8")
        finally:
            os._exit(0)
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() - started > SECONDS:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"outcome": "not built", "why": f"not done after {SECONDS} seconds"}
        time.sleep(0.01)
    return json.loads(target.read_text(encoding="utf-8")) if target.exists() else {"outcome": "fault", "why": "the process died"}


def warm_up() -> None:
    """Import what every architecture needs, before the forks."""
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        examine("llama", Path(folder))


def measured(chosen: list[str]) -> dict[str, Any]:
    """Examine the architectures ``chosen``, each in a process."""
    os.environ["TUNESMITH_HOME"] = tempfile.mkdtemp()
    warm_up()
    found: dict[str, Any] = {}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = examine_apart(name, Path(folder))
        print(name, json.dumps(found[name], ensure_ascii=False), flush=True)
    return {"transformers": transformers.__version__, "architectures": found}


# --------------------------------------------------------------------------------------------------- the page


def render(recorded: dict[str, Any]) -> str:
    """Return docs/architectures.md."""
    found: dict[str, dict[str, Any]] = recorded["architectures"]
    groups = {kind: {name: one for name, one in found.items() if summary(one) == kind} for kind in SUMMARIES}
    counts = {kind: len(group) for kind, group in groups.items()}
    reasons = dict.fromkeys(one["why"] for one in groups["left out"].values())
    tried = len(found) - counts["left out"] - counts["not built"]
    lines = [
        "# Architectures",
        "",
        f"transformers {recorded['transformers']} has {len(found)} architectures that write text, fill in words or classify texts.",
        f"{counts['left out']} of them do not read text alone, and {counts['not built']} could not be built in a small size. The other {tried} were built",
        "with random weights and trained two steps, full and with LoRA: decoders with `sft`, encoders with `classify`. What was saved was",
        "opened in plain transformers, and its loss and logits were compared with tunesmith's.",
        "",
        "| result | architectures |",
        "|---|---|",
        *(f"| {SUMMARIES[kind]} | {counts[kind]} |" for kind in SUMMARIES),
        "",
        "A packed batch has no padding. The weights are random, so nothing here tells how well an architecture learns.",
        "`python -m tests.matrix.architectures --write` examines every architecture again and writes this page.",
        "",
        "## Packed",
        "",
        ", ".join(groups["packed"]),
        "",
        "## Padded",
        "",
        "| architecture | why |",
        "|---|---|",
        *(f"| {name} | {_why_padded(one)} |" for name, one in groups["padded"].items()),
        "",
        "## No LoRA on some layers",
        "",
        "With its default targets a LoRA leaves out routers, weights that a kernel reads, and gates narrower than r (here 8, and the",
        "layers are tiny, so a real model leaves out fewer).",
        "",
        "| architecture | layers |",
        "|---|---|",
        *(f"| {name} | {note} |" for name, one in found.items() for note in _left_out(one)),
        "",
        *_refusals("Refused", {**groups["refused"], **groups["lora refused"]}),
        *(_refusals("Faults", groups["fault"]) if groups["fault"] else []),
        *_refusals("Could not be built small", groups["not built"]),
        "## Left out",
        "",
        *(f"- {why}: {', '.join(name for name, one in groups['left out'].items() if one['why'] == why)}" for why in reasons),
    ]
    return "\n".join(lines) + "\n"


SUMMARIES = {
    "packed": "trained, rows packed",
    "padded": "trained, rows padded",
    "lora refused": "trained full; LoRA is refused",
    "refused": "refused before training",
    "fault": "faults: the saved model has other logits, or an error message names no cause",
    "not built": "could not be built in a small size",
    "left out": "left out",
}


def summary(one: dict[str, Any]) -> str:
    """Return the key of ``SUMMARIES`` for what happened to an architecture."""
    if "outcome" in one:
        return str(one["outcome"])
    outcomes = {adaptation: one[adaptation]["outcome"] for adaptation in ADAPTATIONS}
    if "fault" in outcomes.values():
        return "fault"
    if outcomes["full"] == "refused":
        return "refused"
    return "lora refused" if outcomes["lora"] == "refused" else str(one["full"]["batches"])


def _why_padded(one: dict[str, Any]) -> str:
    notes = [note for note in one["full"]["notes"] if "rows are padded" in note]
    return _cell(notes[0].removeprefix("rows are padded, not packed, for this model: ") if notes else "")


def _left_out(one: dict[str, Any]) -> list[str]:
    notes = one.get("lora", {}).get("notes", [])
    return [_cell(note.partition(": ")[2].partition(". Name them")[0]) for note in notes if note.startswith("no LoRA on")]


def _refusals(title: str, group: dict[str, dict[str, Any]]) -> list[str]:
    """Return a section with the message of each architecture."""
    rows = []
    for name, one in group.items():
        whys = {adaptation: found["why"] for adaptation in ADAPTATIONS if "why" in (found := one.get(adaptation, {}))}
        whys = {"": one["why"]} if "why" in one else whys
        same = len(set(whys.values())) == 1 and len(whys) != 1
        listed = [next(iter(whys.values()))] if same else [f"{key}: {why}".removeprefix(": ") for key, why in whys.items()]
        rows.append(f"| {name} | {_cell('; '.join(listed))} |")
    return [f"## {title}", "", "| architecture | message |", "|---|---|", *rows, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def recorded() -> dict[str, Any]:
    """Return the results of the last ``--write``."""
    found: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return found


def main() -> None:
    if "--page" not in sys.argv[1:]:
        chosen = [word for word in sys.argv[1:] if not word.startswith("--")]
        found = measured(chosen or names())
        if chosen:
            found["architectures"] = dict(sorted((recorded()["architectures"] | found["architectures"]).items()))
        print(Counter(summary(one) for one in found["architectures"].values()))
        if "--write" not in sys.argv[1:]:
            return
        RECORDED.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(render(recorded()), encoding="utf-8")


if __name__ == "__main__":
    main()
