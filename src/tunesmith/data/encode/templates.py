"""Chat templates for models that have none, and the checks of every template before data is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from jinja2 import meta

from tunesmith.data.encode import template_limits
from tunesmith.data.rows import Message
from tunesmith.errors import DataError
from tunesmith.json_types import JsonObject
from tunesmith.suggestions import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
"""Errors that a template can raise on data that it was not written for."""

PROBE: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

_LONGER_PROBE: list[Message] = [{"role": "system", "content": "Be brief."}, *PROBE, *PROBE[:1]]
_PROBE_TOOLS: list[JsonObject] = [{"type": "function", "function": {"name": "add", "parameters": {}}}]

_checked: set[str] = set()
"""Templates that passed ``check_limits``."""

_TOOLS = """{%- if tools %}{{ raise_exception('the template ' + name + ' has no place for tools; use chatml') }}{% endif %}"""
_CALLS = """{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{% endfor %}"""

ALPACA = (
    """{%- set name = 'alpaca' %}"""
    + _TOOLS
    + """{%- if messages[0].role != 'system' %}{{ 'Below is an instruction that describes a task. """
    """Write a response that appropriately completes the request.\\n\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}
{%- elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}
{%- elif message.role == 'system' %}{{ message.content + '\\n\\n' }}
{%- else %}{{ '### ' + (message.role | capitalize) + ':\\n' + message.content + '\\n\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""
)

CHATML = (
    """{%- if tools %}{{ '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') + """
    """'You may call these functions; write {"name": ..., "arguments": {...}} between <tool_call> and </tool_call>.\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '<|im_start|>assistant\\n' + message.content }}"""
    + _CALLS
    + """{{ eos_token + '\\n' }}
{%- elif not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
)

ROLES = (
    """{%- set name = 'roles' %}"""
    + _TOOLS
    + """{%- for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content }}
{%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
)

KOREAN = (
    """{%- set name = 'korean' %}"""
    + _TOOLS
    + """{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '### 답변:\\n' + message.content + eos_token + '\\n\\n' }}
{%- elif message.role == 'user' %}{{ '### 질문:\\n' + message.content + '\\n\\n' }}
{%- elif message.role == 'system' %}{{ message.content + '\\n\\n' }}
{%- else %}{{ '### ' + message.role + ':\\n' + message.content + '\\n\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### 답변:\\n' }}{% endif %}"""
)

TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")

GIVEN = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now",
    "bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token", "namespace", "range",
    "dict", "lipsum", "cycler", "joiner",
}  # fmt: skip
"""Variables that transformers and Jinja set themselves."""

TEMPLATES = {"alpaca": ALPACA, "chatml": CHATML, "roles": ROLES, "korean": KOREAN}
"""Each closes every assistant turn with the model's end token, so that generation stops in any program."""


def apply_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None, kwargs: Mapping[str, object] | None = None
) -> tuple[PreTrainedTokenizerBase, str]:
    """Give ``tokenizer`` its chat template and check it on a small conversation.

    ``template``: a name of ``TEMPLATES``, the path of a .jinja file, a Jinja string, or None for the model's
    own (``roles`` if it has none). ``kwargs``: variables of the template, such as ``enable_thinking``. They
    become its defaults, so they are saved with the model and hold in every program that reads the template.
    The tokenizer is changed and returned, with a sentence that names the choice. Raises DataError (exit code
    2) when name or file is unknown, the template does not compile or read a variable of ``kwargs``, or it
    reaches outside the sandbox.
    """
    if template is None and tokenizer.chat_template:
        description = "the model's own chat template"
    elif template is None or template in TEMPLATES:
        name = template or "roles"
        end_id(tokenizer, f"which the template {name} needs")
        begins = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in special_ends(tokenizer)[0]
        tokenizer.chat_template = ("{{- bos_token }}" if begins else "") + TEMPLATES[name]
        description = f"the template {name}" + ("" if template else ", because the model has none of its own")
    elif "{{" in template or "{%" in template:
        tokenizer.chat_template = template
        description = "the recipe's own Jinja template"
    else:
        tokenizer.chat_template = _read_template(template)
        description = f"the template in {template}"
    if kwargs:
        _set_defaults(tokenizer, kwargs)
        description += ", with " + ", ".join(f"{name}: {_literal(value)}" for name, value in kwargs.items())
    check_limits(tokenizer)
    try:
        rendered = template_limits.render(tokenizer, PROBE)
    except RENDER_ERRORS as error:
        fix = f"Correct data.template, or use one of: {', '.join(TEMPLATES)}"
        raise DataError(f"the chat template fails on a question and an answer: {error}. {fix}") from None
    if "Hello" not in rendered:
        raise DataError(
            "the chat template does not write the assistant's answer. Correct data.template: it must write message.content"
        )
    return tokenizer, description


def _read_template(path: str) -> str:
    """Return the text of a template file. Raises DataError."""
    file = Path(path).expanduser()
    if file.suffix not in TEMPLATE_SUFFIXES:
        raise DataError(
            f"data.template: {path!r} is neither a Jinja string, nor the path of a .jinja file, nor a name. "
            + did_you_mean(path, TEMPLATES)
        )
    try:
        with file.open(encoding="utf-8") as opened:
            return opened.read(template_limits.LARGEST_TEMPLATE + 1)
    except (OSError, ValueError) as error:
        near = file.parent.glob("*.jinja") if file.parent.is_dir() else ()
        names = ", ".join(sorted(one.name for one in near)) or "none"
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(
            f"data.template: {path} cannot be read: {reason}. Template files in {file.parent}: {names}."
        ) from None


def _texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokenizer's chat templates. Some models have several, by name."""
    chosen = tokenizer.chat_template
    return list(chosen.values()) if isinstance(chosen, dict) else [chosen]


def _set_defaults(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, object]) -> None:
    """Put defaults of variables at the start of the chat template.

    Raises DataError for a variable that the template never reads.
    """
    read = set[str]().union(*(_variables(text) for text in _texts(tokenizer))) - GIVEN
    for name in kwargs:
        if name not in read:
            has = f"It reads {', '.join(sorted(read))}. " if read else "It reads none. "
            raise DataError(
                f"data.template_kwargs: the chat template reads no variable {name!r}. {has}{did_you_mean(name, read)}"
            )
    # transformers drops the newline after a block and the spaces before it, so these lines render to nothing
    lines = [
        f"{{% set {name} = {name} if {name} is defined else {_literal(value)} %}}\n"
        for name, value in kwargs.items()
    ]
    chosen, begin = tokenizer.chat_template, "".join(lines)
    if isinstance(chosen, dict):
        tokenizer.chat_template = {name: begin + text for name, text in chosen.items()}
    else:
        tokenizer.chat_template = begin + chosen


def _variables(template: str) -> set[str]:
    """Return the variables that a template reads without setting them first."""
    return meta.find_undeclared_variables(template_limits.parse(template))


def _literal(value: object) -> str:
    """Return ``value`` as a Jinja literal: as JSON, but null as ``none``."""
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(item)}" for key, item in value.items()) + "}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value)


def end_id(tokenizer: PreTrainedTokenizerBase, purpose: str) -> int:
    """The id of the end token. Raises DataError without one; ``purpose``: "which ...", why it is needed."""
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer has no end token, {purpose}. Set eos_token in the model's tokenizer.")
    return int(tokenizer.eos_token_id)


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer itself puts before and after a text without a template."""
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(text) + 1):
        if full[start : start + len(text)] == text:
            return list(full[:start]), list(full[start + len(text) :])
    return [], []


def check_limits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the syntax of a template once, and try it on small conversations with little memory.

    Raises DataError. Any other failure is left to the rendering that needs the template.
    """
    if not tokenizer.chat_template or (key := repr(tokenizer.chat_template)) in _checked:
        return
    for text in _texts(tokenizer):
        template_limits.check_syntax(text)
    with template_limits.limited_memory():
        for messages, tools in ((PROBE, None), (_LONGER_PROBE, None), (_LONGER_PROBE, _PROBE_TOOLS)):
            with suppress(*RENDER_ERRORS):
                template_limits.render(tokenizer, messages, tools=tools, add_generation_prompt=tools is None)
    _checked.add(key)


OPENING = re.compile(r"<(\w+)>\s*\Z")


class Renderer:
    """The chat template of one tokenizer, whose special tokens are looked up once for many rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"the tokenizer {type(tokenizer).__name__} returns no character offsets, so masks cannot be made. "
                "Use a model with a tokenizer.json (a fast tokenizer)."
            )
        check_limits(tokenizer)
        self.tokenizer = tokenizer
        self.eos: str | None = tokenizer.eos_token
        self.specials = special_tokens(tokenizer)
        self.before = tuple(special_ends(tokenizer)[0])

    @cached_property
    def opening(self) -> re.Match[str] | None:
        """The tag at the end of the generation prompt that opens reasoning, such as ``<think>``."""
        try:
            return OPENING.search(self(PROBE[:1], (), prompt=True))
        except RENDER_ERRORS:
            return None

    @cached_property
    def opens_answers(self) -> bool:
        """True if the template has a generation prompt."""
        try:
            return self(PROBE[:1], ()) != self(PROBE[:1], (), prompt=True)
        except RENDER_ERRORS:
            return True

    def __call__(self, messages: Sequence[Message], tools: Sequence[JsonObject], prompt: bool = False) -> str:
        """Render turns by the chat template. ``prompt``: add its generation prompt."""
        if any("weight" in message for message in messages):  # a template may write all keys of a message
            messages = [
                {key: value for key, value in message.items() if key != "weight"} for message in messages
            ]
        return template_limits.render(
            self.tokenizer, messages, tools=list(tools) or None, add_generation_prompt=prompt
        )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts of the special tokens, longest first (a token may begin with another)."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(sorted({*added, *tokenizer.all_special_tokens}, key=lambda token: (-len(token), token)))
