"""Formats of figures for people, the same on the console and in the report."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float) -> str:
    """Four significant digits: 1.842, 0.03121, 15.31, 0.5, 4,210, 2.00e-05, nan."""
    if not math.isfinite(value):
        return str(float(value))
    magnitude = abs(value)
    if value == int(value) and magnitude < 1e15:
        return f"{int(value):,}"
    if magnitude >= 1000:
        return f"{value:,.0f}"
    if magnitude < 1e-3:
        return f"{value:.2e}"
    text = f"{value:.{3 - math.floor(math.log10(magnitude))}f}"
    return text.rstrip("0").rstrip(".") if float(text) == value else text


def rate(value: float) -> str:
    """A learning rate: 2e-4, 1.63e-5, 0."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(float(value))
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def count(value: float) -> str:
    """A large whole number: 950, 12.3k, 134.5M, 7.2G."""
    for scale, letter in _SCALES:
        if value >= scale:
            return f"{value / scale:.1f}{letter}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes in decimal units, as on disks and model cards: 269 MB, 1.92 GB."""
    for scale, letter in _SCALES:
        if value >= scale:
            scaled = value / scale
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {letter}B"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """12.3 s, 3:07, 1:02:03, 2 d 03:04."""
    if not math.isfinite(seconds):
        return str(float(seconds))
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def share(part: float, whole: float) -> str:
    """``part`` of ``whole`` in percent; a share below 1% keeps three decimals."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    return f"{percent:.0f}%" if percent in (0, 100) else f"{percent:.{1 if percent >= 1 else 3}f}%"


def shorten_middle(text: str, most: int) -> str:
    """Cut ``text`` in its middle to at most ``most`` characters; names differ at their ends."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - half]}…{text[-half:]}"


def short_command(command: str) -> str:
    """A recorded command as a person types it: ``tunesmith train ...``, without the program's folder."""
    return re.sub(r"^(?:\S*[\\/])?tunesmith(?:[\\/]__main__\.py|\.exe)?(?=\s|$)", "tunesmith", command)


def figure_names(records: Sequence[Iterable[str]], sets: Sequence[str], prefix: str = "eval_") -> list[str]:
    """Names of an evaluation's figures, in order, without standard errors and those of single ``sets``."""
    of_sets = tuple(f"eval_{name}_" for name in sets)
    return [
        name
        for name in dict.fromkeys(name for record in records for name in record)
        if (name.startswith(prefix) or (name == "perplexity" and prefix == "eval_"))
        and not name.startswith(of_sets)
        and not name.endswith("_stderr")
    ]


def label(name: str) -> str:
    """Return a figure's name for readers: ``macro f1`` for ``eval_macro_f1``."""
    return name.removeprefix("eval_").replace("_", " ")


def change_text(change: Mapping[str, float]) -> str:
    """Return a difference of ``runs.assessment`` with its interval: ``+0.329 (+0.25 to +0.41)``."""
    return f"{change['value']:+.3g} ({change['low']:+.3g} to {change['high']:+.3g})"


TOO_FEW = "too few for an interval"


def interval_text(one: Mapping[str, Any], form: Callable[[float], str] = number) -> str:
    """Return ``0.31 to 0.47``, or that a figure or a difference is over too few rows to have an interval.

    A figure that never has one, such as distinct-n, has no ``rows`` and no text."""
    if one.get("low") is not None:
        return f"{form(one['low'])} to {form(one['high'])}"
    return TOO_FEW if "rows" in one or "difference" in one else ""


def signed(value: float) -> str:
    """A difference with three digits: +0.329, -12.1."""
    return f"{value:+.3g}"


def lower_is_better(name: str) -> bool | None:
    """Return whether a lower value of this evaluation figure is better; None where neither is better."""
    if name.endswith("answer_stopped"):
        return False
    neither = ("answer_length", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl")
    if name.endswith((*neither, "response_length", "stopped")):
        return None
    return name.endswith(("loss", "perplexity", "mse", "mae", "error", "answer_repetition"))


def is_number(value: object) -> TypeGuard[float]:
    """Return whether ``value`` is a figure. A JSON boolean is not, though Python counts it as an int."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(record: Mapping[str, object], key: str) -> bool:
    """Return whether ``record`` has a finite figure ``key``."""
    value = record.get(key)
    return is_number(value) and math.isfinite(value)
