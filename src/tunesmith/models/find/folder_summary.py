"""Facts about a model folder, from its JSON files and safetensors headers; no weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypedDict

from tunesmith.json_types import JsonObject
from tunesmith.models.find import catalog, headers, model_store, record
from tunesmith.models.find.headers import TensorHeader
from tunesmith.models.find.locate import Folder, locate
from tunesmith.models.heads import head_types
from tunesmith.models.load import vocabulary

_KINDS = (  # the first pattern that a tensor's name matches decides
    ("norm", r"(?i)norm|(^|\.)ln_|layer_?norm"),
    ("head", r"(?i)(^|\.)(lm_head|embed_out|score|classifier|qa_outputs|cls)\."),
    ("attention", r"(?i)attn|attention"),
    ("embedding", r"(?i)embed|(^|\.)w[tp]e\."),
    ("mlp", r"(?i)mlp|feed_forward|ffn|(^|\.)fc[_\d]|intermediate|output\.dense|expert"),
)
_ADAPTER_KINDS = (  # peft's names
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
_ADAPTER_KEYS = ("use_dora", "use_rslora", "variant", "bottleneck_size", "non_linearity")
_VIRTUAL_TOKEN_KEYS = (
    "num_virtual_tokens", "prefix_projection", "prompt_tuning_init", "prompt_tuning_init_text",
)  # fmt: skip


class Part(TypedDict):
    """Tensors of one kind. ``count``: their numbers."""

    count: int
    dtypes: list[str]


def show(model: str | Path) -> JsonObject:
    """Return facts about a model folder. A key that does not apply is None.

    ``parameters`` maps each kind of tensor (embedding, attention, mlp, norm, head, other, adapter) to a
    :class:`Part`, and an adapter's own kinds too ("adapter: lora_A"). Raises ModelError as ``locate`` does.
    """
    folder = locate(model)
    network = folder.network
    config = headers.read_json(network / "config.json")
    text = config.get("text_config") or config
    parameters = _base_parts(headers.read_tensors(network))
    total = sum(part["count"] for part in parameters.values())
    head = _head(config, parameters)
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", "head" not in parameters))
    adapter = None
    if folder.kind == "adapter":
        settings = headers.read_json(folder.path / "adapter_config.json")
        adapter = _adapter(settings, vocabulary.adapter_rows(folder.path))
        tensors = headers.read_tensors(folder.path, "adapter_model")
        parameters["adapter"] = _part(tensors.values())
        parameters |= _adapter_parts(tensors, settings.get("modules_to_save") or [])
    return {
        "path": str(folder.path),
        "kind": folder.kind,
        "architecture": (config.get("architectures") or [config.get("model_type")])[0],
        "model_type": config.get("model_type"),
        "base": str(folder.base) if folder.base else None,
        "adapter": adapter,
        "head": head,
        "tied_embeddings": bool(tied) if head == "lm" else None,
        "layers": text.get("num_hidden_layers") or text.get("n_layer"),
        "origin": catalog.describe_source((model_store.manifest(network) or {}).get("source")),
        "context_window": text.get("max_position_embeddings") or text.get("n_positions"),
        "parameters": parameters,
        "total_parameters": total,
        "quantization": _quantization(folder, config),
        "chat_template": _template(folder),
        "run": _run(folder),
        "saved_with": record.read(folder.path).get("versions"),
    }


def _base_parts(tensors: dict[str, TensorHeader]) -> dict[str, Part]:
    # position_ids is a constant that old checkpoints hold
    parameters = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    return _by_kind(parameters, lambda name: _match(name, _KINDS) or "other")


def _adapter_parts(tensors: dict[str, TensorHeader], modules_to_save: list[str]) -> dict[str, Part]:
    """Tensors under the base model's own names are biases, or belong to ``modules_to_save``."""

    def kind_of(name: str) -> str:
        saved = any(f".{module}." in f".{name}" for module in modules_to_save)
        rest = "modules_to_save" if saved else "biases" if name.endswith(".bias") else "other"
        return f"adapter: {_match(name, _ADAPTER_KINDS) or rest}"

    return _by_kind(tensors, kind_of)


def _match(name: str, patterns: Iterable[tuple[str, str]]) -> str | None:
    return next((kind for kind, pattern in patterns if re.search(pattern, name)), None)


def _by_kind(tensors: dict[str, TensorHeader], kind_of: Callable[[str], str]) -> dict[str, Part]:
    groups: dict[str, list[TensorHeader]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(kind_of(name), []).append(tensor)
    return {kind: _part(group) for kind, group in sorted(groups.items())}


def _part(tensors: Iterable[TensorHeader]) -> Part:
    tensors = list(tensors)
    dtypes = sorted({tensor.dtype for tensor in tensors})
    return {"count": sum(tensor.count for tensor in tensors), "dtypes": dtypes}


def _head(config: JsonObject, parameters: dict[str, Part]) -> str | None:
    """Return lm, score, token or span, as the architecture's name tells; None for a body without a head."""
    architecture = (config.get("architectures") or [""])[0]
    kind = head_types.kind_of(architecture)
    writes = architecture.endswith(("LMHeadModel", "ForCausalLM", "ForMaskedLM")) or "head" in parameters
    return kind if kind != "lm" or writes else None


def _adapter(config: JsonObject, rows: dict[str, list[int]]) -> JsonObject:
    def last_names(names: list[str]) -> list[str]:
        return sorted({name.rpartition(".")[2] for name in names})

    targets = config.get("target_modules")
    virtual = _VIRTUAL_TOKEN_KEYS if config.get("num_virtual_tokens") else ()
    return {
        "type": str(config.get("peft_type", "")).lower(),
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "target_modules": last_names(targets) if isinstance(targets, list) else targets,
        "modules_to_save": last_names(config.get("modules_to_save") or []) or None,
        "new_tokens": len(set().union(*rows.values())) if rows else None,
        **{key: config.get(key) for key in _ADAPTER_KEYS},
        **{key: config[key] for key in virtual if key in config},
    }


def _quantization(folder: Folder, config: JsonObject) -> str | None:
    """Return the format of the weights; of an adapter, that of its base model during training."""
    recorded = record.read(folder.path).get("quantization") if folder.kind == "adapter" else None
    if not recorded:
        return (config.get("quantization_config") or {}).get("quant_method")
    twice = ", double quantisation" if recorded["use_double_quant"] else ""
    return f"{recorded['quant_type']}{twice} (the base model, while the adapter was trained)"


def _template(folder: Folder) -> JsonObject:
    """Return {"present", "first_line", "stop_tokens"} of the folder's tokenizer, else of the base model's."""
    path = _own_or_base(folder, "tokenizer_config.json").parent
    config = headers.read_json_if_present(path / "tokenizer_config.json")
    file = path / "chat_template.jinja"
    template = headers.read_text(file, 10_000) if file.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    lines = template.strip().splitlines() if template else []
    return {
        "present": bool(template),
        "first_line": lines[0] if lines else None,
        "stop_tokens": _stop_tokens(folder, path, config),
    }


def _stop_tokens(folder: Folder, tokenizer: Path, config: JsonObject) -> list[str]:
    """Return the texts of the tokenizer's eos token and of the generation config's eos ids."""
    eos = config.get("eos_token")
    tokens = [eos.get("content") if isinstance(eos, dict) else eos]
    ids = headers.read_json_if_present(_own_or_base(folder, "generation_config.json")).get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    added = headers.read_json_if_present(tokenizer / "tokenizer.json").get("added_tokens", []) if ids else []
    names = {token["id"]: token["content"] for token in added}
    tokens += [names.get(id, f"id {id}") for id in ids]
    return list(dict.fromkeys(token for token in tokens if token))


def _own_or_base(folder: Folder, name: str) -> Path:
    return folder.path / name if (folder.path / name).is_file() else folder.network / name


def _run(folder: Folder) -> JsonObject | None:
    """Return the run folder that wrote this model, with its manifest."""
    if folder.run is None:
        return None
    manifest = headers.read_json_if_present(folder.run / "manifest.json")
    return {"path": str(folder.run), "manifest": manifest or None}
