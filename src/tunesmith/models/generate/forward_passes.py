"""Forward passes of generation: all running rows together in slots, or row by row as in transformers."""

from __future__ import annotations

import bisect
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache

from tunesmith.errors import ModelError
from tunesmith.models.adapters import virtual_tokens
from tunesmith.models.generate import prompt_layers, slot_cache
from tunesmith.models.generate.decode_step import (
    COPIED_SLOTS,
    KERNEL_ROWS,
    DecodeStep,
    DecodeWeights,
    decode_step,
)
from tunesmith.models.generate.int8_weights import int8_forward
from tunesmith.models.generate.row_adapters import ACTIVE, CannotStack, RowAdapters
from tunesmith.models.generate.slot_cache import CannotUseSlots, Piece, SlotCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKED_TOKENS = 24
"""Tokens of a prompt on which attention over slots is compared with the model's own."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference of a logit, relative to the largest logit: about four times the rounding error."""


class ForwardPass(Protocol):
    """Runs pieces of rows."""

    @property
    def cache(self) -> SlotCache | None:
        """The cache of all slots; None if the tokens of a slot cannot be used again or copied."""

    def __call__(self, pieces: Sequence[Piece]) -> Tensor:
        """Return the logits after the last token of each piece, fp32 (pieces, vocabulary)."""

    def resize(self, slots: int, capacity: int) -> None:
        """Change the number of slots and their capacity in tokens. Slots keep the content that fits.

        If memory runs out, nothing changes.
        """

    def forget(self) -> None:
        """Drop what was computed from the weights: they have changed. All slots are empty."""


def _keywords(core: PreTrainedModel, **keywords: Tensor | None) -> dict[str, Tensor | None]:
    """Return the keywords that the model's forward takes."""
    accepted = inspect.signature(core.forward).parameters
    return {name: value for name, value in keywords.items() if name in accepted}


class SlotPass:
    """All pieces in one forward pass, side by side, with attention over slots."""

    def __init__(
        self,
        core: PreTrainedModel,
        note: Callable[[str], None] = lambda sentence: None,
        adapters: RowAdapters | None = None,
        decode_weights: DecodeWeights = "stored",
    ) -> None:
        self.core, self.note, self.decode_weights = core, note, decode_weights
        self.adapters = adapters or RowAdapters(core)
        self.cache = SlotCache(0, 0, virtual_tokens.count(core))
        self.has_virtual_tokens = False
        """The slots begin with the virtual tokens as they are now."""
        self.step = decode_step(core)
        self.layers = prompt_layers.forwards(core)
        """Layers that passes over prompts compute in C, with their forwards."""
        self.packed_step: DecodeStep | None = None
        """The step with copies of the weights as they are now: in bf16 where these lose nothing, or in int8."""
        self.checked_steps = set[tuple[int, bool, bool, bool, bool]]()
        """The kinds of C steps that were compared with the model's own forward: number of tokens (its place in
        ``KERNEL_ROWS``), several tokens of a row, LoRAs, several of them, copies of the weights."""
        self.is_checked = False
        """The caller compares what the pass returns: a new kind of C step is not compared here."""
        self.stack_checked = False
        self.can_stack = True

    def resize(self, slots: int, capacity: int) -> None:
        self.cache, self.has_virtual_tokens = self.cache.resized(slots, capacity), False
        if self.decode_weights == "stored" and slots > COPIED_SLOTS:
            self.packed_step = None

    def forget(self) -> None:
        self.has_virtual_tokens, self.packed_step = False, None

    @torch.inference_mode()
    def __call__(self, pieces: Sequence[Piece]) -> Tensor:
        if self.cache.virtual and not self.has_virtual_tokens:
            self._begin_slots()
        self.cache.begin(pieces, self.core.device)
        drawn = all(piece.drawn for piece in pieces)
        tokens, step = sum(len(piece.ids) for piece in pieces), self.step
        if step is not None and self.cache.keys and (drawn or step.takes(tokens, self.cache.capacity)):
            try:
                return self._run_step(step, pieces, drawn)
            except CannotStack:
                self.step = None
        return self._forward_of_adapters(pieces)

    def _forward_of_adapters(self, pieces: Sequence[Piece]) -> Tensor:
        """Run all pieces by the model's own forward, each with its adapter."""
        adapters = [piece.adapter for piece in pieces]
        if all(adapter in (ACTIVE, self.adapters.active) for adapter in adapters):
            return self._forward(pieces)
        if self.can_stack and len({*adapters}) > 1:
            try:
                return self._together(pieces)
            except CannotStack as reason:
                self.can_stack = False
                self.note(f"rows of several adapters run in turns: {reason}")
        return self._in_turns(pieces)

    def _together(self, pieces: Sequence[Piece]) -> Tensor:
        """Run pieces of several LoRAs as one. The first result is compared with that of turns."""
        ends = list(itertools.accumulate(len(piece.ids) for piece in pieces))
        of_token = [piece.adapter for piece in pieces for _ in piece.ids]
        of_token += of_token[-1:] * self._padding(len(of_token))
        with self.adapters.together(of_token, [end - 1 for end in ends]):
            self.cache.begin(pieces, self.core.device)
            logits = self._forward(pieces)
        if not self.stack_checked:
            expected, self.stack_checked = self._in_turns(pieces), True
            off = difference(logits, expected)
            if off > TOLERANCE[self.core.dtype]:
                raise CannotStack(f"their logits differ by {off:.1e}")
        return logits

    def _in_turns(self, pieces: Sequence[Piece]) -> Tensor:
        """Run the pieces of one adapter after those of another."""
        found: dict[int, Tensor] = {}
        for adapter in dict.fromkeys(piece.adapter for piece in pieces):
            places = [place for place, piece in enumerate(pieces) if piece.adapter == adapter]
            own = [pieces[place] for place in places]
            self.cache.begin(own, self.core.device)
            with self.adapters.using(adapter):
                found |= zip(places, self._forward(own), strict=True)
        self.cache.begin(pieces, self.core.device)  # a step in C that follows runs all of them
        return torch.stack([found[place] for place in range(len(pieces))])

    def _begin_slots(self) -> None:
        """Compute the virtual tokens in the first slot and copy them to the others."""
        virtual = self.cache.virtual
        self.cache.begin([Piece(range(virtual), 0, -virtual)], self.core.device)
        with slot_attention(self.core):
            places = self.cache.place_of_token[None]
            virtual_tokens.fill_cache(self.core, self.cache, slots=self.cache, position_ids=places)
        for slot in range(1, self.cache.slots):
            self.cache.copy_prefix(0, slot, 0)
        self.has_virtual_tokens = True

    def _run_step(self, step: DecodeStep, pieces: Sequence[Piece], drawn: bool) -> Tensor:
        """Run the step in C. Raises CannotStack.

        Only tokens that were drawn are computed with copies of the weights: those of a prompt never depend on whether the
        engine has decoded before. The first result of a kind of step is compared with the model's own forward. If they
        differ, the step is not used again. Otherwise the step's result is returned, for the same reason.
        """
        adapters = [self.adapters.active if piece.adapter == ACTIVE else piece.adapter for piece in pieces]
        loras = self.adapters.stack(adapters) if self.adapters.layers else None
        several = loras is not None and len({*adapters, *loras.names}) > 1
        of_token = [adapter for adapter, piece in zip(adapters, pieces, strict=True) for _ in piece.ids]
        keep = loras.keep(of_token) if loras and several else None
        if drawn:
            self.packed_step = step = self.packed_step or self._packed(step)
        tokens = [token for piece in pieces for token in piece.ids]
        size, is_piece = bisect.bisect_left(KERNEL_ROWS, len(tokens)), len(tokens) > len(pieces)
        kind = size, is_piece, loras is not None, several, bool(step.panels)
        is_new = kind not in self.checked_steps and not self.is_checked
        with int8_forward(step.linears if is_new and step.weights == "int8" else ()):
            expected = self._forward_of_adapters(pieces) if is_new else None
        last = torch.tensor([len(piece.ids) for piece in pieces]).cumsum(0) - 1
        logits = step(torch.tensor(tokens), self.cache, loras, keep, last)
        self.checked_steps.add(kind)
        if expected is None or (off := difference(logits, expected)) <= TOLERANCE[self.core.dtype]:
            return logits
        self.step = self.packed_step = None
        self.note(f"generating without the C step: its logits differ by {off:.1e}")
        return self._forward_of_adapters(pieces)  # again, because the step has written into the cache

    def _packed(self, step: DecodeStep) -> DecodeStep:
        """Return ``step`` with the copies of the weights that it reads, for as many slots as there are."""
        if self.decode_weights == "stored":
            return step if self.cache.slots > COPIED_SLOTS else step.packed()
        packed = step.in_int8()
        if not packed.panels:
            self.note("decoding with the weights as stored: too little memory is free for int8 copies")
        return packed

    def _padding(self, tokens: int) -> int:
        """Return how many tokens that nobody sees are added to a pass over prompts.

        In 16 bits oneDNN compiles each product anew for another number of tokens, and keeps 0.6 MB for each:
        passes of few different sizes need less memory.
        """
        if self.cache.decoding or self.core.device.type != "cpu" or self.core.dtype is torch.float32:
            return 0
        return -tokens % (1 << max(3, tokens.bit_length() - 5))

    def _forward(self, pieces: Sequence[Piece]) -> Tensor:
        """Run all pieces by the model's own forward, side by side."""
        self.cache.calls = 0
        device = self.core.device
        tokens = [token for piece in pieces for token in piece.ids]
        padding = self._padding(len(tokens))
        ids = torch.tensor([tokens + [0] * padding], device=device)
        lengths = torch.tensor([len(piece.ids) for piece in pieces], device=device)
        last = lengths.cumsum(0) - 1
        places = functional.pad(self.cache.place_of_token, (0, padding))
        chosen = _keywords(self.core, position_ids=places[None], logits_to_keep=last)
        cache = self.cache
        with slot_attention(self.core), prompt_layers.replaced(self.layers):
            out = self.core(input_ids=ids, past_key_values=cache, use_cache=True, slots=cache, **chosen)
        if self.cache.calls != len(self.cache.keys):
            raise CannotUseSlots(f"{self.cache.calls} of its {len(self.cache.keys)} layers call attention")
        logits: Tensor = out.logits[0]
        return (logits if "logits_to_keep" in chosen else logits[last]).float()


class PlainPass:
    """Row by row with transformers' own cache and attention: for models that slots cannot serve."""

    cache = None

    def __init__(self, core: PreTrainedModel, adapters: RowAdapters | None = None) -> None:
        self.core, self.adapters = core, adapters or RowAdapters(core)
        self.caches: dict[int, DynamicCache] = {}

    def resize(self, slots: int, capacity: int) -> None:
        self.caches = {slot: cache for slot, cache in self.caches.items() if slot < slots}

    def forget(self) -> None:
        self.caches.clear()

    def __call__(self, pieces: Sequence[Piece]) -> Tensor:
        logits = []
        for piece in pieces:
            with self.adapters.using(piece.adapter):
                logits.append(self._row(piece))
        return torch.stack(logits)

    def _row(self, piece: Piece) -> Tensor:
        if piece.ahead == 0:
            self.caches[piece.slot] = DynamicCache(config=self.core.config)
        device = self.core.device
        ids = torch.tensor([list(piece.ids)], device=device)
        last = torch.tensor([len(piece.ids) - 1], device=device)
        positions = torch.arange(piece.ahead, piece.end, device=device)[None]
        chosen = _keywords(self.core, position_ids=positions, logits_to_keep=last)
        out = self.core(input_ids=ids, past_key_values=self.caches[piece.slot], use_cache=True, **chosen)
        logits: Tensor = out.logits[0, -1]
        return logits.float()


@contextmanager
def slot_attention(core: PreTrainedModel) -> Iterator[None]:
    """Let ``core`` call attention over slots inside the ``with`` block."""
    slot_cache.register()
    before = core.config._attn_implementation
    core.set_attn_implementation(slot_cache.NAME)
    try:
        yield
    finally:
        core.set_attn_implementation(before)


class WholePass:
    """Row by row, with all tokens computed again in each step: for models whose cache fails or is wrong."""

    cache = None

    def __init__(self, core: PreTrainedModel, adapters: RowAdapters | None = None) -> None:
        self.core, self.adapters = core, adapters or RowAdapters(core)
        self.tokens: dict[int, list[int]] = {}

    def resize(self, slots: int, capacity: int) -> None:
        self.tokens = {slot: tokens for slot, tokens in self.tokens.items() if slot < slots}

    def forget(self) -> None:
        self.tokens.clear()

    def __call__(self, pieces: Sequence[Piece]) -> Tensor:
        logits = []
        for piece in pieces:
            self.tokens[piece.slot] = [*self.tokens.get(piece.slot, [])[: piece.ahead], *piece.ids]
            with self.adapters.using(piece.adapter):
                logits.append(logits_after(self.core, self.tokens[piece.slot], [piece.end]))
        return torch.cat(logits)


def logits_after(core: PreTrainedModel, ids: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Return the logits after so many of ``ids`` by the model's own forward, without a cache; fp32 (lengths, vocabulary)."""
    logits: Tensor = core(input_ids=torch.tensor([list(ids)], device=core.device), use_cache=False).logits
    return logits[0, [length - 1 for length in lengths]].float()


FAILURES = (CannotUseSlots, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Exceptions of a model that does not accept a cache or its keywords."""


@torch.inference_mode()
def choose_pass(
    core: PreTrainedModel,
    adapters: RowAdapters,
    prompt: Sequence[int],
    note: Callable[[str], None],
    decode_weights: DecodeWeights = "stored",
) -> ForwardPass:
    """Return the fastest pass that is exact for ``core``. Call ``note`` if it is a slower one.

    Each pass is checked on a start of ``prompt`` and on the first half of this start, which run side by side, in two
    pieces. The model's own forward runs the longer start as a whole. Both must agree on the logits after the last token of
    each. In a ``SlotPass`` with a step in C, that step computes the second pieces; if it fails, the pass goes on without
    it. Raises ModelError if the model's own forward fails.
    """
    start = list(prompt[:CHECKED_TOKENS])
    starts = [start, start[: len(start) // 2 + 1]]
    try:
        expected = logits_after(core, start, [len(ids) for ids in starts])
    except FAILURES as error:
        raise ModelError(
            f"{type(core).__name__} cannot continue a text: its own forward failed ({first_line(error)})."
        ) from error
    tolerance = TOLERANCE[core.dtype]
    halves, last_token = [len(ids) // 2 for ids in starts], [len(ids) - 1 for ids in starts]
    slots = SlotPass(core, note, adapters, decode_weights)
    slots.is_checked = True
    failed = reason = None
    if slots.step is not None:
        failed = _why_not(slots, starts, halves, expected, tolerance)
        slots.step = slots.step if failed is None else None
    if slots.step is None:  # nor is there one for adapters that cannot be stacked
        reason = _why_not(slots, starts, last_token, expected, tolerance)
    slots.is_checked = False
    if reason is None:
        if failed is not None:
            note(f"generating without the C step: {failed}")
        return slots
    plain = PlainPass(core, adapters)
    broken = _why_not(plain, starts, last_token, expected, tolerance)
    if broken is None:
        note(f"generating row by row: {reason}")
        return plain
    note(f"generating row by row and without a cache, which is slow: {broken}")
    return WholePass(core, adapters)


def _why_not(
    run: ForwardPass,
    starts: Sequence[Sequence[int]],
    ends: Sequence[int],
    expected: Tensor,
    tolerance: float,
) -> str | None:
    """Return why ``run`` does not continue the starts as ``expected``, None if it does.

    The first piece of each start ends at its place in ``ends``. It is computed by the model's own forward, because the cache
    is empty. ``run`` is left empty.
    """
    run.resize(len(starts), CHECKED_TOKENS)
    pieces = list(zip(range(len(starts)), starts, ends, strict=True))
    try:
        first = [Piece(ids[:end], slot, 0) for slot, ids, end in pieces if end]
        if first:
            run(first)
        got = run([Piece(ids[end:], slot, end) for slot, ids, end in pieces])
    except FAILURES as error:
        return first_line(error)
    finally:
        run.resize(0, 0)
    off = difference(got, expected)
    return None if off <= tolerance else f"its logits differ by {off:.1e}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class."""
    return str(error).split("\n")[0] or type(error).__name__


def difference(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference of a logit, relative to the largest logit."""
    return float((logits - expected).abs().max() / expected.abs().max())
