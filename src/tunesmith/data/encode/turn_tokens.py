"""Tokens that open or close a turn of the chat template, typed inside a message.

If ``<|im_end|>`` in a question became that token, it would end the turn there, and the text after it could
pose as another speaker. By default such text is encoded as plain characters. To that end the template's own
tokens get private names, in the rendering and in a copy of the tokenizer, so the tokenizer finds only these.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from tunesmith.data.encode.spans import SpanError
from tunesmith.data.encode.templates import RENDER_ERRORS, Renderer
from tunesmith.data.rows import Chat, Message

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

Policy = Literal["text", "allow", "error"]

KEY = "special_tokens_in_text"
"""Key of tokenizer_config.json, so that a saved model encodes text as in training. Absent for ``text``."""

MARK = "\ue0f2"
_FIRST_NAME = 0xE100
"""Private-use characters: one inside each typed token, and one for each token of the template."""

_CONTENTS = ("Alpha1", "Beta2", "Gamma3", "Delta4")
_PROBE: tuple[Message, ...] = tuple(
    {"role": role, "content": content}
    for role, content in zip(("system", "user", "assistant", "user"), _CONTENTS)
)


def set_policy(tokenizer: PreTrainedTokenizerBase, policy: Policy) -> None:
    """Choose what typed turn tokens become: plain text, control tokens (``allow``), or an error."""
    if policy == "text":
        tokenizer.init_kwargs.pop(KEY, None)
    else:
        tokenizer.init_kwargs[KEY] = policy


def policy_of(tokenizer: PreTrainedTokenizerBase) -> Policy:
    """Return the policy that was set, or that was saved with the tokenizer."""
    policy: Policy = tokenizer.init_kwargs.get(KEY, "text")
    return policy


def turn_tokens(render: Renderer) -> tuple[str, ...]:
    """Return the added tokens that the template writes around contents, and the end token; longest first.

    A pair such as ``<think>`` and ``</think>`` before a content opens and closes no turn, and is left out.
    """
    return _turn_tokens(render.tokenizer, repr(render.tokenizer.chat_template))


@lru_cache(maxsize=8)
def _turn_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, ...]:
    """Return ``turn_tokens`` of a tokenizer; ``template`` is only a part of the cache key."""
    render = Renderer(tokenizer)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    found = {tokenizer.eos_token} & added
    for messages in (_PROBE, _PROBE[1:], _PROBE[1:3]):
        try:
            text = render(messages, ())
        except RENDER_ERRORS:
            continue
        for region in re.split("|".join(_CONTENTS), text):
            here = _pattern(_longest_first(token for token in added if token in region)).findall(region)
            found |= {token for token in here if not _paired(token, here)}
    return _longest_first(found)


def _paired(token: str, region: Sequence[str]) -> bool:
    """Return True if the region has both ``<x>`` and ``</x>``, and ``token`` is one of them."""
    return f"{token[0]}/{token[1:]}" in region or (token[1:2] == "/" and token[0] + token[2:] in region)


def _longest_first(tokens: Iterator[str] | set[str]) -> tuple[str, ...]:
    return tuple(sorted(tokens, key=lambda token: (-len(token), token)))


@lru_cache(maxsize=64)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _texts(value: object, place: str) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of every string in nested lists and objects."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _texts(item, f"{place}[{index}]")


def typed(row: Chat, render: Renderer) -> dict[str, Counter[str]]:
    """Count the turn tokens typed in the texts of a row: ``{"messages[0].content": {"<|im_end|>": 2}}``."""
    pattern = _pattern(turn_tokens(render))
    found = {}
    for place, text in (*_texts(row.messages, "messages"), *_texts(row.tools, "tools")):
        if pattern.search(text):
            found[place] = Counter(pattern.findall(text))
    return found


def _with_marks(value: object, pattern: re.Pattern[str]) -> object:
    """Return ``value`` with MARK after the first character of every turn token in its strings."""
    if isinstance(value, str):
        return pattern.sub(lambda match: match[0][0] + MARK + match[0][1:], value)
    if isinstance(value, Mapping):
        return {key: _with_marks(item, pattern) for key, item in value.items()}
    return [_with_marks(item, pattern) for item in value] if isinstance(value, list | tuple) else value


def typed_places(render: Renderer, row: Chat, full: str, prompt: bool = False) -> tuple[int, ...] | None:
    """Return the positions of typed turn tokens to encode as text; None if there are none.

    ``full``: the rendering of ``row``. The row is rendered again with a mark in each typed token. Raises
    SpanError under the policy ``error``, and if the marks change the rest of the rendering.
    """
    policy = policy_of(render.tokenizer)
    if policy == "allow" or not (found := typed(row, render)):
        return None
    place, tokens = next(iter(found.items()))
    got = f"{', '.join(tokens)} in {place}"
    if policy == "error":
        fix = "Remove it, or set data.special_tokens=text to read it as plain text."
        raise SpanError("messages without tokens that open or close a turn", got, fix)
    pattern = _pattern(turn_tokens(render))
    messages, tools = _with_marks(row.messages, pattern), _with_marks(row.tools, pattern)
    assert isinstance(messages, list) and isinstance(tools, list)
    marked = render(messages, tools, prompt=prompt)
    if MARK in full or marked.replace(MARK, "") != full:
        fix = "Remove it, or set data.special_tokens=allow to read it as the token."
        got += ", which the template reads itself"
        raise SpanError("messages without tokens that open or close a turn", got, fix)
    marks = [match.start() for match in re.finditer(MARK, marked)]
    return tuple(mark - index - 1 for index, mark in enumerate(marks))


def encode(render: Renderer, text: str, places: Sequence[int]) -> Encoding:
    """Tokenise a rendering whose turn tokens at ``places`` are plain text. Offsets refer to ``text``."""
    tokens, typed_here = turn_tokens(render), set(places)
    names = _private_names(tokens)
    private = _pattern(tokens).sub(
        lambda match: match[0] if match.start() in typed_here else names[match[0]], text
    )
    backend = _private_backend(render.tokenizer, tokens, len(render.tokenizer))
    return backend.encode(private, add_special_tokens=False)


def _private_names(tokens: Sequence[str]) -> dict[str, str]:
    """Return a private name for each token, of the same length so that offsets stay valid."""
    return {token: chr(_FIRST_NAME + index) * len(token) for index, token in enumerate(tokens)}


@lru_cache(maxsize=4)
def _private_backend(tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...], size: int) -> Tokenizer:
    """Return the tokenizer with ``tokens`` under private names.

    ``size``: size of the vocabulary, only a part of the cache key.
    """
    from tokenizers import Tokenizer

    names = _private_names(tokens)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return Tokenizer.from_str(json.dumps(state))
