"""Small tokenizers with chat templates of the well-known families, built in memory."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Plain ChatML: every message a block of its own."""

_TOOLS = (
    "# Tools\n\nYou may call functions.\n<tools>"
    "{% for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}"
    "{{ '\n' }}</tools>\nAnswer a call as <tool_call>{\"name\": ...}</tool_call>"
)
_QWEN_SYSTEM = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% else %}DEFAULT{% endif %}"
    + _TOOLS
    + "<|im_end|>\n{% elif messages[0].role == 'system' %}"
    "<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% else %}NOTOOLS{% endif %}"
)
_TOOL_MESSAGE = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

QWEN25 = (
    _QWEN_SYSTEM.replace("DEFAULT", "You are helpful.\n\n").replace(
        "NOTOOLS", "<|im_start|>system\nYou are helpful.<|im_end|>\n"
    )
    + "{% for m in messages %}"
    "{% if m.role == 'user' or m.role == 'assistant' or (m.role == 'system' and not loop.first) %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'tool' %}" + _TOOL_MESSAGE + "{% endif %}{% endfor %}" + _PROMPT
)
"""Qwen2.5's structure: a default system message, consecutive tool results merged into one user block."""

QWEN3 = (
    _QWEN_SYSTEM.replace("DEFAULT", "").replace("NOTOOLS", "")
    + "{% set ns = namespace(last=messages|length - 1, seek=true) %}"
    "{% for m in messages[::-1] %}{% set i = messages|length - 1 - loop.index0 %}"
    "{% if ns.seek and m.role == 'user' and m.content is string and not m.content.startswith('<tool_response>') %}"
    "{% set ns.seek = false %}{% set ns.last = i %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}"
    "{% set content = m.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and thought %}"
    "<|im_start|>assistant\n{{ '<think>\n' + thought + '\n</think>\n\n' + content }}"
    "{% else %}<|im_start|>assistant\n{{ content }}{% endif %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}" + _TOOL_MESSAGE + "{% endif %}{% endfor %}" + _PROMPT
)
"""Qwen3's structure: thoughts before the last user message are left out of the history."""

FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else 'gone' }}")
"""A template that drops what the assistant said as soon as something follows."""

_CORPUS = [
    "the quick brown fox looked up the birthplace of Zanvel and found Toruna", "system user assistant tool",
    '{"name": "lookup", "arguments": {"entity": "Zanvel", "attribute": "mentor"}}', "341 - 87 = 254",
] * 4  # fmt: skip


@cache
def byte_bpe(template: str | None = CHATML, merges: int = 80, *, pad_to: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; `pad_to` adds ordinary tokens until the vocabulary has that size."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(_CORPUS, trainer)
    return _dress(core, template, pad_to)


@cache
def lossy(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Deliberately not bijective: text is lower-cased, several ids decode to one text, merges depend on neighbours."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + 60, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(_CORPUS, trainer)
    return _dress(core, template, 0)


def _dress(core: Tokenizer, template: str | None, pad_to: int) -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>"]
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    plain = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
    plain += [f"<extra_{i}>" for i in range(pad_to - core.get_vocab_size() - len(plain))]
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer
