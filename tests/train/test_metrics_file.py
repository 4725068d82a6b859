import errno
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runs import EVAL, TRAIN
from tunesmith.errors import DataError, DiskFullError
from tunesmith.runs import metrics_file
from tunesmith.runs.metrics_file import TIMING_KEYS, Metrics, read

figure = st.floats() | st.integers() | st.text() | st.none() | st.booleans()
record = st.dictionaries(st.text(max_size=8), figure | st.lists(figure, max_size=3), max_size=5)


def same(left, right):
    """Equal, with nan equal to nan and 1 not equal to True."""
    return repr(left) == repr(right)


def test_append_then_read(tmp_path):
    metrics = Metrics(tmp_path / "run" / "metrics.jsonl")
    metrics.append(TRAIN)
    metrics.append(EVAL)
    assert read(metrics.path) == [TRAIN, EVAL]


def test_each_line_is_there_before_append_returns(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1, "note": "둘째 줄\n"})
    assert metrics.path.read_bytes() == '{"step": 1, "note": "둘째 줄\\n"}\n'.encode()


def test_what_is_not_finite_is_written_as_it_is_in_valid_json(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append({"loss": math.nan, "grad_norm": math.inf, "low": -math.inf, "rows": [1.0, math.nan], "inner": {"x": math.inf}})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(metrics.path.read_text(), parse_constant=refuse)
    assert line == {"loss": "nan", "grad_norm": "inf", "low": "-inf", "rows": [1.0, "nan"], "inner": {"x": "inf"}}
    back = read(metrics.path)[0]
    assert math.isnan(back["loss"])
    assert back["grad_norm"] == math.inf
    assert back["low"] == -math.inf
    assert math.isnan(back["rows"][1])
    assert back["inner"] == {"x": math.inf}


@given(st.lists(record, max_size=4))
def test_any_records_read_back(tmp_path_factory, records):
    metrics = Metrics(tmp_path_factory.mktemp("any") / "metrics.jsonl")
    for one in records:
        metrics.append(one)
    assert same(read(metrics.path), metrics_file._from_json(records))


@given(st.lists(record, max_size=4), st.data())
def test_any_prefix_of_a_valid_file_reads_as_its_whole_lines(tmp_path_factory, records, data):
    folder = tmp_path_factory.mktemp("cut")
    metrics = Metrics(folder / "metrics.jsonl")
    ends = [0]
    for one in records:
        metrics.append(one)
        ends.append(metrics.path.stat().st_size)
    content = metrics.path.read_bytes() if records else b""
    cut = data.draw(st.integers(0, len(content)))
    torn = folder / "torn.jsonl"
    torn.write_bytes(content[:cut])
    whole = sum(cut >= end - 1 for end in ends[1:])  # a line is whole when only its newline is missing
    expected = metrics_file._from_json(records[:whole])
    assert same(read(torn), expected)
    Metrics(torn).append({"step": 9})
    assert same(read(torn), [*expected, {"step": 9}])


def test_rewind_drops_what_is_past_the_step(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        metrics.append({"kind": "train", "step": step})
        metrics.append({"kind": "eval", "step": step})
    before = metrics.path.read_bytes().splitlines(keepends=True)
    metrics.rewind(3)
    assert metrics.path.read_bytes() == b"".join(before[:6])
    metrics.append({"kind": "train", "step": 4})
    assert [one["step"] for one in read(metrics.path)] == [1, 1, 2, 2, 3, 3, 4]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_rewind_keeps_a_line_without_step_with_the_line_before_it(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for one in ({"note": "a"}, {"step": 1}, {"note": "b"}, {"step": 2}, {"note": "c"}):
        metrics.append(one)
    metrics.rewind(1)
    assert read(metrics.path) == [{"note": "a"}, {"step": 1}, {"note": "b"}]


def test_rewind_past_the_end_and_to_the_start(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1})
    metrics.rewind(10)
    assert read(metrics.path) == [{"step": 1}]
    metrics.rewind(0)
    assert read(metrics.path) == []


def test_a_kill_within_rewind_leaves_the_old_file(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1})
    metrics.append({"step": 2})

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.rewind(1)
    assert read(metrics.path) == [{"step": 1}, {"step": 2}]


def test_no_file_reads_as_no_records(tmp_path):
    assert read(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("damage", [b"{oops}\n", b"[1]\n", b"\n", b"\xff\n", b'{"step": 1}{"step": 2}\n'])
def test_damage_before_the_last_line_is_named(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: expected one JSON object"):
        read(path)


def test_zeros_after_a_power_cut_are_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bytes(50))
    assert read(path) == [{"step": 1}]


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path / "metrics.jsonl")

    def full(self, mode):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DiskFullError, match="no room left to write"):
        metrics.append(TRAIN)


def test_sync_works_before_and_after_the_first_line(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.sync()
    metrics.append(TRAIN)
    metrics.sync()
    assert read(metrics.path) == [TRAIN]


def test_timing_keys_leave_what_must_repeat():
    assert {key for key in TRAIN if key not in TIMING_KEYS} == {
        *("kind", "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens")
    }
