"""Modules that a pattern of the recipe names, by peft's rules. A pattern that names no module is an error."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tunesmith.errors import RecipeError
from tunesmith.suggestions import closest


def require_matches(key: str, patterns: str | list[str], names: list[str]) -> None:
    """Raise RecipeError for a pattern that names no module. ``key``: of ``adaptation`` in the recipe."""
    check_regex(key, patterns)
    matched = matching_patterns(patterns, names)
    unmatched = [pattern for pattern in _as_list(patterns) if pattern not in matched]
    if unmatched:
        ends = sorted({name.rpartition(".")[2] for name in names} - {str(number) for number in range(1000)})
        listed = "; ".join(f"`{pattern}`{hint(pattern, ends)}" for pattern in unmatched)
        modules = ", ".join(ends)
        raise RecipeError(
            f"adaptation.{key} matches no module of this model: {listed}.\n  Its modules are: {modules}"
        )


def matching_patterns(patterns: str | list[str], names: list[str]) -> list[str]:
    """Return the patterns that name a module: by its full name, its end, or (a string) as a regex."""
    regex = isinstance(patterns, str)

    def matches(pattern: str, name: str) -> bool:
        return f".{name}".endswith(f".{pattern}") or (regex and re.fullmatch(pattern, name) is not None)

    return [pattern for pattern in _as_list(patterns) if any(matches(pattern, name) for name in names)]


def check_regex(key: str, patterns: str | list[str]) -> None:
    """Raise RecipeError for a single string that is no regular expression."""
    try:
        re.compile(patterns if isinstance(patterns, str) else "")
    except re.error as error:
        raise RecipeError(
            f"adaptation.{key}: {patterns!r} is no module name and no regular expression: {error}.\n"
            "  Write the end of a module's name, a list as in [q_proj, v_proj], or a pattern as in '.*_proj'."
        ) from None


def matching_modules(patterns: list[str], names: Iterable[str]) -> list[str]:
    """Return the full names of the modules that ``patterns`` name, without those inside another of them.

    peft gets full names (``modules_to_save``), because it matches the last letters alone: ``norm`` would also
    match ``input_layernorm``.
    """
    outermost: list[str] = []
    for name in sorted(names):  # a module sorts before those inside it
        if matching_patterns(patterns, [name]) and not is_inside(name, outermost):
            outermost.append(name)
    return outermost


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Return whether a module is one of ``modules`` or inside one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def require_disjoint(subject: str, targets: Iterable[str], saved: list[str]) -> None:
    """Raise RecipeError for a target inside a module of ``modules_to_save``: peft would silently skip it.

    ``subject``: the start of the message, as in "adaptation.target_modules names". ``saved``: full names.
    """
    for target in targets:
        for module in saved:
            if is_inside(target, [module]):
                raise RecipeError(
                    f"{subject} {target}, and adaptation.modules_to_save trains {module} whole: "
                    "only one can train a layer.\n"
                    "  Remove it from one of the two keys."
                )


def in_any_layer(names: Iterable[str]) -> str:
    """Return a regular expression that matches exactly ``names``, with any layer number."""
    return "|".join(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names))


def hint(name: str, valid: list[str]) -> str:
    """Return `` (nearest: `q_proj`)``, or "" when no valid name is close."""
    names = closest(name, valid)
    return f" (nearest: `{names[0]}`)" if names else ""


def _as_list(patterns: str | list[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else patterns
