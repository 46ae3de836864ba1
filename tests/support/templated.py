"""Byte-level and SentencePiece-like tokenizers with chat templates in the styles of several model families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace(
    "{% if m.content %}",
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ (m.reasoning_content or '').strip('\n') }}\n</think>\n\n{% endif %}"
    "{% if m.content %}",
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}<|python_tag|>{{ m.tool_calls[0].function.name }}{{ m.tool_calls[0].function.arguments | tojson }}<|eom_id|>"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ENDS_TWICE = CHATML.removesuffix("{% endif %}") + "{% else %}{{ eos_token }}{% endif %}"
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
PARTS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
ARGUMENTS_AS_TEXT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLLM = QWEN.replace("You are Qwen.", "You are SmolLM.")
QWEN3 = (
    "{% set asked = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set asked.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > asked.last and (loop.last or m.reasoning_content) %}"
    "<think>\n{{ (m.reasoning_content or '').strip('\n') }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
MARKED_BEYOND_END = MARKED.replace("<|im_end|>{% endgeneration %}", "<|im_end|>{{ '\n' }}{% endgeneration %}").replace(
    "{% endif %}{{ '\n' }}{% endfor", "{{ '\n' }}{% endif %}{% endfor"
)
TOKENS = (
    "<|endoftext|>", "<pad>", "<bos>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<think>", "</think>",
)  # fmt: skip


def tokenizer(
    template: str | None = CHATML,
    *,
    pieces: bool = False,
    begins: bool = False,
    ends: bool = False,
    tokens: Sequence[str] = TOKENS,
    eos: str = "<|endoftext|>",
    pad: str = "<pad>",
) -> Any:
    """Make a tokenizer with one token for each letter and each special token.

    Args:
        pieces: use Unigram with a space before each text, like SentencePiece, instead of byte-level BPE.
        begins, ends: add a begin-of-text token before each text, an end-of-text token after it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if pieces:
        plain = ["<unk>", "▁", *(chr(code) for code in range(33, 127)), "\n", "▁the", "hi"]
        backend = Tokenizer(
            models.Unigram([*((token, 0.0) for token in tokens), *((piece, -float(len(plain))) for piece in plain)], len(tokens))
        )
        backend.pre_tokenizer, backend.decoder = (
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            decoders.Metaspace(prepend_scheme="first"),
        )
    else:
        backend = Tokenizer(models.BPE({token: id for id, token in enumerate([*tokens, *letters])}, []))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([token for token in tokens if "think" not in token])
    backend.add_tokens([token for token in tokens if "think" in token])
    if begins or ends:
        backend.post_processor = processors.TemplateProcessing(
            single=[*(["<bos>"] if begins else []), "$A", *([eos] if ends else [])],
            special_tokens=[(token, backend.token_to_id(token)) for token in ("<bos>", eos)],
        )
    result = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=eos, pad_token=pad)
    result.chat_template = template
    return result
