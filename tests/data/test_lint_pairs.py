"""The findings of lint in files of preferences and rankings."""

from __future__ import annotations

import json

import pytest

from tests.data.zoo import ZOO
from tests.tiny import save_tiny
from tunesmith.cli.main import main
from tunesmith.data.check.lint import lint
from tunesmith.data.check.lint_pairs import FIRST
from tunesmith.data.data_config import Source


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def file(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


def said(*paths, evaluation=()):
    report = lint([Source(path=path) for path in paths], [Source(path=path) for path in evaluation])
    json.dumps(report.as_dict())
    return [item.as_dict() for item in report.pairs]


ROWS = [
    pair("q", "yes", "no, not at all"),
    pair("q", "no, not at all", "yes"),
    pair("q", "yes", "no, not at all"),
    pair("other", "yes", "no, not at all"),
    pair("q", "same", "same "),
    pair("q", "a", ""),
    {"prompt": "q", "chosen": "a", "rejected": None},
    pair("q", "yes", "never", chosen_score=1, rejected_score=2),
]


def test_each_kind_is_counted_and_named(tmp_path):
    path = file(tmp_path, ROWS)
    (found,) = said(path)
    counted = {name: found[name] for name in ("rows", "pairs", "equal", "empty", "prompts_differ")}
    assert counted == {"rows": 5, "pairs": 5, "equal": 1, "empty": 2, "prompts_differ": 0}
    assert found["first"] == {
        "equal": [f"{path}:5"],
        "empty": [f"{path}:6", f"{path}:7"],
        "duplicates": [f"{path}:3 and {path}:1"],
        "contradictions": [f"{path}:2 and {path}:1", f"{path}:3 and {path}:2"],
        "against_scores": [f"{path}:8"],
    }


def test_sides_that_differ_in_their_prompt_are_counted(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    other = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}]
    path = file(tmp_path, [{"chosen": turns, "rejected": other}, {"chosen": turns, "rejected": [turns[0], other[1]]}])
    (found,) = said(path)
    assert found["prompts_differ"] == 1 and found["rows"] == 1 and found["first"] == {"prompts_differ": [f"{path}:1"]}


def test_how_often_the_longer_one_is_chosen(tmp_path):
    rows = [pair("q", "long one", "b"), pair("q", "a", "b"), pair("q", "c", "long one"), pair("q", "longer", "d")]
    (found,) = said(file(tmp_path, rows))
    assert found["longer_chosen"] == pytest.approx(2 / 3) and found["as_long"] == 1
    assert found["characters_chosen"] == 16 / 4 and found["characters_rejected"] == 11 / 4


def test_every_pair_of_a_ranking_counts(tmp_path):
    (found,) = said(file(tmp_path, [{"prompt": "q", "answers": ["aaa", "bb", "c", "d"], "scores": [3, 2, 1, 1]}]))
    assert found["pairs"] == 5 and found["longer_chosen"] == 1 and found["characters_chosen"] == (3 * 3 + 2 * 2) / 5
    assert found["duplicates"] == found["contradictions"] == 0


def test_a_ranking_with_the_same_answer_twice_repeats_no_other_row(tmp_path):
    (found,) = said(file(tmp_path, [{"prompt": "q", "answers": ["a", "b", "a"], "scores": [2, 1, 2]}]))
    assert found["pairs"] == 2 and found["duplicates"] == 0


def test_a_ranking_contradicts_a_pair_of_another_file(tmp_path):
    ranking = file(tmp_path, [{"prompt": "q", "answers": ["a", "b", "c"]}], "ranking.jsonl")
    held = file(tmp_path, [pair("q", "c", "a"), pair("q", "b", "c")], "held.jsonl")
    _, found = said(ranking, evaluation=[held])
    assert found["first"] == {"contradictions": [f"{held}:1 and {ranking}:1"], "duplicates": [f"{held}:2 and {ranking}:1"]}


def test_spaces_and_the_order_of_keys_hide_nothing(tmp_path):
    turn, turned = {"role": "user", "content": "q"}, {"content": "q ", "role": "user"}
    rows = [pair([turn], "a", "b"), pair([turned], " b", "a\n"), pair([turned], "a ", "b"), pair([turn], "a", "c")]
    (found,) = said(file(tmp_path, rows))
    assert (found["duplicates"], found["contradictions"]) == (1, 2)


def test_only_the_first_are_named(tmp_path):
    (found,) = said(file(tmp_path, [pair("q", "a", "b")] * (FIRST + 5)))
    assert found["duplicates"] == FIRST + 4 and len(found["first"]["duplicates"]) == FIRST


def test_files_without_comparisons_are_not_mentioned(tmp_path):
    assert said(file(tmp_path, [{"instruction": "q", "output": "a"}, {"instruction": "q", "output": ""}])) == []


def test_the_command_lists_the_findings(tmp_path, capsys):
    path = file(tmp_path, ROWS)
    assert main(["data", "lint", path]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{path}:6:rejected") and "an answer with something in it" in line for line in lines)
    assert "  2 rows with an empty answer: row 6; row 7" in lines
    assert "  2 rows that prefer what an earlier row rejects: row 2 and row 1; row 3 and row 2" in lines
    assert main(["data", "lint", path, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["pairs"][0]["contradictions"] == 2


def test_remarks_on_pairs_keep_exit_code_0(tmp_path, capsys):
    assert main(["data", "lint", file(tmp_path, ROWS[:4])]) == 0
    assert "4 pairs in 4 rows; where lengths differ, the longer answer is the better one in 25.0%" in capsys.readouterr().out


def test_what_the_template_refuses_or_drops_is_named_once(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"}]
    path = file(tmp_path, [{"prompt": turns, "chosen": "a", "rejected": "b"}])
    (problem,) = lint([Source(path=path)], tokenizer=ZOO["gemma"].tokenizer()).problems
    assert problem.row == 1 and "System role not supported" in problem.got
    (place,) = lint([Source(path=path)], tokenizer=ZOO["llama2"].tokenizer()).left_out
    assert place.startswith(f"{path}:1:messages[0].content: 'Be brief.'")


def test_preview_shows_the_prompt_once_and_each_answer(tmp_path, capsys):
    model = save_tiny("llama", tmp_path / "model")
    row = {"prompt": [{"role": "user", "content": "Why?"}], "answers": ["Because.", "No.", "So."], "scores": [1, 4.5, 1]}
    path = file(tmp_path, [row])
    assert main(["data", "preview", path, "--model", str(model), "--json"]) == 0
    (source,) = json.loads(capsys.readouterr().out)["sources"]
    (shown,) = source["rows"]
    text = "".join(piece["text"] for piece in shown["pieces"])
    assert text.count("Why?") == 1 and "--- answer 2: rank 1, score 4.5\nNo." in text
    assert shown["known"].startswith("answer 2 > 1 = 3; ") and source["format"].startswith("ranking (prompt, answers, scores); ")
    supervised = [piece["text"] for piece in shown["pieces"] if piece["supervised"]]
    assert [text[:3] for text in supervised] == ["Bec", "No.", "So."]
