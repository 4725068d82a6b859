"""``adapters combine``: several LoRA adapters of one base as one.

The sum that is meant is E = sum_i w_i s_i B_i A_i, layer by layer. All of it is worked out on the factors: E = P Q with
P = [w_1 s_1 B_1, w_2 s_2 B_2, ...] and Q = [A_1; A_2; ...], so nothing as large as a layer is ever made.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import files
from tunesmith.errors import UserError
from tunesmith.models.adapters import adapter_types
from tunesmith.models.find import headers, record
from tunesmith.models.find.locate import locate
from tunesmith.models.load import load, probe, vocabulary

if TYPE_CHECKING:
    import torch

METHODS = ("cat", "svd", "linear")
_FACTOR = re.compile(r"^base_model\.model\.(.+)\.lora_(embedding_)?([AB])(\.weight)?$")


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter as read from its folder.

    ``layers``: name -> (A (r, in), B (out, r), scaling); ``names``: their keys in the file; ``rest``: modules saved whole;
    ``quantization``: how its base was quantised, if it was.
    """

    folder: Path
    base: Path
    config: dict[str, Any]
    layers: dict[str, tuple[torch.Tensor, torch.Tensor, float]]
    names: dict[str, tuple[str, str]]
    rest: dict[str, torch.Tensor]
    quantization: dict[str, Any] | None = None


def combine(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "cat",
    r: int | None = None,
) -> dict[str, Any]:
    """Write the weighted sum of LoRA ``adapters`` of one base to the new folder ``out``: a plain LoRA with tokenizer and probe.

    ``weights``: one for each adapter; default: the mean. ``method``: ``cat`` is the exact sum, its rank that of all together;
    ``svd`` is the nearest LoRA of rank ``r`` (default: the largest rank among the parts); ``linear`` adds the As and the Bs, each
    times the root of its weight, as peft's ``add_weighted_adapter`` does: B_1 A_2 and the like come in, so it is another adapter.

    Returns {"path", "base", "method", "r", "parts", "distances"}: for each method that could be, how far it is from the
    exact sum, of that sum's own size. Raises UserError naming what cannot be summed.
    """
    from safetensors.torch import save_file

    if method not in METHODS:
        raise UserError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    if r is not None and (method != "svd" or r < 1):
        raise UserError(
            "--r is the rank of --method svd, a number above 0; the others have the rank of their parts"
        )
    if len(adapters) < 2:
        raise UserError("combine takes two adapters or more")
    shares = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if len(shares) != len(adapters):
        raise UserError(
            f"{len(adapters)} adapters and {len(shares)} weights: give one weight for each adapter, such as 0.7,0.3"
        )
    if not all(math.isfinite(share) for share in shares):
        raise UserError(
            f"weights are {', '.join(f'{share:g}' for share in shares)}; each must be a finite number, such as 0.7,0.3"
        )
    target = files.new_target(out, "combine")
    parts = [read(adapter) for adapter in adapters]
    _check_together(parts)
    for part in parts:
        load.load(
            part.folder
        )  # each must answer as it did when it was saved, or the sum is of something else
    rank = r or max(a.shape[0] for part in parts for a, _, _ in part.layers.values())
    exact = {
        name: _exact(parts, shares, name)
        for name in dict.fromkeys(name for part in parts for name in part.layers)
    }
    made = {
        "cat": exact,
        "svd": {name: nearest(*pair, rank) for name, pair in exact.items()},
        "linear": _linear(parts, shares),
    }
    found = {name: distance(one, exact) for name, one in made.items() if one is not None}
    chosen = made[method]
    if chosen is None:
        raise UserError(
            "--method linear adds the factors of the adapters, so each layer must have one rank in all of them, and here the "
            "ranks or the layers differ.\n  Use --method cat, the exact sum, or --method svd."
        )
    widest = max(a.shape[0] for a, _ in chosen.values())
    names = {name: keys for part in parts for name, keys in part.names.items()}
    tensors = dict(parts[0].rest)
    for name, (a, b) in chosen.items():
        tensors[names[name][0]] = _padded(a, widest, 0)
        tensors[names[name][1]] = _padded(b, widest, 1)
    plain: dict[str, Any] = {
        "r": widest, "lora_alpha": widest, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "lora_dropout": 0.0,
        "target_modules": sorted(chosen), "layers_to_transform": None, "layers_pattern": None, "init_lora_weights": True,
    }  # fmt: skip
    with files.new_folder(target) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(
            json.dumps(parts[0].config | plain, indent=2, sort_keys=True), encoding="utf-8"
        )
        stand = {"base": {"path": str(parts[0].base)}, "quantization": parts[0].quantization}
        (folder / record.FILE).write_text(
            json.dumps(stand), encoding="utf-8"
        )  # what the sum is to be loaded on
        tokenizer = load.load_tokenizer(locate(parts[0].folder))
        tokenizer.save_pretrained(folder)
        probe.write_probe(folder, load.load_model(locate(folder)), tokenizer)
        provenance = [
            {"path": str(part.folder), "weight": share, "sha256": _digest(part.folder)}
            for part, share in zip(parts, shares, strict=True)
        ]
        combined = record.read(folder) | {
            "combined": {"method": method, "distance": found[method], "parts": provenance}
        }
        (folder / record.FILE).write_text(json.dumps(combined, indent=1), encoding="utf-8")
    return {
        "path": str(target),
        "base": str(parts[0].base),
        "method": method,
        "r": widest,
        "parts": provenance,
        "distances": found,
    }


def read(adapter: str | Path) -> Lora:
    """A LoRA adapter in fp32. Raises UserError for one that is more than factors beside layers."""
    from safetensors.torch import load_file

    folder = locate(adapter)
    if folder.base is None:
        raise UserError(
            f"{folder.path} is a full model (a merged one, perhaps): there is no adapter in it. Name adapter folders."
        )
    config = headers.read_json(folder.path / "adapter_config.json")
    kind = str(config.get("peft_type", "")).lower()
    why = None
    if not adapter_types.kind_of(adapter_types.type_of(config)).summable:
        why = f"is a {kind} adapter: only LoRA adapters can be summed"
    elif config.get("use_dora"):
        why = "has use_dora: its magnitudes are no sum"
    elif config.get("bias", "none") != "none" or config.get("lora_bias"):
        why = "trained biases, which are no part of a LoRA's factors"
    elif vocabulary.adapter_rows(folder.path):
        why = "holds rows of new tokens, and two adapters may have learnt different ones at one place"
    if why:
        raise UserError(f"{folder.path} {why}.\n  Merge it into its base (tunesmith merge), or leave it out.")
    record.check_base(folder.path, folder.base)
    tensors: dict[str, Any] = {}
    for file in headers.weight_files(folder.path, "adapter_model"):
        tensors |= load_file(file)
    keys: dict[str, dict[str, str]] = {}
    for name in tensors:
        if match := _FACTOR.match(name):
            keys.setdefault(match[1], {})[match[3]] = name
    lacking = sorted(name for name, found in keys.items() if set(found) != {"A", "B"})
    if lacking or not keys:
        raise UserError(
            f"{folder.path} lacks a factor of {lacking[0] if lacking else 'every layer'}. Copy the folder again."
        )
    names = {layer: (found["A"], found["B"]) for layer, found in keys.items()}
    used = {key for pair in names.values() for key in pair}
    layers = {}
    for layer, (a, b) in names.items():
        rank = _by_pattern(config.get("rank_pattern"), layer, config["r"])
        alpha = _by_pattern(config.get("alpha_pattern"), layer, config["lora_alpha"])
        scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        layers[layer] = (tensors[a].float(), tensors[b].float(), float(scaling))
    rest = {name: value for name, value in tensors.items() if name not in used}
    return Lora(
        folder.path, folder.base, config, layers, names, rest, record.read(folder.path).get("quantization")
    )


def nearest(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of rank ``rank`` nearest to B A (Eckart and Young 1936), their size shared evenly. a (n, in), b (out, n)."""
    import torch

    left, inner_left = torch.linalg.qr(b.double())
    right, inner_right = torch.linalg.qr(a.double().t())
    u, values, v = torch.linalg.svd(inner_left @ inner_right.t())
    root = values[:rank].sqrt()
    low = root[:, None] * (v[:rank] @ right.t())
    high = (left @ u[:, :rank]) * root
    return low.to(a.dtype).contiguous(), high.to(b.dtype).contiguous()


def distance(ours: Mapping[str, Any], exact: Mapping[str, Any]) -> float:
    """|ours - exact| / |exact| over all layers (Frobenius); 0 where both are zero. Each layer is (A, B), meaning B A."""
    import torch

    apart = size = 0.0
    for name, (a, b) in exact.items():
        size += _square(a, b)
        other_a, other_b = ours[name]
        apart += _square(torch.cat([other_a, a]), torch.cat([other_b, -b], dim=1))
    return (apart / size) ** 0.5 if size else apart**0.5


def _square(a: torch.Tensor, b: torch.Tensor) -> float:
    """|B A|^2, from the triangular parts of both: no product of a layer's size, no loss of digits."""
    import torch

    inner = torch.linalg.qr(b.double(), mode="r")[1] @ torch.linalg.qr(a.double().t(), mode="r")[1].t()
    return float(inner.square().sum())


def _exact(parts: Sequence[Lora], shares: Sequence[float], name: str) -> tuple[Any, Any]:
    """The weighted sum as one LoRA of scaling 1, its factors beside each other; the weight is on A, as in peft."""
    import torch

    having = [
        (part.layers[name], share) for part, share in zip(parts, shares, strict=True) if name in part.layers
    ]
    return torch.cat([a * (share * s) for (a, _, s), share in having]), torch.cat(
        [b for (_, b, _), _ in having], dim=1
    )


def _linear(parts: Sequence[Lora], shares: Sequence[float]) -> dict[str, tuple[Any, Any]] | None:
    """peft's ``linear``: (sum_i sqrt(w_i s_i) B_i)(sum_i sqrt(w_i s_i) A_i), a sign on A. None where shapes differ."""
    first = parts[0].layers
    if any(part.layers.keys() != first.keys() for part in parts):
        return None
    if any(part.layers[name][0].shape != first[name][0].shape for part in parts for name in first):
        return None
    made = {}
    for name in first:
        scaled = [
            (part.layers[name][:2], share * part.layers[name][2])
            for part, share in zip(parts, shares, strict=True)
        ]
        a = sum(abs(weight) ** 0.5 * (1 if weight >= 0 else -1) * one[0] for one, weight in scaled)
        b = sum(abs(weight) ** 0.5 * one[1] for one, weight in scaled)
        made[name] = (a, b)
    return made


def _check_together(parts: Sequence[Lora]) -> None:
    """Raise UserError unless the adapters stand on one base and hold the same whole modules."""
    import torch

    first = parts[0]
    print_of = {base: record.fingerprint(base) for base in {part.base for part in parts}}
    for part in parts[1:]:
        if print_of[part.base] != print_of[first.base]:
            raise UserError(
                f"the adapters have different bases: {first.folder} stands on {first.base}, {part.folder} on {part.base}.\n"
                "  Only adapters of one base can be summed."
            )
        if _bits(part) != _bits(first):
            raise UserError(
                f"{first.folder} and {part.folder} were trained on the base quantised in different ways ({_bits(first)}; "
                f"{_bits(part)}), which are two bases.\n  Only adapters of one base can be summed."
            )
        same = part.rest.keys() == first.rest.keys() and all(
            torch.equal(part.rest[key], first.rest[key]) for key in first.rest
        )
        if not same:
            saved = sorted({*part.rest, *first.rest})[0].removeprefix("base_model.model.")
            raise UserError(
                f"{first.folder} and {part.folder} hold modules that were trained whole (modules_to_save) and differ: {saved}.\n"
                "  Adapters with heads of their own cannot be summed; others can, trained without adaptation.modules_to_save."
            )
        if any(
            first.layers[name][0].shape[1] != a.shape[1]
            for name, (a, _, _) in part.layers.items()
            if name in first.layers
        ):
            raise UserError(f"{first.folder} and {part.folder} have layers of different sizes")


def _bits(part: Lora) -> str:
    """What the bits of an adapter's base depend on; what it computed in is no part of that."""
    kept = part.quantization
    return (
        ", ".join(f"{key}={kept[key]}" for key in kept if key != "compute_dtype") if kept else "not quantised"
    )


def _by_pattern(patterns: Mapping[str, float] | None, layer: str, default: float) -> float:
    """The value of the first pattern that names the layer, as peft reads them."""
    return next(
        (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), default
    )


def _padded(factor: Any, rank: int, dim: int) -> Any:
    """The factor with zeros up to ``rank``: peft's config has one rank for all layers."""
    import torch

    lacking = rank - factor.shape[dim]
    if not lacking:
        return factor.contiguous()
    shape = list(factor.shape)
    shape[dim] = lacking
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in headers.weight_files(folder, "adapter_model"):
        digest.update(file.read_bytes())
    return digest.hexdigest()
