"""Every objective with every adaptation on every architecture. A new objective or adaptation is one row here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import tunesmith
from tests.runs import recipe
from tests.tiny import TINY

OBJECTIVES: dict[str, Any] = {"sft": "sft", "cpt": "cpt"}
ADAPTATIONS: dict[str, Any] = {
    "full": "full",
    "lora": {"type": "lora", "r": 4},
    "qlora": {"type": "qlora", "r": 4},
    "ia3": "ia3",
}
TRAINS: dict[str, Callable[[str], bool]] = {
    "full": lambda name: True,
    "lora": lambda name: ".lora_" in name,
    "qlora": lambda name: ".lora_" in name,
    "ia3": lambda name: ".ia3_l." in name,
}
"""Which of a network's parameters an adaptation is to train, by name."""

ARCHITECTURES = tuple(TINY)
STEPS = 2  # B of a fresh LoRA is zero, so its A does not move before the second


@dataclass(frozen=True)
class Cell:
    architecture: str
    objective: str
    adaptation: str

    def __str__(self) -> str:
        return f"{self.architecture}-{self.objective}-{self.adaptation}"


CELLS = [Cell(*names) for names in product(ARCHITECTURES, OBJECTIVES, ADAPTATIONS)]


@dataclass(frozen=True)
class Ran:
    """A run of two steps: its ``base`` and ``model`` folders, the ``losses`` of its steps, ``batches`` = packed or padded."""

    base: Path
    model: Path
    losses: list[float]
    batches: str
    masters: dict[str, Any]
    """What was trained, as its last checkpoint holds it."""


def run(cell: Cell, folder: Path) -> Ran:
    made = recipe(folder, cell.architecture, OBJECTIVES[cell.objective], ADAPTATIONS[cell.adaptation], max_steps=STEPS)
    outcome = tunesmith.train(made, out=folder / "run")
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    manifest = json.loads((folder / "run" / "manifest.json").read_text(encoding="utf-8"))
    state = load_file(folder / "run" / "checkpoints" / f"step-{STEPS}" / "state.safetensors")
    masters = {name.removeprefix("master."): value for name, value in state.items() if name.startswith("master.")}
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    return Ran(Path(made["model"]), Path(outcome["model_dir"]), losses, manifest["route"]["batches"], masters)
