"""Entities against the rule of conlleval, and by hand."""

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.metrics import entities

TAGS = ["O", "B-X", "I-X", "E-X", "S-X", "B-Y", "I-Y", "E-Y", "S-Y", "B", "I", "E", "S", "B-a-b", "I-a-b"]
rows = st.lists(st.sampled_from(TAGS), max_size=12)


@pytest.fixture(autouse=True)
def nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def conlleval(tags):
    """Return the entities of one row by the rule: I- and E- continue what a B- or I- of their type left open, other tags end it."""
    found, held = [], None
    for place, tag in enumerate(tags):
        kind, _, name = tag.partition("-")
        name = name or "_"
        goes_on = held is not None and kind in "IE" and name == held[0]
        if not goes_on and held is not None:
            found.append((*held, place))
        if not goes_on:
            held = None if kind == "O" else (name, place)
        if kind in "ES":
            found.append((*held, place + 1))
            held = None
    return found if held is None else [*found, (*held, len(tags))]


@settings(deadline=None)
@given(rows)
def test_spans_follow_the_rule_of_conlleval(tags):
    assert entities.spans(tags) == entities.spans(tuple(tags)) == conlleval(tags)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-X I-X O", [("X", 1, 3)]),
        ("B-X B-X", [("X", 0, 1), ("X", 1, 2)]),
        ("I-X I-X O I-Y", [("X", 0, 2), ("Y", 3, 4)]),
        ("B-X I-Y", [("X", 0, 1), ("Y", 1, 2)]),
        ("B-X I-X E-X I-X", [("X", 0, 3), ("X", 3, 4)]),
        ("S-X S-X E-X", [("X", 0, 1), ("X", 1, 2), ("X", 2, 3)]),
        ("B I O", [("_", 0, 2)]),
        ("", []),
    ],
)
def test_spans_by_hand(tags, expected):
    assert entities.spans(tags.split()) == expected


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        ("O B-X I-X", "BIO"), ("B-X", "BIO"), ("B I O", "BIO"), ("B-a-b I-a-b", "BIO"),
        ("O B-X I-X E-X S-X", "BIOES"), ("S-X O", "BIOES"), ("B-X E-X", "BIOES"),
        ("I-X O I-Y", "IO"),
        ("O", None), ("", None), ("NN VB", None), ("B-X I-X NN", None), ("B-X L-X U-X", None), ("B-", None), ("O-X", None), ("O-X B-X", None),
        ("Other B-X", None), ("BE-X", None),
    ],
)  # fmt: skip
def test_scheme(tags, scheme):
    assert entities.scheme_of(tags.split()) == scheme


@pytest.mark.parametrize(
    ("tags", "scheme", "expected"),
    [
        ("O B-X I-X I-X O", "BIO", {}),
        ("O I-X I-X O I-X", "BIO", {"inside_without_begin": 2}),
        ("I-X", "BIO", {"inside_without_begin": 1}),
        ("B-X I-Y I-Y", "BIO", {"type_change": 1}),
        ("B-X B-X", "BIO", {}),
        ("B-X I-X E-X O S-X", "BIOES", {}),
        ("O E-X", "BIOES", {"end_without_begin": 1}),
        ("B-X E-Y", "BIOES", {"type_change": 1}),
        ("B-X E-X I-X E-X", "BIOES", {"inside_without_begin": 1}),
        ("S-X E-X", "BIOES", {"end_without_begin": 1}),
        ("B-X O B-X S-X B-X", "BIOES", {"no_end": 3}),
        ("B-X I-X", "BIOES", {"no_end": 1}),
        ("I-X I-Y", "IO", {}),
        ("I-X", None, {}),
    ],
)
def test_problems(tags, scheme, expected):
    found = entities.problems(tags.split(), scheme)
    assert found == expected
    assert set(found) <= set(entities.PROBLEMS)


def test_problems_are_still_entities():
    tags = ["O", "I-X", "I-X"]
    assert entities.problems(tags) and entities.spans(tags) == [("X", 1, 3)]


def test_a_score_by_hand():
    gold = [["B-X", "I-X", "O", "B-Y"], ["O", "B-X"]]
    said = [["B-X", "O", "O", "B-Y"], ["B-Z", "B-X"]]
    found = entities.score(gold, said)
    assert found["precision"] == 2 / 4 and found["recall"] == 2 / 3 and found["support"] == 3
    assert found["f1"] == pytest.approx(4 / 7)
    assert found["by_type"]["X"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert found["by_type"]["Y"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
    assert found["by_type"]["Z"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert found["token_accuracy"] == 4 / 6 and found["words"] == 6 and found["missing"] == 0 and found["scheme"] == "BIO"


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1, max_size=6), min_size=1, max_size=4)
)
def test_scores_count_entities_with_the_same_type_and_ends(pairs):
    gold, said = ([[pair[side] for pair in row] for row in pairs] for side in (0, 1))
    found = entities.score(gold, said)
    if found["scheme"] is None:
        return
    truth, claimed = ({(row, *span) for row, tags in enumerate(rows) for span in conlleval(tags)} for rows in (gold, said))

    def figures(truth, claimed):
        shares = [(1, len(claimed)), (1, len(truth)), (2, len(truth) + len(claimed))]
        shares = [factor * len(truth & claimed) / whole if whole else 0.0 for factor, whole in shares]
        return pytest.approx(dict(zip(("precision", "recall", "f1", "support"), [*shares, len(truth)])))

    assert {name: found[name] for name in ("precision", "recall", "f1", "support")} == figures(truth, claimed)
    assert found["by_type"].keys() == {kind for _, kind, _, _ in truth | claimed}
    for kind, by_type in found["by_type"].items():
        assert by_type == figures(*({span for span in spans if span[1] == kind} for spans in (truth, claimed)))


@settings(max_examples=25)
@given(st.lists(st.lists(st.sampled_from(TAGS), min_size=1, max_size=6), min_size=1, max_size=4))
def test_gold_against_itself_is_perfect(gold):
    found = entities.score(gold, gold)
    assert found["token_accuracy"] == 1.0
    assert found["f1"] in (None, 1.0) or not any(map(entities.spans, gold))


def test_what_is_missing_is_wrong():
    found = entities.score([["B-X", "O", "B-Y"], ["O", "O"]], [["B-X"], []])
    assert found["recall"] == 0.5 and found["precision"] == 1.0
    assert found["token_accuracy"] == 1 / 5  # a missing O is no right tag
    assert found["missing"] == 4


def test_an_entity_ends_with_its_row():
    found = entities.score([["B-X"], ["I-X"]], [["B-X"], ["I-X"]])
    assert found["support"] == 2


def test_entities_that_are_only_predicted_are_wrong():
    found = entities.score([["O"]], [["B-X"]])
    assert found["scheme"] == "BIO" and found["f1"] == 0.0
    assert found["by_type"] == {"X": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}}


def test_plain_tags_have_token_accuracy_alone():
    found = entities.score([["NN", "VB"]], [["NN", "NN"]])
    assert found["token_accuracy"] == 0.5
    assert found["f1"] is found["precision"] is found["recall"] is found["by_type"] is found["scheme"] is None


def test_no_words_are_no_accident():
    assert entities.score([], [])["token_accuracy"] == 0.0


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="1 rows of tags, but 2"):
        entities.score([["O"]], [["O"], ["O"]])
    with pytest.raises(ValueError, match="row 1 has 1 words, but 2"):
        entities.score([["O"], ["O"]], [["O"], ["O", "O"]])


def test_a_tagging_scheme_that_the_rows_do_not_show_is_reported():
    found = entities.score([["O", "O"]], [["O", "O"]], "BIO")
    assert (found["f1"], found["support"], found["by_type"], found["token_accuracy"]) == (0.0, 0, {}, 1.0)
    assert entities.score([["O"]], [["O"]])["f1"] is None


@settings(deadline=None)
@given(rows)
def test_iob1_in_iob2_has_the_same_entities(tags):
    converted = entities.to_iob2(tags)
    assert entities.spans(converted) == entities.spans(tags)
    if entities.scheme_of(tags) in ("BIO", "IO"):
        assert not entities.problems(converted)
        assert entities.to_iob2(converted) == converted


def test_iob1_is_recognised_by_where_b_occurs():
    assert entities.is_iob1([["I-X", "O", "I-Y"], ["I-X", "B-X"]]) and entities.is_iob1([["I", "B", "O"]])
    for rows in ([["I-X", "O"]], [["I-X", "B-Y"]], [["B-X", "O"], ["I-X"]], [["B-X", "I-X", "B-X"]], []):
        assert not entities.is_iob1(rows)
