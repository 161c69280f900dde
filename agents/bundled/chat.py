"""The chat template: ChatML with tools as one compact line each.

Append-only: the text of a message list is a prefix of the text of any longer one with the same tools, so that
episodes grow by tokenising only what is new.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PLAIN_TAGS = ("<tool_call>", "</tool_call>", "<answer>", "</answer>", "<think>", "</think>")

# Trailing dashes take the template's own line breaks out; every line break of the text is written as '\n'.
TEMPLATE = r"""{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is iterable and content is not mapping -%}
        {%- for part in content -%}
            {%- if part is string -%}
                {{- part -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception('the bundled model reads text only; got a part of type ' ~ part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro lines_of(tools) -%}
    {%- for tool in tools -%}
        {%- set f = tool.function if tool.function is defined else tool -%}
        {%- set schema = f.parameters if f.parameters is mapping else {} -%}
        {%- set required = schema.required if schema.required is defined else [] -%}
        {{- f.name ~ '(' -}}
        {%- for name in (schema.properties if schema.properties is mapping else {}) -%}
            {{- name ~ ('' if name in required else '?') ~ ('' if loop.last else ', ') -}}
        {%- endfor -%}
        {{- ')' -}}
        {%- if f.description -%}
            {{- ': ' ~ f.description.strip().split('\n')[0] -}}
        {%- endif -%}
        {{- '\n' -}}
    {%- endfor -%}
{%- endmacro -%}
{%- set leading = messages and messages[0].role == 'system' -%}
{%- if leading or tools -%}
    {{- '<|im_start|>system\n' -}}
    {%- if leading -%}
        {{- text_of(messages[0].content) -}}
        {%- if tools -%}
            {{- '\n' -}}
        {%- endif -%}
    {%- endif -%}
    {%- if tools -%}
        {{- lines_of(tools) -}}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if not (loop.first and leading) -%}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ text_of(message.content) -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set f = call.function if call.function is defined else call -%}
            {{- '<tool_call>{"name": ' ~ f.name | tojson ~ ', "arguments": ' -}}
            {{- f.arguments if f.arguments is string else f.arguments | tojson -}}
            {{- '}</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}"""


@cache
def _compiled():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE)


def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """The text of a conversation, as the shipped tokenizer's `apply_chat_template` writes it."""
    return _compiled().render(messages=messages, tools=tools)
