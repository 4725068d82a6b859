"""Rows made from Python's own library: what they say is true, and the same call makes the same rows."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import io
import json
import re
import sys
import tokenize
from collections import Counter
from inspect import signature
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.cli import data as data_verbs
from tunesmith.cli import main as program
from tunesmith.data.read import library
from tunesmith.errors import UserError
from tunesmith.synth.python import classify, tag
from tunesmith.synth.python.draw import KINDS, Kind, strata, stream
from tunesmith.synth.python.questions import NO_ANSWER
from tunesmith.synth.python.wording import WORDING, Candidate, join_names

drawing = importlib.import_module("tunesmith.synth.python.draw")
ROWS = 200
LANGUAGES = ("en", "ko")
EVERY = [(kind, lang) for kind in KINDS for lang in LANGUAGES]
COLUMNS = {
    "docstrings": {"instruction": str, "response": str},
    "instructions": {"instruction": str, "input": str, "output": str},
    "preferences": {"instruction": str, "chosen": str, "rejected": str},
    "judged": {"prompt": str, "completion": str, "label": bool},
    "classify": {"text": str, "label": str},
    "multilabel": {"text": str, "labels": list},
    "tag": {"tokens": list, "ner_tags": list},
    "qa": {"context": str, "question": str, "answers": dict},
    "summaries": {"instruction": str, "input": str, "output": str},
    "translations": {"instruction": str, "input": str, "output": str},
}


def draw(kind, rows, seed=0, lang="en", split=None, no_answer=None, on_progress=lambda done, total: None):
    share = 0.2 if no_answer is None and kind == "qa" else no_answer or 0.0
    return drawing.draw(kind, rows, seed, lang, split, share, on_progress)


@functools.cache
def drawn(kind, lang="en", seed=0):
    """Rows of a kind; but for the kinds whose groups are rare in few modules, with fewer rows held ahead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "AHEAD", 600 if kind in ("classify", "tag") else 100)
        return draw(kind, ROWS, seed, lang)


def rows(kind, lang="en"):
    return [one.row for one in drawn(kind, lang)]


def groups(kind, lang="en"):
    return Counter(one.group for one in drawn(kind, lang))


read_module = functools.cache(library.read_module)


@pytest.fixture(autouse=True)
def each_module_is_parsed_once(monkeypatch):
    monkeypatch.setattr(drawing, "read_module", read_module)


@functools.cache
def library_texts():
    return {name: path.read_text(encoding="utf-8") for name, path in library.modules().items() if path}


@functools.cache
def words_of(name):
    return " ".join(library_texts()[name].split())


@functools.cache
def defined_names():
    """{"def" or "class": every name that the library defines so}."""
    found = {"def": set(), "class": set()}
    for source in library_texts().values():
        for kind, name in re.findall(r"^\s*(?:async )?(def|class)\s+(\w+)", source, re.M):
            found[kind].add(name)
    return found


def parsed(name, source):
    return library.Module(name, source, ast.parse(source))


@pytest.fixture
def few_ahead(monkeypatch):
    """Fewer rows are held while modules are read, so fewer modules are."""
    monkeypatch.setattr(drawing, "AHEAD", 60)


# What all kinds share


@pytest.mark.parametrize(("kind", "lang"), EVERY)
def test_rows_have_the_columns_of_their_kind_and_none_comes_twice(kind, lang):
    made = rows(kind, lang)
    assert len(made) == ROWS
    for row in made:
        assert {name: type(value) for name, value in row.items()} == COLUMNS[kind]
    assert len({json.dumps([*row.values()][:-1]) for row in made}) == ROWS  # the answer is the last column


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_call_makes_the_same_rows_and_another_seed_makes_others(kind, few_ahead):
    again, other = draw(kind, 40, 7), draw(kind, 40, 8)
    assert draw(kind, 40, 7) == again
    same = {json.dumps(one.row) for one in again} & {json.dumps(one.row) for one in other}
    assert len(same) < 20


@pytest.mark.parametrize("kind", ["instructions", "preferences", "judged", "qa"])
def test_few_rows_are_about_many_functions(kind):
    about = [one.about for one in drawn(kind)]
    assert len(set(about)) > 0.95 * len(about)


def test_only_as_many_modules_are_read_as_the_rows_need(few_ahead):
    read = []
    draw("instructions", ROWS, on_progress=lambda done, total: read.append((done, total)))
    assert [done for done, _ in read] == [*range(1, len(read) + 1)] and len(read) < read[0][1] / 3


def test_more_than_there_are_is_refused_and_the_number_that_is_named_can_be_had(small_library):
    with pytest.raises(UserError) as error:
        draw("qa", 100_000, no_answer=0.3)
    most = int(re.search(r"Type --rows (\d+)", str(error.value))[1])
    assert len(draw("qa", most, no_answer=0.3)) == most
    with pytest.raises(UserError):
        draw("qa", most + 1, no_answer=0.3)


@pytest.fixture
def small_library(monkeypatch):
    """A library of a few modules, so that all of it can be read."""
    few = ("textwrap", "shlex", "string", "json.decoder", "json.encoder", "queue", "heapq", "netrc")
    monkeypatch.setattr(drawing, "modules", lambda: dict.fromkeys(few))


def noted(read, name):
    read.append(name)
    return read_module(name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_to_test_on_come_from_other_modules_and_none_is_among_those_to_train_on(kind, monkeypatch):
    packages = ("json", "urllib", "concurrent", "logging", "html", "dbm")
    few = [name for name in library.modules() if name.partition(".")[0] in packages]
    monkeypatch.setattr(drawing, "modules", lambda: dict.fromkeys(few))
    used = {name for name in few if KINDS[kind].stratum(name)}
    found = {}
    for split in ("train", "test"):
        read = []
        monkeypatch.setattr(drawing, "read_module", functools.partial(noted, read))
        made = [json.dumps([*one.row.values()][:-1]) for one in stream(KINDS[kind], "en", 3, split)]
        found[split] = set(made)
        assert made and len(found[split]) == len(made)
        assert set(read) < used if split == "train" else set(read) == used
    assert not found["train"] & found["test"]


def test_a_topic_has_modules_for_training_and_for_testing():
    for split in drawing.SPLITS:
        half = strata(KINDS["classify"], split)
        assert len(half) == len(classify.TOPICS) and all(half)
        assert {classify.topic(names[0]) for names in half} == {key.partition("|")[0] for key in classify.TOPICS}


@pytest.mark.parametrize("kind", KINDS)
def test_four_modules_of_five_are_for_training_and_the_rest_are_held_out(kind):
    train, test, every = ({name for names in strata(KINDS[kind], split) for name in names} for split in ("train", "test", None))
    assert train | test == every and not train & test and 0.15 < len(test) / len(every) <= 0.2


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(drawing, "modules", lambda: {"builtins": None})


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(data=st.data())
def test_rows_are_drawn_evenly_whatever_the_groups_hold(data, no_library):
    sizes = data.draw(st.dictionaries(st.sampled_from("abcde"), st.integers(1, 40), min_size=1))
    everything = [
        Candidate(group, f"{group}{n}", {"n": f"{group}{n}", "answer": 0}) for group, size in sizes.items() for n in range(size)
    ]
    wanted = data.draw(st.integers(1, sum(sizes.values())))
    got = [one.group for one in stream(Kind(lambda module, lang, seed: iter(everything)), "en", 0, None)][:wanted]
    counts = {group: got.count(group) for group in sizes}
    fullest = max(counts.values())
    assert all(count >= fullest - 1 or count == sizes[group] for group, count in counts.items())


def test_an_excerpt_gives_each_node_its_own_characters():
    source = (
        'class A:\n    @mark\n    def été(self, naïve="é", *, b: int = 3) -> "x":\n        """Ä."""\n        return naïve, b\n'
    )
    item = parsed("m", source).definitions[-1]
    part, node = library.excerpt(item), item.node
    assert part.text.startswith("@mark\ndef été(self") and part.text.endswith("    return naïve, b")
    assert [part.source(one.node) for one in library.all_parameters(node)] == ["self", "naïve", "b: int"]
    assert [part.source(one.default) for one in library.all_parameters(node)[1:]] == ['"é"', "3"]


def test_a_string_left_of_its_function_is_not_cut():
    source = 'class A:\n    def f(self):\n        return """\nleft\n"""\n'
    assert library.excerpt(parsed("m", source).definitions[-1]) is None


# Instructions: each answer found again by other means


def names_in(text):
    return re.findall(r"`([^`]+)`", text)


def declared(code):
    """{parameter with its stars: text of its default, or None} of the first function in some code, from its tokens alone."""
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(code).readline) if token.type != tokenize.NL]
    start = next(place for place, token in enumerate(tokens) if token.string == "def") + 2
    depth, pieces, piece = 0, [], []
    for token in (token for token in tokens[start:] if token.type != tokenize.COMMENT):
        depth += (token.string in ("(", "[", "{")) - (token.string in (")", "]", "}"))
        if depth == 0 or (depth == 1 and token.string == ","):
            pieces.append(piece)
            piece = []
        elif depth > 1 or token.string != "(":
            piece.append(token)
        if depth == 0:
            break
    found = {}
    for piece in pieces:
        words = [token.string for token in piece]
        name = "".join(words[: next((n + 1 for n, word in enumerate(words) if word.isidentifier()), 0)])
        if name:
            place = words.index("=") + 1 if "=" in words else None
            found[name] = None if place is None else between(code, piece[place].start, piece[-1].end)
    return found


def between(code, start, end):
    lines = code.split("\n")[start[0] - 1 : end[0]]
    return (
        lines[0][start[1] : end[1]] if len(lines) == 1 else "\n".join([lines[0][start[1] :], *lines[1:-1], lines[-1][: end[1]]])
    )


def raises(code):
    """Names behind `raise`, in order."""
    found = tokenize.generate_tokens(io.StringIO(code).readline)
    tokens = [token.string for token in found if token.type != tokenize.COMMENT]
    places = [place for place, word in enumerate(tokens) if word == "raise" and tokens[place + 1].isidentifier()]
    ends = [next(n for n in range(place, len(tokens)) if tokens[n] in ("(", "from", "\n", "", "else", ";")) for place in places]
    return list(dict.fromkeys("".join(tokens[place + 1 : end]) for place, end in zip(places, ends)))


def test_what_finds_the_parameters_anew_is_right():
    code = "@a(b=1)\nasync def f(self, x: int = (1, 2), *rest, y='a,b',  # why, = not\n        z=[3],\n        **more) -> c: return g(q=1)"
    assert declared(code) == {"self": None, "x": "(1, 2)", "*rest": None, "y": "'a,b'", "z": "[3]", "**more": None}


TASKS = [
    "parameters",
    "required",
    "default",
    "next parameter",
    "exceptions",
    "decorators",
    "bases",
    "quotation",
    "docstring",
    "signature",
]


def task_of(question, lang="en", tasks=(*TASKS, "described")):
    """The task whose phrasing a question has, within any of the frames."""
    for task in tasks:
        for frame in WORDING[lang]["frame"]:
            for phrase in WORDING[lang][task]:
                phrase = re.escape(frame.replace("{question}", phrase))
                if re.fullmatch(re.sub(r"\\{\w+\\}", ".*?", phrase), question, re.S):
                    return task
    raise AssertionError(question)


NONE = {"en": "None.", "ko": "없습니다."}


def check_names(task, question, code, answer):
    """Check that the names of an answer are those found in the code in another way."""
    named = names_in(answer)
    if task in ("parameters", "required"):
        found = list(declared(code))
        if task == "required":
            found = [name for name, text in declared(code).items() if text is None and "*" not in name]
        assert named == found or (named == found[1:] and found[0] in {"self", "cls", *names_in(question)})
    elif task == "default":
        asked = [name for name in names_in(question) if name in declared(code) and f"def {name}(" not in code]
        assert named[0] == (declared(code)[asked[0]] or asked[0])
    elif task == "next parameter":
        plain = [name.lstrip("*") for name in declared(code)]
        asked = [name for name in names_in(question) if name in plain and f"def {name}(" not in code]
        assert named == plain[plain.index(asked[-1]) + 1 :][:1]
    elif task == "exceptions":
        assert set(named) <= set(raises(code)) and bool(named) == bool(raises(code))
    elif task == "bases":
        header = code[code.index("class ") :].split(":")[0]
        assert f"({', '.join(named)}" in header if named else "(" not in header or "()" in header
    elif task == "decorators":
        assert named == [line[1:] for line in code.split("\n") if line.startswith("@")] or "\n    " in code.split("def ")[0]


@pytest.mark.parametrize("lang", LANGUAGES)
def test_answers_to_instructions_are_true(lang):
    checked = set()
    for row in rows("instructions", lang):
        question, code, answer = row["instruction"], row["input"], row["output"]
        task = task_of(question, lang, TASKS)
        checked.add(task)
        assert answer != NONE[lang] or task not in ("signature", "docstring", "decorators"), row
        if task == "signature":
            assert re.match(r"def (\w+)", answer)[1] in names_in(question)
            given = names_in(question)
            assert [name if value is None else f"{name}={value}" for name, value in declared(answer).items()] == given[
                -len(declared(answer)) :
            ], row
        elif task == "docstring":
            assert f'"""{answer}' not in code and answer.endswith(".") and ast.parse(code)
        elif task == "quotation":
            assert answer in code if answer != NONE[lang] else '"""' not in code, row
        else:
            check_names(task, question, code, answer)
    assert checked == set(TASKS)


def test_an_instruction_about_code_comes_with_the_code():
    for row in rows("instructions"):
        assert bool(row["input"]) == (task_of(row["instruction"]) != "signature")
        assert len(row["input"]) <= library.CHARACTERS


# Preferences


@pytest.mark.parametrize("lang", LANGUAGES)
def test_length_does_not_give_the_answer_away(lang):
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in rows("preferences", lang)]
    same = sum(len(row["chosen"]) == len(row["rejected"]) for row in rows("preferences", lang))
    assert 0.4 <= sum(longer) / (len(longer) - same) <= 0.6


def test_the_lengths_are_balanced_within_each_flaw():
    counts = groups("preferences")
    for name, count in counts.items():
        flaw, side = name.rsplit(", ", 1)
        if side == "longer" and flaw != "cut off":  # what is cut off may only be longer when there is a second paragraph
            assert 0.5 < count / counts[f"{flaw}, shorter"] < 2


def check_fact(prompt, true, false):
    """Check that the first of two answers about code is right and the second wrong. Returns False if the prompt has no code."""
    question, _, code = prompt.partition("\n\n")
    if not code:
        return False
    task = task_of(question)
    told, wrong = names_in(true), names_in(false)
    check_names(task, question, code, true)
    if task == "default":
        assert ast.literal_eval(told[0]) != ast.literal_eval(wrong[0])
    elif task == "parameters":
        assert wrong not in (told, list(declared(code)))
    else:
        assert task == "exceptions" and set(wrong) != set(told)
    return True


def test_chosen_answers_are_true_and_rejected_ones_are_not():
    facts = 0
    for row in rows("preferences"):
        assert row["chosen"] != row["rejected"] and row["chosen"].strip() and row["rejected"].strip()
        facts += check_fact(row["instruction"], row["chosen"], row["rejected"])
    assert facts > 50


def test_judged_answers_are_those_of_preferences_one_by_one(small_library):
    pairs = [one.row for one in stream(KINDS["preferences"], "en", 0, None)]
    wanted = {(row["instruction"], row[side], side == "chosen") for row in pairs for side in ("chosen", "rejected")}
    made = [tuple(one.row.values()) for one in stream(KINDS["judged"], "en", 0, None)]
    assert set(made) == wanted and len(made) == len(wanted)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_judged_answers_are_good_and_bad_and_length_does_not_tell(lang):
    made = rows("judged", lang)
    assert 0.4 < sum(row["label"] for row in made) / len(made) < 0.6
    assert len({row["prompt"] for row in made}) > 0.95 * len(made)  # unpaired
    counts = groups("judged", lang)
    for name, count in counts.items():
        flaw, side, label = name.rsplit(", ", 2)
        assert abs(count - counts[f"{flaw}, {side}, {'bad' if label == 'good' else 'good'}"]) <= 2


# Classification


def test_labels_are_the_topics_of_the_modules_and_as_even_as_can_be():
    counts = groups("classify")
    english, korean = (set(names) for names in zip(*(key.split("|") for key in classify.TOPICS)))
    assert set(counts) == english and max(counts.values()) - min(counts.values()) <= 2
    assert set(groups("classify", "ko")) == korean and len(korean) == len(english)


def test_a_text_comes_from_a_module_of_its_topic():
    for row in rows("classify")[::10]:
        names = [name for name in library_texts() if classify.topic(name) == row["label"]]
        beginning = " ".join(row["text"].split()[:3])
        assert any(beginning in words_of(name) for name in names), row


def test_no_module_has_two_topics():
    names = [name for lines in classify.TOPICS.values() for line in lines for name in line.split()]
    assert len(names) == len(set(names))


SEEN = {
    "recursion": None,
    "generator": r"\byield\b",
    "assertion": r"\bassert\b",
    "lambda": r"\blambda\b",
    "nested function": r"\n\s+(async )?def ",
    "context manager": r"\bwith\b",
    "comprehension": r"\bfor\b[^:]*\bin\b",
    "decorator": r"^@",
    "string formatting": r"%|\.format|\bf['\"]|\b[rR]?[fF][rR]?['\"]",
    "exception handling": r"\btry\s*:",
    "raising": r"\braise\b",
    "loop": r"\b(for|while)\b",
    "default value": r"=",
    "condition": r"\bif\b",
}


def test_labels_of_a_function_are_the_constructs_in_it():
    labels = set()
    for row in rows("multilabel"):
        bare = re.sub(r'("""|\'\'\').*?\1|#.*', "", row["text"], flags=re.S)  # without docstrings and comments
        for name, pattern in SEEN.items():
            if name in row["labels"] and pattern:
                assert re.search(pattern, row["text"], re.M), (name, row["text"])
        for name in ("generator", "exception handling", "nested function", "lambda", "decorator"):
            if name not in row["labels"]:
                assert not re.search(rf"^[^'\"]*(?:{SEEN[name]})", bare, re.M), (name, row["text"])
        if "recursion" in row["labels"]:
            name = re.search(r"def (\w+)", row["text"])[1]
            assert len(re.findall(rf"\b{name}\(", row["text"])) > 1
        assert row["labels"] == [name for name in classify.CONSTRUCTS if name in row["labels"]]
        labels.update(row["labels"])
    assert len(labels) >= len(SEEN) - 1
    assert set(classify.CONSTRUCTS) == set(SEEN)
    korean = {label for row in rows("multilabel", "ko") for label in row["labels"]}
    assert korean <= {korean for korean, _ in classify.CONSTRUCTS.values()} and len(korean) >= len(SEEN) - 1


@pytest.mark.parametrize(
    ("source", "labels"),
    [
        ("def f(n):\n    if n:\n        return f(n - 1)\n    return n", ["recursion", "condition"]),
        ("def f(n):\n    # f(1)\n    return g(f)", []),
        ("def f(n):\n    def g():\n        yield 1\n    return g", ["generator", "nested function"]),
        ("def f(a, *, b=1):\n    c = '%d' % b\n    return f'{a}', c", ["string formatting", "default value"]),
        ("async def f(a):\n    async with a as b:\n        await b\n    assert a", ["assertion", "context manager"]),
    ],
)
def test_constructs_by_example(source, labels):
    (made,) = classify.multilabel(parsed("m", source + "\n"), "en", 0)
    assert made.row["labels"] == labels


def test_a_method_that_calls_its_namesake_of_another_object_is_not_recursive():
    source = "class A:\n    def close(self):\n        self.file.close()\n        super().close()\n    def walk(self):\n        self.x = 1\n        self.walk()\n"
    assert [one.row["labels"] for one in classify.multilabel(parsed("m", source), "en", 0)] == [[], ["recursion"]]


# Properties


PROPERTIES = '''
class Box:
    """A box. Calls `width` and `fill()`, then setting width_of is done."""

    @property
    def width(self):
        """How wide it is, in units."""
        raise ValueError("no width")

    @width.setter
    def width(self, value=1):
        """Set it."""

    @functools.cached_property
    def width_of(self):
        """How wide it was, in units."""

    @types.DynamicClassAttribute
    def tall(self):
        """How tall it is, in units."""

    def fill(self, amount=3):
        """Call `fill` to fill the box."""
'''


@pytest.mark.parametrize("kind", ["tag", "qa", "instructions", "translations"])
@pytest.mark.parametrize("lang", LANGUAGES)
def test_no_row_claims_that_a_property_is_called(kind, lang):
    made = [one.row for one in KINDS[kind].make(parsed("boxes", PROPERTIES), lang, 0)]
    if kind == "tag":
        named = {name for row in made for shown, name in entities(row) if shown in ("FUNCTION", "함수")}
        assert named == {"fill"}
    elif kind == "qa":
        assert not [row for row in made if re.search(r"(method|function) `(width|tall)", row["question"])]
    else:
        assert made and not [
            row for row in made if re.search("`(width|tall)|def (width|tall)", row["instruction"] + row["output"])
        ]
        assert not [row for row in made if re.match(r"(@.*\n)*def (width|tall)", row["input"])]


@pytest.mark.parametrize(("lang", "said"), [("en", "property"), ("ko", "속성")])
def test_questions_about_properties_call_them_so(lang, said):
    asked = [one.row["instruction"] for one in KINDS["docstrings"].make(parsed("boxes", PROPERTIES), lang, 0)]
    about = [one for one in asked if re.search("boxes.Box.(width|tall)", one)]
    assert about and all(said in one for one in about)
    of_builtins = [row["instruction"] for _, row in library.docstrings(library.read_module("builtins"), lang)]
    assert any(said in one and "`int.real`" in one for one in of_builtins)


# Tags


@pytest.mark.parametrize("lang", LANGUAGES)
def test_tags_are_valid_bio(lang):
    kinds = set(tag.KINDS) if lang == "en" else set(tag.KINDS.values())
    seen = set()
    for row in rows("tag", lang):
        assert len(row["tokens"]) == len(row["ner_tags"]) and all(row["tokens"])
        before = "O"
        for one in row["ner_tags"]:
            assert one == "O" or (one[:2] in ("B-", "I-") and one[2:] in kinds)
            if one.startswith("I-"):
                assert before[2:] == one[2:], row
            before = one
            seen.add(one)
    assert {f"B-{kind}" for kind in kinds} <= seen and any(one.startswith("I-") for one in seen)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_most_tokens_name_nothing(lang):
    tags = [one for row in rows("tag", lang) for one in row["ner_tags"]]
    assert 0.5 < tags.count("O") / len(tags) < 0.95


def entities(row):
    """(kind, text) of each entity, its tokens joined."""
    out = []
    for token, one in zip(row["tokens"], row["ner_tags"]):
        if one.startswith("B-"):
            out.append([one[2:], token])
        elif one.startswith("I-"):
            out[-1][1] += token
    return out


@pytest.mark.parametrize("lang", LANGUAGES)
def test_what_is_named_is_in_the_library(lang):
    defined = defined_names()
    in_c = {one.short for one in library.read_module("builtins").definitions}
    english = {shown: kind for kind, shown in tag.KINDS.items()} if lang == "ko" else {}
    for row in rows("tag", lang):
        for shown, name in entities(row):
            kind = english.get(shown, shown)
            last = name.rpartition(".")[2]
            if kind == "FUNCTION":
                assert last in defined["def"] | in_c, row
            elif kind == "CLASS":
                assert last in defined["class"] | in_c, row
            elif kind == "EXCEPTION":
                assert last in defined["class"] | library.EXCEPTIONS or re.search(r"(Error|Exception|Warning)$", last), row
            elif kind == "MODULE":
                assert name in {*library.modules(), *sys.stdlib_module_names} or any(
                    re.search(rf"^\s*import .*\b{name}\b", one, re.M) for one in library_texts().values()
                )
            elif kind == "NUMBER":
                assert re.fullmatch(r"0[xo][\da-fA-F]+|[\d.]+", name), row
            else:
                assert name.isidentifier()


SHELVES = """
def dedent(text, maxlen, name): ...
def open(): ...
class Shelf:
    def close(self): ...
    def flush(self): ...
class date: ...
class ShelfError(OSError): ...
"""
NAMES = {**tag.names(parsed("shelves", SHELVES)), "text": "PARAM", "maxlen": "PARAM", "name": "PARAM"}


@pytest.mark.parametrize(
    ("sentence", "named"),
    [
        ("Wrap *text* at 80 columns.", [("PARAM", "text"), ("NUMBER", "80")]),
        ("Use `dedent()` of the textwrap module before the maxlen argument is reached.", [("FUNCTION", "dedent"), ("MODULE", "textwrap"), ("PARAM", "maxlen")]),
        ("Close the Shelf or a ShelfError is raised.", [("CLASS", "Shelf"), ("EXCEPTION", "ShelfError")]),
        ("See json.decoder for Shelf.close() too.", [("MODULE", "json.decoder"), ("FUNCTION", "Shelf.close")]),
        ("It can flush and close the file 3.4.1 of UTF-8.", []),
        ("Raises OSError, KeyError.", [("EXCEPTION", "OSError"), ("EXCEPTION", "KeyError")]),
        ("Call `flush` or self.close() first.", [("FUNCTION", "flush"), ("FUNCTION", "self.close")]),
    ],
)  # fmt: skip
def test_names_in_sentences_by_example(sentence, named):
    assert [(kind, sentence[start:end]) for start, end, kind in tag.mentions(sentence, NAMES)] == named


@pytest.mark.parametrize(
    "sentence",
    [
        "The name of the file.",  # a parameter or the word
        "Can open the file.",  # a function or the verb
        "A date object.",  # a class or the day
        "Shelf of books.",  # a class or the beginning of a sentence
        "Calls unknown_name first.",
        "Uses os.nothing_there here.",
        "The text-based form.",
        "Runs until the text completes.",  # a parameter or the word
        "Sets its `name` attribute.",  # whatever has that name
        "As RFC 2047 says.",  # part of a name
        "The Python 3.10 release.",
        "Import it from this module.",  # the library has one that is called so
        "Found in a code module.",
        'The "open" codec.',  # no function
        "The 'flush' option is set.",
    ],
)
def test_a_sentence_with_a_word_that_may_be_a_name_is_left_out(sentence):
    with pytest.raises(tag.UnsureError):
        tag.mentions(sentence, NAMES)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("def f(a, *b, c=3, d=None, **e):\n    pass", [("FUNCTION", "f"), ("PARAM", "a"), ("PARAM", "b"), ("PARAM", "c"), ("NUMBER", "3"), ("PARAM", "d"), ("PARAM", "e")]),
        ("class Mine(KeyError):\n    pass", [("EXCEPTION", "Mine"), ("EXCEPTION", "KeyError")]),
        ("raise ValueError('a name', 5)", [("EXCEPTION", "ValueError"), ("NUMBER", "5")]),
        ("import os.path, shelve", [("MODULE", "os.path"), ("MODULE", "shelve")]),
        ("import shelve as s", []),  # no tag says what s is
        ("raise found", []),
        ("def f(a=unknown):\n    pass", []),
        ("def f(a,\n      b):\n    pass", []),  # goes on behind the line
        ("raise ValueError(5)  # five", []),
        ("raise ValueError('a'\n    'b')", []),
    ],
)  # fmt: skip
def test_names_in_lines_of_code_by_example(source, named):
    module = parsed("m", source)
    line = source.split("\n")[0]
    found = tag._code_entities(module.tree.body[0], line, tag.names(module))
    assert [(kind, line[start:end]) for start, end, kind in found] == named


def test_some_rows_are_lines_of_code_and_most_are_not():
    assert 0.05 < groups("tag")["line of code"] / ROWS < 0.3


@given(st.text("ab._( )3é", max_size=30), st.data())
def test_tokens_are_the_text_without_its_spaces(text, data):
    words = [match.span() for match in tag.TOKEN.finditer(text)]
    chosen = sorted(data.draw(st.lists(st.sampled_from(words), unique=True, max_size=3))) if words else []
    tokens, tags = tag.bio(text, [(*span, "CLASS") for span in chosen])
    assert "".join(tokens) == "".join(text.split())
    assert [token for token, one in zip(tokens, tags) if one == "B-CLASS"] == [text[slice(*span)] for span in chosen]


# Questions


@pytest.mark.parametrize("lang", LANGUAGES)
def test_answers_are_where_the_row_says(lang):
    for row in rows("qa", lang):
        answers = row["answers"]
        assert len(answers["text"]) == len(answers["answer_start"]) <= 1
        for text, start in zip(answers["text"], answers["answer_start"]):
            assert text and row["context"][start : start + len(text)] == text


def test_one_question_in_five_has_no_answer_or_as_many_as_are_asked_for(few_ahead):
    assert sum(not row["answers"]["text"] for row in rows("qa")) == ROWS / 5
    assert sum(count for name, count in groups("qa").items() if name.startswith(NO_ANSWER)) == ROWS / 5
    for share in (0.0, 0.5, 1.0):
        assert sum(not one.row["answers"]["text"] for one in draw("qa", 40, no_answer=share)) == 40 * share


def test_answers_to_questions_are_true():
    checked = set()
    for row in rows("qa"):
        context, question, answers = row["context"], row["question"], row["answers"]["text"]
        task = task_of(question)
        checked.add(task)
        if task == "default" and not answers:
            assert None in [declared(context).get(name, 0) for name in names_in(question)], row
        elif task == "exceptions":
            assert answers == raises(context), row
        elif task == "quotation":
            assert re.search(r"(\"\"\"|'''|['\"])\s*" + re.escape(answers[0]), context) if answers else '"""' not in context, row
        elif task == "described":
            line = re.search(rf"^{re.escape(names_in(question)[0])}: (.*)$", context, re.M)
            assert (line[1] if line else None) == (answers[0] if answers else None), row
        else:
            check_names(task, question, context, "".join(f"`{answer}`" for answer in answers))
    assert checked == {"default", "exceptions", "quotation", "next parameter", "bases", "described"}


# Texts to shorten and to translate


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_summary_is_the_first_sentence_of_the_documentation_that_follows_it(lang):
    texts = {name: " ".join(source.split()) for name, source in library_texts().items()}
    everything = " ".join(texts.values())
    for row in rows("summaries", lang)[:60]:
        head, _, text = row["input"].partition("\n\n")
        assert "`" in head and row["output"] not in text and len(text) >= 2 * len(row["output"])
        first = text.split("\n\n")[0][:40]
        if "\\" not in row["output"] + first and row["output"] in everything:
            assert re.search(re.escape(row["output"]) + r"\W{0,3}" + re.escape(first), everything), row


def test_a_translation_states_the_facts_of_its_source():
    for row in rows("translations"):
        marked = [sorted(re.findall("`([^`]+)`", row[key])) for key in ("input", "output")]
        assert marked[0] == marked[1], row
        assert not re.search("[가-힣]", row["input"]) and re.search("[가-힣]", row["output"])
    backward = {one["output"]: one["input"] for one in rows("translations", "ko")}
    assert backward and all(re.search("[가-힣]", text) for text in backward.values())


def test_the_phrases_that_state_a_fact_are_alike_in_both_languages():
    stated = [key for key in WORDING["en"] if key.startswith("stated ")]
    assert len(stated) == 7
    for key in stated:
        slots = [[sorted(re.findall(r"{(\w+)}", phrase)) for phrase in WORDING[lang][key]] for lang in LANGUAGES]
        if key != "stated bases":  # Korean names the kind in the phrase
            assert slots[0] == slots[1], key


# Korean


WRITTEN_BY_US = {
    "summaries": "instruction",
    "translations": "input",
    "docstrings": "instruction",
    "instructions": "instruction",
    "preferences": "instruction",
    "judged": "prompt",
    "qa": "question",
}


@pytest.mark.parametrize("kind", [*WRITTEN_BY_US, "tag"])
def test_no_korean_particle_depends_on_how_a_name_is_read(kind):
    hangul = re.compile(r"[가-힣]")
    for row in rows(kind, "ko"):
        text = " ".join(row["tokens"]) if kind == "tag" else row[WRITTEN_BY_US[kind]].partition("\n\n")[0]
        assert hangul.search(text), row
        assert not re.search(r"[A-Za-z0-9_]`?(은|는|이|가|을|를|과|와|으로|로)(?![가-힣])", text), text


def test_particles_after_korean_nouns_fit_their_last_sound():
    pairs = {"을": True, "를": False, "은": True, "는": False, "과": True, "와": False}
    texts = json.dumps([WORDING["ko"], library.QUESTIONS["ko"], tag.SENTENCES], ensure_ascii=False)
    texts = texts.replace("{kind}", "함수")
    found = re.findall(r"(?<![가-힣])([가-힣]+)(을|를|은|는|과|와)(?![가-힣])", texts)
    assert len(found) > 30
    for noun, particle in found:
        closed = (ord(noun[-1]) - ord("가")) % 28 > 0
        assert closed == pairs[particle] or noun + particle in ("있는", "없는", "오는", "붙은", "하는", "같은", "않는"), (
            noun + particle
        )


def test_lists_read_as_their_language_wants():
    assert join_names(["a", "b", "c"], "en") == "a, b and c" and join_names(["a", "b", "c"], "ko") == "a, b, c"


# The command


def run(capsys, *words):
    code = program.main(["data", "build", *words])
    caught = capsys.readouterr()
    return code, caught.out, caught.err


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_build_writes_a_file_and_describes_it(capsys, few_ahead):
    code, out, err = run(capsys, "classify", "--rows", "30", "--lang", "ko", "--json")
    assert code == 0
    told = json.loads(out)
    content = Path("classify-ko.jsonl").read_bytes()
    assert (told["path"], told["rows"], told["lang"]) == ("classify-ko.jsonl", 30, "ko")
    assert told["sha256"] == hashlib.sha256(content).hexdigest()
    lines = [json.loads(line) for line in content.decode().splitlines()]
    assert lines == [one.row for one in draw("classify", 30, 0, "ko")]
    assert told["modules"] > 0 and told["about"] == KINDS["classify"].about
    assert sum(told["counts"].values()) == 30
    assert "Real: " in err and "--- 3" in err and lines[0]["label"] in err


def test_the_help_names_every_kind(capsys):
    assert run(capsys, "--help")[0] == 0
    assert set(KINDS) <= set(re.findall(r"\w+", signature(data_verbs.build).parameters["kind"].annotation))


def test_build_never_overwrites(capsys):
    Path("qa-en.jsonl").write_text("mine")
    code, _, err = run(capsys, "qa", "--rows", "10")
    assert code == 2 and "qa-en.jsonl exists" in err and Path("qa-en.jsonl").read_text() == "mine"


def test_build_prints_rows_when_asked(capsys, few_ahead):
    code, out, _ = run(capsys, "tag", "--rows", "5", "--out", "-", "--seed", "3")
    assert code == 0 and [json.loads(line) for line in out.splitlines()] == [one.row for one in draw("tag", 5, 3)]
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["instruction"], "Did you mean `instructions`"),
        (["qa", "--lang", "kr"], "Did you mean `ko`"),
        (["qa", "--split", "eval"], "Valid: test, train"),
        (["tag", "--no-answer", "0.5"], "is for the kind qa"),
        (["qa", "--out", "-", "--json"], "both print"),
        (["qa", "--out", "a.csv"], "--out a.jsonl"),
        (["qa", "--out", "none/a.jsonl"], "the folder none of a.jsonl does not exist"),
    ],
)
def test_build_refuses_what_makes_no_sense(capsys, words, said):
    code, out, err = run(capsys, *words)
    assert code == 2 and said in " ".join((err + out).split())
    assert not list(Path().iterdir())
