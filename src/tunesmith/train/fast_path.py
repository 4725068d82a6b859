"""Choose what a run may use: packed or padded batches, fused or plain layers.

A fast path must compute the same function as the plain path. Before the first step two rows go through
transformers' own forward and through the fast path; loss and gradients are compared, and a part that differs
is switched off and reported (see ``train.parity_check``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from tunesmith import machine
from tunesmith.data.batch.pack import PACKED, PADDED, Layout, to_device
from tunesmith.errors import ModelError, RecipeError
from tunesmith.json_types import JsonObject
from tunesmith.models import lanes
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.fast import attention, fused_layers, torch_compile, varlen
from tunesmith.models.fast.self_check import describe
from tunesmith.models.heads import lm_head, noise
from tunesmith.models.network import FORWARD_ERRORS, attribute, base
from tunesmith.objectives import Example, Objective
from tunesmith.train.parity_check import CALL_TOKENS, ParityCheck, shorten, without_zeros
from tunesmith.train.row_check import RowCheck
from tunesmith.train.train_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_SHARED = "what several answers or rows begin with is computed for each"
EVALUATION_TOLERANCE = 1e-6
"""Largest relative difference between figures of a deterministic network in training and in eval mode."""


@dataclass
class FastPath:
    """The layout of batches and the layers that are replaced.

    ``check``: the network, the objective and the first rows, on which later choices are tested as well."""

    check: ParityCheck = field(repr=False)
    layout: Layout
    fused: fused_layers.Fused
    attention: str
    """The model's own attention, for every batch that is not packed."""
    notes: list[str] = field(default_factory=list)
    """Decisions, printed once."""
    packed_attention: str = "segments"
    """The attention of packed batches: ``varlen`` or ``segments``."""
    recomputed: bool = False
    """True when the backward pass computes decoder layers again."""
    compiled: bool = False
    """True when torch.compile has compiled the decoder layers."""

    @property
    def packed(self) -> bool:
        return self.layout.packed

    @property
    def model(self) -> PreTrainedModel:
        return self.check.model

    def disable(self) -> None:
        """Restore the model's own layers, loss and attention."""
        torch_compile.disable(self.model)
        self.fused.disable()
        lm_head.use_plain_head(self.model, False)
        base(self.model).set_attn_implementation(self.attention)

    def disable_fused(self) -> None:
        self.fused.disable()
        self.fused = fused_layers.Fused(rejected=self.fused.rejected)

    def disable_packing(self) -> None:
        self.layout = PADDED
        base(self.model).set_attn_implementation(self.attention)

    def disable_sharing(self) -> None:
        self.layout = replace(self.layout, shared=False)

    def as_dict(self) -> JsonObject:
        return {
            "batches": "packed" if self.packed else "padded",
            "lanes": self.layout.lanes,
            "attention": self.packed_attention if self.packed else self.attention,
            "fused": dict(self.fused.kinds),
            "not_fused": dict(self.fused.rejected),
            "recomputed": self.recomputed,
            "compiled": self.compiled,
            "shared": self.layout.shared,
            "notes": list(self.notes),
        }


@contextmanager
def plain_attention(model: PreTrainedModel, chosen: FastPath) -> Iterator[None]:
    """Use the model's own attention inside the block: generation has a cache and no segments."""
    inner = base(model)
    current = inner.config._attn_implementation
    inner.set_attn_implementation(chosen.attention)
    model.eval()
    try:
        with torch_compile.paused() if chosen.compiled else nullcontext():
            yield
    finally:
        inner.set_attn_implementation(current)


def choose(
    model: PreTrainedModel,
    objective: Objective,
    examples: Sequence[Example],
    longest: int,
    packing: str,
    device: torch.device,
    stack: bool = True,
) -> FastPath:
    """Find the fastest path that is equal to the plain one on the first two ``examples``.

    A run passes the shortest rows of step 1. ``longest``: tokens of the longest row of the run, which a
    sliding window must cover. ``stack``: whether a fused layer may keep the memory of trained weights
    (DeepSpeed moves it). The model is left in eval mode, without gradients, set up for the chosen path.
    """
    model.eval()
    check = ParityCheck.of_first_rows(model, objective, examples, device)
    longest += virtual_tokens.count(model)
    alone = RowCheck(model, _tokens(check.rows[0]), device)
    if objective.traits.head == "lm":
        alone.require_causal()
    unnumbered = alone.number_tokens()
    chosen = FastPath(check, PADDED, fused_layers.Fused(), base(model).config._attn_implementation)
    with without_zeros(model):
        lm_head.use_plain_head(model, True)
        expected = check.measure_plain()
        if unnumbered is not None:
            why = f"with position ids its hidden states differ ({unnumbered})"
            chosen.notes.append(f"rows are padded, not packed, for this model: {why}")
        elif packing != "off":
            _pack(chosen, longest)
        lm_head.use_plain_head(model, False)
        chosen.fused = fused_layers.install(model, stack)
        chosen.notes += [
            f"{name} keeps its own forward: {why}"
            for name, why in chosen.fused.rejected.items()
            if "failed" in why
        ]
        fallbacks: list[tuple[str, Callable[[], None]]] = [
            ("the fused layers are off", chosen.disable_fused),
            ("the loss is computed from all logits", lambda: lm_head.use_plain_head(model, True)),
            ("rows are padded, not packed", chosen.disable_packing),
        ]
        if chosen.layout.shared:
            fallbacks.insert(0, (NOT_SHARED, chosen.disable_sharing))
        if chosen.packed_attention == "varlen":
            by_segments = partial(_pack_by_segments, chosen, longest)
            fallbacks.insert(2, ("attention is not varlen_attn", by_segments))
        for consequence, fall_back in fallbacks:
            found = check.why_not_equal(expected, chosen.layout)
            if found is None:
                break
            fall_back()
            chosen.notes.append(f"{consequence}: on the first rows the fast path {found}")
    if not chosen.packed:
        alone.require_padding_ignored()
    if stack:
        _add_lanes(chosen)
    return chosen


def _add_lanes(chosen: FastPath) -> None:
    """Let micro-batches go through the network at the same time where its layers are known to keep no state.

    A model's own loss takes what its head receives by a hook, and some rotary embeddings change with the longest row.
    """
    model, kinds = chosen.model, chosen.fused.kinds
    changing = [kind for module in model.modules() if (kind := attribute(module, "rope_type"))]
    fixed = all(isinstance(kind, str) and kind not in ("dynamic", "longrope") for kind in changing)
    known = ("attention" in kinds or "encoder attention" in kinds) and not chosen.fused.rejected
    if chosen.packed and known and fixed and not lm_head.is_plain(model):
        parameters = list(model.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        least = lanes.least_tokens(sum(parameter.numel() for parameter in parameters))
        number = lanes.number(chosen.check.device, trained)
        chosen.layout = replace(chosen.layout, lanes=number, lane_tokens=least)


def _tokens(example: Example) -> Sequence[int]:
    """Return the tokens of the first sequence of an example."""
    return [int(token) for token in example["input_ids"]]


def _pack(chosen: FastPath, longest: int) -> None:
    """Pack with the fastest attention that is exact for this model; note why if there is none."""
    check, reason = chosen.check, None
    if packed_attention(check.device, check.model.dtype) == "varlen":
        kernel = varlen.torch_kernel()
        found = varlen.self_test(kernel, check.device, check.model.dtype)
        if found is None:
            varlen.register(kernel, torch.cuda.get_device_capability(check.device))
            reason = _why_not_packed(chosen, longest, varlen.NAME)
            if reason is None:
                chosen.packed_attention = "varlen"
                return
        else:
            chosen.notes.append(
                f"attention is not varlen_attn: on random numbers it differed from plain attention ({found})"
            )
    _pack_by_segments(chosen, longest, reason)


def _pack_by_segments(chosen: FastPath, longest: int, no_varlen: str | None = None) -> None:
    """Pack with attention row by row, or pad. ``no_varlen``: why varlen_attn is not used."""
    attention.register()
    chosen.packed_attention = "segments"
    why = _why_not_packed(chosen, longest, attention.NAME)
    if why is not None:
        chosen.notes.append(f"rows are padded, not packed, for this model: {why}")
        chosen.disable_packing()
    elif no_varlen is not None:
        chosen.notes.append(f"attention is not varlen_attn for this model: {no_varlen}")


def _why_not_packed(chosen: FastPath, longest: int, name: str) -> str | None:
    """Set ``chosen.layout`` to the best packed layout that is exact; return why there is none."""
    layouts = [PACKED] if chosen.check.may_share() else []
    reasons: list[str] = []
    for layout in [*layouts, Layout(packed=True)]:
        why = chosen.check.why_not_packed(name, layout, longest)
        if why is None:
            chosen.layout = layout
            chosen.notes += [f"{NOT_SHARED}: {reason}" for reason in reasons]
            return None
        reasons.append(why)
    return reasons[-1]


def check_training_mode(chosen: FastPath) -> None:
    """Run the starts of the rows of :func:`choose` in training mode, and switch off misplaced dropout.

    Layers such as dropout act only in training mode. If packed rows fail there, the run pads its rows. Raises
    ModelError if padded rows fail, too.
    """
    check = chosen.check
    model, objective, device = check.model, check.objective, check.device
    rows = [shorten(row, CALL_TOKENS) for row in check.rows]
    lengths = [len(row["input_ids"]) for row in rows]

    def forward() -> None:
        batch = to_device(objective.collate(rows, chosen.layout), device)
        with machine.fork_rng(device), torch.no_grad():
            objective.loss(model, batch)

    model.train()
    try:
        while True:
            try:
                chosen.notes += noise.switch_off_misplaced(model, lengths, chosen.packed, forward)
                return
            except (attention.CannotPack, *FORWARD_ERRORS) as error:
                if machine.is_out_of_memory(error):  # the first step handles this error and names the row
                    chosen.notes.append("training mode was not tried before the first step: memory ran out")
                    return
                if not chosen.packed:
                    raise ModelError(
                        f"{base(model).config.model_type}: the model's own forward fails in training mode "
                        f"({describe(error)}), so tunesmith cannot train it.\n  Check its config.json, or take another model."
                    ) from error
                chosen.disable_packing()
                chosen.notes.append(
                    f"rows are padded, not packed: packed ones fail in training mode ({describe(error)})"
                )
    finally:
        model.eval()


def check_deterministic(chosen: FastPath) -> None:
    """Raise ModelError where the network computes another result in training mode than in eval mode.

    For an objective whose figures must depend on the weights alone. Uses the rows of :func:`choose`.
    """
    check = chosen.check
    model, objective, rows, device = check.model, check.objective, check.rows, check.device
    batch = to_device(objective.collate(rows, chosen.layout), device)
    model.train()
    with machine.fork_rng(device):
        training = objective.summarise([objective.evaluate(model, batch)])
    model.eval()
    evaluation = objective.summarise([objective.evaluate(model, batch)])
    limit = EVALUATION_TOLERANCE
    for name, value in evaluation.items():
        if not np.isclose(value, training[name], rtol=limit, atol=limit, equal_nan=True):
            raise ModelError(
                f"{base(model).config.model_type} computes another result in training mode than in eval mode "
                f"({name} of the first rows: {training[name]:.6g} and {value:.6g}). It has random layers in addition to "
                "dropout, which is off.\n"
                "  Set their rates in the model's config.json to 0, or take another model."
            )


def recompute(chosen: FastPath) -> None:
    """Keep the input of each decoder layer and compute the rest again in backward (gradient checkpointing).

    Chen et al. 2016. It is transformers' own, in the non-reentrant form: gradients reach adapters in a frozen
    base, and keywords such as the segments reach the second forward. Only training mode does it. The
    gradients of the rows of :func:`choose` are compared with and without it; where they differ, it is
    switched off and a note reports it.
    """
    model, check = chosen.model, chosen.check
    inner = base(model)
    model.train()
    expected = check.measure_training(chosen.layout)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # of a new name that transformers 5.17 does not have yet
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # only the reentrant form needs a gradient of the frozen embeddings, which costs time
    inner.disable_input_require_grads()
    found = check.compare(expected, check.measure_training(chosen.layout))
    if found is None:
        chosen.recomputed = True
        # recomputation restores the random numbers of the whole process
        chosen.layout = replace(chosen.layout, lanes=1)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            inner.gradient_checkpointing_disable()
        chosen.notes.append(
            f"gradient checkpointing is off: on the first rows the gradients differed ({found})"
        )
    model.eval()


def compile_layers(chosen: FastPath) -> None:
    """Compile each decoder layer with torch.compile, where loss and gradients stay the same.

    They are compared with those of the uncompiled path in training mode, for two rows together and for the
    first row alone: one piece of code has to serve both packings. Layers that cannot be compiled, or differ,
    stay uncompiled, and a note reports it.
    """
    if chosen.packed and chosen.packed_attention == "segments":
        chosen.notes.append(
            "torch.compile is off: attention runs row by row here, so every packing would be compiled again"
        )
        return
    model, both = chosen.model, chosen.check
    checks = [both, replace(both, rows=both.rows[:1])]
    model.train()
    expected = [check.measure_training(chosen.layout) for check in checks]
    torch_compile.enable(model)
    try:
        measured = [check.measure_training(chosen.layout) for check in checks]
        found = next(filter(None, map(both.compare, expected, measured)), None)
    except RuntimeError as error:  # no compiler, no Triton, untraceable code: torch has no narrower class
        if machine.is_out_of_memory(error):
            raise
        found = f"{type(error).__name__}: {' '.join(str(error).split(chr(10))[:2])}"
        model.zero_grad()
    if found is None:
        chosen.compiled = True
    else:
        torch_compile.disable(model)
        chosen.notes.append(f"torch.compile is off: on the first rows it failed or differed ({found})")
    model.eval()


def packed_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Return ``varlen`` on a GPU since Ampere in fp16 or bf16, else ``segments``."""
    return "varlen" if varlen.why_not(device, dtype) is None else "segments"


def check_compile(train: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raise RecipeError if torch.compile cannot work here or would not be faster."""
    if not train.torch_compile:
        return
    if device.type != "cuda":
        raise RecipeError(
            f"train.torch_compile is for GPUs, and this run is on a {device.type} device. On a CPU compiling takes "
            "half a minute, needs padded rows, and is no faster than tunesmith's own layers.\n"
            "  Leave train.torch_compile out."
        )
    if train.packing == "auto" and packed_attention(device, dtype) != "varlen":
        raise RecipeError(
            f"train.torch_compile: attention runs row by row on packed batches here "
            f"({varlen.why_not(device, dtype)}), so every packing would be compiled again.\n"
            "  Set train.packing: off, or leave train.torch_compile out."
        )
