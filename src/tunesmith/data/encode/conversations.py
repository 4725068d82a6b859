"""From a row to tokens and a mask: the one place where conversations are rendered and tokenised.

Training, evaluation and generation all come through here, so that the model is served what it was trained on. The
rendered text is tokenised once; what is learnt is found as stretches of characters in it (``spans``), never by the
identity of a token nor by the length of a prompt tokenised on its own.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tunesmith.data.encode.spans import END, Span, SpanError, assistant_turns, find_span
from tunesmith.data.encode.templates import RENDER_ERRORS, special_ends
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Chat, Message, PromptCompletion, Text, Written
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["completion", "assistant", "all"]
Example = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text. ``spans``: the characters to learn. ``before`` and ``after``: ids the text does not write itself."""

    text: str
    spans: tuple[Span, ...]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


class Renderer:
    """What one tokenizer needs for rendering, looked up once for many rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets, so masks cannot be made. "
                "Use a model with a tokenizer.json (a fast tokenizer)."
            )
        self.tokenizer = tokenizer
        self.eos: str | None = tokenizer.eos_token
        self.specials = special_tokens(tokenizer)
        self.before, _ = special_ends(tokenizer)

    def __call__(self, messages: Sequence[Message], tools: Sequence[Any], prompt: bool = False) -> str:
        """The chat template's own text. ``prompt``: end where the assistant begins to speak."""
        text = self.tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
        )
        return str(text)

    def end(self) -> tuple[int, ...]:
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end token, so a row cannot be closed. Set eos_token in the model's tokenizer."
            )
        return (self.tokenizer.eos_token_id,)

    def document(self, text: str, start: int) -> Rendered:
        """Plain text, learnt from character ``start``: the tokenizer's own beginning, and one end token, neither doubled."""
        bos = self.tokenizer.bos_token
        begun = bool(bos) and text.startswith(bos)
        ended = bool(self.eos) and text.endswith(self.eos or "")
        return Rendered(
            text, (Span(start, END),), () if begun else tuple(self.before), () if ended else self.end()
        )

    def chat(self, row: Chat, train_on: TrainOn | int) -> Rendered:
        """A conversation with the spans of the turns that ``train_on`` names, or of those from a message on."""
        turns = assistant_turns(row.messages)
        if isinstance(train_on, int):
            wanted = [turn for turn in turns if turn >= train_on]
        else:
            wanted = turns if train_on == "assistant" else turns[-1:]
        if not wanted:
            raise SpanError("a turn of the assistant", "none", "Add the answer to learn.")
        full = self(row.messages, row.tools)
        spans = [find_span(self, row, full, turn) for turn in wanted]
        # A conversation that ends with an answer which the template does not close is closed by the end token.
        after = self.end() if turns[-1] == len(row.messages) - 1 and not spans[-1].stopped else ()
        return Rendered(full, (Span(0, END),) if train_on == "all" else tuple(spans), (), after)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts of the tokens marked special, longest first (a token may begin with another)."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(sorted({*added, *tokenizer.all_special_tokens}, key=lambda token: (-len(token), token)))


def render(
    row: Written, renderer: Renderer, train_on: TrainOn | int = "completion", expand_turns: bool = False
) -> list[Rendered]:
    """A row as text with spans: one, or one for each turn of the assistant under ``expand_turns``.

    ``train_on`` as in ``encode``; a number = every turn of the assistant from that message on (and a completion).
    Raises SpanError, or what a template raises (``RENDER_ERRORS``).
    """
    if isinstance(row, Text):
        return [renderer.document(row.text, 0)]
    if isinstance(row, PromptCompletion):
        start = 0 if train_on == "all" else len(row.prompt)
        return [renderer.document(row.prompt + row.completion, start)]
    if not expand_turns:
        return [renderer.chat(row, train_on)]
    parts = [Chat(row.messages[: turn + 1], row.tools) for turn in assistant_turns(row.messages)]
    return [renderer.chat(part, "completion") for part in parts]


def encode(
    rows: Sequence[Written],
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_on: TrainOn | Sequence[int] = "completion",
    expand_turns: bool = False,
) -> list[list[Example]]:
    """Tokenise rows in one batch: for each row its examples {"input_ids": int32[n], "supervised": bool[n]}.

    ``train_on``: ``completion`` = the last turn of the assistant (and the completion of a PromptCompletion), ``assistant`` =
    every turn of the assistant, ``all`` = every token; Text rows are learnt whole. Numbers, one for each row: every turn of the
    assistant from that message on (and the completion of a PromptCompletion). ``expand_turns``: one example for each
    turn of the assistant, which sees exactly what generation would see. Nothing is cut.

    Raises RowFault (a DataError) whose ``index`` is the position in ``rows``.
    """
    renderer = Renderer(tokenizer)
    wanted = [train_on] * len(rows) if isinstance(train_on, str) else train_on
    texts = [_render_row(row, index, renderer, wanted[index], expand_turns) for index, row in enumerate(rows)]
    examples = iter(tokenise(list(chain.from_iterable(texts)), tokenizer))
    return [[next(examples) for _ in group] for group in texts]


def _render_row(
    row: Written, index: int, renderer: Renderer, train_on: TrainOn | int, expand_turns: bool
) -> list[Rendered]:
    try:
        return render(row, renderer, train_on, expand_turns)
    except SpanError as error:
        raise RowFault(index, error.expected, error.got, error.fix) from None
    except RENDER_ERRORS as error:
        got = f"{type(error).__name__}: {error}"
        raise RowFault(
            index, "a conversation that the chat template takes", got, "Change the row or data.template."
        ) from None


def tokenise(texts: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """One tokenizer call for all texts; a token is supervised when it shares a character with a span.

    Where the characters of a token lie is asked of the tokenizer for a few tokens only, near the ends of the spans: as lists
    for Python, the offsets of all tokens would cost a fifth of the time that tokenising takes.
    """
    if not texts:
        return []
    encoded = tokenizer(
        [item.text for item in texts], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
        padding=False, truncation=False, verbose=False,
    )  # fmt: skip
    return [
        _example(item, ids, encoding)
        for item, ids, encoding in zip(texts, encoded["input_ids"], encoded.encodings)
    ]


def _example(item: Rendered, ids: list[int], encoding: Any) -> Example:
    before, length = len(item.before), len(ids)
    input_ids = np.empty(before + length + len(item.after), np.int32)
    input_ids[:before] = item.before
    input_ids[before : before + length] = ids
    input_ids[before + length :] = item.after
    supervised = np.zeros(len(input_ids), np.bool_)
    for span in item.spans:
        _mark(supervised[before : before + length], encoding, span)
    supervised[before + length :] = True
    if item.spans and item.spans[0].start == 0:
        supervised[:before] = True
    return {"input_ids": input_ids, "supervised": supervised}


def _mark(learnt: np.ndarray, encoding: Any, span: Span) -> None:
    """Set ``learnt`` (bool[tokens]) where a token of ``encoding`` (a ``tokenizers.Encoding``) shares a character with ``span``.

    Tokens stand in the order of the text and their ends never decrease, so two bisections find those that end inside the
    span. Starts may: a byte-level tokenizer that puts a space before the first word gives it no width, and a place behind the
    first piece of a character in pieces. So what begins inside the span and ends at its end or later is looked at one by one.
    """
    length = len(learnt)
    first = bisect_right(range(length), span.start, key=lambda token: encoding.token_to_chars(token)[1])
    past = bisect_left(range(length), span.end, lo=first, key=lambda token: encoding.token_to_chars(token)[1])
    learnt[first:past] = True
    for token in range(past, length):
        start, end = encoding.token_to_chars(token)
        if start < span.end:
            learnt[token] = True
        elif start < end:
            break


def prompt_ids(
    prompt: str | Sequence[Message] | Chat | Text,
    tokenizer: PreTrainedTokenizerBase,
    system: str | None = None,
) -> list[int]:
    """Tokens after which the model is to speak, as training saw them.

    A string is the user's turn when the tokenizer has a chat template, else (and as ``Text``) plain text to continue.
    ``system`` is put before turns that have none. Raises DataError when the template refuses the turns.
    """
    renderer = Renderer(tokenizer)
    if isinstance(prompt, Text) or (isinstance(prompt, str) and not tokenizer.chat_template):
        text = prompt.text if isinstance(prompt, Text) else f"{system}\n\n{prompt}" if system else prompt
        begun = renderer.document(text, 0).before
    else:
        row = prompt if isinstance(prompt, Chat) else Chat(_turns(prompt))
        messages = list(row.messages)
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        try:
            text, begun = renderer(messages, row.tools, prompt=True), ()
        except RENDER_ERRORS as error:
            raise DataError(
                f"the chat template refuses the conversation: {type(error).__name__}: {error}"
            ) from None
    return [*begun, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def _turns(prompt: str | Sequence[Message]) -> tuple[Message, ...]:
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's end token and whatever the chat template closes a turn with."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        probe: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (example,) = encode([Chat(tuple(probe))], tokenizer)[0]
        last = int(example["input_ids"][np.flatnonzero(example["supervised"])[-1]])
        special = tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer)))
        ids += [last] if last in special and last not in ids else []
    return ids


def left_out(row: Chat, renderer: Renderer) -> list[str]:
    """What the row says that the rendered text does not have: ``messages[1].content: 'the first words ...'``.

    Templates that strip the reasoning of earlier turns, or have no place for a system turn or for tools, leave such traces.
    """
    text = renderer(row.messages, row.tools)
    missing = []
    for position, message in enumerate(row.messages):
        for field in ("content", "reasoning_content"):
            said = str(message.get(field) or "").strip()
            if said and said not in text:
                missing.append(f"messages[{position}].{field}: {said[:60]!r}")
        called = [str(call.get("function", call).get("name")) for call in message.get("tool_calls") or ()]
        missing += [f"messages[{position}].tool_calls: {name!r}" for name in called if name not in text]
    if row.tools and _same_without_tools(row, renderer, text):
        missing.append(f"tools: all {len(row.tools)} of them")
    return missing


def _same_without_tools(row: Chat, renderer: Renderer, text: str) -> bool:
    try:
        return renderer(row.messages, ()) == text
    except RENDER_ERRORS:  # the template asks for them, so it reads them
        return False
