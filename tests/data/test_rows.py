"""Rows as a person reads them."""

import pytest

from tunesmith.data.rows import Chat, Judged, Labelled, Prompt, PromptCompletion, Question, Ranking, Tagged, Text, row_text

USER, ASSISTANT = {"role": "user", "content": "질문"}, {"role": "assistant", "content": "답"}


@pytest.mark.parametrize(
    "row, text",
    [
        (Text("a"), "a"),
        (Tagged("a b", ((0, 1), (2, 3)), ("O", "O")), "a b"),
        (Labelled("a", "b", "good"), "a\n\nb\n\n→ good"),
        (Labelled("a", labels=("x", "y")), "a\n\n→ x, y"),
        (Labelled("a", label=0.0), "a\n\n→ 0.0"),
        (Question("who?", "Ann.", (("Ann", 0),)), "who?\n\nAnn.\n\n→ Ann"),
        (Question("who?", "Ann.", ()), "who?\n\nAnn."),
        (PromptCompletion("a", "b"), "a\n\nb"),
        (Chat((USER, ASSISTANT)), "user: 질문\n\nassistant: 답"),
        (Ranking((USER,), ((ASSISTANT,), (ASSISTANT,)), (0, 1)), "user: 질문\n\nassistant: 답\n\nassistant: 답"),
        (Judged("a", "b", True), "a\n\nb"),
        (Prompt("a"), "a"),
    ],
)
def test_a_row_is_shown_as_its_texts(row, text):
    assert row_text(row) == text
