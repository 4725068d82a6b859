"""From recipe to examples: policies, counts, the cache."""

from __future__ import annotations

import gc
import json
import multiprocessing
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import CHATML, tiny_tokenizer
from tunesmith.cli.main import main
from tunesmith.data.data_config import DataConfig
from tunesmith.data.encode import conversations
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Chat, PromptCompletion, Text
from tunesmith.data.store import cache
from tunesmith.data.store.encoded_rows import blocks
from tunesmith.data.store.prepare import prepare
from tunesmith.errors import DataError, DiskFullError, UserError
from tunesmith.objectives import Config, Objective, Traits


class Options(Config):
    train_on: str
    overlong: str


class Language(Objective):
    """The part of an objective that preparation uses."""

    traits = Traits(rows=())

    def __init__(self, overlong="error", train_on="completion", rows=(Chat, PromptCompletion, Text)):
        super().__init__(Options(train_on=train_on, overlong=overlong))
        self.traits = Traits(rows=rows, overlong=overlong)

    def encode(self, rows, tokenizer):
        return conversations.encode(rows, tokenizer, train_on=self.config.train_on)


@pytest.fixture
def alpaca(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Question {n}?", "output": f"Answer {n}." + " More." * (n % 7)} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(path, objective=None, *, tokenizer=None, max_length=None, window=512, seed=0, **data):
    config = DataConfig.model_validate({"train": [{"path": str(path)}], **data})
    return prepare(
        config, objective or Language(), tokenizer or tiny_tokenizer("chatml"), max_length=max_length, window=window, seed=seed
    )


def test_examples_are_the_encoded_rows(alpaca):
    tokenizer = tiny_tokenizer("chatml")
    prepared = run(alpaca, eval={"fraction": 0})
    assert prepared.eval is None and len(prepared.train) == 40
    for index in (0, 39):
        turns = (
            {"role": "user", "content": f"Question {index}?"},
            {"role": "assistant", "content": f"Answer {index}." + " More." * (index % 7)},
        )
        ((expected,),) = conversations.encode([Chat(turns)], tokenizer)
        got = prepared.train[index]
        assert got.pop("row").tolist() == [0, index + 1]
        assert got.keys() == expected.keys() and all((got[name] == expected[name]).all() for name in got)
        assert prepared.train.lengths[index] == len(got["input_ids"])
        assert prepared.train.supervised[index] == got["supervised"][1:].sum()
        assert prepared.train.where(index) == f"{alpaca}:{index + 1}"
        assert not got["input_ids"].flags.owndata and not got["input_ids"].flags.writeable
    assert prepared.max_length == prepared.train.lengths.max()


def test_the_report_counts_every_row_and_is_json(alpaca):
    report = run(alpaca).report
    plain = json.loads(json.dumps(report.as_dict()))
    (source,) = plain["sources"]
    assert source["rows_read"] == source["rows_kept"] + source["rows_rejected"] == 40
    assert plain["train"]["rows"] + plain["eval"]["rows"] == 40
    assert sum(plain["train"]["histogram"]["counts"]) == plain["train"]["examples"]
    assert plain["template"] == "the model's own chat template" and report.lines()


def test_the_held_out_share_is_a_function_of_seed_and_prompt(alpaca):
    def held(**options):
        prepared = run(alpaca, **options)
        places = [prepared.eval.where(index) for index in range(len(prepared.eval))]
        assert not set(places) & {prepared.train.where(index) for index in range(len(prepared.train))}
        return places

    some = held(eval={"fraction": 0.25})
    assert some == held(eval={"fraction": 0.25}) != held(eval={"fraction": 0.25}, seed=1)
    assert set(held(eval={"fraction": 0.1})) <= set(some)
    with alpaca.open("a") as handle:
        handle.write(json.dumps({"instruction": "one more", "output": "row"}) + "\n")
    assert len(set(some) - set(held(eval={"fraction": 0.25}))) <= 1


@pytest.mark.parametrize(("rows", "held"), [(1, 0), (2, 1), (3, 1)])
def test_at_least_one_row_is_held_out_of_two(tmp_path, rows, held):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"document {n}\n" for n in range(rows)))
    prepared = run(path, eval={"fraction": 0.001})
    assert len(prepared.train) == rows - held and (len(prepared.eval) if prepared.eval else 0) == held


def test_rows_of_an_evaluation_file_that_equal_training_rows_are_counted(alpaca, tmp_path):
    held = tmp_path / "held.csv"
    held.write_text("question,answer\nQuestion 0?,Answer 0.\nWhat else?,This.\n")
    prepared = run(alpaca, eval={"path": str(held)})
    assert len(prepared.train) == 40 and len(prepared.eval) == 2
    assert prepared.report.duplicates_train_eval == 1


def test_sources_keep_their_weights_and_limits(alpaca, tmp_path):
    other = tmp_path / "b.jsonl"
    other.write_bytes(alpaca.read_bytes())
    sources = [{"path": str(alpaca), "weight": 2}, {"path": str(other), "limit": 5, "weight": 0.5}]
    prepared = run(alpaca, train=sources, eval={"fraction": 0})
    assert np.bincount(prepared.train.source).tolist() == [40, 5] and prepared.train.weights.tolist() == [2, 0.5]
    assert prepared.report.train.duplicates == 5


def test_rows_that_are_too_long_are_listed_with_their_share(alpaca):
    with pytest.raises(
        DataError, match=r"(?s)rows are longer than max_length 30; they hold \d+\.\d% .*rows\.jsonl:\d+: \d+ tokens.*max_length="
    ):
        run(alpaca, max_length=30)


def test_rows_above_the_window_are_refused_unless_a_policy_cuts_them(alpaca):
    assert run(alpaca, window=None).max_length == run(alpaca, window=100_000).max_length
    with pytest.raises(DataError, match="The model's window is 20"):
        run(alpaca, window=20)
    with pytest.raises(DataError, match="above the model's window"):
        run(alpaca, window=20, max_length=21)


@pytest.mark.parametrize("policy", ["drop", "truncate", "split"])
def test_policies_fit_and_are_counted(alpaca, policy):
    whole = run(alpaca, eval={"fraction": 0}).train
    longest = int(np.median(whole.lengths))
    prepared = run(alpaca, Language(overlong=policy), max_length=longest, eval={"fraction": 0})
    over = prepared.report.train.overlong
    assert prepared.train.lengths.max() <= longest and over["rows"] == int((whole.lengths > longest).sum())
    assert (over["tokens_lost"] == 0) == (policy == "split") and (over["share_lost"] > 0) == (policy != "split")
    assert all(prepared.train[i]["input_ids"].shape == prepared.train[i]["supervised"].shape for i in range(len(prepared.train)))


@settings(max_examples=100)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(2, 20))
def test_blocks_lose_and_double_nothing(lengths, max_length):
    which, start, length = blocks(np.array(lengths), max_length)
    assert length.max() <= max_length
    for index, total in enumerate(lengths):
        mine = which == index
        targets = [position for a, n in zip(start[mine], length[mine]) for position in range(a + 1, a + n)]
        assert targets == list(range(1, total))


def test_documents_become_blocks_that_hold_every_token_once(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. \n" * 3 + "short\n")
    tokenizer = tiny_tokenizer()
    prepared = run(path, Language(overlong="split", rows=(Text,)), tokenizer=tokenizer, max_length=7, eval={"fraction": 0})
    text = []
    for index in range(len(prepared.train)):
        ids = prepared.train[index]["input_ids"].tolist()
        first = index == 0 or prepared.train.where(index) != prepared.train.where(index - 1)
        text += ids if first else ids[1:]
    documents = [line for line in path.read_text().split("\n") if line]
    assert text == [token for line in documents for token in [*tokenizer(line)["input_ids"], tokenizer.eos_token_id]]
    assert prepared.report.train.supervised_tokens == len(text) - len(documents)


def test_rows_without_supervised_tokens_are_dropped_and_counted(alpaca, tmp_path):
    path = tmp_path / "mixed.jsonl"
    rows = [{"prompt": "long " * (30 if n == 3 else 1), "completion": "yes"} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = run(path, Language(overlong="truncate"), max_length=40, eval={"fraction": 0})
    assert prepared.report.train.unlearnable == 1 and prepared.report.train.unlearnable_first == (f"{path}:4",)
    assert len(prepared.train) == 19 and (prepared.train.supervised > 0).all()
    with pytest.raises(DataError, match="have nothing to learn"):
        run(path, Language(overlong="truncate"), max_length=40, eval={"fraction": 0}, max_unlearnable=0.01)
    with pytest.raises(DataError, match="20 of 20 training examples have nothing to learn"):
        run(path, Language(overlong="truncate"), max_length=2, eval={"fraction": 0}, max_unlearnable=1.0)


def test_bad_rows_stop_or_are_skipped_and_listed(alpaca):
    with alpaca.open("a") as handle:
        handle.write('{"instruction": "x"}\n{"instruction": 3, "output": "y"}\n')
    with pytest.raises(DataError, match=r"(?s)2 bad rows:.*:41:output.*:42:instruction.*tunesmith data lint"):
        run(alpaca)
    report = run(alpaca, bad_rows="skip").report.sources[0]
    assert (report.rows_read, report.rows_kept, report.rows_rejected) == (42, 40, 2) and len(report.problems) == 2


def test_lint_is_advised_only_where_it_lists_the_rows(tmp_path):
    """A row that the objective refuses is a good row to lint, and the advice has the flags of the source."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "x", "a": "y"}\n{"q": "x", "a": ""}\n{"q": "x", "a": "z"}\n')
    with pytest.raises(DataError) as error:
        run(path, train=[{"path": str(path), "columns": {"question": "q", "answer": "a"}}])
    command = f"tunesmith data lint {path} --column question=q --column answer=a"
    assert f"Type `{command}` for all of them." in str(error.value)
    assert main(command.split()[1:]) == 2
    path.write_text("".join(json.dumps({"prompt": "x", "completion": f"y{n}"}) + "\n" for n in range(4)))

    class Refusing(Language):
        def encode(self, rows, tokenizer):
            raise RowFault(0, "a shorter answer", "a long one", "Shorten it.", "completion")

    with pytest.raises(DataError) as error:
        run(path, Refusing())
    assert "4 bad rows" in str(error.value) and "data lint" not in str(error.value) and "data.bad_rows=skip" in str(error.value)


def test_a_file_that_cannot_be_read_to_its_end_is_never_skipped_over(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "one"}, {"text": "two"}, {"text": ')
    with pytest.raises(DataError, match="nothing is skipped"):
        run(path, bad_rows="skip")


def test_a_row_that_the_template_refuses_is_a_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "q", "output": "a", "system": "s"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refuses = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = "{% for m in messages %}" + refuses + "{{ m.content + eos_token }}{% endfor %}"
    with pytest.raises(DataError, match=r"1 bad row:\n.*:2:row.*no system"):
        run(path, tokenizer=tiny_tokenizer(template))


def test_words_that_the_template_drops_are_reported(alpaca):
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    (source,) = run(alpaca, tokenizer=tiny_tokenizer(template)).report.sources
    assert source.left_out["rows"] == 40 and "messages[0].content" in source.left_out["first"][0]


# --- the cache ---------------------------------------------------------------------------------------------------------


def entries():
    return sorted(path for path in cache.store().iterdir() if not path.name.startswith("."))


def test_the_second_start_finds_the_same_bytes(alpaca):
    first, second = run(alpaca), run(alpaca)
    assert not first.report.cached and second.report.cached
    assert all((first.train[i]["input_ids"] == second.train[i]["input_ids"]).all() for i in range(len(first.train)))


def test_length_and_share_do_not_change_the_key(alpaca):
    run(alpaca)
    assert run(alpaca, Language(overlong="drop"), max_length=40, seed=5, eval={"fraction": 0.5}).report.cached


def changed_byte(path):
    path.write_text(path.read_text().replace("Question 7?", "Question 7!"))


def with_template(template):
    """The tokenizer of the other runs but for the template: the same vocabulary, the same special tokens."""
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = template
    return tokenizer


CHANGES = {
    "a byte": (changed_byte, {}),
    "the template": (lambda path: None, {"tokenizer": with_template("{{ messages[0].content }}" + CHATML)}),
    "an option": (lambda path: None, {"objective": Language(train_on="all")}),
    "the limit": (lambda path: None, {"train": [{"path": "", "limit": 39}]}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_misses(alpaca, change):
    run(alpaca)
    edit, options = CHANGES[change]
    edit(alpaca)
    if "train" in options:
        options = {"train": [{**options["train"][0], "path": str(alpaca)}]}
    assert not run(alpaca, **options).report.cached


def test_a_changed_special_token_misses(alpaca):
    run(alpaca)
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert not run(alpaca, tokenizer=tokenizer).report.cached


def test_changed_code_misses(alpaca, monkeypatch, tmp_path):
    from tunesmith.data.store import encode_source

    run(alpaca)
    other = tmp_path / "other.py"
    other.write_text("# another version\n")
    code = encode_source.code_files
    monkeypatch.setattr(encode_source, "code_files", lambda objective: [*code(objective), other])
    assert not run(alpaca).report.cached


@pytest.mark.parametrize("name", ["input_ids.values", "supervised.values", "input_ids.starts", "row", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_cache_is_noticed_and_rebuilt(alpaca, name, damage):
    train = run(alpaca).train
    good = [train[i]["input_ids"].copy() for i in range(len(train))]  # what is mapped changes with the file
    (folder,) = entries()
    file = folder / name
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 0x55
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[:middle])
    again = run(alpaca)
    assert not again.report.cached
    assert all((good[i] == again.train[i]["input_ids"]).all() for i in range(len(good)))
    assert run(alpaca).report.cached and len(entries()) == 1


def test_without_a_cache_nothing_stays(alpaca):
    prepared = run(alpaca, cache=False)
    assert not prepared.report.cached and not cache.store().exists()
    assert prepared.train[0]["input_ids"].size


def test_a_scratch_folder_is_removed_with_its_object_without_a_message():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scratch = cache.Scratch("tunesmith-test-")
        folder = Path(scratch.name)
        (folder / "file").write_text("x")
        del scratch
        gc.collect()
    assert not folder.exists()


def _prepare_and_report(path, queue):
    prepared = run(path)
    queue.put(int(prepared.train.lengths.sum()))


def test_two_processes_may_race(alpaca):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_prepare_and_report, args=(alpaca, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    sums = {queue.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(sums) == 1 and len(entries()) == 1 and run(alpaca).report.cached


def test_the_loser_of_a_race_keeps_the_winner_s_work(tmp_path):
    example = {"input_ids": np.arange(3, dtype=np.int32)}
    writers = [cache.begin(tmp_path / "entry") for _ in range(2)]
    for number, writer in enumerate(writers):
        writer.add([example], 1, number)
        cache.finish(writer, tmp_path / "entry", {"number": number})
    assert cache.load(tmp_path / "entry").info == {"number": 0} and [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_examples_may_hold_any_arrays(tmp_path):
    """Later objectives keep several arrays of different lengths in a row."""
    examples = [
        {
            "chosen_ids": np.arange(n, dtype=np.int32),
            "rejected_ids": np.arange(2 * n, dtype=np.int32),
            "label": np.array([n], np.int64),
        }
        for n in (1, 0, 5)
    ]
    writer = cache.begin(tmp_path / "entry")
    for row, example in enumerate(examples, 1):
        writer.add([example], row, row)
    cache.finish(writer, tmp_path / "entry", {})
    entry = cache.load(tmp_path / "entry")
    assert entry.length.tolist() == [2, 1, 10] and entry.targets.tolist() == [1, 1, 1]
    for index, example in enumerate(examples):
        got = entry.example(index, 0, int(entry.length[index]))
        assert all((got[name] == example[name]).all() and got[name].dtype == example[name].dtype for name in example)


def test_a_store_that_cannot_be_written_is_reported(alpaca, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="Set TUNESMITH_HOME"):
        run(alpaca)


def test_a_full_disk_is_reported_and_leaves_nothing(alpaca, monkeypatch):
    def full(self, file, number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.Writer, "_write_number", full)
    with pytest.raises(DiskFullError, match="no room for processed data"):
        run(alpaca)
    assert list(cache.store().iterdir()) == []


def test_progress_counts_the_rows_read(alpaca):
    seen = []
    config = DataConfig.model_validate({"train": [{"path": str(alpaca)}]})
    prepare(
        config,
        Language(),
        tiny_tokenizer("chatml"),
        max_length=None,
        window=None,
        seed=0,
        on_progress=lambda *args: seen.append(args),
    )
    assert seen[-1] == (str(alpaca), 40)


def test_an_objective_that_takes_other_rows_is_named(alpaca):
    objective = Language(overlong="split", rows=(Text,))
    with pytest.raises(DataError, match="learns from Text rows"):
        run(alpaca, objective)


def test_the_korean_csv_needs_no_configuration(shared):
    prepared = run(shared / "data/ko_chatbot.csv", train=[{"path": str(shared / "data/ko_chatbot.csv"), "limit": 300}])
    assert prepared.report.sources[0].format.startswith("question_answer (question <- Q, answer <- A)")
    assert prepared.report.sources[0].rows_kept == 300


def test_the_wiki_text_needs_no_configuration(shared):
    objective = Language(overlong="split", rows=(Text,))
    prepared = run(shared / "data/wiki_demo.txt", objective, train=[{"path": str(shared / "data/wiki_demo.txt"), "limit": 4}])
    assert prepared.report.sources[0].rows_kept == 4 and prepared.max_length == 512
    assert prepared.report.train.overlong["tokens_lost"] == 0


def test_dropped_rows_are_not_counted_as_training_rows(tmp_path):
    rows = [{"text": "short"}, {"text": "much longer " * 20}, {"text": "brief"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = Language(overlong="drop", train_on="all", rows=(Text,))
    train = run(tmp_path / "a.jsonl", objective, max_length=8, eval={"fraction": 0}).report.train
    assert (train.rows, train.examples, train.overlong["rows"]) == (2, 2, 1) and "2 examples of 2 rows" in train.line()


def test_line_ends_are_reported_of_training_and_held_out_files(tmp_path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text('dialogue,summary\r\n"one\r\ntwo",three\r\nfour,five\r\n', newline="")
    report = run(tmp_path / "a.csv", eval={"path": str(tmp_path / "b.csv")}).report
    assert [source.carriage_returns for source in report.sources] == [1, 1]
    assert sum(r"\r\n is read as \n in 1 rows" in line for line in report.lines()) == 2
