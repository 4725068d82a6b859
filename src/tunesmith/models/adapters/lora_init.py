"""First values of LoRA factors that are read off the base's weights, and how what grew from them is saved as a plain LoRA."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tunesmith.models.adapters.lora_factors import ADAPTER, STARTS


@torch.no_grad()
def factors_of(layer: Any, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The start (A, B) of a LoRA ``layer`` of peft's, (r, in) and (out, r) in fp32; s B A is a part of the layer's own W.

    ``kind``: ``pissa`` (Meng et al. 2024: the r largest singular values, shared evenly by A and B), ``pissa_niter_N`` (the same
    from N rounds of a randomised decomposition, Halko et al. 2011: much faster on large layers), ``olora`` (Buyukakyildiz 2024:
    the first r columns of Q and rows of R). On the meta device, shapes alone.
    """
    rank, scaling = layer.r[ADAPTER], layer.scaling[ADAPTER]
    weight = layer.get_base_layer().weight.detach()
    weight = weight.t() if layer.fan_in_fan_out else weight
    if weight.device.type == "meta":
        return weight.new_empty(rank, weight.shape[1], dtype=torch.float32), weight.new_empty(
            weight.shape[0], rank, dtype=torch.float32
        )
    if kind == "olora":
        whole = weight.float()
        b = torch.linalg.qr(whole[:, :rank])[0]  # the first columns of Q need no others
        return (b.t() @ whole).contiguous(), b.contiguous()
    left, values, right = (
        _largest(weight, rank) if kind == "pissa" else _nearly(weight, rank, int(kind.rpartition("_")[2]))
    )
    root = (values / scaling).sqrt()
    return (root[:, None] * right).float().contiguous(), (left * root).float().contiguous()


def _largest(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ``rank`` largest singular values of W (out, in) with their vectors, (out, r), (r,), (r, in), in fp64.

    From the eigenvectors of the smaller of W W^T and W^T W, in fp64: exact enough in fp32, so that another machine or number
    of threads finds the same start. The sign of each pair of vectors is fixed for the same reason.
    """
    exact = weight.double()
    tall = exact.shape[0] > exact.shape[1]
    gram = exact.t() @ exact if tall else exact @ exact.t()
    vectors = torch.linalg.eigh(gram)[1].flip(1)[:, :rank]  # eigh sorts from the smallest
    other = exact @ vectors if tall else exact.t() @ vectors
    values = other.norm(dim=0)
    other = other / values.clamp_min(1e-30)
    left, right = (other, vectors) if tall else (vectors, other)
    sign = torch.sign(left.gather(0, left.abs().argmax(dim=0, keepdim=True)))
    return left * sign, values, (right * sign).t()


def _nearly(weight: torch.Tensor, rank: int, rounds: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`_largest`, nearly, in fp32; it draws from torch's random numbers."""
    left, values, right = torch.svd_lowrank(weight.float(), rank, niter=rounds)
    return left, values, right.t()


@torch.no_grad()
def write_plain(folder: Path, layers: Mapping[str, Any], rslora: bool) -> None:
    """Make the adapter just saved in ``folder``, which holds changes of factors, a LoRA of twice the rank on the untouched base.

    B A - B0 A0 = dB A + B0 dA = [dB, B0] [A; dA]: no small difference of large numbers, so it may be read in bf16. ``layers``:
    those of ``models.adapters.lora_factors.started``. lora_alpha is set so that the scaling stays: twice, or with rslora
    sqrt(2) times, the old one.
    """
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, layer in layers.items():
        keys = [f"{name}.{part}.weight" for part in ("lora_A", "lora_B")]
        change_a, change_b = (tensors[key] for key in keys)
        start_a, start_b = (getattr(layer, part).to(change_a) for part in STARTS)
        tensors[keys[0]] = torch.cat([start_a + change_a, change_a]).contiguous()
        tensors[keys[1]] = torch.cat([change_b, start_b], dim=1).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    grown = 2**0.5 if rslora else 2
    config["r"], config["lora_alpha"] = 2 * config["r"], grown * config["lora_alpha"]
    config["rank_pattern"] = {key: 2 * value for key, value in (config.get("rank_pattern") or {}).items()}
    config["alpha_pattern"] = {
        key: grown * value for key, value in (config.get("alpha_pattern") or {}).items()
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
