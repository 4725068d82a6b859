import pytest

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
