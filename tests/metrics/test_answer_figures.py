"""Figures of answers that are added in blocks: intervals, baselines, missing references, memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tunesmith.metrics import answer_figures, answer_metrics, comparison, metric_names
from tunesmith.metrics.answer_figures import ModelAnswers
from tunesmith.metrics.answer_metrics import Answered


def answers(count, right=lambda row: row % 3 == 0):
    """Answers to ``count`` prompts; those of the rows for which ``right`` holds are their references."""
    return [
        Answered(f"yes {row}" if right(row) else "no", (f"yes {row}",), 2 + row % 3, prompt=f"say yes {row}", row=row)
        for row in range(1, count + 1)
    ]


def measured(found, names=("exact_match", "bleu", "length"), block=7):
    terms = ModelAnswers(metric_names.of_names(names))
    for start in range(0, len(found), block):
        terms.add(found[start : start + block])
    return terms


def test_blocks_give_the_figures_of_all_answers_at_once():
    found = answers(60)
    blocks, whole = (answer_figures.answer_figures(measured(found, block=size), {}) for size in (7, 60))
    assert blocks == whole
    exact = blocks["figures"]["exact_match"]
    assert exact["value"] == pytest.approx(20 / 60) and exact["rows"] == 60 and exact["low"] < 1 / 3 < exact["high"]
    assert blocks["figures"]["distinct_1"]["value"] == pytest.approx((1 + 20 + 1) / (20 * 2 + 40))


def test_a_baseline_is_compared_by_the_interval_of_the_paired_difference():
    better, worse = measured(answers(60)), measured(answers(60, lambda row: row % 10 == 0))
    (exact,) = answer_figures.answer_figures(better, {"the base model": worse})["figures"]["exact_match"]["baselines"]
    pairs = [better.terms("exact_match"), worse.terms("exact_match")]
    expected = comparison.difference(pairs[1], pairs[0], better.clusters.tolist())
    assert (exact["difference"], exact["low"], exact["high"]) == (expected.value, expected.low, expected.high)
    assert exact["value"] == pytest.approx(0.1) and exact["better"] is True
    figures = answer_figures.answer_figures(worse, {"the base model": better})["figures"]
    assert figures["exact_match"]["baselines"][0]["better"] is False
    assert figures["length"]["baselines"][0]["better"] is None, "no length is better than another"


def test_the_copied_prompt_has_no_length_of_its_own():
    found, texts = answers(12), answer_figures.metrics_of_texts(answer_metrics.table())
    copied = ModelAnswers(texts)
    copied.add(answer_figures.rewritten(found, None))
    assert "length" not in copied.measured and copied.value("token_f1") == pytest.approx(2 * 2 / 5)


def test_rows_without_a_reference_have_no_overlap_and_are_counted():
    found = [*answers(20), Answered("no idea", prompt="What?", row=21)]
    figures = answer_figures.answer_figures(measured(found), {})
    assert figures["without_reference"] == 1 and figures["answers"] == 21
    assert figures["figures"]["exact_match"]["rows"] == 20 and figures["figures"]["length"]["rows"] == 21
    alone = answer_figures.answer_figures(measured(found[-1:]), {})
    assert "exact_match" not in alone["figures"] and alone["worst"][0]["repetition"] == 0


def test_few_answers_have_no_interval():
    figures = answer_figures.answer_figures(measured(answers(comparison.FEWEST - 1)), {"again": measured(answers(9))})["figures"]
    assert "low" not in figures["exact_match"] and figures["exact_match"]["value"] == pytest.approx(1 / 3)
    assert figures["exact_match"]["baselines"][0]["better"] is None
    enough = answer_figures.answer_figures(measured(answers(comparison.FEWEST)), {})["figures"]["exact_match"]
    assert 0 <= enough["low"] < enough["high"] <= 1


def test_the_worst_answers_are_kept_in_the_order_of_their_overlap():
    worst = answer_figures.answer_figures(measured(answers(60)), {})["worst"]
    assert [one["row"] for one in worst] == [1, 2, 4, 5, 7, 8, 10, 11, 13, 14]
    assert worst[0]["answer"] == "no" and worst[0]["token_f1"] == 0


def test_the_text_of_answers_is_not_kept():
    """700 long answers need no more memory than their terms, the hashes of their n-grams, and one block."""
    text = " ".join(f"w{number}" for number in range(200))

    def peak(count):
        tracemalloc.start()
        terms = ModelAnswers(metric_names.of_names(["exact_match", "length"]))
        for start in range(0, count, 20):
            terms.add(
                [Answered(f"{row} {text}", (f"{row}",), prompt=f"{row} {text}", row=row) for row in range(start, start + 20)]
            )
        answer_figures.answer_figures(terms, {})
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(700) < peak(100) + 600 * 600, "the texts of an answer and its prompt alone have 1,700 characters"


def test_a_bootstrap_of_many_rows_needs_no_more_memory_than_one_of_few():
    def peak(rows):
        terms = np.stack([np.random.default_rng(0).random(rows), np.ones(rows)], axis=1)
        tracemalloc.start()
        comparison.difference(terms, terms[::-1], of_sums=lambda sums: np.sqrt(sums[:, 0]))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(2000) < peak(200) + 2_000_000
