"""Every objective with every adaptation on every architecture. A new objective or adaptation is one row here."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

import tunesmith
from tests.runs import recipe
from tests.tiny import ENCODERS, TINY, tiny_config
from tunesmith import objectives
from tunesmith.errors import ModelError
from tunesmith.models.heads import head_types
from tunesmith.models.load import head_loading
from tunesmith.train import setup

OBJECTIVES: dict[str, Any] = {
    "sft": "sft",
    "cpt": "cpt",
    "classify": "classify",
    "tag": "tag",
    "qa": "qa",
    "dpo": "dpo",
    "kto": "kto",
    "grpo": {
        "type": "grpo",
        "num_generations": 2,
        "rollout_batch_size": 5,
        "max_new_tokens": 4,
        "temperature": 3.0,
        "rewards": [{"type": "length", "target": 4, "unit": "characters"}],
    },
    "ppo": {
        "type": "ppo",
        "max_new_tokens": 4,
        "rewards": [{"type": "length", "target": 4, "unit": "characters"}],
    },
    "reward": "reward",
}
HEADS = ("classify", "tag", "qa", "reward")
"""Objectives with a head of their own; the others are a language model's."""
VALUED = ("ppo",)
"""Objectives with a value head in addition to the head of a language model."""

ADAPTATIONS: dict[str, Any] = {
    "full": "full",
    "features": {"type": "features", "train_last": 1},
    "lora": {"type": "lora", "r": 4},
    "qlora": {"type": "qlora", "r": 4},
    "bottleneck": {"type": "bottleneck", "bottleneck_size": 4},
    "prefix": {"type": "prefix", "num_virtual_tokens": 4},
    "prompt": {"type": "prompt", "num_virtual_tokens": 4},
    "ia3": "ia3",
}
TRAINS: dict[str, Callable[[str], bool]] = {
    "full": lambda name: True,
    "features": lambda name: re.search(r"\.(layers?|h)\.1\.|(model|transformer)\.norm\.|ln_f\.", name) is not None,
    "lora": lambda name: ".lora_" in name,
    "qlora": lambda name: ".lora_" in name,
    "bottleneck": lambda name: ".bottleneck_" in name,
    "prefix": lambda name: name.startswith("prompt_encoder."),
    "prompt": lambda name: name.startswith("prompt_encoder."),
    "ia3": lambda name: ".ia3_l" in name,
}
"""Which of a network's parameters an adaptation is to train, by name."""

CANCELS = {"reward": {"transformer.ln_f.bias"}}
"""Parameters that a difference of two answers does not depend on: a bias right before the reward's own layer."""

MERGES = ("lora", "qlora", "ia3")
"""Adaptations that are a change of weights, so that they can be folded into them."""

ON_ITS_BASE = ("lora", "bottleneck", "prefix", "prompt", "ia3")
"""Adaptations that leave the base as it was, and that can be switched off: then the base answers."""

ARCHITECTURES = (*TINY, *ENCODERS)
STEPS = 2  # B of a fresh LoRA is zero, so its A does not move before the second


@dataclass(frozen=True)
class Cell:
    architecture: str
    objective: str
    adaptation: str

    def __str__(self) -> str:
        return f"{self.architecture}-{self.objective}-{self.adaptation}"


def config_of(architecture: str) -> Any:
    return AutoConfig.for_model(architecture, **ENCODERS[architecture]) if architecture in ENCODERS else tiny_config(architecture)


def why_not(cell: Cell) -> str | None:
    """What the refusal of a pair that makes no sense says; None for one that works."""
    kind = objectives.module(cell.objective).Objective.traits.head
    if cell.objective in VALUED and cell.adaptation == "features":
        return "freezes the body, and the value model"
    try:
        head_types.require_class(config_of(cell.architecture), kind)
    except ModelError:
        return "is an encoder" if kind == "lm" else "transformers has no"
    if cell.architecture not in ENCODERS:
        return None
    if cell.adaptation == "prefix":
        return "prefix tuning is not available"
    if cell.adaptation == "prompt" and kind == "score":
        return "would be a virtual token"
    return "is an encoder" if cell.objective == "reward" else None


EVERY = [Cell(*names) for names in product(ARCHITECTURES, OBJECTIVES, ADAPTATIONS)]
CELLS = [cell for cell in EVERY if why_not(cell) is None]
REFUSED = [cell for cell in EVERY if why_not(cell) is not None]


def pairs(cell: Cell) -> set[tuple[str, str]]:
    """Every two names of a cell."""
    return set(combinations((cell.architecture, cell.objective, cell.adaptation), 2))


def cover(cells: Sequence[Cell]) -> list[Cell]:
    """Return a few of ``cells`` that together have every pair of all of them: the cell with most new pairs first."""
    missing = set().union(*map(pairs, cells))
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(pairs(cell) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


SHORT = frozenset(cover(CELLS))
"""The cells that `make test` runs. `make long` runs the others."""


@dataclass(frozen=True)
class Ran:
    """A run of two steps: its ``base`` and ``model`` folders, the ``losses`` of its steps, ``batches`` = packed or padded.

    ``names`` of all parameters; ``trained``: those that required gradients, ``still``: those of them that did not; ``touched``: frozen ones that did.
    ``at_first`` and ``at_last``: logits of the network in memory, before and after.
    """

    made: dict[str, Any]
    base: Path
    model: Path
    losses: list[float]
    batches: str
    names: set[str]
    trained: set[str]
    still: set[str]
    touched: set[str]
    at_first: torch.Tensor
    at_last: torch.Tensor


def of(cell: Cell, folder: Path, **train: Any) -> dict[str, Any]:
    """The recipe of a cell."""
    return recipe(folder, cell.architecture, OBJECTIVES[cell.objective], ADAPTATIONS[cell.adaptation], max_steps=STEPS, **train)


def run(cell: Cell, folder: Path, **train: Any) -> Ran:
    made = of(cell, folder, **train)
    with watched() as networks:
        outcome = tunesmith.train(made, out=folder / "run")
    ((built, first, before),) = networks
    after, last = digests(built.model), _plain_logits(built)
    trained = {name for name, parameter in built.model.named_parameters() if parameter.requires_grad}
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    manifest = json.loads((folder / "run" / "manifest.json").read_text(encoding="utf-8"))
    return Ran(
        made=made,
        base=Path(made["model"]),
        model=Path(outcome["model_dir"]),
        losses=[record["loss"] for record in records if record["kind"] == "train"],
        batches=manifest["route"]["batches"],
        names=set(after),
        trained=trained,
        still={name for name in trained if before[name] == after[name]},
        touched={name for name in before if name not in trained and before[name] != after[name]},
        at_first=first,
        at_last=last,
    )


@contextmanager
def watched() -> Iterator[list[tuple[Any, torch.Tensor, dict[str, str]]]]:
    """Of every network that is built meanwhile: it, its logits and the digests of its parameters as they were then."""
    seen: list[tuple[Any, torch.Tensor, dict[str, str]]] = []
    build = setup.build

    def keep(*arguments: Any) -> Any:
        built = build(*arguments)
        seen.append((built, _plain_logits(built), digests(built.model)))
        return built

    setup.build = keep
    try:
        yield seen
    finally:
        setup.build = build


def digests(model: Any) -> dict[str, str]:
    """sha256 of each parameter's bytes."""
    return {
        name: hashlib.sha256(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
    }


IDS = [[5, 6, 7, 300, 41, 9]]


def logits(model: Any) -> torch.Tensor:
    """(tokens, vocabulary) of a few ids, or (1, labels)."""
    with torch.no_grad():
        return head_loading.row_logits(model.eval(), torch.tensor(IDS)).float()


def is_head(name: str) -> bool:
    """Whether a parameter belongs to a new head; peft keeps the one that it trains beside the one it found."""
    found = re.search(r"(^|\.)(score|classifier|qa_outputs|pooler)\.", name) is not None
    return found and ".original_module." not in name


def trains(cell: Cell, name: str) -> bool:
    """Whether a run of ``cell`` is to train the parameter ``name``."""
    value_head = cell.objective in VALUED and ".value_head." in f".{name}"
    return TRAINS[cell.adaptation](name) or value_head or (cell.objective in HEADS and is_head(name))


def _plain_logits(built: Any) -> torch.Tensor:
    from tunesmith.train import fast_path

    with built.fast_path.fused.disabled(), fast_path.plain_attention(built.model, built.fast_path):
        return logits(built.model)
