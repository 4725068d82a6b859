"""The slots of the running rows: which tokens each holds, who has it, and the forward passes that fill them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith import machine
from tunesmith.models.fast import kernels
from tunesmith.models.generate import slot_cache
from tunesmith.models.generate.decode_step import DecodeWeights
from tunesmith.models.generate.forward_passes import ForwardPass, choose_pass
from tunesmith.models.generate.row_adapters import RowAdapters
from tunesmith.models.generate.running_rows import Row
from tunesmith.models.generate.slot_cache import Piece
from tunesmith.models.network import context_window

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL_TOKENS = 1024
"""Tokens of prompts in one forward pass: with twice as many, products are no faster, and activations take twice the memory."""
RETURN_TOKENS = 256
"""After as many tokens of prompts, which take about a second, the memory of their activations is returned."""
MEMORY_SHARE = 0.5
"""Share of the free memory that the cache may take."""
BLOCK = 128
"""The capacity of slots is a multiple of this."""
FREE_SHARE = 8
"""While rows run, prompts wait until one slot in so many is free."""
SHARED_TOKENS = 16
"""Shorter common starts of two prompts are computed again instead of copied."""


@dataclass
class Timing:
    """Seconds and tokens of the forward passes, sampling included."""

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    shared_tokens: int = 0
    """Prompt tokens that were taken from a slot instead of computed."""


class Slots:
    """Slots for at most ``most`` rows of ``core``, made when the first row comes; as many as memory allows.

    ``held``: the tokens in each slot; a free slot keeps them for a prompt of the same adapter that begins alike.
    ``note`` is called with a sentence when the model cannot run over slots.
    """

    def __init__(
        self,
        core: PreTrainedModel,
        most: int,
        note: Callable[[str], None],
        decode_weights: DecodeWeights = "stored",
    ) -> None:
        self.core, self.most, self.note, self.decode_weights = core, most, note, decode_weights
        self.adapters = RowAdapters(core)
        self.timing = Timing()
        self.capacity = 0
        self.wanted = most
        """The number of rows that a run brings: more slots are not made."""
        self._made_for = 0
        self.held: list[list[int]] = []
        self._computed_by: list[str | None] = []
        """The adapter that computed the tokens of each slot."""
        self._free: list[int] = []
        self._pass: ForwardPass | None = None

    @property
    def count(self) -> int:
        """The number of slots."""
        return len(self.held)

    @property
    def taken(self) -> int:
        """The number of rows that have a slot."""
        return len(self.held) - len(self._free)

    @property
    def ready(self) -> bool:
        """True if no row runs, or enough slots are free: a pass over several prompts costs less than one over each."""
        return not self.taken or len(self._free) * FREE_SHARE >= self.count

    def take(self, row: Row) -> bool:
        """Give ``row`` a free slot; return False if it must wait for the rows that run.

        The slot is the one that holds most of the row's tokens, the emptiest of several; it keeps that start.
        """
        if self._pass is None:
            self._pass = choose_pass(
                self.core, self.adapters, row.request.ids, self.note, self.decode_weights
            )
        too_few = self._made_for < min(self.wanted, self.most)
        if len(self._free) == self.count:
            if row.needed > self.capacity or too_few:
                self._make(row.needed)
        elif self._free and row.needed > self.capacity:
            self._lengthen(row.needed)
        if row.needed > self.capacity or not self._free:
            return False
        tokens = row.tokens
        kept = self._pass_of_rows().cache is not None
        shared = {slot: self._shared(slot, row, tokens) if kept else 0 for slot in self._free}
        row.slot = max(self._free, key=lambda slot: (shared[slot], -len(self.held[slot]), -slot))
        self._free.remove(row.slot)
        del self.held[row.slot][min(shared[row.slot], len(tokens) - 1) :]
        self._computed_by[row.slot] = row.adapter
        return True

    def _shared(self, slot: int, row: Row, tokens: Sequence[int]) -> int:
        """Return how many of the first ``tokens`` of a row the slot holds, computed by the row's adapter."""
        return _common_start(self.held[slot], tokens) if self._computed_by[slot] == row.adapter else 0

    def release(self, row: Row) -> None:
        """Free the slot of ``row``, which keeps its tokens."""
        if row.slot >= 0:
            self._free.append(row.slot)
            row.slot = -1

    def forget(self) -> None:
        """Empty all slots: the weights have changed."""
        for held in self.held:
            held.clear()
        self.adapters.forget()
        if self._pass is not None:
            self._pass.forget()

    def drop(self) -> None:
        """Free the memory of all slots, which no row may have. The next row makes new ones, for the same pass."""
        if self._pass is not None:
            self._pass.resize(0, 0)
            self._pass.forget()
        self.held, self._free, self.capacity, self._made_for = [], [], 0, 0

    def choose_again(self) -> None:
        """Drop all slots and the pass: the network has other layers, or uses another adapter."""
        self.drop()
        self._pass, self.adapters = None, RowAdapters(self.core)

    def halve(self, rows: Sequence[Row]) -> None:
        """Make half as many slots the most. All ``rows``, which are those with a slot, lose theirs."""
        self.note(f"out of memory with {self.taken} rows at once; going on with {self.taken // 2}")
        self.most = self.taken // 2
        for row in rows:
            row.slot = -1
        self.drop()
        machine.release_memory(self.core.device)

    def _make(self, needed: int) -> None:
        """Make slots for rows of ``needed`` tokens: as many as are wanted and memory allows, at least one.

        They keep the tokens that they hold."""
        self.capacity = self._capacity_for(needed)
        slots = max(1, min(self.most, max(self.wanted, self.count), self._affordable(self.capacity)))
        self._made_for = min(self.wanted, self.most)
        if not any(self.held):  # there is nothing to copy: the old memory is free before the new is taken
            self._pass_of_rows().resize(0, 0)
        kernels.return_freed_memory()  # slots in memory that was used before would take all of it at once
        slots = self._resize(slots)
        self.held = [self.held[slot] if slot < len(self.held) else [] for slot in range(slots)]
        self._computed_by = (self._computed_by + [None] * slots)[:slots]
        self._free = list(range(slots))

    def _lengthen(self, needed: int) -> None:
        """Give the slots room for ``needed`` tokens while rows run in some of them; if memory allows, else not.

        Where it does not suffice for all, the last slots are given up, if one before them is free."""
        capacity = self._capacity_for(needed)
        slots = min(self.count, self._affordable(capacity))
        free = [slot for slot in self._free if slot < slots]
        if not free or slots - len(free) < self.taken:
            return
        try:
            self._pass_of_rows().resize(slots, capacity)
        except (RuntimeError, MemoryError) as error:
            if not machine.is_out_of_memory(error):
                raise
            return
        self.capacity, self._free = capacity, free
        del self.held[slots:], self._computed_by[slots:]

    def _capacity_for(self, needed: int) -> int:
        """Return the new capacity for rows of ``needed`` tokens."""
        wished = self.capacity
        if needed > wished:  # at least twice as much, so that a growing chat is not copied in each turn
            wished = max(needed, min(2 * wished, context_window(self.core.config) or 0))
        return -(-wished // BLOCK) * BLOCK

    def _affordable(self, capacity: int) -> int:
        """Return the number of slots of ``capacity`` tokens for which there is memory."""
        free = machine.free_bytes(self.core.device)
        return int(MEMORY_SHARE * free / (capacity * slot_cache.bytes_per_token(self.core)))

    def _resize(self, slots: int) -> int:
        """Make ``slots`` slots, fewer and empty ones while memory runs out. Return how many there are."""
        while True:
            try:
                self._pass_of_rows().resize(slots, self.capacity)
                return slots
            except (RuntimeError, MemoryError) as error:
                if not machine.is_out_of_memory(error) or slots == 1:
                    raise
            self._pass_of_rows().resize(0, 0)
            self.held.clear()
            machine.release_memory(self.core.device)
            self.note(f"out of memory with {slots} rows at once; going on with {slots // 2}")
            self.most = slots = slots // 2

    def _pass_of_rows(self) -> ForwardPass:
        assert self._pass is not None, "chosen when the first row is admitted"
        return self._pass

    def forward(self, rows: Sequence[Row]) -> Tensor:
        """Return the logits after the last token of each row, fp32 (rows, vocabulary)."""
        began = perf_counter()
        decoding = all(row.ids for row in rows) and all(self._left(row) == 1 for row in rows)
        if decoding:
            logits = self._run(rows, [1] * len(rows))
            self.timing.decode_seconds += perf_counter() - began
            self.timing.decode_tokens += len(rows)
            return logits
        found: dict[Row, Tensor] = {}
        before = self.timing.prefill_tokens
        while missing := [row for row in rows if row not in found]:
            chosen = self._share_starts(missing)
            sizes, budget = [], PREFILL_TOKENS
            for row in chosen:
                sizes.append(min(self._left(row), budget))
                budget -= sizes[-1]
            chosen = [row for row, size in zip(chosen, sizes, strict=True) if size]
            sizes = [size for size in sizes if size]
            self.timing.prefill_tokens += sum(sizes)
            for row, last in zip(chosen, self._run(chosen, sizes), strict=True):
                if not self._left(row):
                    found[row] = last
        if self.timing.prefill_tokens - before >= RETURN_TOKENS:
            kernels.return_freed_memory()
        self.timing.prefill_seconds += perf_counter() - began
        return torch.stack([found[row] for row in rows])

    def _left(self, row: Row) -> int:
        """Return how many tokens of the row are not in its slot."""
        return len(row.request.ids) + len(row.ids) - len(self.held[row.slot])

    @torch.inference_mode()
    def _run(self, rows: Sequence[Row], sizes: Sequence[int]) -> Tensor:
        """Run the next ``sizes`` tokens of each row and note that the slots hold them."""
        pieces = []
        for row, size in zip(rows, sizes, strict=True):
            ahead = len(self.held[row.slot])
            drawn = size == 1 and self._left(row) == 1 and bool(row.ids)
            ids = [row.ids[-1]] if drawn else row.tokens[ahead : ahead + size]
            pieces.append(Piece(ids, row.slot, ahead, row.adapter, drawn))
        logits = self._pass_of_rows()(pieces)
        for piece in pieces:
            self.held[piece.slot].extend(piece.ids)
        return logits

    @torch.inference_mode()
    def _share_starts(self, rows: Sequence[Row]) -> list[Row]:
        """Copy what other slots hold of the rows' starts; return the rows that gain nothing by waiting.

        A row waits for one before it that begins alike: it will then copy that start.
        """
        cache = self._pass_of_rows().cache
        if cache is None:
            return list(rows)
        chosen: list[Row] = []
        for row in rows:
            tokens, held = row.tokens, len(self.held[row.slot])
            alike = [other for other in chosen if other.adapter == row.adapter]
            coming = max((_common_start(tokens, other.tokens) for other in alike), default=0)
            shared = {slot: self._shared(slot, row, tokens) for slot in range(self.count)}
            source = max(shared, key=shared.__getitem__)
            most = min(shared[source], len(tokens) - 1)
            if coming >= max(most, held) + SHARED_TOKENS:
                continue
            if most >= held + SHARED_TOKENS:
                cache.copy_prefix(source, row.slot, most)
                self.held[row.slot] = tokens[:most]
                self.timing.shared_tokens += most - held
            chosen.append(row)
        return chosen


def _common_start(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the longest common start."""
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:
        return shorter
    return next(place for place in range(shorter) if left[place] != right[place])
