"""Tiny models, a tokenizer and rows for the trainer's tests."""

from __future__ import annotations

import random
from typing import Any

import torch

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [
    "red", "green", "blue", "one", "two", "three", "four", "five", "six", "plus", "minus", "times", "is", "not", "the", "a", "cat", "dog",
    "bird", "fish", "runs", "sleeps", "eats", "sees",
]  # fmt: skip
SPECIAL = ["<|end|>", "<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|system|>"]


def make_tokenizer(words: list[str] = WORDS, template: str | None = TEMPLATE) -> Any:
    """A word-level tokenizer that splits at spaces and punctuation; single letters and signs are words too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        token: i
        for i, token in enumerate(
            [
                *SPECIAL,
                "<|unk|>",
                *(f"Ġ{w}" for w in words),
                *words,
                *(chr(c) for c in range(33, 127)),
                *(f"Ġ{chr(c)}" for c in range(97, 123)),
                "Ċ",
                "ĊĊ",
                "Ġ",
            ]
        )
    }
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL, "<|unk|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|unk|>")
    fast.chat_template = template
    return fast


def make_model(
    hidden: int = 16,
    layers: int = 2,
    vocab_size: int = 192,
    seed: int = 0,
    family: str = "Llama",
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    import transformers

    torch.manual_seed(seed)
    cls = getattr(transformers, f"{family}Config")
    sizes = {
        "vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(cls(**{**sizes, **config})).to(dtype)


def make_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    return [{"prompt": words(2, 6) + " ", "response": words(1, 9)} for _ in range(count)]
