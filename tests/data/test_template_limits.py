"""A template that does not end, builds gigabytes or is nested too deeply raises DataError within seconds and little memory."""

from __future__ import annotations

import threading
import time
from resource import RLIMIT_AS, RUSAGE_SELF, getrlimit, getrusage

import pytest

from tests.tiny import tiny_tokenizer
from tunesmith.data.encode import template_limits
from tunesmith.data.encode.templates import Renderer, apply_template
from tunesmith.data.rows import Chat
from tunesmith.errors import DataError

ANSWERS = "{% for m in messages %}{{ m.content }}{% endfor %}"
LOOP = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set ns = namespace(x='a') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
TWO_CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"

HOSTILE = {
    "loops": (LOOP, "takes too long: it was stopped after 0.2 seconds"),
    "calls itself twice": (TWO_CALLS, "takes too long"),
    "doubles": (DOUBLED, "too much memory|more than 512 MB|takes too long"),
    "one product": ("{{ 'a' * 900000 * 900000 }}", "too much memory"),
    "one product, at run time": ("{{ messages[0].content.center(900000) * 90000 }}", "too much memory"),
    "filters": ("{{ ('a' * 90000)|replace('a', 'a' * 90000) }}", "too much memory"),
    "a power": ("{{ 9 ** 9 ** 9 }}", r"\*\*: line 1"),
    "squares": (
        "{% set ns = namespace(x=9) %}{% for a in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "multiplies two variables",
    ),
    "a wide number": ("{{ 'a'.ljust(1000000000) }}", "a number above 1,000,000: line 1"),
    "nested ifs": ("{% if true %}" * 3000 + "{% endif %}" * 3000, "nested too deep"),
    "too many ifs for Python": ("{% if messages %}" * 150 + "{% endif %}" * 150, "nested too deep"),
    "nested loops": ("{% for a in messages %}" * 30 + "{% endfor %}" * 30, "nested too deep"),
    "nested brackets": ("{{ " + "(" * 40000 + "1" + ")" * 40000 + " }}", "nested too deep"),
    "many elifs": ("{% if a %}" + "{% elif b %}" * 3000 + "{% endif %}", "nested too deep|takes too long"),
    "many digits": ("{{ " + "9" * 100_000 + " }}", "4300 digits"),
    "a long text": ("a" * 10**6, "more than 131,072 characters"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused(name, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.2)
    template, message = HOSTILE[name]
    before, begun, limit = getrusage(RUSAGE_SELF).ru_maxrss, time.thread_time(), getrlimit(RLIMIT_AS)
    with pytest.raises(DataError, match=message):
        apply_template(tiny_tokenizer(), template + ANSWERS)
    assert time.thread_time() - begun < 2.5 and getrlimit(RLIMIT_AS) == limit
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 1.1 * 2**20  # kB


@pytest.mark.parametrize("part", [LOOP, DOUBLED])
def test_a_template_that_is_hostile_on_some_rows_only_is_interrupted_in_any_thread(part, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.2)
    monkeypatch.setattr(template_limits, "MEMORY_BYTES", 2**27)
    tokenizer, _ = apply_template(tiny_tokenizer(), "{% if messages|length > 4 %}" + part + "{% endif %}" + ANSWERS)
    caught: list[DataError] = []

    def render() -> None:
        renderer = Renderer(tokenizer)
        row = Chat(({"role": "user", "content": "x"},) * 5)
        try:
            assert renderer(row.messages[:4], ()) == "xxxx"
            renderer(row.messages, ())
        except DataError as error:
            caught.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and [type(error) for error in caught] == [template_limits.TemplateLimit]


def test_a_text_far_longer_than_its_conversation_is_refused_and_a_long_conversation_is_not(monkeypatch):
    monkeypatch.setattr(template_limits, "LEAST_CHARACTERS", 1000)
    tokenizer, _ = apply_template(tiny_tokenizer(), ANSWERS + "{% if messages|length > 4 %}{{ 'a' * 99999 }}{% endif %}")
    renderer = Renderer(tokenizer)
    assert len(renderer([{"role": "user", "content": "a" * 10**6}], ())) == 10**6
    with pytest.raises(DataError, match="makes 100,004 characters of a conversation of"):
        renderer([{"role": "user", "content": "x"}] * 5, ())


def test_the_watching_thread_ends_when_nothing_is_rendered(monkeypatch):
    monkeypatch.setattr(template_limits, "_IDLE_SECONDS", 0.0)
    Renderer(tiny_tokenizer("chatml"))([{"role": "user", "content": "x"}], ())
    (watching,) = [thread for thread in threading.enumerate() if thread.name == "chat-template-limits"]
    watching.join(10)
    assert not watching.is_alive() and not template_limits._watching
