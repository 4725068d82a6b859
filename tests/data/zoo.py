"""Chat templates in the styles of real models, each with the tokens that it needs.

``stop``: the token that ends an answer. ``system``, ``tools``: roles that the template renders.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.tiny import tiny_tokenizer


@dataclass(frozen=True)
class Style:
    name: str
    template: str
    stop: str
    specials: tuple[str, ...] = ()
    eos: str = "</s>"
    adds_bos: bool = False
    system: bool = True
    tools: bool = False

    def tokenizer(self):
        tokenizer = tiny_tokenizer(template=self.template, adds_bos=self.adds_bos)
        tokenizer.add_special_tokens({"additional_special_tokens": [*self.specials, self.stop]})
        tokenizer.eos_token = self.eos
        tokenizer.chat_template = self.template
        return tokenizer


CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """{{- bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (m.content | trim) + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

MISTRAL = """{{- bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'system' %}{{ '[SYSTEM_PROMPT] ' + m.content + '[/SYSTEM_PROMPT]' }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}
{%- elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ ']' + eos_token }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""

LLAMA2 = """{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

ZEPHYR = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

PHI = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

QWEN3 = """{%- set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}{{ '<|im_start|>system\n<tools>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '</tools><|im_end|>\n' }}{% endif %}
{%- for m in messages %}{% if m.role == 'assistant' %}
{%- set content = m.content %}{% set thought = m.reasoning_content or '' %}
{%- if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content }}
{%- for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}
{%- else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"""

ALPACA = """{% for m in messages %}{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}
{%- elif m.role == 'assistant' %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}
{%- else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"""

VICUNA = """{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}
{%- elif m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}
{%- else %}{{ m.content + ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"""

GRANITE = """{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""

COHERE = """{{ bos_token }}{% for m in messages %}{{ '<|START|>' + ('<|CHATBOT|>' if m.role == 'assistant' else '<|USER|>') }}
{{- m.content.strip() + '<|END|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|START|><|CHATBOT|>' }}{% endif %}"""

IM = ("<|im_start|>",)
ZOO = {
    style.name: style
    for style in (
        Style("chatml", CHATML, "<|im_end|>", IM, eos="<|im_end|>"),
        Style("chatml, another eos", CHATML, "<|im_end|>", IM),
        Style("llama3", LLAMA3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"), eos="<|eot_id|>", adds_bos=True),
        Style("gemma", GEMMA, "<end_of_turn>", ("<start_of_turn>",), adds_bos=True, system=False),
        Style("mistral", MISTRAL, "</s>", ("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]"), adds_bos=True, tools=True),
        Style("llama2", LLAMA2, "</s>", adds_bos=True, system=False),
        Style("zephyr", ZEPHYR, "</s>"),
        Style("phi", PHI, "<|end|>", ("<|user|>", "<|assistant|>", "<|system|>")),
        Style("qwen3", QWEN3, "<|im_end|>", IM, eos="<|im_end|>", tools=True),
        Style("deepseek", DEEPSEEK, "</s>", ("<|User|>", "<|Assistant|>"), adds_bos=True),
        Style("alpaca", ALPACA, "</s>"),
        Style("vicuna", VICUNA, "</s>"),
        Style("granite", GRANITE, "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>"), eos="<|end_of_text|>"),
        Style("cohere", COHERE, "<|END|>", ("<|START|>", "<|CHATBOT|>", "<|USER|>"), eos="<|END|>", adds_bos=True, system=False),
    )
}
