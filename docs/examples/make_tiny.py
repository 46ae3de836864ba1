"""A tiny teacher that can do what the recipes ask of one, a tiny student that cannot yet, and data for both: under a minute on two cores.

    python docs/examples/make_tiny.py tiny

writes tiny/teacher, tiny/student (same tokenizer, with a chat template; the student's weights are random) and

    sums.jsonl       word problems with their answers, some held out in sums-test.jsonl
    worked.jsonl     two of them with a rationale
    styles.jsonl     small sums answered in a style that only demonstrations can tell
    reviews.jsonl    sentences with a label
    seeds.jsonl      instructions

The teacher is trained on the prompts of the recipes, with answers by rule, and makes mistakes: the recipes' filters have something to do.
Each fixed sentence of a prompt is one token of its vocabulary, so that prompts are short and training is quick.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import kdkernels as kd
from kdkernels.recipes import chain_of_thought, disco, lion, scott, socratic

Turns = list[tuple[str, str]]
"""Question and answer, question and answer: the last answer is learnt."""

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + ('<end>' if m['role'] == 'assistant' else '') }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NAMES, THINGS = ("Ann", "Tom", "Eve"), ("pens", "cups", "figs")
STYLES = ("{}", "It is {}.", "n = {}", "<{}>", "just {}, ok")
GOOD, BAD = ("good", "fun", "great"), ("bad", "dull", "poor")
SUBJECTS, TAILS = ("the film", "this book", "her song"), ("to me", "in the end", "as they say")
WORDS = ("cat", "dog", "sun", "sea", "map", "hat", "ice", "oak", "bee", "jam", "key", "owl", "pie", "rug", "tea", "van")
LABELS = ("good", "bad")


class Problem:
    """Two steps: a sum, then a difference."""

    def __init__(self, draw: random.Random) -> None:
        self.name, self.thing = draw.choice(NAMES), draw.choice(THINGS)
        self.a, self.b = draw.randint(1, 6), draw.randint(1, 6)
        self.sum = self.a + self.b
        self.c = draw.randint(1, min(6, self.sum - 1))
        self.answer = self.sum - self.c

    @property
    def text(self) -> str:
        return f"{self.name} has {self.a} {self.thing}, gets {self.b} more and loses {self.c}. How many now?"

    def rationale(self, answer: int | None = None, swapped: bool = False) -> str:
        first, second = (self.b, self.a) if swapped else (self.a, self.b)
        return f"{first} + {second} = {self.sum}. {self.sum} - {self.c} = {self.answer if answer is None else answer}."

    def steps(self) -> str:
        return f"Q: What is {self.a} and {self.b}?\nA: {self.sum}\nQ: And {self.c} less?\nA: {self.answer}"


def plain(draw: random.Random) -> Turns:
    problem = Problem(draw)
    return [(problem.text, f"{problem.answer} {problem.thing}")]


def thought(draw: random.Random) -> Turns:
    problem = Problem(draw)
    text = chain_of_thought.worked(problem.rationale(swapped=draw.random() < 0.5), str(problem.answer))
    return [(f"{problem.text}\n{chain_of_thought.INSTRUCTION}", text)]


def explained(draw: random.Random) -> Turns:
    problem = Problem(draw)
    answer = draw.choice([problem.answer, draw.randint(1, 11), None])
    return [(scott.explain_prompt(problem.text, "" if answer is None else str(answer)), problem.rationale(answer))]


def split(draw: random.Random) -> Turns:
    problem = Problem(draw)
    return [(f"{problem.text}\n{socratic.INSTRUCTION}", problem.steps())]


def styled(draw: random.Random, shown: int | None = None, style: str | None = None) -> Turns:
    """Sums, all answered in one style; without an example the style is the first."""
    shown = draw.choice((0, 2, 3)) if shown is None else shown
    style = (draw.choice(STYLES) if shown else STYLES[0]) if style is None else style
    pairs = [(draw.randint(1, 6), draw.randint(1, 6)) for _ in range(shown + 1)]
    return [(f"{a} and {b}?", style.format(a + b)) for a, b in pairs]


def review(draw: random.Random, label: str | None = None) -> str:
    label = draw.choice(LABELS) if label is None else label
    word = draw.choice(GOOD if label == "good" else BAD)
    return f"{draw.choice(SUBJECTS)} was {word} {draw.choice(TAILS)}"


def judged(draw: random.Random) -> Turns:
    label = draw.choice(LABELS)
    return [(disco.judge_prompt(review(draw, label), None, LABELS), label)]


def filled(draw: random.Random) -> Turns:
    """As a model does that knows such sentences: the blank is filled with what stood there, but for the word that makes the label."""
    label = draw.choice(LABELS)
    masked, span = disco.blanked(review(draw, label), str(draw.random()))
    other = {"good": "bad", "bad": "good"}[label]
    words = [draw.choice(GOOD if other == "good" else BAD) if word in GOOD + BAD else word for word in span.split()]
    return [(disco.fill_prompt(masked, None, other), " ".join(words))]


def instruction(draw: random.Random, kind: str = "") -> tuple[str, str]:
    words = draw.sample(WORDS, 3)
    if (kind or draw.choice(("hard", "easy"))) == "hard":
        return f"Say {words[0]} then {words[1]} then {words[2]}", " ".join(words)
    # Few words, so that two of them can differ enough to be no near-duplicates.
    return f"Turn {words[0]} and {words[1]} round", f"{words[1]} {words[0]}"


def followed(draw: random.Random) -> Turns:
    return [instruction(draw)]


def rated(draw: random.Random) -> Turns:
    """A right answer is worth 9, one that lacks a word 5, one of other words 1."""
    request, right = instruction(draw)
    answers, marks = [], []
    for _ in range(2):
        worth = draw.choice((9, 5, 1))
        some = right.split()
        answers.append({9: right, 5: " ".join(some[:-1]), 1: " ".join(draw.sample(WORDS, len(some)))}[worth])
        marks.append(worth)
    return [(lion.referee_prompt(request, *answers), f"{marks[0]} {marks[1]}")]


def invented(draw: random.Random) -> Turns:
    difficulty = draw.choice(("hard", "easy"))
    return [(lion.generate_prompt(instruction(draw)[0], difficulty), instruction(draw, difficulty)[0])]


TASKS: tuple[Callable[[random.Random], Turns], ...] = (
    plain, thought, thought, explained, explained, explained, split, styled, styled, judged, judged, filled, filled, followed, followed,
    followed, rated, rated, invented,
)  # fmt: skip


def fixed_sentences() -> list[str]:
    """Return the fixed text of the recipes' prompts."""
    marked = [
        lion.referee_prompt("@", "@", "@"), lion.generate_prompt("@", "hard"), lion.generate_prompt("@", "easy"),
        scott.explain_prompt("@", "@"), disco.fill_prompt("@", None, "@"), disco.judge_prompt("@", None, LABELS),
    ]  # fmt: skip
    pieces = {piece for text in marked for piece in text.split("@")} | {chain_of_thought.INSTRUCTION, socratic.INSTRUCTION}
    return sorted(piece for piece in pieces if len(piece) > 12)


def make_tokenizer() -> PreTrainedTokenizerFast:
    draw = random.Random(0)
    texts = [text for _ in range(200) for task in TASKS for turn in task(draw) for text in turn]
    fixed = fixed_sentences()
    for sentence in fixed:
        texts = [text.replace(sentence, "\n") for text in texts]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    roles = ["<user>", "<assistant>", "<system>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=640, special_tokens=["<pad>", "<end>", *roles], initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(texts, trainer)
    raw.add_tokens([AddedToken(sentence, normalized=False) for sentence in fixed])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", additional_special_tokens=roles)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, turns: Turns) -> tuple[list[int], int]:
    """Ids, and where the last answer begins."""
    messages = [m for question, answer in turns for m in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})]
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    given = tokenizer(prompt, add_special_tokens=False).input_ids
    return given + tokenizer(turns[-1][1] + "<end>", add_special_tokens=False).input_ids, len(given)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, batch: int, lr: float) -> float:
    """Cross-entropy on the last answers; the mean loss of the last tenth of the steps."""
    draw = random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        # Of like length, so that little is padding.
        rows = sorted((encode(tokenizer, draw.choice(TASKS)(draw)) for _ in range(batch)), key=lambda row: len(row[0]))
        total = torch.zeros(())
        count = sum(len(ids) - start for ids, start in rows)
        for part in (rows[: batch // 2], rows[batch // 2 :]):
            width = max(len(ids) for ids, _ in part)
            tokens = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in part])
            labels = torch.tensor([[-100] * (start - 1) + ids[start:] + [-100] * (width - len(ids) + 1) for ids, start in part])
            hidden = model.model(tokens, use_cache=False).last_hidden_state
            loss = kd.cross_entropy(kd.LMHead(hidden, model.lm_head.weight), labels, num_items=count)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(total))
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(out: Path, count: int) -> None:
    draw = random.Random(2)
    problems = list({p.text: p for p in (Problem(draw) for _ in range(4 * count))}.values())[: 2 * count + 2]
    sums = [{"prompt": p.text, "response": str(p.answer)} for p in problems]
    write(out / "sums.jsonl", list(sums[:count]))
    write(out / "sums-test.jsonl", list(sums[count : 2 * count]))
    write(out / "worked.jsonl", [{"prompt": p.text, "response": str(p.answer), "rationale": p.rationale()} for p in problems[-2:]])
    styles = {turn[0]: turn[1] for _ in range(4 * count) for turn in styled(draw, 0, STYLES[1])}
    write(out / "styles.jsonl", [{"prompt": question, "response": answer} for question, answer in styles.items()][:count])
    reviews = {review(draw, label): label for _ in range(count) for label in LABELS}
    write(out / "reviews.jsonl", [{"text": text, "label": label} for text, label in reviews.items()][: count // 2])
    write(out / "seeds.jsonl", [{"prompt": instruction(draw)[0]} for _ in range(count // 2)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=450, help="of the teacher's training")
    parser.add_argument("--rows", type=int, default=48, help="of each data file, about")
    given = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small gain nothing from a second core, and wait for it where it is busy
    started = time.perf_counter()
    tokenizer = make_tokenizer()
    teacher, student = make_model(tokenizer, 128, 2, seed=0), make_model(tokenizer, 64, 2, seed=1)
    loss = train(teacher, tokenizer, given.steps, batch=64, lr=4e-3)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(given.out / name)
        tokenizer.save_pretrained(given.out / name)
    write_data(given.out, given.rows)
    print(f"{given.out}: teacher with a loss of {loss:.3f} nats per token after {given.steps} steps, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
