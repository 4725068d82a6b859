import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import RecipeError
from tunesmith.recipe import text as recipe_text


def data(text):
    return recipe_text.read(text, "r.yaml")[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("truely", "truely"),
        ("null", None),
        ("2e-4", 2e-4),
        ("2.0e-4", 2e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("1.5.0", "1.5.0"),
        ("'8'", "8"),
        ("1e-4", 1e-4),
        ("on", "on"),
        ("no", "no"),
        ("1_000", 1000),
        ("1_0.5", "1_0.5"),
        ("08", "08"),
        ("0o7", "0o7"),
        ("0x1F", "0x1F"),
        ("2024-01-01 10:00:00", "2024-01-01 10:00:00"),
        ("+3", 3),
        ("-.inf", -math.inf),
        ("~", None),
        ("", None),
        ("=", "="),
        ("!!str 8", "8"),
        ("&a {p: 1}", {"p": 1}),
    ],
)
def test_scalars(text, value):
    read = data(f"k: {text}")["k"]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: !!python/object:os.system {}", ["line 2", "remove the tag"]),
        ("a: !!python/name:os.system", ["line 1", "remove the tag"]),
        ("a: !include x", ["line 1", "remove the tag"]),
        ("a: 1\nb: 2\na: 3", ["line 3", "`a` is given twice"]),
        ("a: !!python/object/apply:os.system [x]", ["line 1", "remove the tag"]),
        ("a: !!python/tuple [1]", ["line 1", "remove the tag"]),
        ("a: !!python/object/new:os.system [x]", ["line 1", "remove the tag"]),
        ("!!python/name:os.system x: 1", ["line 1", "remove the tag"]),
        ("a: !!binary aGk=", ["line 1", "remove the tag"]),
        ("a: !!set {x}", ["line 1", "remove the tag"]),
        ("a: {b: 1,\n b: 2}", ["line 2", "`b` is given twice"]),
        ("a:\n  <<: 1", ["line 2", "takes a mapping"]),
        ("a: &a [*a]", ["line 1", "Remove aliases"]),
        ("a: " + "[" * 60 + "]" * 60, ["line 1", "levels deep"]),
        ("[" * 5000, ["line 1", "levels deep"]),
        ("a: [1", ["not valid YAML", "line 1"]),
        ("a: b: c", ["not valid YAML", "line 1"]),
        ("? [1, 2]\n: 3", ["plain word"]),
        ("a: \x00", ["not valid YAML"]),
        ("a: 1\n---\nb: 2", ["not valid YAML"]),
    ],
)
def test_refused(text, words):
    with pytest.raises(RecipeError) as error:
        data(text)
    assert all(word in str(error.value) for word in ["r.yaml", *words])


def test_aliases_that_expand_to_billions_are_refused_at_once():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(RecipeError, match=r"r\.yaml, line \d+: expected at most 10,000 values"):
        data("\n".join(lines))


def test_aliases_and_merges():
    read = data("a: &a {p: 1, q: 2}\nb: &b {q: 3, r: 4}\nc: *a\nd: {<<: *a, p: 9}\ne: {p: 9, <<: [*a, *b]}")
    assert read["c"] == {"p": 1, "q": 2} and read["d"] == {"p": 9, "q": 2} and read["e"] == {"p": 9, "q": 2, "r": 4}


words = st.sampled_from(
    ["off", "yes", "010", "08", "0o7", "1e3", "1:30", "2024-01-01", "=", "<<", "~", "", "true", "a: b", "글", "# x"]
)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | words


@given(
    st.dictionaries(words | st.text(), st.recursive(plain, lambda inner: st.lists(inner, max_size=3), max_leaves=6), max_size=4)
)
def test_what_is_written_reads_back_here_and_as_yaml_1_1(value):
    text = recipe_text.dump(value)
    assert repr(data(text)) == repr(value)
    pyyaml = pytest.importorskip("yaml")
    assert repr(pyyaml.safe_load(text)) == repr(value)


def is_exponent(value):
    return isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+[eE][-+]?[0-9]+", value)


def breaks_lines(value):
    return isinstance(value, str) and set("\x85\u2028\u2029") & set(value)


# PyYAML leaves the word 1e3 bare, which recipes always read as a number, and folds line breaks that YAML 1.2 has no longer
old = plain.filter(lambda value: not is_exponent(value) and not breaks_lines(value))


@settings(deadline=None)
@given(st.dictionaries(words.filter(lambda word: not is_exponent(word)), old | st.lists(old, max_size=3), max_size=4))
def test_what_pyyaml_wrote_reads_as_before(value):
    """Run folders of earlier versions have a recipe.yaml that ``yaml.safe_dump`` wrote."""
    pyyaml = pytest.importorskip("yaml")
    assert repr(data(pyyaml.safe_dump(value, sort_keys=False, allow_unicode=True))) == repr(value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a.b=2", {"a": {"b": 2}, "l": [{"p": 1}], "objective": "sft"}),
        ("a.c=x", {"a": {"b": 1, "c": "x"}, "l": [{"p": 1}], "objective": "sft"}),
        ("l.0.p=3", {"a": {"b": 1}, "l": [{"p": 3}], "objective": "sft"}),
        ("l=[{p: a b}]", {"a": {"b": 1}, "l": [{"p": "a b"}], "objective": "sft"}),
        ("n.m=1", {"a": {"b": 1}, "l": [{"p": 1}], "objective": "sft", "n": {"m": 1}}),
        ("a.b=", {"a": {"b": None}, "l": [{"p": 1}], "objective": "sft"}),
        ("objective.beta=1", {"a": {"b": 1}, "l": [{"p": 1}], "objective": {"type": "sft", "beta": 1}}),
        ("objective.type=cpt", {"a": {"b": 1}, "l": [{"p": 1}], "objective": {"type": "cpt"}}),
        ("a.b=|", {"a": {"b": "|"}, "l": [{"p": 1}], "objective": "sft"}),
        ("a.b==", {"a": {"b": "="}, "l": [{"p": 1}], "objective": "sft"}),
    ],
)
def test_apply(override, value):
    raw = {"a": {"b": 1}, "l": [{"p": 1}], "objective": "sft"}
    assert recipe_text.apply(raw, override) == value
    assert raw == {"a": {"b": 1}, "l": [{"p": 1}], "objective": "sft"}


@pytest.mark.parametrize("override", ["a", "=1", "a..b=1", "a.b.c=1", "l.1.p=1", "l.x=1", "a=[1", "a=!!python/name:os.system"])
def test_bad_overrides_are_named(override):
    with pytest.raises(RecipeError, match="override"):
        recipe_text.apply({"a": {"b": 1}, "l": [{"p": 1}]}, override)


def test_places():
    _, tree = recipe_text.read("a:\n  b: 1\nl:\n  - p: 1\n  - p: 2\n", "r.yaml")
    text = recipe_text.Text("r.yaml", tree, ("l.1.q=3",))
    assert text.at(("a", "b")) == "r.yaml, line 2"
    assert text.at(("l", 1, "p")) == "r.yaml, line 5"
    assert text.at(("l", 1, "q")) == "override 'l.1.q=3'"
    assert text.at(("z",)) == "r.yaml"
