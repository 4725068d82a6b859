"""Charts: what is drawn where, read from the figure before it becomes a PNG."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from tunesmith.metrics import classes
from tunesmith.report import charts, curves, fonts

NOWHERE = "\U00050000"  # no font has a letter for it


@pytest.fixture(autouse=True)
def nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def drawn(figure):
    """The figure, laid out as drawing does, which warns of letters that no font has."""
    figure.draw_without_rendering()
    return figure


def figures_of(counts):
    """per_class of class ids 0, 1, ... that stand as often as ``counts`` says, all predicted right."""
    gold = np.repeat(np.arange(len(counts)), counts)
    return classes.single_label_metrics(gold, np.eye(len(counts))[gold], [f"c{number}" for number in range(len(counts))])


def labels(ticks):
    return [tick.get_text() for tick in ticks]


def test_each_is_a_png():
    found = figures_of([3, 2])
    curve = classes.multi_label_metrics([[1], [0]], [[0.9], [0.1]], ["a"])["curves"]
    for figure in (
        charts.confusion(found["confusion"], ["a", "b"]),
        charts.per_class(found["per_class"]),
        charts.precision_recall(curve),
        charts.calibration(found["calibration"]),
    ):
        image = Image.open(io.BytesIO(charts.png(figure)))
        assert image.format == "PNG" and min(image.size) > 150 and image.convert("L").getextrema()[0] < 100


def test_a_confusion_matrix_has_truth_in_rows_and_shares_as_colours():
    axes = drawn(charts.confusion([[3, 1], [0, 4]], ["a", "b"])).axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0.0, 1.0]]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "3", (1, 0): "1", (1, 1): "4"}  # (column, row); nothing is written where there is nothing
    assert axes.get_ylabel() == "true" and axes.get_xlabel() == "predicted"


def test_a_class_without_rows_does_not_divide_by_zero():
    axes = drawn(charts.confusion([[0, 0], [1, 1]], ["a", "b"])).axes[0]
    assert axes.images[0].get_array()[0].tolist() == [0.0, 0.0]


def test_of_many_classes_the_rare_ones_are_taken_together():
    counts = [1] * 10 + [5] * 25
    found = figures_of(counts)
    axes = drawn(charts.confusion(found["confusion"], list(found["per_class"]))).axes[0]
    shown = labels(axes.get_yticklabels())
    assert len(shown) == charts.MOST_CLASSES and shown == labels(axes.get_xticklabels())
    assert shown[-1] == "6 others" and shown[:4] == ["c0", "c1", "c2", "c3"] and shown[4] == "c10"
    assert sum(int(text.get_text()) for text in axes.texts) == sum(counts)
    assert axes.texts[-1].get_text() == "6"


@pytest.mark.parametrize(("count", "text"), [(9_999, "9999"), (10_000, "10k"), (999_499, "999k"), (999_500, "1.0M")])
def test_large_counts_are_short(count, text):
    assert drawn(charts.confusion([[count]], ["a"])).axes[0].texts[0].get_text() == text


def test_bars_begin_with_the_most_frequent():
    axes = drawn(charts.per_class(figures_of([2, 7, 4])["per_class"])).axes[0]
    assert labels(axes.get_yticklabels()) == ["c1  (7)", "c2  (4)", "c0  (2)"]
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first is on top


def test_bars_are_the_measures():
    found = {"a": {"precision": 0.5, "recall": 0.25, "f1": 0.3, "support": 1}}
    axes = drawn(charts.per_class(found)).axes[0]
    assert [(box.get_label(), box.patches[0].get_width()) for box in axes.containers] == [
        ("precision", 0.5), ("recall", 0.25), ("F1", 0.3),
    ]  # fmt: skip


def test_bars_show_how_many_were_left_out():
    axes = drawn(charts.per_class(figures_of([1] * 40)["per_class"])).axes[0]
    assert len(axes.get_yticklabels()) == charts.MOST_CLASSES
    assert "the 30 most frequent of 40 classes" in axes.get_xlabel()


def test_precision_at_a_recall_is_that_of_the_threshold_that_reaches_it():
    # From the lowest threshold: recall 1 at precision 1/2; between recalls 1/2 and 1 the figure is that of 1.
    figure = drawn(charts.precision_recall({"a": [[1.0, 0.5], [0.5, 1.0], [0.0, 1.0]]}))
    (line,) = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[1.0, 0.5], [0.5, 1.0], [0.0, 1.0]]
    assert line.get_drawstyle() == "steps-post"  # each value holds from its own recall down to the next


def test_curves_that_cannot_be_distinguished_are_left_out():
    curve = [[1.0, 0.5], [0.0, 1.0]]
    figure = drawn(charts.precision_recall({"empty": None, **{f"label {number}": curve for number in range(14)}}))
    names = labels(figure.legends[0].get_texts())
    assert names == [f"label {number}" for number in range(12)]
    assert "12 of 14 labels" in figure.axes[0].get_xlabel()
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == charts.MOST_LINES


def test_reliability_has_the_bins_over_their_sizes():
    bins = classes.calibration([0.3, 0.3, 0.9, 0.9], [0, 1, 1, 1])
    above, below = drawn(charts.calibration(bins)).axes
    assert np.array(above.lines[1].get_xydata()).tolist() == [[pytest.approx(0.3), 0.5], [pytest.approx(0.9), 1.0]]
    assert [bar.get_height() for bar in below.patches] == [0.5, 0.5]
    assert above.get_position().x0 == pytest.approx(below.get_position().x0)
    assert above.get_position().y0 > below.get_position().y1


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["$x_{y", "$x_{$", "_hidden", "a\nb", "$a$ and $b$", "%s {}", ""])
def test_any_name_can_be_drawn(name):
    curve = {name: [[1.0, 0.5], [0.0, 1.0]], "other": [[1.0, 0.5], [0.0, 1.0]]}
    expected = " ".join(name.split()) or "(empty)"
    assert labels(drawn(charts.precision_recall(curve)).legends[0].get_texts()) == [expected, "other"]
    assert labels(drawn(charts.confusion([[1, 0], [0, 1]], [name, "other"])).axes[0].get_yticklabels()) == [expected, "other"]
    found = {key: {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 2} for key in (name, "other")}
    assert labels(drawn(charts.per_class(found)).axes[0].get_yticklabels())[0] == f"{expected}  (2)"


def test_long_names_keep_their_ends():
    name = "the beginning " + "x" * 80 + " the end"
    (shown,) = labels(drawn(charts.confusion([[1]], [name])).axes[0].get_yticklabels())
    assert len(shown) == 28 and shown.startswith("the beginning") and shown.endswith("the end") and "…" in shown


def test_a_name_that_no_font_can_write_becomes_its_number(monkeypatch):
    monkeypatch.setattr(fonts, "fonts_of", lambda letters: (["DejaVu Sans"], {"한"} & set(letters)))
    axes = drawn(charts.confusion([[1, 0, 0], [0, 1, 0], [0, 0, 1]], ["a", "b", "c한"])).axes[0]
    assert labels(axes.get_yticklabels()) == ["a", "b", "#2"]
    assert "counted from 0" in axes.get_xlabel()
    found = {"한": {"support": 1}, "b": {"support": 9}}
    for figures in found.values():
        figures.update(precision=1.0, recall=1.0, f1=1.0)
    assert labels(drawn(charts.per_class(found)).axes[0].get_yticklabels()) == ["b  (9)", "#0  (1)"]


def test_plain_names_need_no_other_font():
    assert fonts.fonts_of("Größe, naïve, цель 1") == (["DejaVu Sans"], set())


def test_letters_come_from_whichever_font_has_them():
    from matplotlib import font_manager

    # A letter that matplotlib's own font lacks and another of the fonts it brings has.
    plain, other = (font_manager.get_font(font_manager.findfont(name)) for name in ("DejaVu Sans", "STIXGeneral"))
    lacked = sorted(set(other.get_charmap()) - set(plain.get_charmap()))
    letter = next(chr(code) for code in lacked if chr(code).isprintable())
    families, missing = fonts.fonts_of(letter + NOWHERE)
    assert families[0] == "DejaVu Sans" and len(families) == 2 and missing == {NOWHERE}
    axes = drawn(charts.confusion([[1]], [f"x {letter}"])).axes[0]
    assert labels(axes.get_yticklabels()) == [f"x {letter}"]
    assert axes.get_yticklabels()[0].get_fontfamily() == families


def test_a_font_that_was_installed_after_matplotlib_listed_the_fonts_is_found(monkeypatch):
    from matplotlib import font_manager

    known, missing = fonts.fonts_of("한글")
    if missing:
        pytest.skip("no installed font has Korean letters")
    listed = [entry for entry in font_manager.fontManager.ttflist if entry.name not in known[1:]]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", listed)
    fonts._list_new_fonts.cache_clear()
    assert fonts.fonts_of("한글")[1] == set()


def test_names_of_sets_in_any_alphabet_are_in_the_legend_of_the_curves():
    known = fonts.fonts_of("한글")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a letter that no font has
        figure = charts.over_steps("loss", [curves.Curve.of_set("한글", [(1, 2.0), (2, 1.0)], 0)])
        charts.png(figure)
    assert figure.legends[0].get_texts()[0].get_text() == ("set0" if known[1] else "한글")
