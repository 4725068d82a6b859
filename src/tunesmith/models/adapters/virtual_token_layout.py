"""Positions of virtual tokens: before each segment of a packed row, or each row of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

Keywords: TypeAlias = dict[str, Any]
"""Keywords of a network's forward or of its attention: tensors, tuples of lengths, caches, flags."""


@dataclass(frozen=True, eq=False)
class Layout:
    """``ahead`` virtual tokens before each segment or row. The text with virtual tokens is called extended.

    Either ``segments`` are lengths on the host, or there are two index tensors on the device. ``source``: for
    each extended position an index into the virtual tokens followed by the text. ``place``: the extended
    position of each text token. They are (extended,) and (tokens,), with a batch dimension for padded rows.
    """

    ahead: int
    segments: tuple[int, ...] | None = None
    source: Tensor | None = None
    place: Tensor | None = None
    keywords: Keywords = field(default_factory=dict)
    """The keywords of packed attention over the extended segments."""

    @staticmethod
    def of(keywords: Keywords, ahead: int, tokens: int) -> Layout | None:
        """Return the layout of a packed row, by the keywords of its attention; None for a padded batch."""
        if keywords.get("segments") is not None:
            return _from_segments(keywords["segments"], ahead)
        if keywords.get("cu_seqlens") is not None:
            return _from_boundaries(keywords["cu_seqlens"], keywords["longest"], ahead, tokens)
        return None

    def insert(self, text: Tensor, virtual: Tensor, dim: int = 1) -> Tensor:
        """Put ``virtual`` (``ahead`` tokens along ``dim``) before each segment or row of ``text``."""
        if self.segments is not None:  # split and cat, not an index, whose gradient is a slow sum on a CPU
            segments = text.split(self.segments, dim=dim)
            return torch.cat([part for segment in segments for part in (virtual, segment)], dim=dim)
        assert self.source is not None
        if self.source.dim() == 1:
            return torch.cat([virtual, text], dim=dim).index_select(dim, self.source)
        return _gather(torch.cat([virtual.expand(len(text), *virtual.shape[1:]), text], dim=1), self.source)

    def text(self, extended: Tensor, dim: int = 1) -> Tensor:
        """Return the text's part of ``extended``."""
        if self.segments is not None:
            lengths = [length for segment in self.segments for length in (self.ahead, segment)]
            return torch.cat(extended.split(lengths, dim=dim)[1::2], dim=dim)
        assert self.place is not None
        if self.place.dim() == 1:
            return extended.index_select(dim, self.place)
        return _gather(extended, self.place)


def packed(keywords: Keywords) -> bool:
    """Return whether the keywords of a forward are those of a packed row."""
    return keywords.get("segments") is not None or keywords.get("cu_seqlens") is not None


def padded(mask: Tensor, ahead: int) -> Layout:
    """Return the layout of a padded batch: virtual tokens before the first 1 of ``mask`` (batch, tokens)."""
    first = mask.argmax(dim=1, keepdim=True)
    token = torch.arange(mask.shape[1], device=mask.device)[None]
    column = torch.arange(mask.shape[1] + ahead, device=mask.device)[None]
    inside = (column >= first) & (column < first + ahead)
    source = torch.where(inside, column - first, torch.where(column < first, column + ahead, column))
    return Layout(ahead, source=source, place=torch.where(token < first, token, token + ahead))


@lru_cache(maxsize=8)
def _from_segments(segments: tuple[int, ...], ahead: int) -> Layout:
    extended = tuple(length + ahead for length in segments)
    return Layout(ahead, segments=segments, keywords={"segments": extended})


def _from_boundaries(ends: Tensor, longest: int, ahead: int, tokens: int) -> Layout:
    """Return the layout for ``cu_seqlens`` (segments + 1,) on a device; the host does not wait for it."""
    count = len(ends) - 1
    extended = ends + torch.arange(count + 1, device=ends.device) * ahead
    token = torch.arange(tokens, device=ends.device)
    place = token + ahead * (torch.searchsorted(ends[1:].contiguous(), token, right=True) + 1)
    virtual = torch.arange(ahead, device=ends.device)
    source = torch.empty(tokens + count * ahead, dtype=torch.long, device=ends.device)
    source[(extended[:-1, None] + virtual).flatten()] = virtual.repeat(count)
    source[place] = token + ahead
    keywords = {"cu_seqlens": extended.to(ends.dtype), "longest": longest + ahead}
    return Layout(ahead, source=source, place=place, keywords=keywords)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """``rows`` (batch, n, ...) at ``index`` (batch, m) -> (batch, m, ...)."""
    index = index.view(*index.shape, *[1] * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:])
    return rows.gather(1, index)
