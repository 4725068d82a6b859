"""Hidden states of a frozen body for the rows of a run, computed once and kept on disk.

Where only the head is trained, the body's hidden states are the same in every epoch, so each row costs one
forward pass. Only those that a loss reads are kept, at a batch's ``positions``. They are stored next to the
processed rows in the same format (``data.store.cache``): memory-mapped, written under another name and
renamed when complete. A row is found by its tokens and positions, so any split into micro-batches, number of
processes and order finds it. A missing row is computed, so deleting the cache costs only time.

On a CPU each row goes through the body alone, so that its hidden states depend on no other row.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from tunesmith import files, machine
from tunesmith.data.batch.pack import to_device
from tunesmith.data.batch.step import Batch, Step, groups_under
from tunesmith.data.store import cache
from tunesmith.models.fast import kernels
from tunesmith.models.find import record
from tunesmith.models.heads import lm_head
from tunesmith.models.network import base
from tunesmith.runs.figure_format import size
from tunesmith.train import distributed, memory_budget, setup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORWARD = (
    "train.frozen_body_cache", "data.store.cache", "data.batch.pack",
    "models.network", "models.heads.head_types", "models.adapters.adapter_types",
    "models.heads.lm_head", "models.heads.task_heads", "models.fast.bidirectional_attention",
    "models.heads.noise", "models.load.load", "models.load.quantization", "models.load.dequantized_linear",
    "models.load.vocabulary", "models.adapters.virtual_tokens", "models.adapters.virtual_token_layout",
    "models.adapters.linear_layers", "models.fast.attention", "models.fast.segments", "models.fast.varlen",
    "models.fast.fused_layers", "models.fast.fused_encoder", "models.fast.last_layer", "models.fast.fused_bottleneck",
    "models.fast.rotary", "models.fast.linear_products", "models.fast.kernels", "models.fast.torch_compile",
)  # fmt: skip
"""Modules that a body's hidden states depend on: the cache is made again when one of them changes."""

SHARD_BYTES = 256 * 2**20
"""Bytes written at a time, which a kill can lose."""

REPORT_SECONDS = 30.0
"""Seconds between two reports of progress."""


@dataclass(frozen=True)
class Row:
    """A row as the body sees it."""

    ids: np.ndarray
    """int32 (tokens,); followed by the token types where a row has other types than 0."""
    places: np.ndarray
    """int32: positions in the row whose hidden states are kept."""

    @property
    def digest(self) -> int:
        content = hashlib.blake2b(self.ids.tobytes(), digest_size=8)
        content.update(b"|" + self.places.tobytes())
        return int.from_bytes(content.digest(), "little")


def rows_of(batch: Batch) -> list[Row]:
    """Return the rows of a packed or padded batch, in order. ``batch["positions"]`` must ascend."""
    ids, positions = batch["input_ids"].cpu().numpy(), batch["positions"].cpu().numpy()
    if "segments" in batch:
        lengths = np.array(batch["segments"])
        starts = np.cumsum(lengths) - lengths
    else:
        lengths = batch["attention_mask"].sum(1).cpu().numpy()
        starts = np.arange(len(ids)) * ids.shape[1]
    flat = ids.reshape(-1).astype(np.int32)
    types = np.zeros(0, np.int32)
    if "token_type_ids" in batch:
        types = batch["token_type_ids"].cpu().numpy().reshape(-1).astype(np.int32)
    edges = np.searchsorted(positions, [*starts, flat.size])
    rows = []
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own, own_types = flat[start : start + length], types[start : start + length]
        content = np.concatenate([own, own_types]) if own_types.any() else own
        rows.append(Row(content, (positions[edges[number] : edges[number + 1]] - start).astype(np.int32)))
    return rows


@dataclass
class CachedStates:
    """Kept hidden states, ``width`` numbers of ``dtype`` for each position."""

    width: int
    dtype: torch.dtype
    index: dict[int, tuple[cache.Entry, int]] = field(default_factory=dict)
    scratch: object = None
    """Keeps a temporary folder alive."""
    shards: set[Path] = field(default_factory=set)
    """The shards that were read."""

    def __call__(self, batch: Batch) -> torch.Tensor | None:
        """Return the hidden states at the batch's positions (positions, width); None if a row is missing."""
        parts = [self.find(row) for row in rows_of(batch) if len(row.places)]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or not known:
            return None
        states = torch.from_numpy(np.concatenate(known)).view(self.dtype).view(-1, self.width)
        return states.to(batch["input_ids"].device)

    def find(self, row: Row) -> np.ndarray | None:
        """Return the bytes of a row's hidden states, a view of the file; None if the row is not there."""
        if (location := self.index.get(row.digest)) is None:
            return None
        entry, number = location
        kept = entry.example(number, 0, int(entry.length[number]))
        # another row may have the same digest
        same = np.array_equal(kept["ids"], row.ids) and np.array_equal(kept["places"], row.places)
        return kept["outputs"] if same else None

    def read(self, folder: Path) -> None:
        """Read the new shards of ``folder``; remove damaged ones."""
        for shard in sorted(set(folder.glob("[!.]*")) - self.shards):
            entry = cache.load(shard)
            if entry is None:
                files.remove_folder(shard)
                continue
            self.shards.add(shard)
            self.index |= {int(digest): (entry, number) for number, digest in enumerate(entry.digest)}

    def write(self, folder: Path, rows: Sequence[Row], states: Sequence[torch.Tensor]) -> None:
        """Write a shard of rows into ``folder``. Raises DiskFullError or UserError."""
        name = hashlib.sha256(np.array([row.digest for row in rows], np.uint64).tobytes()).hexdigest()[:32]
        writer = cache.begin(folder / name)
        try:
            for number, (row, state) in enumerate(zip(rows, states, strict=True)):
                raw = state.to(self.dtype).cpu().contiguous().view(torch.uint8).numpy().reshape(-1)
                writer.add([{"ids": row.ids, "places": row.places, "outputs": raw}], number, row.digest)
            cache.finish(writer, folder / name, {})
        except OSError as error:
            raise cache.disk_error(error, folder) from None
        finally:
            writer.abandon()


def install(ready: setup.Setup, built: setup.Built, note: Callable[[str], None]) -> None:
    """Compute and keep the body's hidden states for all rows of the run, where that changes no result.

    Does nothing where the body is trained. Where the body is not deterministic, or the disk is full, the
    reason is printed and each step computes them. All processes call it; each computes its share.
    """
    model = built.model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if (
        ready.adaptation.traits.saved_as is not None
        or not trained
        or lm_head.own_parameters(model) != trained
    ):
        return
    why = _why_not(ready, model)
    if why is None:
        first, states = _batch(ready, built, ready.all_examples()[0], [0]), []
        with torch.no_grad(), machine.fork_rng(ready.device):
            for training in (True, False):
                model.train(training)
                states.append(lm_head.hidden_states(model, first))
        if torch.equal(*states):
            built.fast_path.disable_sharing()  # a kept row is whole
            _fill(ready, built, states[0].shape[-1], states[0].dtype, note)
            return
        why = "it computes another result in training mode than in eval mode, so it has random layers"
    note(f"each step computes the body's hidden states again: {why}")


def _why_not(ready: setup.Setup, model: PreTrainedModel) -> str | None:
    """Return why the body's hidden states change from step to step, or why the loss cannot use kept ones."""
    if ready.objective.traits.shares_prompts:
        return "answers share the forward pass of their prompt"
    if ready.recipe.train.neftune_noise_alpha is not None:
        return "train.neftune_noise_alpha adds noise to the embeddings"
    layers = base(model).base_model.modules()
    # dropout of attention probabilities is off already
    rates = {layer.p for layer in layers if isinstance(layer, nn.Dropout) and layer.p > 0}
    if rates:
        return f"the body has dropout ({', '.join(f'{rate:g}' for rate in sorted(rates))}) in training"
    return None if lm_head.takes_outputs(model) else "the loss is computed from the model's own logits"


def _fill(
    ready: setup.Setup, built: setup.Built, width: int, dtype: torch.dtype, note: Callable[[str], None]
) -> None:
    """Read the cache, compute the missing rows, and let losses read from it."""
    scratch = None if ready.recipe.data.cache else cache.Scratch("tunesmith-bodies-")
    root = cache.store() if scratch is None else Path(distributed.broadcast(scratch.name))
    folder = root / f"bodies-{_key(ready, built)[:32]}"
    states = CachedStates(width, dtype, scratch=scratch)
    with distributed.main_first():  # one process removes damaged shards
        states.read(folder)
    missing: dict[int, tuple[Step, int]] = {}
    rows = tokens = positions = 0
    examples = [(step, place) for step in ready.all_examples() for place in range(len(step))]
    for step, place in examples:
        row = rows_of(_batch(ready, built, step, [place]))[0]
        rows += 1
        if row.digest not in missing and states.find(row) is None:
            missing[row.digest] = (step, place)
            tokens, positions = tokens + len(row.ids), positions + len(row.places)
    needed = positions * (width * dtype.itemsize + 4) + tokens * 4
    free = files.free_disk_bytes(folder)
    distributed.wait()  # no process may write before all have looked for missing rows
    if any(distributed.gather([needed + files.MARGIN_BYTES > free])):
        note(
            f"each step computes the body's hidden states again: the cache needs {size(needed)} in {root}, and "
            f"{size(free)} are free there"
        )
        return
    if any(distributed.gather([bool(missing)])):  # another run may have written since one process looked
        note(
            f"the body's hidden states are kept: {len(missing):,} of {rows:,} rows to compute, {size(needed)} in {folder}"
        )
        state = distributed.state()
        mine = list(missing.values())[state.process_index :: state.num_processes]
        _compute(ready, built, mine, states, folder, note)
        distributed.wait()
        states.read(folder)
    else:
        note(f"the body's hidden states are kept: all {rows:,} rows are in {folder}")
    lm_head.keep_outputs(built.model, states)


def _compute(
    ready: setup.Setup,
    built: setup.Built,
    missing: Sequence[tuple[Step, int]],
    cached: CachedStates,
    folder: Path,
    note: Callable[[str], None],
) -> None:
    """Run rows through the body and write their hidden states, a shard at a time."""
    layout = built.fast_path.layout
    # a CPU is as fast with one row at a time
    budget = (
        1
        if ready.device.type == "cpu"
        else memory_budget.first_budget(ready.recipe.train, ready.device, ready.precision.compute)
    )
    lengths = [int(step.lengths[place]) for step, place in missing]
    rows: list[Row] = []
    states: list[torch.Tensor] = []
    shard_bytes, done, reported = 0, 0, time.monotonic()
    for group in groups_under(lengths, budget, layout):
        examples = [step.examples([place])[0] for step, place in (missing[number] for number in group)]
        batch = to_device(ready.objective.collate(examples, layout), ready.device)
        with torch.no_grad():
            computed = lm_head.outputs_at(built.model, batch)
        batch_rows = rows_of(batch)
        rows += batch_rows
        states += torch.split(computed, [len(row.places) for row in batch_rows])
        shard_bytes, done = shard_bytes + computed.nbytes, done + len(group)
        if shard_bytes >= SHARD_BYTES:
            cached.write(folder, rows, states)
            rows, states, shard_bytes = [], [], 0
        if time.monotonic() - reported > REPORT_SECONDS:
            note(f"the body's hidden states: {done:,} of {len(missing):,} rows")
            reported = time.monotonic()
    if rows:
        cached.write(folder, rows, states)


def _batch(ready: setup.Setup, built: setup.Built, step: Step, places: Sequence[int]) -> Batch:
    return to_device(ready.objective.collate(step.examples(places), built.fast_path.layout), ready.device)


def _key(ready: setup.Setup, built: setup.Built) -> str:
    """Hash everything that hidden states depend on, except the row."""
    path = built.fast_path.as_dict()
    facts = [
        record.fingerprint(Path(base(built.model).name_or_path)), ready.precision.as_dict()["compute"],
        ready.device.type, {name: path[name] for name in ("batches", "attention", "fused", "compiled")},
        {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    ]  # fmt: skip
    content = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in FORWARD:
        spec = importlib.util.find_spec(f"tunesmith.{name}")
        assert spec is not None and spec.origin is not None
        content.update(Path(spec.origin).read_bytes())
    for source in (kernels.SOURCE, *kernels.INCLUDED):
        content.update(source.read_bytes())
    return content.hexdigest()
