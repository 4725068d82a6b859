"""Figures of classes against their definitions, counted row by row, and against cases worked out by hand."""

import itertools
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from tunesmith.errors import DataError
from tunesmith.metrics import classes

ABC = ["a", "b", "c"]


@pytest.fixture(autouse=True)
def nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def one_hot(predicted, k, confidence=0.8):
    out = np.full((len(predicted), k), (1 - confidence) / (k - 1))
    out[np.arange(len(predicted)), predicted] = confidence
    return out


def several(n=60, k=5, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    gold = rng.random((n, k)) < [0.6, 0.3, 0.1, 0.5, 0.2][:k]
    return gold, np.clip(gold * 0.3 + rng.random((n, k)) * 0.7, 0, 1).astype(dtype)


def counted(gold, predicted):
    """Return precision, recall, F1 and support of two columns of bools; 0 where nothing is divided."""
    hits = sum(a and b for a, b in zip(gold, predicted))
    shares = [(hits, sum(predicted)), (hits, sum(gold)), (2 * hits, sum(predicted) + sum(gold))]
    return [*(part / whole if whole else 0.0 for part, whole in shares), sum(gold)]


def area(gold, scores):
    """Return the share of pairs of a positive and a negative in which the positive has the higher score, ties a half."""
    pairs = [(a, b) for a, b in itertools.product(range(len(gold)), repeat=2) if gold[a] and not gold[b]]
    return sum((scores[a] > scores[b]) + (scores[a] == scores[b]) / 2 for a, b in pairs) / len(pairs)


# --------------------------------------------------------------------------------------------------------------- single


def test_three_rows_of_three_classes_by_hand():
    found = classes.single_label_metrics([0, 0, 1], one_hot([0, 1, 1], 3), ABC)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["micro_f1"] == found["accuracy"]
    assert found["per_class"]["a"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    assert found["per_class"]["b"] == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1}
    assert found["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert found["macro_f1"] == pytest.approx(2 / 3)  # c is nowhere, so it does not count
    assert found["confusion"] == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert found["baseline"] == pytest.approx(2 / 3)
    assert found["calibration_error"] == pytest.approx(0.8 - 2 / 3)


def test_a_class_that_is_only_predicted_counts_in_the_macro_mean():
    found = classes.single_label_metrics([0, 0], one_hot([0, 2], 3), ABC)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["baseline"] == 1.0


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_single_agrees_with_the_definitions(pairs):
    gold, predicted = map(np.array, zip(*pairs))
    found = classes.single_label_metrics(gold, one_hot(predicted, 4), "wxyz")
    assert found["accuracy"] == found["micro_f1"] == sum(a == b for a, b in pairs) / len(pairs)
    expected = [counted((gold == one).tolist(), (predicted == one).tolist()) for one in range(4)]
    for name, row in zip("wxyz", expected):
        assert list(found["per_class"][name].values()) == pytest.approx(row)
    seen = [row[2] for one, row in enumerate(expected) if one in gold or one in predicted]
    assert found["macro_f1"] == pytest.approx(sum(seen) / len(seen))
    assert found["confusion"] == [[pairs.count((a, b)) for b in range(4)] for a in range(4)]
    assert found["baseline"] == max(row[3] for row in expected) / len(pairs)


def test_a_single_class_of_all_rows_is_right_without_a_warning():
    found = classes.single_label_metrics([0, 0], [[1.0], [1.0]], ["only"])
    assert found["confusion"] == [[2]] and found["macro_f1"] == found["micro_f1"] == found["accuracy"] == 1.0


def test_of_equal_probabilities_the_first_is_predicted():
    assert classes.single_label_metrics([1], [[0.2, 0.4, 0.4]], ABC)["accuracy"] == 1.0


def test_float32_and_lists_are_taken():
    assert classes.single_label_metrics([0], np.array([[1, 0, 0]], np.float32), ABC)["accuracy"] == 1.0


@pytest.mark.parametrize("measure", [classes.single_label_metrics, classes.multi_label_metrics])
def test_no_rows_are_refused(measure):
    gold = np.zeros((0,) if measure is classes.single_label_metrics else (0, 3), int)
    with pytest.raises(DataError, match="nothing to evaluate"):
        measure(gold, np.zeros((0, 3)), ABC)


@pytest.mark.parametrize("gold", [[0, 1], [0, 3, 1], [0, -1, 1]])
def test_what_does_not_fit_is_refused(gold):
    with pytest.raises(ValueError, match=r"expected 0 to 2|do not match"):
        classes.single_label_metrics(gold, np.full((3, 3), 1 / 3), ABC)


def test_names_that_are_too_few_are_refused():
    with pytest.raises(ValueError, match="do not match 2 names"):
        classes.multi_label_metrics(np.ones((4, 3), bool), np.ones((4, 3)), ["a", "b"])


def test_json_can_hold_all_of_it():
    json.dumps(classes.single_label_metrics([0, 1], one_hot([0, 1], 3), ABC), allow_nan=False)
    json.dumps(classes.multi_label_metrics(*several(), "abcde"), allow_nan=False)
    json.dumps(classes.regression_metrics([1, 2, 3], [1, 2, 4]), allow_nan=False)


# ---------------------------------------------------------------------------------------------------------- calibration


def test_the_edge_of_a_bin_belongs_to_the_lower_one():
    bins = classes.calibration([0.0, 1 / 15, 1 / 15 + 1e-9, 1.0], [0, 1, 1, 1])
    assert [one["count"] for one in bins] == [2, 1, 1]
    assert bins[0] == {"confidence": pytest.approx(1 / 30), "accuracy": 0.5, "count": 2}


def test_the_error_is_weighted_by_rows():
    # Three rows of one bin, sure by 0.9 and right in one: 3 * |1/3 - 0.9|; one row sure by 0.5 and right: |1 - 0.5|.
    bins = classes.calibration([0.9, 0.9, 0.9, 0.5], [1, 0, 0, 1])
    assert classes.calibration_error(bins) == pytest.approx((3 * (0.9 - 1 / 3) + 0.5) / 4)


def test_a_forecast_that_is_right_as_often_as_it_claims_has_no_error():
    assert classes.calibration_error(classes.calibration([0.5] * 4, [1, 0, 1, 0])) == 0.0


def test_nan_is_in_no_bin():
    assert classes.calibration([np.nan], [1]) == []
    assert classes.calibration_error([]) is None


# ------------------------------------------------------------------------------------------------------- several labels


@pytest.mark.parametrize("k", [1, 2, 5])
def test_multi_agrees_with_the_definitions(k):
    gold, scores = several(k=k)
    found = classes.multi_label_metrics(gold, scores, "abcde"[:k], 0.4)
    predicted = scores >= 0.4
    expected = [[*counted(gold[:, one], predicted[:, one]), area(gold[:, one], scores[:, one])] for one in range(k)]
    for name, row in zip("abcde", expected):
        assert list(found["per_class"][name].values()) == pytest.approx(row)
    assert found["micro_f1"] == pytest.approx(counted(gold.ravel(), predicted.ravel())[2])
    assert [found["macro_f1"], found["auroc"]] == pytest.approx(np.mean(expected, axis=0)[[2, 4]])
    assert found["exact_match"] == sum(row.tolist() == said.tolist() for row, said in zip(gold, predicted)) / len(gold)


def test_a_label_that_is_nowhere_counts_in_the_macro_mean_of_several():
    gold, scores = np.array([[1, 0], [1, 0]]), np.array([[0.9, 0.1], [0.9, 0.1]])
    assert classes.multi_label_metrics(gold, scores, "ab")["macro_f1"] == 0.5


def test_one_label_alone_is_no_question_of_two_classes():
    found = classes.multi_label_metrics([[1], [1], [0]], [[0.9], [0.1], [0.2]], ["only"])
    assert found["micro_f1"] == found["macro_f1"] == pytest.approx(2 / 3)


def test_the_area_is_left_out_where_all_rows_are_of_one_kind():
    gold, scores = np.array([[1, 1, 0], [0, 1, 0]], bool), np.array([[0.9, 0.3, 0.2], [0.1, 0.5, 0.2]])
    found = classes.multi_label_metrics(gold, scores, ABC)
    assert [found["per_class"][name]["auroc"] for name in ABC] == [1.0, None, None]
    assert found["auroc"] == 1.0
    assert found["curves"]["c"] is None
    assert classes.multi_label_metrics(gold[:, 1:], scores[:, 1:], ABC[1:])["auroc"] is None


def test_the_threshold_itself_predicts():
    assert classes.multi_label_metrics([[1]], [[0.25]], ["a"], 0.25)["exact_match"] == 1.0


def test_calibration_of_several_labels_takes_each_label_of_each_row():
    found = classes.multi_label_metrics([[1, 0], [1, 0]], [[0.9, 0.2], [0.9, 0.2]], "ab")
    assert found["calibration_error"] == pytest.approx((0.1 * 2 + 0.2 * 2) / 4)


def test_a_curve_keeps_its_ends_in_a_hundred_points():
    gold, scores = several(n=3000, k=1)
    precision, recall, _ = sklearn.precision_recall_curve(gold[:, 0], scores[:, 0])
    curve = classes.multi_label_metrics(gold, scores, ["a"])["curves"]["a"]
    assert len(curve) == classes.POINTS
    assert curve[0] == [recall[0], precision[0]] and curve[-1] == [0.0, 1.0]
    whole = set(zip(recall, precision))
    assert all(tuple(point) in whole for point in curve)


def test_a_curve_of_a_rare_label_reaches_every_recall():
    gold, scores = np.zeros((5000, 1), bool), np.linspace(1, 0, 5000)[:, None]
    gold[::1000] = True
    curve = classes.multi_label_metrics(gold, scores, ["a"])["curves"]["a"]
    assert sorted({recall for recall, _ in curve}) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert max(precision for recall, precision in curve if recall == 0.4) == 2 / 1001


def test_a_short_curve_is_kept_whole():
    assert classes.multi_label_metrics([[1], [0]], [[0.9], [0.1]], ["a"])["curves"]["a"] == [[1.0, 0.5], [1.0, 1.0], [0.0, 1.0]]


def test_probabilities_that_are_not_numbers_do_not_stop_the_others():
    found = classes.multi_label_metrics([[1, 1], [0, 0]], [[0.9, np.nan], [0.1, np.nan]], "ab")
    assert [found["per_class"][name]["auroc"] for name in "ab"] == [1.0, None]
    assert found["curves"]["b"] is None


# ------------------------------------------------------------------------------------------------------------ threshold


def micro(gold, scores, threshold):
    truth, said = np.ravel(gold).astype(bool), np.ravel(scores) >= threshold
    return 2 * (truth & said).sum() / max(truth.sum() + said.sum(), 1)


def test_the_threshold_is_in_the_middle():
    assert classes.best_threshold([[1, 1], [0, 0]], [[0.4, 0.3], [0.2, 0.1]]) == pytest.approx(0.25)


def test_a_half_is_kept_when_nothing_is_better():
    assert classes.best_threshold([[1, 0]], [[0.9, 0.3]]) == 0.5
    assert classes.best_threshold([[0, 0]], [[0.9, 0.3]]) == 0.5
    assert classes.best_threshold([[1, 1]], [[0.3, np.nan]]) == 0.5


def test_of_equally_good_thresholds_the_nearest_to_a_half():
    # From 0.9 down: right, wrong, right, wrong: F1 is 2/3, 1/2, 4/5, 2/3; and 2/3 stands there twice, a half included.
    assert classes.best_threshold([[1, 0, 1, 0]], [[0.9, 0.8, 0.7, 0.6]]) == pytest.approx(0.65)
    # 2/(1+3) = 4/(5+3) = 0.5 and the best of all: after one and after five; a half (three predictions) gives 1/3.
    gold, scores = [[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]], [[0.99, 0.9, 0.8, 0.45, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05]]
    assert micro(gold, scores, 0.35) == micro(gold, scores, 0.95) == 0.5
    assert classes.best_threshold(gold, scores) == pytest.approx(0.35)
    scores = [[0.9, 0.6, 0.45, 0.3, 0.2, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04]]
    assert micro(gold, scores, 0.15) == micro(gold, scores, 0.75) == 0.5
    assert classes.best_threshold(gold, scores) == pytest.approx(0.75)


def test_equal_probabilities_stand_on_one_side():
    assert classes.best_threshold([[1, 0, 0, 0]], [[0.3, 0.3, 0.3, 0.1]]) == pytest.approx(0.2)


def test_all_of_them_are_predicted_when_that_is_best():
    threshold = classes.best_threshold([[1, 1]], [[0.4, 0.2]])
    assert threshold == pytest.approx(0.1)
    assert classes.best_threshold([[1, 1]], [[0.4, 0.0]]) == 0.0


chances = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.floats(0, 1, width=32))
cases = st.lists(st.tuples(st.booleans(), chances), min_size=1, max_size=12)


@settings(max_examples=80)
@given(cases, st.sampled_from([np.float32, np.float64]))
def test_no_threshold_is_better(pairs, dtype):
    gold = np.array([[held for held, _ in pairs]])
    scores = np.array([[chance for _, chance in pairs]], dtype)
    threshold = classes.best_threshold(gold, scores)
    everything = [0.5, 2.0, *scores.ravel().tolist()]
    assert micro(gold, scores, threshold) == max(micro(gold, scores, one) for one in everything)
    assert micro(gold, scores.astype(np.float64), threshold) == micro(gold, scores, threshold)


def test_neighbours_with_no_number_between_them_are_still_parted():
    low = np.float32(0.3)
    high = np.nextafter(low, np.float32(1))
    threshold = classes.best_threshold([[1, 0]], np.array([[high, low]]))
    assert low < threshold <= high


# ------------------------------------------------------------------------------------------------------------- baseline


@settings(max_examples=40)
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=8))
def test_no_constant_is_better_than_the_most_frequent(rows):
    gold = np.array(rows)
    found = classes.most_frequent_labels(gold)
    scores = {}
    for chosen in itertools.product([False, True], repeat=4):
        scores[chosen] = micro(gold, np.tile(chosen, (len(gold), 1)), 0.5)
    kept = tuple(label in found["labels"] for label in range(4))
    assert found["micro_f1"] == pytest.approx(max(scores.values())) == pytest.approx(scores[kept])


def test_the_baseline_names_its_labels():
    gold = np.array([[0, 1, 1], [0, 1, 0], [0, 1, 1]], bool)
    assert classes.most_frequent_labels(gold) == {"micro_f1": pytest.approx(10 / 11), "labels": [1, 2]}
    found = classes.multi_label_metrics(gold, gold * 1.0, ABC)
    assert found["baseline"] == pytest.approx(10 / 11) and found["baseline_labels"] == ["b", "c"]


def test_without_any_label_the_best_prediction_is_none():
    assert classes.most_frequent_labels(np.zeros((3, 2), bool)) == {"micro_f1": 0.0, "labels": []}


# ----------------------------------------------------------------------------------------------------------- regression


def test_numbers_by_hand():
    found = classes.regression_metrics([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 8.0])
    assert found["mse"] == 4.0 and found["rmse"] == 2.0 and found["mae"] == 1.0
    assert found["r2"] == pytest.approx(1 - 4 / 1.25)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 2, 3, 8])[0, 1])


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_correlations_agree_with_the_definitions(pairs):
    columns = gold, said = np.array(pairs).T
    found = classes.regression_metrics(gold, said)
    if len(set(gold)) == 1 or len(set(said)) == 1:
        assert found["pearson"] is found["spearman"] is None
        return
    ranks = []
    for side in columns:
        ranks.append([sum(other < one for other in side) + sum(other == one for other in side) / 2 for one in side])
    assert found["pearson"] == pytest.approx(np.corrcoef(gold, said)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert -1 <= found["pearson"] <= 1 and -1 <= found["spearman"] <= 1
    assert found["r2"] == pytest.approx(sklearn.r2_score(gold, said))


def test_predictions_that_are_not_numbers_give_figures_that_are_not_numbers():
    found = classes.regression_metrics([1.0, 2.0, 3.0], [1.0, np.nan, 2.0])
    assert all(np.isnan(figure) for figure in found.values())


def test_what_a_constant_leaves_undefined_is_none():
    assert classes.regression_metrics([2, 2], [1, 3]) == {
        "mse": 1.0, "rmse": 1.0, "mae": 1.0, "r2": None, "pearson": None, "spearman": None,
    }  # fmt: skip
    assert classes.regression_metrics([1, 3], [2, 2])["r2"] == 0.0


def test_numbers_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        classes.regression_metrics([1, 2], [1])
    with pytest.raises(DataError):
        classes.regression_metrics([], [])
