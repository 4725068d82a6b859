"""Figures as pictures: PNG bytes, drawn by matplotlib without a display, in the style of the curves of a run."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

MOST = 30
"""Classes that a picture has room for; of more, the most frequent ones."""
LINES = 12
"""Curves that can be told apart: six colours, plain and dashed."""

_LONGEST = 28  # characters of a name
_BLUE, _ORANGE, _TEAL, _GREY = "#2f6db5", "#d2691e", "#0f8578", "#6a6f78"
_COLOURS = (_TEAL, "#8a4fbf", "#a87900", "#c2185b", "#5b7d1c", _GREY)
_FIRST = "DejaVu Sans"  # comes with matplotlib, so pictures look the same everywhere


def confusion(counts: Any, names: Sequence[str]) -> bytes:
    """A confusion matrix: ``counts`` (k, k), a row is what is true. Coloured by the share of the row, counts written.

    Of more than 30 classes the 29 that occur most, as truth or as prediction, and the others taken together.
    """
    from matplotlib.colors import LinearSegmentedColormap

    counts = np.asarray(counts)
    labels = list(names)
    numbers = list(range(len(labels)))
    if len(labels) > MOST:
        by_size = np.argsort(-(counts.sum(axis=0) + counts.sum(axis=1)), kind="stable")
        kept, rest = np.sort(by_size[: MOST - 1]), by_size[MOST - 1 :]
        fold = np.zeros((MOST, len(labels)), dtype=counts.dtype)
        fold[np.arange(MOST - 1), kept] = 1
        fold[-1, rest] = 1
        counts = fold @ counts @ fold.T
        labels, numbers = [*(labels[place] for place in kept), f"{len(rest)} others"], [*kept.tolist(), -1]
    size = len(labels)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shown, fonts, is_numbered = _legible(labels, numbers)
    side = max(3.2, 0.36 * size)
    figure, axes = _empty(side + 2.6, side + 1.4)
    axes.imshow(shares, vmin=0, vmax=1, cmap=LinearSegmentedColormap.from_list("shares", ["#ffffff", _BLUE]))
    ink = 9 if size <= 12 else 7 if size <= 20 else 5.5
    for row, column in zip(*np.nonzero(counts)):
        colour = "white" if shares[row, column] > 0.55 else "#22211f"
        axes.text(column, row, _short(int(counts[row, column])), ha="center", va="center", fontsize=ink, color=colour)
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, shown)) > 3 else {}
    axes.set_xticks(range(size), shown, parse_math=False, fontfamily=fonts, fontsize=max(ink, 7), **turned)
    axes.set_yticks(range(size), shown, parse_math=False, fontfamily=fonts, fontsize=max(ink, 7))
    axes.set(xlabel="predicted" + _explained(is_numbered), ylabel="true")
    axes.tick_params(length=0)
    axes.spines[:].set_color("#e4e0d8")
    return _png(figure)


def per_class(figures: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Bars of precision, recall and F1 of each class {name: {precision, recall, f1, support}}, the most frequent first.

    Of more than 30 classes the most frequent ones; the axis says so.
    """
    number = {name: place for place, name in enumerate(figures)}
    ordered = sorted(figures, key=lambda name: -figures[name]["support"])[:MOST]
    shown, fonts, is_numbered = _legible(ordered, [number[name] for name in ordered])
    figure, axes = _empty(8, 1.5 + 0.42 * len(ordered))
    places = np.arange(len(ordered))
    for turn, (key, colour) in enumerate({"precision": _BLUE, "recall": _TEAL, "f1": _ORANGE}.items()):
        values = [figures[name][key] for name in ordered]
        axes.barh(places + (turn - 1) * 0.26, values, height=0.24, color=colour, label="F1" if key == "f1" else key)
    labels = [f"{name}  ({figures[key]['support']:,})" for name, key in zip(shown, ordered)]
    axes.set_yticks(places, labels, parse_math=False, fontfamily=fonts)
    left_out = f"\nthe {len(ordered)} most frequent of {len(figures)} classes" if len(ordered) < len(figures) else ""
    axes.set(xlim=(0, 1.02), ylim=(len(ordered) - 0.5, -0.5))  # the first on top
    axes.set_xlabel(f"share (in brackets: how often it is true){left_out}{_explained(is_numbered)}")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    return _png(figure)


def precision_recall(curves: Mapping[str, Sequence[Sequence[float]] | None]) -> bytes:
    """Precision over recall of each label {name: [[recall, precision], ...]}; the first 12 labels that have a curve."""
    number = {name: place for place, name in enumerate(curves)}
    drawn = {name: points for name, points in curves.items() if points}
    names = list(drawn)[:LINES]
    shown, fonts, is_numbered = _legible(names, [number[name] for name in names])
    figure, axes = _empty(8, 4.5)
    lines = []
    for place, name in enumerate(names):
        recall, precision = zip(*drawn[name])
        dashes = "--" if place >= len(_COLOURS) else "-"
        # Between two thresholds a recall is only reached by the lower one, with its precision: no straight line between them
        # (Davis and Goadrich 2006). Recall falls from point to point, so that is the first of the two.
        lines += axes.step(recall, precision, dashes, where="post", color=_COLOURS[place % len(_COLOURS)], linewidth=1.6)
    left_out = f" ({len(names)} of {len(drawn)} labels)" if len(names) < len(drawn) else ""
    axes.set(xlim=(0, 1.02), ylim=(0, 1.04), xlabel=f"recall{left_out}{_explained(is_numbered)}", ylabel="precision")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(lines, [str(place) for place in range(len(lines))], frameon=False, loc="outside right upper")
    for text, name in zip(legend.get_texts(), shown):  # set afterwards: a legend leaves out names that begin with "_"
        text.set(parse_math=False, text=name, fontfamily=fonts)
    return _png(figure)


def reliability(bins: Sequence[Mapping[str, float]]) -> bytes:
    """How often forecasts of a confidence are right, of the bins that ``classes.calibration`` makes; below, how many they are."""
    confidence, accuracy, count = ([one[key] for one in bins] for key in ("confidence", "accuracy", "count"))
    figure, axes = _empty(6, 5.4)
    axes.plot([0, 1], [0, 1], "--", color=_GREY, linewidth=1, label="as sure as right")
    axes.plot(confidence, accuracy, "o-", color=_ORANGE, linewidth=1.6, markersize=5, label="measured", zorder=4)
    axes.vlines(confidence, confidence, accuracy, color=_ORANGE, alpha=0.3, linewidth=4)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.04), ylabel="share that is right")
    axes.tick_params(labelbottom=False)
    axes.legend(frameon=False, loc="upper left")
    # The same confidence stands above itself: one axis under the other, of one width.
    grid = axes.get_subplotspec().subgridspec(2, 1, height_ratios=[4, 1], hspace=0.06)
    axes.set_subplotspec(grid[0])
    below = figure.add_subplot(grid[1], sharex=axes)
    below.bar(confidence, np.asarray(count) / max(sum(count), 1), width=0.05, color=_BLUE)
    below.set(xlabel="confidence", ylabel="share of all")
    for one in (axes, below):
        one.grid(alpha=0.25)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def buckets(figures: Mapping[str, Mapping[str, float]], chance: float) -> bytes:
    """Bars of the accuracy in each bucket {name: {pairs, accuracy}}, in their order, beside what ``chance`` gives."""
    figure, axes = _empty(8, 1.3 + 0.42 * len(figures))
    places = range(len(figures))
    axes.barh(places, [one["accuracy"] for one in figures.values()], height=0.6, color=_BLUE)
    axes.axvline(chance, linestyle="--", color=_GREY, linewidth=1)
    labels = [f"{name}  ({one['pairs']:,})" for name, one in figures.items()]
    axes.set_yticks(places, labels)
    axes.set(xlim=(0, 1.02), ylim=(len(labels) - 0.5, -0.5), xlabel="accuracy (in brackets: pairs; dashed: by chance)")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _empty(width: float, height: float) -> tuple[Any, Any]:
    """(figure, axes) of this many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", bbox_inches="tight", pad_inches=0.1)
    return out.getvalue()


def _short(count: int) -> str:
    """950, 12k, 3.4M: what fits into a cell."""
    if count < 10_000:
        return str(count)
    return f"{count / 1e3:.0f}k" if count < 999_500 else f"{count / 1e6:.1f}M"


def _explained(is_numbered: bool) -> str:
    return "\n#n = class n, counted from 0: no font here has its letters" if is_numbered else ""


def _legible(names: Sequence[str], numbers: Sequence[int]) -> tuple[list[str], list[str], bool]:
    """(names as they are drawn, the fonts that have their letters, whether any is a number for want of a font)."""
    cut = [_cut(name) for name in names]
    fonts, missing = fonts_of("".join(cut))
    bare = [bool(missing & set(name)) for name in cut]
    drawn = [f"#{number}" if is_bare else name for name, number, is_bare in zip(cut, numbers, bare)]
    return drawn, fonts, any(bare)


def _cut(name: str) -> str:
    """One line of at most 28 characters; the middle gives way, since names differ at their ends."""
    line = "".join(letter if letter.isprintable() else " " for letter in " ".join(name.split()))
    half = (_LONGEST - 1) // 2
    return (line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1 - half]}…{line[-half:]}") or "(empty)"


def fonts_of(letters: Iterable[str]) -> tuple[list[str], set[str]]:
    """(families to draw with, letters that none has): matplotlib's own font, and installed ones for what it lacks.

    Upright sans-serif fonts of normal weight are tried first. Files are opened only until every letter is found.
    """
    from matplotlib import font_manager

    def lacking(path: str, wanted: set[str]) -> set[str]:
        face = font_manager.get_font(path)
        return {letter for letter in wanted if not face.get_char_index(ord(letter))}

    missing = lacking(font_manager.findfont(_FIRST), {letter for letter in letters if not letter.isspace()})
    families = [_FIRST]
    if not missing:
        return families, missing

    def rank(entry: Any) -> tuple[bool, bool, bool, str]:
        is_sans = any(word in entry.name for word in ("Sans", "Gothic", "Hei"))
        return entry.style != "normal", str(entry.weight) not in ("400", "normal", "regular"), not is_sans, entry.name

    for entry in sorted(font_manager.fontManager.ttflist, key=rank):
        if entry.name in families or entry.name.startswith("Last Resort"):  # which has a box for every letter
            continue
        rest = lacking(entry.fname, missing)
        if rest != missing:
            families.append(entry.name)
            missing = rest
        if not missing:
            break
    return families, missing
