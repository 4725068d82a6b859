"""Where virtual tokens stand among those of the text: in front of every segment of a packed row, or of every row of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Layout:
    """``ahead`` virtual tokens in front of each segment, or row.

    Segments are known as lengths on the host, or as ``source`` and ``place`` on the device: what stands in each grown position
    (an index into the virtual tokens followed by the text), and where each token of the text stands. Of one row these are
    (grown,) and (tokens,), of a padded batch (batch, grown) and (batch, tokens).
    """

    ahead: int
    segments: tuple[int, ...] | None = None
    source: torch.Tensor | None = None
    place: torch.Tensor | None = None
    keywords: dict[str, Any] = field(default_factory=dict)
    """What packed attention wants to know of the grown segments."""

    @staticmethod
    def of(keywords: dict[str, Any], ahead: int, tokens: int) -> Layout | None:
        """The layout of a packed row of so many ``tokens``, from the keywords of its attention; None for a padded batch."""
        if keywords.get("segments") is not None:
            return _of_segments(keywords["segments"], ahead)
        if keywords.get("cu_seqlens") is not None:
            return _of_boundaries(keywords["cu_seqlens"], keywords["longest"], ahead, tokens)
        return None

    def insert(self, text: torch.Tensor, virtual: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """``text``, tokens along ``dim``, with ``virtual`` (the same but ``ahead`` long) in front of each segment or row."""
        if self.segments is not None:  # pieces, not an index: the gradient of an index is a slow sum on a CPU
            pieces = text.split(self.segments, dim=dim)
            return torch.cat([part for piece in pieces for part in (virtual, piece)], dim=dim)
        assert self.source is not None
        if self.source.dim() == 1:
            return torch.cat([virtual, text], dim=dim).index_select(dim, self.source)
        return _gather(torch.cat([virtual.expand(len(text), *virtual.shape[1:]), text], dim=1), self.source)

    def text(self, grown: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The text's part of ``grown``."""
        if self.segments is not None:
            lengths = [length for segment in self.segments for length in (self.ahead, segment)]
            return torch.cat(grown.split(lengths, dim=dim)[1::2], dim=dim)
        assert self.place is not None
        return grown.index_select(dim, self.place) if self.place.dim() == 1 else _gather(grown, self.place)


def packed(keywords: dict[str, Any]) -> bool:
    """Whether the keywords of a forward are those of a packed row."""
    return keywords.get("segments") is not None or keywords.get("cu_seqlens") is not None


def padded(mask: torch.Tensor, ahead: int) -> Layout:
    """Of a batch padded on either side: in front of each row's first token, where ``mask`` (batch, tokens) says that it is."""
    first = mask.argmax(dim=1, keepdim=True)
    token = torch.arange(mask.shape[1], device=mask.device)[None]
    column = torch.arange(mask.shape[1] + ahead, device=mask.device)[None]
    inside = (column >= first) & (column < first + ahead)
    source = torch.where(inside, column - first, torch.where(column < first, column + ahead, column))
    return Layout(ahead, source=source, place=torch.where(token < first, token, token + ahead))


@lru_cache(maxsize=8)
def _of_segments(segments: tuple[int, ...], ahead: int) -> Layout:
    return Layout(
        ahead, segments=segments, keywords={"segments": tuple(length + ahead for length in segments)}
    )


def _of_boundaries(ends: torch.Tensor, longest: int, ahead: int, tokens: int) -> Layout:
    """From ``cu_seqlens`` (segments + 1,) on a device, which is asked for nothing."""
    numbers = torch.arange(len(ends), device=ends.device)
    grown = ends + numbers * ahead
    token = torch.arange(tokens, device=ends.device)
    place = token + ahead * (torch.searchsorted(ends[1:].contiguous(), token, right=True) + 1)
    virtual = torch.arange(ahead, device=ends.device)
    source = torch.empty(tokens + (len(ends) - 1) * ahead, dtype=torch.long, device=ends.device)
    source[(grown[:-1, None] + virtual).flatten()] = virtual.repeat(len(ends) - 1)
    source[place] = token + ahead
    keywords = {"cu_seqlens": grown.to(ends.dtype), "longest": longest + ahead}
    return Layout(ahead, source=source, place=place, keywords=keywords)


def _gather(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``rows`` (batch, n, ...) at ``index`` (batch, m) -> (batch, m, ...)."""
    index = index.view(*index.shape, *[1] * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:])
    return rows.gather(1, index)
