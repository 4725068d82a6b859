"""Near-duplicates: every planted pair is found, and no dissimilar pair."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_minhash import change, exact, real_texts
from tunesmith.cli.main import main
from tunesmith.data.check import near_duplicates as near
from tunesmith.data.check.near_duplicates import kept_rows, near_duplicates
from tunesmith.data.data_config import Source
from tunesmith.errors import DataError


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Source(path=str(path))


def find(tmp_path, texts, held=None, threshold=0.8):
    train = [write(tmp_path / "train.jsonl", texts)]
    return near_duplicates(train, [write(tmp_path / "held.jsonl", held)] if held else [], threshold)


def numbers(cluster):
    return [int(where.rpartition(":")[2]) for where in cluster.rows]


def made_up(count, seed=0, size=40):
    rng = np.random.default_rng(seed)
    return [" ".join("".join(map(chr, rng.integers(97, 123, 6))) for _ in range(size)) for _ in range(count)]


def planted(texts, lowest, highest):
    """Each text again with words changed, one at a time, until it is as alike as asked."""
    rng = np.random.default_rng(7)
    for text in texts:
        other = text
        while exact(text, other) > highest:
            parts = other.split()
            parts[int(rng.integers(len(parts)))] = f"x{rng.integers(10**4)}"
            other = " ".join(parts)
        assert exact(text, other) >= lowest
        yield other


def test_planted_rows_are_all_found_and_random_rows_are_not(tmp_path):
    texts = made_up(100)
    report = find(tmp_path, [*texts, *planted(texts[:70], 0.8, 0.86)])
    assert sorted(map(numbers, report.clusters)) == [[row, row + 100] for row in range(1, 71)]
    assert (report.rows, report.near, report.same, len(report.surplus)) == (170, 140, 0, 70)
    assert 0.999 <= report.recall < 1


def test_rows_just_below_the_threshold_are_not_reported(tmp_path):
    texts = made_up(50)
    near_misses = [*planted(texts, 0.7, 0.79)]
    assert find(tmp_path, [*texts, *near_misses]).near == 0
    assert find(tmp_path, [*texts, *near_misses], threshold=0.7).near == 100


@pytest.fixture(scope="module")
def real_pairs():
    """Real texts, some of them again with words changed, and the similarity of every two."""
    rng = np.random.default_rng(3)
    texts = [*real_texts(50)]
    texts += [change(text, rng, rng.uniform(0, 0.2)) for text in texts[:40]]
    return texts, [(one, other, exact(texts[one], texts[other])) for one in range(len(texts)) for other in range(one)]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_real_rows_are_clustered_as_comparing_all_of_them_does(threshold, tmp_path, real_pairs):
    texts, pairs = real_pairs
    joined = list(range(len(texts)))
    for one, other, similarity in pairs:
        if similarity >= threshold:
            old, new = joined[one], joined[other]
            joined = [new if name == old else name for name in joined]
    expected = [[row + 1 for row, name in enumerate(joined) if name == wanted] for wanted in sorted(set(joined))]
    report = find(tmp_path, texts, threshold=threshold)
    assert sorted(map(numbers, report.clusters)) == sorted(rows for rows in expected if len(rows) > 1)
    assert [len(cluster.rows) for cluster in report.clusters] == sorted((len(c.rows) for c in report.clusters), reverse=True)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=15),
    st.lists(st.integers(0, 11), min_size=12, max_size=12),
)
def test_clusters_are_what_pairs_and_equal_words_join(pairs, same):
    leader = np.array([same.index(name) for name in same])
    pairs = sorted({(min(a, b), max(a, b)) for a, b in leader[np.array(pairs, int).reshape(-1, 2)].tolist() if a != b})
    joined = leader.tolist()
    for one, other in pairs:
        joined = [joined[one] if name == joined[other] else name for name in joined]
    expected = [[row for row, name in enumerate(joined) if name == wanted] for wanted in set(joined)]
    neighbours = {}
    for one, other in pairs:
        neighbours.setdefault(one, {})[other] = neighbours.setdefault(other, {})[one] = (1.0, 1.0)
    found = near._clusters(leader, neighbours)
    assert sorted(map(np.ndarray.tolist, found)) == sorted(rows for rows in expected if len(rows) > 1)


def test_what_is_shown_was_compared_exactly(tmp_path):
    text = made_up(1)[0]
    (cluster,) = find(tmp_path, [text, "something else", text.replace(text.split()[20], "changed")]).clusters
    (like,) = cluster.like
    assert (like.where, like.like) == (f"{tmp_path}/train.jsonl:3", f"{tmp_path}/train.jsonl:1")
    assert like.jaccard == exact(text, text.replace(text.split()[20], "changed")) and abs(like.estimate - like.jaccard) < 0.15
    assert "changed" in like.here and text.split()[20] in like.there


def test_capitals_and_spaces_are_no_difference(tmp_path):
    report = find(tmp_path, ["Hello  World", "hello world", "Hello\tworld ", "Hi"])
    ((first, second),) = [cluster.like for cluster in report.clusters]
    assert (report.near, report.same) == (3, 2) and first.jaccard == second.jaccard == 1 and first.here == first.there == ""


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("하루가 또 가네요. 오늘은 정말 긴 하루였고 마음이 조금 무거웠어요.", "하루가 또 가네요! 오늘은 정말 긴 하루였고 마음이 조금 무거웠어요.", True),
        ("하루가 또 가네요. 오늘은 정말 긴 하루였어요.", "위로해 드립니다. 내일은 좋은 일이 있을 거예요.", False),
        ("def add(a, b):\n    return a + b  # the sum of two numbers", "def add(a, b):\n\treturn a + b  # the sum of 2 numbers", False),
        ("def add(a, b):\n    return a + b  # the sum of two numbers", "def add(a, b):\n\treturn a + b  # the sum of two numbers.", True),
        ("yes", "no", False),
        ("ok", "ok!", False),
        ("네", "네", True),
        ("물이 좋아요", "불이 좋아요", False),
        ("물이 좋아요", unicodedata.normalize("NFD", "물이 좋아요"), True),
    ],
)  # fmt: skip
def test_korean_code_and_short_rows(one, other, alike, tmp_path):
    assert find(tmp_path, [one, other]).near == (2 if alike else 0)


def test_a_system_prompt_in_all_rows_does_not_make_them_alike(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"instruction": text, "output": text[::-1], "system": "You are a kind and careful assistant. " * 50}
        for text in made_up(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert near_duplicates([Source(path=str(path))]).near == 0


def test_evaluation_rows_near_training_rows_are_counted(tmp_path):
    texts = made_up(30)
    alike = [*planted(texts[:4], 0.8, 0.95)]
    report = find(tmp_path, texts, [*alike, texts[9], *made_up(5, seed=9)])
    assert report.eval_near == 5 and (report.rows, report.learnt) == (40, 30)
    assert report.surplus == {0, 1, 2, 3, 9}


def test_evaluation_rows_near_each_other_are_not_near_training(tmp_path):
    one = made_up(1, seed=4)[0]
    report = find(tmp_path, made_up(3), [one, *planted([one], 0.8, 0.95)])
    assert report.near == 2 and report.eval_near == 0 and report.surplus == frozenset()


def test_what_is_kept_resembles_nothing_kept_and_what_goes_resembles_it(tmp_path):
    chain = made_up(1)  # each like the next one, the ends not alike
    for _ in range(12):
        chain += planted([chain[-1]], 0.8, 0.87)
    assert exact(chain[0], chain[-1]) < 0.5
    report = find(tmp_path, chain)
    kept = [row["text"] for row in kept_rows([Source(path=str(tmp_path / "train.jsonl"))], report)]
    assert 1 < len(kept) < len(chain) and kept[0] == chain[0]
    assert not [1 for one in kept for other in kept if one != other and exact(one, other) >= 0.8]
    assert all(any(exact(text, other) >= 0.8 for other in kept) for text in chain)


@pytest.mark.parametrize("threshold", [0.0, 0.49, 1.01, float("nan")])
def test_a_threshold_that_means_nothing_is_refused(threshold, tmp_path):
    with pytest.raises(DataError, match=r"0\.5 to 1"):
        find(tmp_path, ["a"], threshold=threshold)


def test_the_verb_reports_and_writes(tmp_path, capsys):
    texts = made_up(6)
    train = write(tmp_path / "train.jsonl", [*texts, *planted(texts[:2], 0.8, 0.9)]).path
    held = write(tmp_path / "held.jsonl", planted(texts[5:], 0.8, 0.9)).path
    with open(train, "a") as file:
        file.write('{"text": 3}\n')
    clean = str(tmp_path / "clean.jsonl")
    line = ["data", "lint", train, "--eval", held, "--near-duplicates", "--write", clean]
    assert main([*line, "--json"]) == 2  # for the bad row
    said = json.loads(capsys.readouterr().out)
    assert (said["near_duplicates"]["near"], said["near_duplicates"]["eval_near"], said["near_duplicates"]["surplus"]) == (
        6,
        1,
        3,
    )
    assert {name: said["written"][name] for name in ("rows", "surplus", "rejected")} == {"rows": 5, "surplus": 3, "rejected": 1}
    assert [json.loads(row)["text"] for row in Path(clean).read_text().splitlines()] == texts[:5]
    assert main(line) == 2 and "clean.jsonl exists" in capsys.readouterr().err
    assert main(["data", "lint", clean, "--eval", held, "--near-duplicates"]) == 0
    assert "0 of 1 evaluation rows resemble a training row" in capsys.readouterr().out


def test_near_duplicates_are_a_remark_with_what_differs(tmp_path, capsys):
    text = made_up(1)[0]
    train = write(tmp_path / "train.jsonl", [text, text + " changed"]).path
    assert main(["data", "lint", train, "--near-duplicates", "--threshold", "0.9"]) == 0
    out = capsys.readouterr().out
    assert (
        "2 of 2 rows have a similarity of 0.9 or more with another row, in 1 clusters" in out
        and f"{train}:2: similarity 0.9" in out
        and "changed" in out
    )


@pytest.mark.parametrize("option", [["--threshold", "0.9"], ["--write", "x.jsonl"]])
def test_options_without_the_flag_are_refused(option, tmp_path, capsys):
    assert main(["data", "lint", write(tmp_path / "a.jsonl", ["text"]).path, *option]) == 2
    assert "--near-duplicates" in capsys.readouterr().err
