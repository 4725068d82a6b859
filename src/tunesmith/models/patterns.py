"""Which modules of a network a pattern of the recipe names, as peft reads it; one that names none is an error."""

from __future__ import annotations

import difflib
import re

from tunesmith.errors import RecipeError


def require(key: str, patterns: str | list[str], names: list[str]) -> None:
    """Each pattern must name at least one module."""
    known = matched(patterns, names)
    unmatched = [pattern for pattern in ([patterns] if isinstance(patterns, str) else patterns) if pattern not in known]
    if unmatched:
        ends = sorted({name.rpartition(".")[2] for name in names} - {str(number) for number in range(1000)})
        hints = [f"`{pattern}`{hint(pattern, ends)}" for pattern in unmatched]
        raise RecipeError(
            f"adaptation.{key} matches no module of this model: {'; '.join(hints)}.\n  Its modules are: {', '.join(ends)}"
        )


def matched(patterns: str | list[str], names: list[str]) -> list[str]:
    """The patterns that name a module: its whole name, the end of it, or (a single string) a regular expression."""
    listed = [patterns] if isinstance(patterns, str) else patterns
    return [
        pattern
        for pattern in listed
        if any(name == pattern or name.endswith("." + pattern) for name in names)
        or (isinstance(patterns, str) and any(re.fullmatch(pattern, name) for name in names))
    ]


def hint(name: str, valid: list[str]) -> str:
    """`` (nearest: `q_proj`)``, or nothing when none is near."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return f" (nearest: `{close[0]}`)" if close else ""
