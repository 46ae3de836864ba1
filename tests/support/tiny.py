"""A tiny model and tokenizer in a folder, and rows of data."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from training import make_model

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
WORDS = "the quick brown fox jumps over a lazy dog and sleeps while two birds sing".split()  # noqa: SIM905


def tokenizer() -> Any:
    """Train a byte-level BPE tokenizer on ``WORDS``. Each word becomes one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [f" {word}" for word in WORDS] * 3,
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    return fast


def model(vocab_size: int, seed: int = 0, hidden: int = 32, spread: float = 0.3) -> Any:
    """Return a Llama of one layer. ``spread``: standard deviation of the head's weights; larger gives less uniform distributions."""
    sizes = {"intermediate_size": 64, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    llama = make_model(hidden, 1, vocab_size, seed, **sizes)
    torch.nn.init.normal_(llama.lm_head.weight, std=spread)
    return llama.eval()


def save(folder: Path, seed: int = 0) -> Path:
    text = tokenizer()
    text.save_pretrained(folder)
    model(len(text), seed).save_pretrained(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows that alternate between a prompt and a chat, each with a response. No two are equal."""
    draw = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    result: list[dict[str, Any]] = []
    for i in range(count):
        prompt, response = f"{i} {words(1, 6)} ", words(1, 8)
        result.append(
            {"prompt": prompt, "response": response} if i % 2 else {"messages": [{"role": "user", "content": prompt}], "response": response}
        )
    return result


def write(path: Path, data: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    return path
