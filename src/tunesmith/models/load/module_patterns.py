"""Which modules of a network a pattern of the recipe names, as peft reads it; one that names none is an error."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tunesmith.errors import RecipeError
from tunesmith.suggestions import nearest


def require(key: str, patterns: str | list[str], names: list[str]) -> None:
    """Each pattern must name at least one module; a single string may be a regular expression, and must then be one."""
    compile_check(key, patterns)
    known = matched(patterns, names)
    unmatched = [
        pattern for pattern in ([patterns] if isinstance(patterns, str) else patterns) if pattern not in known
    ]
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


def compile_check(key: str, patterns: str | list[str]) -> None:
    """Raise RecipeError for a single string that is no regular expression."""
    try:
        re.compile(patterns if isinstance(patterns, str) else "")
    except re.error as error:
        raise RecipeError(
            f"adaptation.{key}: {patterns!r} is no name of a module and no regular expression: {error}.\n"
            "  Give the end of a module's name, a list such as [q_proj, v_proj], or one pattern such as '.*_proj'."
        ) from None


def whole(patterns: list[str], names: Iterable[str]) -> list[str]:
    """The full names of the modules that ``patterns`` name (``modules_to_save``), without those inside another of them.

    peft is given these: it would take any name that ends in the letters of a pattern, ``input_layernorm`` for ``norm``.
    """
    found: list[str] = []
    for name in sorted(names):  # what is around a module comes before it
        if matched(patterns, [name]) and not within(name, found):
            found.append(name)
    return found


def within(name: str, whole: Iterable[str]) -> bool:
    """Whether a module is one of those ``whole``, or inside one."""
    return any(name == one or name.startswith(f"{one}.") for one in whole)


def require_apart(what: str, targets: Iterable[str], whole: list[str]) -> None:
    """Raise RecipeError where one of ``targets`` lies in a module that is trained ``whole``: peft would leave it out in silence.

    ``what``: who wants the targets, as in "adaptation.target_modules names".
    """
    lost = next((name for name in targets if within(name, whole)), None)
    if lost is not None:
        around = next(one for one in whole if within(lost, [one]))
        raise RecipeError(
            f"{what} {lost}, and adaptation.modules_to_save trains {around} whole: a layer takes only one of both.\n"
            "  Leave it out of one of them."
        )


def hint(name: str, valid: list[str]) -> str:
    """`` (nearest: `q_proj`)``, or nothing when none is near."""
    close = nearest(name, valid)
    return f" (nearest: `{close[0]}`)" if close else ""
