"""What holds for every page: text is escaped by the environment, and HTML is written in templates alone."""

import ast
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from tunesmith.report import curves, pages

ROOM = Path(pages.__file__).parent
EVIL = "</title><script>alert('x')</script>\"'&"


def made(source, **values):
    return pages.environment().from_string("{% import 'macros.html' as m %}" + source).render(**values)


@pytest.mark.parametrize(
    "source",
    [
        "{{ m.header(x, x, [x], x) }}",
        "{{ m.tiles([tile]) }}",
        "{{ m.notes([x]) }}",
        "{{ m.facts({x: x, 'list': [x, 1], 'rows': [{x: x}], 'inner': {x: {x: x}}}) }}",
        "{{ m.grid({x: x}) }}",
        "{{ m.table([{x: x}, {x: [x]}]) }}",
        "{{ m.bars({x: 3}) }}",
        "{{ m.lines([x]) }}",
        "{% call m.answer(x, x) %}{{ x }}{% endcall %}",
        "{{ m.plot(plot) }}",
    ],
)
def test_every_piece_of_a_page_escapes_what_it_is_given(source):
    lines = [curves.Curve(EVIL, [(1, 2.0), (2, 1.0)], EVIL), curves.Curve(EVIL, [(1, float("nan"))], "eval")]
    html = made(source, x=EVIL, tile=pages.Tile(*[EVIL] * 6), plot=curves.plot(EVIL, [*lines, lines[0]]))
    assert "&lt;script&gt;" in html and "<script" not in html
    outside = re.sub(r"<[^<>]*>", "", html)
    assert '"' not in outside and "'" not in outside
    for tag in re.findall(r"<[^<>]*>", html):
        assert re.fullmatch(r"</?\w+(?:\s+[\w-]+=\"[^\"]*\")*\s*/?>", tag), f"a value left its attribute: {tag}"


def test_no_template_turns_escaping_off():
    assert pages.environment().autoescape is True
    for path in (ROOM / "templates").glob("*.html"):
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe\b|autoescape|Markup|<script|https?:", source), path


def test_no_module_writes_html():
    for path in ROOM.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        assert not [text for text in texts if re.search(r"</?[a-z]+[ >]|Markup", text)], path


def test_a_name_that_a_template_misspells_is_an_error():
    with pytest.raises(UndefinedError):
        made("{{ nothing }}")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, '<span class="soft">none</span>'), ([], '<span class="soft">none</span>'), ({}, '<span class="soft">none</span>'),
        ("", ""), (True, "yes"), (False, "no"), (0, "0"), (float("nan"), "nan"), ([1, "a", None], '1, a, <span class="soft">none</span>'),
        ({"items": 1}, "<dl><dt>items</dt><dd>1</dd></dl>"), (["ab", "c"], "ab, c"),
    ],
)  # fmt: skip
def test_values_of_any_shape_are_shown(value, shown):
    assert made("{{ m.shown('key', value) }}", value=value) == shown


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("peak_memory_bytes", 1_934_213_120, "1.93 GB"), ("train_seconds", 187.0, "3:07"), ("share_lost", 0.003, "0.300%"),
        ("share", 3.5, "3.5"), ("rows", 4210, "4,210"),
    ],
)  # fmt: skip
def test_the_key_names_the_unit(key, value, shown):
    assert pages.unit(value, key) == shown


def test_a_column_of_a_table_is_every_key_of_its_rows():
    html = made("{{ m.table(rows) }}", rows=[{"get": 1, "a": "x"}, {"get": 2, "items": 3}])
    assert re.findall(r"<th( class=\"num\")?>(\w+)", html) == [(' class="num"', "get"), ("", "a"), (' class="num"', "items")]
    assert html.count('<span class="soft">none</span>') == 2
