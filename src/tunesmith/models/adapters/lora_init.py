"""Start values of LoRA factors, computed from the base, and how such a LoRA is saved as a plain one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.models.adapters.lora_factors import ADAPTER

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


@torch.no_grad()
def factors_of(layer: LoraLayer, kind: str) -> tuple[Tensor, Tensor]:
    """Return the start (A, B) of a LoRA layer, (r, in) and (out, r) in fp32; s B A is a part of its W.

    ``kind``: ``pissa`` (Meng et al. 2024: the r largest singular values, shared evenly by A and B),
    ``pissa_niter_N`` (the same from N rounds of a randomised decomposition, Halko et al. 2011: much faster on
    large layers), ``olora`` (Buyukakyildiz 2024: the first r columns of Q and rows of R).
    """
    rank, scaling = layer.r[ADAPTER], layer.scaling[ADAPTER]
    weight = layer.get_base_layer().weight.detach()
    weight = weight.t() if layer.fan_in_fan_out else weight
    if weight.device.type == "meta":
        a, b = weight.new_empty(rank, weight.shape[1]), weight.new_empty(weight.shape[0], rank)
        return a.float(), b.float()
    if kind == "olora":
        whole = weight.float()
        b = torch.linalg.qr(whole[:, :rank])[0]  # the first columns of Q depend on no others
        return (b.t() @ whole).contiguous(), b.contiguous()
    if kind == "pissa":
        left, values, right = _exact_svd(weight, rank)
    else:
        left, values, right = _randomised_svd(weight, rank, int(kind.rpartition("_")[2]))
    root = (values / scaling).sqrt()
    return (root[:, None] * right).float().contiguous(), (left * root).float().contiguous()


def _exact_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular values of W (out, in) with their vectors, (out, r), (r,), (r, in).

    From the eigenvectors of the smaller of W W^T and W^T W, in fp64 and with fixed signs: in fp32 another
    machine or number of threads computes the same start.
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


def _randomised_svd(weight: Tensor, rank: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_exact_svd`, approximately, in fp32; draws from torch's global generator."""
    left, values, right = torch.svd_lowrank(weight.float(), rank, niter=rounds)
    return left, values, right.t()


@torch.no_grad()
def write_plain(folder: Path, layers: Mapping[str, LoraLayer], rslora: bool) -> None:
    """Convert the changes of factors saved in ``folder`` to a plain LoRA of twice the rank.

    B A - B0 A0 = dB A + B0 dA = [dB, B0] [A; dA]: no small difference of large numbers, so bf16 may be used
    to load it. ``layers``: those of ``lora_factors.started_layers``. lora_alpha grows by the factor that
    keeps the scaling: 2, or with rslora sqrt(2).
    """
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, layer in layers.items():
        key_a, key_b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        change_a, change_b = tensors[key_a], tensors[key_b]
        start_a, start_b = layer.start_A.to(change_a), layer.start_B.to(change_a)
        tensors[key_a] = torch.cat([start_a + change_a, change_a]).contiguous()
        tensors[key_b] = torch.cat([change_b, start_b], dim=1).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    grown = 2**0.5 if rslora else 2
    config["r"], config["lora_alpha"] = 2 * config["r"], grown * config["lora_alpha"]
    for pattern, factor in (("rank_pattern", 2), ("alpha_pattern", grown)):
        config[pattern] = {key: factor * value for key, value in (config.get(pattern) or {}).items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
