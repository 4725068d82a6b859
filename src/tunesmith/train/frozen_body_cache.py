"""What a frozen body gives for the rows of a run: computed once, kept on disk, found again by a row's content.

Where everything that is trained stands after the body, its outputs are the same in every epoch, so the first look at a row is the
last that costs a forward pass. Only outputs that a loss reads are kept: those at a batch's ``positions``. They lie beside the
processed rows and in the same format (``data.store.cache``): memory-mapped, written under another name and renamed when complete.
A row is known by its tokens and its places, which are compared, not by where it stands: any split into micro-batches, any number
of processes and any order finds it. What is not found is computed, so a cache that is deleted costs time and nothing else.

On a CPU each row goes through the body alone: then what is kept depends on the row and on nothing else.
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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from tunesmith import files
from tunesmith.data.batch.pack import to_device
from tunesmith.data.batch.step import Step, groups_under
from tunesmith.data.store import cache
from tunesmith.models.fast import kernels
from tunesmith.models.find import record
from tunesmith.models.heads import lm_head
from tunesmith.models.network import base
from tunesmith.runs import figure_format
from tunesmith.train import distributed, forecast, setup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORWARD = (
    "train.frozen_body_cache", "data.store.cache", "data.batch.pack",
    "models.network", "models.heads.head_types", "models.adapters.adapter_types",
    "models.heads.lm_head", "models.heads.task_heads", "models.heads.noise", "models.fast.bidirectional_attention",
    "models.load.load", "models.load.quantization", "models.load.dequantized_linear", "models.load.vocabulary",
    "models.adapters.virtual_tokens", "models.adapters.virtual_token_layout", "models.adapters.linear_layers",
    "models.fast.attention", "models.fast.segments", "models.fast.varlen", "models.fast.fused_layers", "models.fast.fused_encoder",
    "models.fast.fused_bottleneck", "models.fast.rotary", "models.fast.linear_products", "models.fast.kernels",
    "models.fast.torch_compile",
)  # fmt: skip
"""Modules that a frozen body's outputs depend on: an edit of one of them makes the cache anew."""

SHARD_BYTES = 256 * 2**20
"""Written at a time: what a kill can lose."""

SECONDS = 30.0
"""Between two words about how far it is."""


@dataclass(frozen=True)
class Row:
    """A row as the body sees it: ``ids`` int32 (tokens,), with the types of its tokens behind them where it has some; the
    ``places`` int32 in it whose outputs are wanted."""

    ids: np.ndarray
    places: np.ndarray

    @property
    def digest(self) -> int:
        content = hashlib.blake2b(self.ids.tobytes(), digest_size=8)
        content.update(b"|" + self.places.tobytes())
        return int.from_bytes(content.digest(), "little")


def rows_of(batch: dict[str, Any]) -> list[Row]:
    """The rows of a packed or padded batch, in order. ``batch["positions"]`` ascends."""
    ids, positions = batch["input_ids"].cpu().numpy(), batch["positions"].cpu().numpy()
    if "segments" in batch:
        lengths = np.array(batch["segments"])
        starts = np.cumsum(lengths) - lengths
    else:
        lengths = batch["attention_mask"].sum(1).cpu().numpy()
        starts = np.arange(len(ids)) * ids.shape[1]
    flat = ids.reshape(-1).astype(np.int32)
    kinds = batch.get("token_type_ids")
    typed = None if kinds is None else kinds.cpu().numpy().reshape(-1).astype(np.int32)
    edges = np.searchsorted(positions, [*starts, flat.size])
    return [
        Row(
            _seen(flat, typed, start, start + length),
            (positions[edges[number] : edges[number + 1]] - start).astype(np.int32),
        )
        for number, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def _seen(ids: np.ndarray, types: np.ndarray | None, start: int, end: int) -> np.ndarray:
    own = ids[start:end]
    return own if types is None or not types[start:end].any() else np.concatenate([own, types[start:end]])


@dataclass
class Outputs:
    """Kept outputs of rows, ``width`` numbers of ``dtype`` for each place. Called with a batch it gives those at its positions
    (positions, width), or None when it lacks a row of it.
    """

    width: int
    dtype: torch.dtype
    index: dict[int, tuple[cache.Entry, int]] = field(default_factory=dict)
    scratch: object = None
    """Keeps a temporary folder alive."""
    shards: set[Path] = field(default_factory=set)
    """Those that were read."""

    def __call__(self, batch: dict[str, Any]) -> torch.Tensor | None:
        found = [self.find(row) for row in rows_of(batch) if len(row.places)]
        parts = [part for part in found if part is not None]
        if len(parts) < len(found) or not parts:
            return None
        return (
            torch.from_numpy(np.concatenate(parts))
            .view(self.dtype)
            .view(-1, self.width)
            .to(batch["input_ids"].device)
        )

    def find(self, row: Row) -> np.ndarray | None:
        """The bytes of a row's outputs, a view of the file; None when there are none, or only of a row with the same digest."""
        if (place := self.index.get(row.digest)) is None:
            return None
        entry, number = place
        kept = entry.example(number, 0, int(entry.length[number]))
        same = np.array_equal(kept["ids"], row.ids) and np.array_equal(kept["places"], row.places)
        return kept["outputs"] if same else None

    def read(self, folder: Path) -> None:
        """Take in what lies in ``folder``; what is there and is not what was written is removed."""
        for shard in sorted(set(folder.glob("[!.]*")) - self.shards):
            entry = cache.load(shard)
            if entry is None:
                files.remove_folder(shard)
                continue
            self.shards.add(shard)
            self.index |= {int(digest): (entry, number) for number, digest in enumerate(entry.digest)}

    def write(self, folder: Path, rows: Sequence[Row], outputs: Sequence[torch.Tensor]) -> None:
        """Put a shard of rows into ``folder``. Raises DiskFullError or UserError where that is impossible."""
        name = hashlib.sha256(np.array([row.digest for row in rows], np.uint64).tobytes()).hexdigest()[:32]
        writer = cache.begin(folder / name)
        try:
            for number, (row, output) in enumerate(zip(rows, outputs, strict=True)):
                raw = output.to(self.dtype).cpu().contiguous().view(torch.uint8).numpy().reshape(-1)
                writer.add([{"ids": row.ids, "places": row.places, "outputs": raw}], number, row.digest)
            cache.finish(writer, folder / name, {})
        except OSError as error:
            raise cache.disk_error(error, folder) from None
        finally:
            writer.abandon()


def keep(ready: setup.Setup, built: setup.Built, say: Callable[[str], None]) -> None:
    """Make the outputs of the body for all rows of the run, unless they are kept already, where that changes no result.

    Nothing is done where the body is trained; where it answers at random, or the disk is full, the reason is said and the run
    computes them anew each time. All processes call it; each makes its share.
    """
    model = built.model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if hasattr(model, "peft_config") or not trained or lm_head.own_parameters(model) != trained:
        return
    why = "a row has several answers" if ready.objective.traits.shares_prompts else _why_not(ready, model)
    if why is None:
        first, outputs = _batch(ready, built, ready.seen()[0], [0]), {}
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[ready.device] if ready.device.type == "cuda" else []),
        ):
            for training in (False, True):
                model.train(training)
                outputs[training] = lm_head.hidden_states(model, first)
        model.eval()
        if not torch.equal(outputs[False], outputs[True]):
            why = "it answers otherwise in training than in evaluation, so something in it is random"
    if why is not None:
        say(f"the body's outputs are computed anew at each step: {why}")
        return
    _keep(ready, built, outputs[False].shape[-1], outputs[False].dtype, say)


def _why_not(ready: setup.Setup, model: PreTrainedModel) -> str | None:
    """What makes the body's outputs another at each step, or keeps them from being used."""
    if ready.recipe.train.neftune_noise_alpha is not None:
        return "train.neftune_noise_alpha puts noise on the embeddings"
    layers = base(model).base_model.modules()
    drops = {
        one.p for one in layers if isinstance(one, nn.Dropout) and one.p > 0
    }  # those of attention are off by now
    if drops:
        return f"the body drops {', '.join(f'{rate:g}' for rate in sorted(drops))} of its activations in training"
    return None if lm_head.takes_outputs(model) else "the loss is computed from the model's own logits"


def _keep(
    ready: setup.Setup, built: setup.Built, width: int, dtype: torch.dtype, say: Callable[[str], None]
) -> None:
    scratch = None if ready.recipe.data.cache else cache.Scratch("tunesmith-bodies-")
    root = cache.store() if scratch is None else Path(distributed.same(scratch.name))
    folder = root / f"bodies-{_key(ready, built)[:32]}"
    kept = Outputs(width, dtype, scratch=scratch)
    with distributed.main_first():  # what is broken is removed by one
        kept.read(folder)
    missing: dict[int, tuple[Step, int]] = {}
    rows = tokens = places = 0
    for step, place in [(one, place) for one in ready.seen() for place in range(len(one))]:
        row = rows_of(_batch(ready, built, step, [place]))[0]
        rows += 1
        if row.digest not in missing and kept.find(row) is None:
            missing[row.digest] = (step, place)
            tokens, places = tokens + len(row.ids), places + len(row.places)
    needed = places * (width * dtype.itemsize + 4) + tokens * 4
    free = files.free_disk_bytes(folder)
    distributed.wait()  # nobody writes before everybody has seen what is missing
    if any(distributed.gather([needed + files.MARGIN_BYTES > free])):
        say(
            f"the body's outputs are computed anew at each step: {figure_format.size(needed)} of them would be kept in {root}, and "
            f"{figure_format.size(free)} are free there"
        )
        return
    if any(distributed.gather([bool(missing)])):  # another run may have written since one of us looked
        say(
            f"the body's outputs are kept: {len(missing):,} of {rows:,} rows to compute, {figure_format.size(needed)} in {folder}"
        )
        state = distributed.state()
        _compute(
            ready,
            built,
            list(missing.values())[state.process_index :: state.num_processes],
            kept,
            folder,
            say,
        )
        distributed.wait()
        kept.read(folder)
    else:
        say(f"the body's outputs are kept: all {rows:,} rows are in {folder}")
    lm_head.keep_outputs(built.model, kept)


def _compute(
    ready: setup.Setup,
    built: setup.Built,
    missing: Sequence[tuple[Step, int]],
    kept: Outputs,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Send rows through the body and write them, a shard at a time."""
    alone = ready.device.type == "cpu"  # as fast there, and free of neighbours
    budget = 1 if alone else forecast.first_budget(ready.recipe.train, ready.device)
    lengths = [int(step.lengths[place]) for step, place in missing]
    rows: list[Row] = []
    outputs: list[torch.Tensor] = []
    size, done, said = 0, 0, time.monotonic()
    for group in groups_under(lengths, budget, built.route.layout):
        examples = [missing[number][0].examples([missing[number][1]])[0] for number in group]
        batch = to_device(ready.objective.collate(examples, built.route.layout), ready.device)
        with torch.no_grad():
            made = lm_head.outputs_at(built.model, batch)
        of_group = rows_of(batch)
        rows += of_group
        outputs += list(made.split([len(row.places) for row in of_group]))
        size, done = size + made.numel() * made.element_size(), done + len(group)
        if size >= SHARD_BYTES:
            kept.write(folder, rows, outputs)
            rows, outputs, size = [], [], 0
        if time.monotonic() - said > SECONDS:
            say(f"the body's outputs: {done:,} of {len(missing):,} rows")
            said = time.monotonic()
    if rows:
        kept.write(folder, rows, outputs)


def _batch(ready: setup.Setup, built: setup.Built, step: Step, places: Sequence[int]) -> dict[str, Any]:
    return to_device(ready.objective.collate(step.examples(places), built.route.layout), ready.device)


def _key(ready: setup.Setup, built: setup.Built) -> str:
    """Of everything that an output depends on besides its row."""
    path = built.route.as_dict()
    facts = [
        record.fingerprint(Path(base(built.model).name_or_path)), ready.precision.as_dict()["compute"], ready.device.type,
        {name: path[name] for name in ("batches", "attention", "fused", "compiled")},
        {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    ]  # fmt: skip
    content = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in FORWARD:
        spec = importlib.util.find_spec(f"tunesmith.{name}")
        assert spec is not None and spec.origin is not None
        content.update(Path(spec.origin).read_bytes())
    for source in (kernels.SOURCE, kernels.ENCODER_SOURCE):
        content.update(source.read_bytes())
    return content.hexdigest()
