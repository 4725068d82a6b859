"""What a model folder is, told from its JSON files and safetensors headers alone: no weight is read, no torch is imported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tunesmith.models.find import catalog, headers, model_store, record
from tunesmith.models.find.locate import Folder, locate
from tunesmith.models.load import vocabulary

_KINDS = (  # the first pattern found in a tensor's name decides; more telling names come first
    ("norm", r"norm|(^|\.)ln_|layer_?norm"),
    ("head", r"(^|\.)(lm_head|embed_out|score|classifier|qa_outputs|cls)\."),
    ("attention", r"attn|attention"),
    ("embedding", r"embed|(^|\.)w[tp]e\."),
    ("mlp", r"mlp|feed_forward|ffn|(^|\.)fc[_\d]|intermediate|output\.dense|expert"),
)
VIRTUAL = ("num_virtual_tokens", "prefix_projection", "prompt_tuning_init", "prompt_tuning_init_text")
"""Keys of the adapters that put virtual tokens in front of each row."""

_PARTS = (  # of an adapter, as peft names its tensors
    ("lora_A", r"\.lora_(embedding_)?A(\.|$)"),
    ("lora_B", r"\.lora_(embedding_)?B\.?(weight)?$"),
    ("lora_B bias", r"\.lora_B\.bias$"),
    ("magnitude", r"\.lora_magnitude_vector"),
    ("ia3 vectors", r"\.ia3_l(\.|$)"),
    ("virtual tokens", r"^prompt_embeddings$|^prompt_encoder\."),
    ("bottleneck down", r"\.bottleneck_down(\.|$)"),
    ("bottleneck up", r"\.bottleneck_up(\.|$)"),
    ("new rows", r"\.trainable_tokens_delta|\.token_adapter\."),
)


def show(model: str | Path) -> dict[str, Any]:
    """Facts about a model: its folder, architecture, base, adapter, head, parameters, template, window and run.

    ``parameters`` maps a kind (embedding, attention, mlp, norm, head, other, adapter) to {"count", "dtypes"}, and of an adapter
    its parts too ("adapter: lora_A", "adapter: modules_to_save"). Keys that do not apply are None. Raises ModelError as
    ``locate`` does.
    """
    folder = locate(model)
    network = folder.network
    config = headers.read_json(network / "config.json")
    text = config.get("text_config") or config
    parameters = _parameters(headers.read_tensors(network))
    head = _head(config, parameters)
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", "head" not in parameters))
    out: dict[str, Any] = {
        "path": str(folder.path),
        "kind": folder.kind,
        "architecture": (config.get("architectures") or [config.get("model_type")])[0],
        "model_type": config.get("model_type"),
        "base": str(folder.base) if folder.base else None,
        "adapter": None,
        "head": head,
        "tied_embeddings": bool(tied) if head == "lm" else None,
        "layers": text.get("num_hidden_layers") or text.get("n_layer"),
        "origin": catalog.origin((model_store.manifest(network) or {}).get("source")),
        "context_window": text.get("max_position_embeddings") or text.get("n_positions"),
        "parameters": parameters,
        "total_parameters": sum(part["count"] for part in parameters.values()),
        "quantization": _quantization(folder, config),
        "chat_template": _template(folder),
        "run": _run(folder),
        "saved_with": record.read(folder.path).get("versions"),
    }
    if folder.kind == "adapter":
        out["adapter"] = _adapter(folder.path)
        tensors = headers.read_tensors(folder.path, "adapter_model")
        parameters["adapter"] = _sum(tensors.values())
        parameters |= _parts(tensors, headers.read_json(folder.path / "adapter_config.json"))
    return out


def _parameters(tensors: dict[str, headers.Tensor]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[headers.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids"):  # a constant that old checkpoints carry
            continue
        kind = next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE)), "other")
        groups.setdefault(kind, []).append(tensor)
    return {kind: _sum(group) for kind, group in sorted(groups.items())}


def _parts(tensors: dict[str, headers.Tensor], config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """An adapter's tensors by what they are; those that bear the base's own names are biases, or modules saved whole."""
    groups: dict[str, list[headers.Tensor]] = {}
    whole = config.get("modules_to_save") or []
    for name, tensor in tensors.items():
        kind = next((kind for kind, pattern in _PARTS if re.search(pattern, name)), None)
        saved = any(f".{module}." in f".{name}" for module in whole)
        kind = kind or ("modules_to_save" if saved else "biases" if name.endswith(".bias") else "other")
        groups.setdefault(f"adapter: {kind}", []).append(tensor)
    return {kind: _sum(group) for kind, group in sorted(groups.items())}


def _sum(tensors: Any) -> dict[str, Any]:
    tensors = list(tensors)
    return {
        "count": sum(tensor.count for tensor in tensors),
        "dtypes": sorted({tensor.dtype for tensor in tensors}),
    }


def _head(config: dict[str, Any], parameters: dict[str, Any]) -> str | None:
    """lm, score, token or span, as the architecture's name says; None for a body without a head."""
    architecture = (config.get("architectures") or [""])[0]
    endings = {
        "ForSequenceClassification": "score",
        "ForTokenClassification": "token",
        "ForQuestionAnswering": "span",
    }
    for ending, head in endings.items():
        if architecture.endswith(ending):
            return head
    return (
        "lm"
        if architecture.endswith(("LMHeadModel", "ForCausalLM", "ForMaskedLM")) or "head" in parameters
        else None
    )


def _adapter(path: Path) -> dict[str, Any]:
    config = headers.read_json(path / "adapter_config.json")
    targets = config.get("target_modules")
    return {
        "type": str(config.get("peft_type", "")).lower(),
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "target_modules": sorted({name.rpartition(".")[2] for name in targets})
        if isinstance(targets, list)
        else targets,
        "modules_to_save": sorted({name.rpartition(".")[2] for name in config.get("modules_to_save") or []})
        or None,
        "new_tokens": len(set().union(*rows.values())) if (rows := vocabulary.adapter_rows(path)) else None,
        "use_dora": config.get("use_dora"),
        "use_rslora": config.get("use_rslora"),
        "variant": config.get("variant"),
        "bottleneck_size": config.get("bottleneck_size"),
        "non_linearity": config.get("non_linearity"),
        **{key: config[key] for key in VIRTUAL if config.get("num_virtual_tokens") and key in config},
    }


def _quantization(folder: Folder, config: dict[str, Any]) -> str | None:
    """How the weights are kept; of an adapter, how its base was while it was trained."""
    kept = record.read(folder.path).get("quantization") if folder.kind == "adapter" else None
    if not kept:
        return (config.get("quantization_config") or {}).get("quant_method")
    return f"{kept['quant_type']}{', double quantisation' if kept['use_double_quant'] else ''} (the base, while it was trained)"


def _template(folder: Folder) -> dict[str, Any]:
    """{"present", "first_line", "stop_tokens"}; from the folder's own tokenizer, else the base's."""
    own = (folder.path / "tokenizer_config.json").is_file() or folder.base is None
    path = folder.path if own else folder.base or folder.path
    config = (
        headers.read_json(path / "tokenizer_config.json")
        if (path / "tokenizer_config.json").is_file()
        else {}
    )
    file = path / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    return {
        "present": bool(template),
        "first_line": template.strip().splitlines()[0] if template and template.strip() else None,
        "stop_tokens": _stop_tokens(folder, path, config),
    }


def _stop_tokens(folder: Folder, tokenizer: Path, config: dict[str, Any]) -> list[str]:
    """The texts of the tokenizer's eos and of the generation config's eos ids."""
    eos = config.get("eos_token")
    found = [eos.get("content") if isinstance(eos, dict) else eos]
    for place in (folder.path, folder.base):
        if place and (place / "generation_config.json").is_file():
            ids = headers.read_json(place / "generation_config.json").get("eos_token_id")
            names = _special(tokenizer)
            found += [
                names.get(id, f"id {id}")
                for id in (ids if isinstance(ids, list) else [ids])
                if id is not None
            ]
            break
    return list(dict.fromkeys(token for token in found if token))


def _special(path: Path) -> dict[int, str]:
    if not (path / "tokenizer.json").is_file():
        return {}
    return {
        token["id"]: token["content"]
        for token in headers.read_json(path / "tokenizer.json").get("added_tokens", [])
    }


def _run(folder: Folder) -> dict[str, Any] | None:
    """The run folder that wrote this model, with what its manifest says of it."""
    if folder.run is None:
        return None
    manifest = folder.run / "manifest.json"
    return {"path": str(folder.run), "manifest": headers.read_json(manifest) if manifest.is_file() else None}
