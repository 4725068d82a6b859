"""``adapters combine``: the weighted sum of several LoRA adapters of one base as one LoRA.

The exact sum of a layer is E = sum_i w_i s_i B_i A_i. Everything is computed on the factors: E = P Q with
P = [w_1 s_1 B_1, w_2 s_2 B_2, ...] and Q = [A_1; A_2; ...], so no matrix of a layer's size is made.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tunesmith import files
from tunesmith.errors import UserError
from tunesmith.json_types import JsonObject
from tunesmith.models.adapters import adapter_types
from tunesmith.models.find import headers, record
from tunesmith.models.find.locate import locate
from tunesmith.models.generate import stop_tokens
from tunesmith.models.load import load, probe, vocabulary

METHODS = ("cat", "svd", "linear")
_FACTOR = re.compile(r"^base_model\.model\.(.+)\.lora_(embedding_)?([AB])(\.weight)?$")

Factors = tuple[torch.Tensor, torch.Tensor]
"""A (r, in) and B (out, r) of one layer, which stand for B A."""


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter in fp32, as read from its folder.

    ``names``: layer -> names of A and B in the file. ``rest``: parameters of modules saved whole.
    ``quantization``: how its base was quantised, None if it was not.
    """

    folder: Path
    base: Path
    config: JsonObject
    layers: dict[str, Factors]
    scalings: dict[str, float]
    names: dict[str, tuple[str, str]]
    rest: dict[str, torch.Tensor]
    quantization: JsonObject | None

    @property
    def quantization_text(self) -> str:
        """Describe what the bits of the base depend on. The dtype it computes in is no part of that."""
        keys = self.quantization or {}
        return ", ".join(f"{key}={keys[key]}" for key in keys if key != "compute_dtype") or "not quantised"


def combine(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "cat",
    r: int | None = None,
) -> JsonObject:
    """Write the weighted sum of LoRA ``adapters`` of one base, with tokenizer and probe, to ``out``.

    ``weights``: one for each adapter; default: the mean. ``method``: ``cat`` is the exact sum, whose rank is
    the sum of the ranks; ``svd`` is the nearest LoRA of rank ``r`` (default: the largest rank of the
    adapters); ``linear`` adds the As and the Bs, each times the root of its weight, as peft's
    ``add_weighted_adapter`` does. It is another adapter, because products such as B_1 A_2 come in.

    Returns {"path", "base", "method", "r", "parts", "distances"}: the distance of each possible method from
    the exact sum, relative to the norm of that sum. Raises UserError that names what cannot be summed.
    """
    shares = _check_arguments(adapters, weights, method, r)
    target = files.new_target(out, "combine")
    parts = [read_lora(adapter) for adapter in adapters]
    _check_compatible(parts)
    for part in parts:
        load.load(part.folder)  # raises unless the adapter gives the answers of its probe
    rank = r or max(a.shape[0] for part in parts for a, _ in part.layers.values())
    layers = dict.fromkeys(layer for part in parts for layer in part.layers)
    exact = {layer: _exact_sum(parts, shares, layer) for layer in layers}
    sums = {"cat": exact, "svd": {layer: nearest_factors(*pair, rank) for layer, pair in exact.items()}}
    if linear := _linear_sum(parts, shares):
        sums["linear"] = linear
    if method not in sums:
        raise UserError(
            "--method linear adds the factors of the adapters, so each layer must have one rank in all of them; here the "
            "ranks or the layers differ.\n  Use --method cat, the exact sum, or --method svd."
        )
    distances = {name: relative_distance(factors, exact) for name, factors in sums.items()}
    chosen = sums[method]
    parts_record = [
        {"path": str(part.folder), "weight": share, "sha256": _digest(part.folder)}
        for part, share in zip(parts, shares, strict=True)
    ]
    combined = {"method": method, "distance": distances[method], "parts": parts_record}
    with files.new_folder(target) as folder:
        rank = _write_adapter(folder, parts, chosen)
        record.write(folder, record.read(folder) | {"combined": combined})
    facts = {"path": str(target), "base": str(parts[0].base), "method": method, "r": rank}
    return {**facts, "parts": parts_record, "distances": distances}


def _check_arguments(
    adapters: Sequence[str | Path], weights: Sequence[float] | None, method: str, r: int | None
) -> list[float]:
    """Return the weight of each adapter. Raises UserError."""
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    if r is not None and (method != "svd" or r < 1):
        raise UserError(
            "--r is the rank for --method svd, at least 1; other methods take the ranks of the adapters"
        )
    if len(adapters) < 2:
        raise UserError("combine takes two adapters or more")
    shares = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if len(shares) != len(adapters):
        counts = f"{len(adapters)} adapters and {len(shares)} weights"
        raise UserError(f"{counts}: give one weight for each adapter, such as 0.7,0.3")
    if not all(map(math.isfinite, shares)):
        listed = ", ".join(f"{share:g}" for share in shares)
        raise UserError(f"weights are {listed}; each must be a finite number, such as 0.7,0.3")
    return shares


def _write_adapter(folder: Path, parts: Sequence[Lora], layers: Mapping[str, Factors]) -> int:
    """Write adapter, tokenizer and probe; return the rank, one for all layers as peft's config wants it."""
    first, rank = parts[0], max(a.shape[0] for a, _ in layers.values())
    names = {layer: keys for part in parts for layer, keys in part.names.items()}
    tensors = dict(first.rest)
    for layer, (a, b) in layers.items():
        name_a, name_b = names[layer]
        tensors[name_a] = torch.cat([a, a.new_zeros(rank - a.shape[0], a.shape[1])])
        tensors[name_b] = torch.cat([b, b.new_zeros(b.shape[0], rank - a.shape[0])], dim=1)
    config = first.config | {
        "r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "lora_dropout": 0.0,
        "target_modules": sorted(layers), "layers_to_transform": None, "layers_pattern": None, "init_lora_weights": True,
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "adapter_config.json", config, indent=2, sort_keys=True)
    # ``load_model`` below reads the base and its quantisation from the record.
    record.write(folder, {"base": {"path": str(first.base)}, "quantization": first.quantization})
    tokenizer = load.load_tokenizer(locate(first.folder))
    tokenizer.save_pretrained(folder)
    model = load.load_model(locate(folder))
    stop_tokens.save_stop_ids(folder, model, tokenizer)
    probe.write_probe(folder, model, tokenizer)
    return rank


def _write_json(path: Path, content: JsonObject, indent: int | None = None, sort_keys: bool = False) -> None:
    path.write_text(json.dumps(content, indent=indent, sort_keys=sort_keys), encoding="utf-8")


def read_lora(adapter: str | Path) -> Lora:
    """Read a LoRA adapter in fp32. Raises UserError for an adapter that is more than factors of layers."""
    folder = locate(adapter)
    path = folder.path
    if folder.base is None:
        raise UserError(
            f"{path} is a full model (a merged one, perhaps) and holds no adapter. Name adapter folders."
        )
    config = headers.read_json(path / "adapter_config.json")
    why = None
    if not adapter_types.kind_of(adapter_types.type_of(config)).summable:
        why = f"is a {adapter_types.type_of(config).lower()} adapter: only LoRA adapters can be summed"
    elif config.get("use_dora"):
        why = "has use_dora: magnitudes cannot be summed"
    elif config.get("bias", "none") != "none" or config.get("lora_bias"):
        why = "has trained biases, which are not part of LoRA factors"
    elif vocabulary.adapter_rows(path):
        why = "holds rows of new tokens, which may differ between adapters"
    if why:
        raise UserError(f"{path} {why}.\n  Merge it into its base (tunesmith merge), or leave it out.")
    record.check_base(path, folder.base)
    tensors: dict[str, torch.Tensor] = {}
    for file in headers.weight_files(path, "adapter_model"):
        tensors |= load_file(file)
    keys: dict[str, dict[str, str]] = {}
    for name in tensors:
        if match := _FACTOR.match(name):
            keys.setdefault(match[1], {})[match[3]] = name
    lacking = sorted(layer for layer, pair in keys.items() if set(pair) != {"A", "B"})
    if lacking or not keys:
        layer = lacking[0] if lacking else "every layer"
        raise UserError(f"{path} lacks a factor of {layer}. Copy the folder again.")
    names = {layer: (pair["A"], pair["B"]) for layer, pair in keys.items()}
    layers = {layer: (tensors.pop(a).float(), tensors.pop(b).float()) for layer, (a, b) in names.items()}
    scalings = {layer: _scaling(config, layer) for layer in names}
    quantization = record.read(path).get("quantization")
    return Lora(path, folder.base, config, layers, scalings, names, tensors, quantization)


def _scaling(config: JsonObject, layer: str) -> float:
    """Return alpha / r of a layer. The first pattern that names the layer decides, as in peft."""

    def value(patterns: str, default: str) -> float:
        values = (config.get(patterns) or {}).items()
        matching = (value for key, value in values if re.match(rf"(.*\.)?({key})$", layer))
        return float(next(matching, config[default]))

    rank = value("rank_pattern", "r")
    return value("alpha_pattern", "lora_alpha") / (rank**0.5 if config.get("use_rslora") else rank)


def nearest_factors(a: torch.Tensor, b: torch.Tensor, rank: int) -> Factors:
    """Return the factors of rank ``rank`` nearest to B A (Eckart and Young 1936). a (n, in), b (out, n).

    Each factor gets the root of the singular values.
    """
    left, inner_left = torch.linalg.qr(b.double())
    right, inner_right = torch.linalg.qr(a.double().t())
    u, values, v = torch.linalg.svd(inner_left @ inner_right.t())
    root = values[:rank].sqrt()
    low = root[:, None] * (v[:rank] @ right.t())
    high = (left @ u[:, :rank]) * root
    return low.to(a.dtype).contiguous(), high.to(b.dtype).contiguous()


def relative_distance(layers: Mapping[str, Factors], exact: Mapping[str, Factors]) -> float:
    """Return |layers - exact| / |exact| over all layers (Frobenius norm); 0 where both are zero."""
    difference = size = 0.0
    for name, (a, b) in exact.items():
        size += _squared_norm(a, b)
        other_a, other_b = layers[name]
        difference += _squared_norm(torch.cat([other_a, a]), torch.cat([other_b, -b], dim=1))
    return (difference / size) ** 0.5 if size else difference**0.5


def _squared_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |B A|^2 from the triangular parts of both: no product of a layer's size, no loss of digits."""
    inner = torch.linalg.qr(b.double(), mode="r")[1] @ torch.linalg.qr(a.double().t(), mode="r")[1].t()
    return float(inner.square().sum())


def _exact_sum(parts: Sequence[Lora], shares: Sequence[float], layer: str) -> Factors:
    """Return the weighted sum with scaling 1: concatenated factors, the weight on A as in peft."""
    having = [(part, share) for part, share in zip(parts, shares, strict=True) if layer in part.layers]
    low = torch.cat([part.layers[layer][0] * (share * part.scalings[layer]) for part, share in having])
    return low, torch.cat([part.layers[layer][1] for part, _ in having], dim=1)


def _linear_sum(parts: Sequence[Lora], shares: Sequence[float]) -> dict[str, Factors] | None:
    """Return peft's ``linear``: (sum_i sqrt(w_i s_i) B_i)(sum_i sqrt(w_i s_i) A_i), with the sign of w_i on
    A.

    None where layers or shapes differ.
    """
    first = parts[0].layers
    if any(part.layers.keys() != first.keys() for part in parts):
        return None
    if any(part.layers[layer][0].shape != first[layer][0].shape for part in parts for layer in first):
        return None
    sums = {}
    for layer, (a, b) in first.items():
        low, high = torch.zeros_like(a), torch.zeros_like(b)
        for part, share in zip(parts, shares, strict=True):
            weight = share * part.scalings[layer]
            low += math.copysign(abs(weight) ** 0.5, weight) * part.layers[layer][0]
            high += abs(weight) ** 0.5 * part.layers[layer][1]
        sums[layer] = (low, high)
    return sums


def _check_compatible(parts: Sequence[Lora]) -> None:
    """Raise UserError unless the adapters have one base and equal modules that were saved whole."""
    first = parts[0]
    fingerprints = {base: record.fingerprint(base) for base in {part.base for part in parts}}
    for part in parts[1:]:
        both = f"{first.folder} and {part.folder}"
        if fingerprints[part.base] != fingerprints[first.base]:
            raise UserError(
                f"the adapters have different bases: {first.folder} was trained on {first.base}, {part.folder} on "
                f"{part.base}.\n  Only adapters of one base can be summed."
            )
        if part.quantization_text != first.quantization_text:
            raise UserError(
                f"{both} were trained on the base quantised in different ways ({first.quantization_text}; "
                f"{part.quantization_text}), which are two bases.\n  Only adapters of one base can be summed."
            )
        equal = part.rest.keys() == first.rest.keys()
        if not (equal and all(torch.equal(part.rest[key], first.rest[key]) for key in first.rest)):
            saved = sorted({*part.rest, *first.rest})[0].removeprefix("base_model.model.")
            raise UserError(
                f"{both} hold modules that were trained whole (modules_to_save) and differ: {saved}.\n"
                "  Sum adapters that were trained without adaptation.modules_to_save."
            )
        shared = part.layers.keys() & first.layers.keys()
        if any(first.layers[layer][0].shape[1] != part.layers[layer][0].shape[1] for layer in shared):
            raise UserError(f"{both} have layers of different sizes")


def _digest(folder: Path) -> str:
    weights = headers.weight_files(folder, "adapter_model")
    return hashlib.sha256(b"".join(file.read_bytes() for file in weights)).hexdigest()
