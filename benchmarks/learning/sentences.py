"""The data and the student of the guide's pair: sentences about orders, and a student that is some of its teacher's layers."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Karl", "Laura", "Peter")
CITIES = ("Paris", "Rome", "Berlin", "Madrid", "Vienna", "Oslo", "Dublin", "Athens", "London", "Lisbon")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "grey", "pink", "purple")
THINGS = (
    "lamp", "chair", "book", "phone", "table", "coat", "bicycle", "camera", "jacket", "bag", "clock", "mirror", "sofa", "carpet", "shirt",
    "hat", "bottle", "vase", "blanket", "desk",
)  # fmt: skip
TEMPLATES = (
    "{name} from {city} ordered a {colour} {thing} on {day}.",
    "On {day}, {name} bought a {colour} {thing} in {city}.",
    "The {colour} {thing} for {name} will arrive in {city} on {day}.",
)
EXAMPLE: tuple[dict[str, str], ...] = (
    {"role": "system", "content": "Write the colour and the item as JSON."},
    {"role": "user", "content": "Maria ordered an orange radio."},
    {"role": "assistant", "content": '{"colour": "orange", "item": "radio"}'},
)
"""The system's message and an answered example, which only the teacher reads: with it the teacher answers all in one form."""

TRAIN, HELD_OUT = 384, 64  # rows
HELD_OUT_PAIRS = 40
"""Pairs of colour and thing, of 200, that no training row has."""


def sentences(seed: int = 0) -> tuple[list[str], list[str]]:
    """Return the sentences of training and of held-out rows. All differ, and no pair of colour and thing is on both sides."""
    rng = random.Random(seed)
    pairs = list(itertools.product(COLOURS, THINGS))
    rng.shuffle(pairs)
    sides = (pairs[HELD_OUT_PAIRS:], TRAIN), (pairs[:HELD_OUT_PAIRS], HELD_OUT)
    train, held_out = (_draw(rng, chosen, count) for chosen, count in sides)
    return train, held_out


def _draw(rng: random.Random, pairs: list[tuple[str, str]], count: int) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        colour, thing = rng.choice(pairs)
        words = {"name": rng.choice(NAMES), "city": rng.choice(CITIES), "day": rng.choice(DAYS), "colour": colour, "thing": thing}
        drawn[rng.choice(TEMPLATES).format(**words)] = None
    return list(drawn)


def write_prompts(folder: Path) -> None:
    """Write ``train-prompts.jsonl`` and ``held-out-prompts.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, side in zip(("train", "held-out"), sentences(), strict=True):
        text = "".join(json.dumps(_row(sentence)) + "\n" for sentence in side)
        (folder / f"{name}-prompts.jsonl").write_text(text, encoding="utf-8")


def _row(sentence: str) -> dict[str, list[dict[str, str]]]:
    """Return a prompt in both views: the teacher's has the example, the student's has not."""
    asked = {"role": "user", "content": sentence}
    return {"messages": [EXAMPLE[0], asked], "teacher_messages": [*EXAMPLE, asked]}


def spread(layers: int, of: int) -> list[int]:
    """Return the indices of ``layers`` of a model's ``of`` layers: the first, the last and evenly spaced ones between them."""
    if not 2 <= layers <= of:
        raise ValueError(f"layers={layers}: expected 2 to {of}, the teacher's own number")
    return [round(index * (of - 1) / (layers - 1)) for index in range(layers)]


def make_student(teacher: Path, student: Path, layers: int) -> None:
    """Write a model of ``layers`` layers of the teacher, with its embeddings, head and tokenizer.

    For architectures whose layers stand in ``model.model.layers``, as Llama's do.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    chosen = spread(layers, len(model.model.layers))
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in chosen)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = [model.config.layer_types[index] for index in chosen]
    model.save_pretrained(student)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(student)
