"""Conversations and plain text to tokens and loss mask: the one module that renders and tokenises them.

Training, evaluation and generation all use it, so a model is served the text that it was trained on. The
rendered text is tokenised once. Supervised parts are spans of its characters (``spans``): they depend neither
on the identity of a token nor on the length of a prompt tokenised alone.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from tunesmith.data.batch.pack import Example
from tunesmith.data.encode import turn_tokens
from tunesmith.data.encode.spans import (
    END,
    Span,
    SpanError,
    assistant_turns,
    check_context_calls,
    check_rendered,
    find_span,
)
from tunesmith.data.encode.templates import PROBE, RENDER_ERRORS, Renderer, end_id, special_tokens
from tunesmith.data.encode.texts import call_tokenizer
from tunesmith.data.row_problems import RowFault
from tunesmith.data.rows import Chat, Message, PromptCompletion, Text, Written
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["completion", "assistant", "all"]
Characters = Callable[[int], tuple[int, int]]
"""Token of a text -> its first character and the one after its last."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text, with its supervised ``spans``. ``before`` and ``after``: ids that the text lacks.

    ``typed``: positions of turn tokens in the text that are encoded as plain text; None if there are none."""

    text: str
    spans: tuple[Span, ...]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    typed: tuple[int, ...] | None = None


def render(
    row: Written, renderer: Renderer, train_on: TrainOn | int = "completion", expand_turns: bool = False
) -> list[Rendered]:
    """Render a row: once, or once for each assistant turn under ``expand_turns``.

    ``train_on`` as in :func:`encode`, for one row. Raises SpanError or one of ``RENDER_ERRORS``.
    """
    if isinstance(row, Text):
        return [_document(renderer, row.text, 0)]
    if isinstance(row, PromptCompletion):
        start = 0 if train_on == "all" else len(row.prompt)
        return [_document(renderer, row.prompt + row.completion, start)]
    if not expand_turns:
        return [_chat(renderer, row, train_on)]
    parts = [
        Chat(row.messages[: turn + 1], row.tools) for turn in _supervised_turns(row.messages, "assistant")
    ]
    return [_chat(renderer, part, "completion") for part in parts]


def _document(renderer: Renderer, text: str, start: int) -> Rendered:
    """A text without template, supervised from character ``start``. It gets the tokenizer's first tokens
    and one end token, unless the text has them itself."""
    bos = renderer.tokenizer.bos_token
    begun = bool(bos) and text.startswith(bos)
    ended = bool(renderer.eos) and text.endswith(renderer.eos or "")
    return Rendered(
        text, (Span(start, END),), () if begun else renderer.before, () if ended else _end(renderer)
    )


def _chat(renderer: Renderer, row: Chat, train_on: TrainOn | int) -> Rendered:
    """A conversation with the spans of the turns that ``train_on`` names, as in :func:`encode`."""
    wanted = _supervised_turns(row.messages, train_on)
    row = _with_one_opening(renderer, row)
    full = renderer(row.messages, row.tools)
    spans = tuple(find_span(renderer, row, full, turn) for turn in wanted)
    for turn, span in zip(wanted, spans):
        check_rendered(renderer, row, full, turn, span)
    check_context_calls(renderer, row, full, wanted)
    # Where the template does not close a final answer, the end token does.
    after = _end(renderer) if wanted[-1] == len(row.messages) - 1 and not spans[-1].stopped else ()
    if train_on == "all":
        context = [turn for turn in assistant_turns(row.messages) if "weight" in row.messages[turn]]
        spans = _without([find_span(renderer, row, full, turn) for turn in context])
    return Rendered(full, spans, (), after, turn_tokens.typed_places(renderer, row, full))


def _with_one_opening(renderer: Renderer, row: Chat) -> Chat:
    """Return ``row``, changed so that its rendering opens reasoning (``<think>``) exactly once.

    This matters where the generation prompt ends with the tag. A template may write the tag before a content
    that already has it, or omit it before a content that lacks it. The row is returned unchanged if changing
    its content does not repair the rendering.
    """
    opening = renderer.opening
    if opening is None or not any(f"</{opening[1]}>" in str(one.get("content")) for one in row.messages):
        return row
    tag, twice = f"<{opening[1]}>", re.compile(f"(<{opening[1]}>)\\s*\\1")
    last = assistant_turns(row.messages)[-1]
    full = renderer(row.messages, row.tools)
    changed = list(row.messages)
    if twice.search(full):
        for turn in assistant_turns(row.messages):
            content = row.messages[turn]["content"].lstrip()
            changed[turn] = {**changed[turn], "content": content.removeprefix(tag).lstrip("\n")}
        return Chat(tuple(changed), row.tools) if not twice.search(renderer(changed, row.tools)) else row
    content = row.messages[last]["content"]
    if tag not in content and f"</{opening[1]}>" in content and last:
        prompt = renderer(row.messages[:last], row.tools, prompt=True)
        changed[last] = {**changed[last], "content": opening[0] + content.lstrip("\n")}
        is_opened = full.startswith(prompt) or not renderer(changed, row.tools).startswith(prompt)
        return row if is_opened else Chat(tuple(changed), row.tools)
    return row


def _supervised_turns(messages: Sequence[Message], train_on: TrainOn | int) -> list[int]:
    """Return the assistant turns that ``train_on`` selects, without those of weight 0. Raises SpanError."""
    turns = assistant_turns(messages)
    if isinstance(train_on, int):
        turns = [turn for turn in turns if turn >= train_on]
    if not turns:
        raise SpanError("a turn of the assistant", "none", "Add the assistant's answer.")
    weighted = [turn for turn in turns if "weight" not in messages[turn]]
    if not weighted:
        fix = "Set the weight of one turn to 1, or delete the row."
        raise SpanError(
            "a turn of the assistant to train on", "weight 0 (or loss: false) in all of them", fix
        )
    return weighted if train_on == "assistant" or isinstance(train_on, int) else weighted[-1:]


def _without(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Return the spans of the text outside ``spans``."""
    edges = [0, *(edge for span in spans for edge in (span.start, span.end)), END]
    return tuple(Span(start, end) for start, end in zip(edges[::2], edges[1::2]) if start < end)


def _end(renderer: Renderer) -> tuple[int, ...]:
    return (end_id(renderer.tokenizer, "which closes each row"),)


def encode(
    rows: Sequence[Written],
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_on: TrainOn | Sequence[int] = "completion",
    expand_turns: bool = False,
) -> list[list[Example]]:
    """Tokenise rows in one batch: for each row its examples {"input_ids": int32[n], "supervised": bool[n]}.

    ``train_on``: ``completion`` = the last assistant turn (and the completion of a PromptCompletion),
    ``assistant`` = every assistant turn, ``all`` = every token; all of a Text is supervised. A sequence has
    one number for each row: every assistant turn from that message on (and the completion of a
    PromptCompletion). An assistant turn whose ``weight`` is 0 is never supervised and does not count as the
    last turn. ``expand_turns``: one example for each assistant turn, with the context of generation. Nothing
    is cut.

    Raises RowFault (a DataError) whose ``index`` is the position in ``rows``.
    """
    renderer = Renderer(tokenizer)
    wanted = [train_on] * len(rows) if isinstance(train_on, str) else train_on
    texts = []
    for index, row in enumerate(rows):
        try:
            texts.append(render(row, renderer, wanted[index], expand_turns))
        except SpanError as error:
            raise RowFault(index, error.expected, error.got, error.fix) from None
        except RENDER_ERRORS as error:
            got, fix = f"{type(error).__name__}: {error}", "Change the row or data.template."
            raise RowFault(index, "a conversation that the chat template accepts", got, fix) from None
    examples = iter(tokenise(list(chain.from_iterable(texts)), renderer))
    return [[next(examples) for _ in group] for group in texts]


def tokenise(texts: Sequence[Rendered], renderer: Renderer) -> list[Example]:
    """Tokenise all texts in one call; a token is supervised when it shares a character with a span.

    Only the offsets of a few tokens near the ends of spans are read: converting the offsets of all tokens to
    Python lists would take a fifth of the time of tokenisation.
    """
    if not texts:
        return []
    encoded = call_tokenizer(renderer.tokenizer, [item.text for item in texts])
    out = []
    for item, ids, encoding in zip(texts, encoded["input_ids"], encoded.encodings):
        if item.typed is not None:
            encoding = turn_tokens.encode(renderer, item.text, item.typed)
            ids = encoding.ids
        out.append(_example(item, ids, encoding))
    return out


def _example(item: Rendered, ids: list[int], encoding: Encoding) -> Example:
    input_ids = np.array([*item.before, *ids, *item.after], np.int32)
    supervised = np.zeros(len(input_ids), np.bool_)
    start, end = len(item.before), len(item.before) + len(ids)
    characters = cast(Characters, encoding.token_to_chars)
    for span in item.spans:
        _mark(supervised[start:end], characters, span)
    supervised[end:] = True
    if item.spans and item.spans[0].start == 0:
        supervised[:start] = True
    return {"input_ids": input_ids, "supervised": supervised}


def _mark(supervised: np.ndarray, characters: Characters, span: Span) -> None:
    """Set ``supervised`` (bool[tokens]) where a token shares a character with ``span``.

    Ends of tokens never decrease, so two bisections find the tokens that end inside the span. Starts may
    decrease: a byte-level tokenizer that puts a space before the first word gives that space no width, and a
    start after the first piece of a character in pieces. So the tokens that end later are checked one by one.
    """
    length = len(supervised)
    first = bisect_right(range(length), span.start, key=lambda token: characters(token)[1])
    past = bisect_left(range(length), span.end, lo=first, key=lambda token: characters(token)[1])
    supervised[first:past] = True
    for token in range(past, length):
        start, end = characters(token)
        if start < span.end:
            supervised[token] = True
        elif start < end:
            break


def prompt_ids(
    prompt: str | Sequence[Message] | Chat | Text,
    tokenizer: PreTrainedTokenizerBase,
    system: str | None = None,
) -> list[int]:
    """The tokens before a generated answer, as training used them.

    A string is the user's turn if the tokenizer has a chat template, else (and as ``Text``) a text to
    continue. ``system`` is put before turns that have none. Raises DataError if the template fails.
    """
    renderer = Renderer(tokenizer)
    try:
        rendered = render_prompt(prompt, renderer, system)
    except RENDER_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"the chat template refuses the conversation: {reason}") from None
    except SpanError as error:
        raise DataError(f"the prompt: {error}") from None
    ids: list[int] = tokenise([rendered], renderer)[0]["input_ids"].tolist()
    return ids


def render_prompt(
    prompt: str | Sequence[Message] | Chat | Text, renderer: Renderer, system: str | None = None
) -> Rendered:
    """The text before a generated answer, without supervised spans; arguments as in :func:`prompt_ids`.

    Raises SpanError or one of ``RENDER_ERRORS``.
    """
    if isinstance(prompt, Text) or (isinstance(prompt, str) and not renderer.tokenizer.chat_template):
        text = prompt.text if isinstance(prompt, Text) else f"{system}\n\n{prompt}" if system else prompt
        return Rendered(text, (), _document(renderer, text, 0).before)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = list(prompt.messages if isinstance(prompt, Chat) else prompt)
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    row = Chat(tuple(messages), tuple(prompt.tools if isinstance(prompt, Chat) else ()))
    text = renderer(row.messages, row.tools, prompt=True)
    if any(message.get("tool_calls") for message in messages):
        with suppress(*RENDER_ERRORS):  # a template may refuse a conversation that ends with the user's turn
            check_context_calls(renderer, row, renderer(row.messages, row.tools))
    return Rendered(text, (), typed=turn_tokens.typed_places(renderer, row, text, prompt=True))


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the end token, and the special token that closes a turn in the template."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        (example,) = encode([Chat(tuple(PROBE))], tokenizer)[0]
        last = int(example["input_ids"][np.flatnonzero(example["supervised"])[-1]])
        special = tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer)))
        ids += [last] if last in special and last not in ids else []
    return ids


def find_omitted_text(row: Chat, renderer: Renderer) -> list[str]:
    """Text of the row that its rendering lacks: ``messages[1].content: 'the first words ...'``.

    Templates that strip the reasoning of earlier turns, or cannot render a system turn or tools, omit text. A
    row whose calls would be omitted is refused.
    """
    rendered = renderer(row.messages, row.tools)
    dense = "".join(rendered.split())  # a template may change the white space of reasoning
    missing = []
    for index, message in enumerate(row.messages):
        for field in ("content", "reasoning_content"):
            text = str(message.get(field) or "").strip()
            if "".join(text.split()) not in dense:
                missing.append(f"messages[{index}].{field}: {text[:60]!r}")
    try:
        without_tools = renderer(row.messages, ()) if row.tools else None
    except RENDER_ERRORS:  # the template requires tools, so it reads them
        without_tools = None
    if without_tools == rendered:
        missing.append(f"tools: all {len(row.tools)} of them")
    return missing
