"""Lion: find instructions that the student cannot follow yet, and generate more of them.

Jiang et al. 2023 (https://arxiv.org/abs/2305.12870), adversarial distillation of a closed model. A round:

1. imitate: the student learns the teacher's answers to the training pool (cross-entropy).
2. discriminate: a referee rates both models' answers to the cache pool, 1 to 10, in both orders, because it favours one position. With s
   the mean over the orders, an instruction is hard if ``s_teacher - s_student >= 1``, else easy.
3. generate: new instructions like the hard ones, and as many like the easy ones, against forgetting. Instructions whose ROUGE-L with an
   earlier one is above 0.7 are dropped. The others form the next training pool, and are added to the cache pool.

Each stage writes one JSONL file atomically, and replies are logged as they arrive, so that an interrupted round can be continued.
Left out: instructions with a separate input field (write both into the prompt); the paper's prompts (the wording here is ours).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..support.files import write_jsonl
from ..teachers.text import TextModel
from .near import Pool
from .rows import Item, RecipeError, Row, Sampling, Tally, ask, cut_short, fingerprint, read_jsonl
from .sequence import sequence_level

__all__ = ["Judged", "discriminate", "generate", "generate_prompt", "imitate", "instructions", "ratings", "referee_prompt", "stage"]

Difficulty = Literal["hard", "easy"]

_KIND_OF_NEW = {
    "hard": "of the same kind and field, at least as difficult",
    "easy": "from another field, rarer, about as difficult",
}
_RATING = re.compile(r"(?<![\d.])(10|\d)(\.\d+)?(?:\s*/\s*10)?(?![\d.]*\d)")


@dataclass(frozen=True)
class Judged:
    """An instruction with the mean rating of both models over the two orders."""

    instruction: str
    teacher: float
    student: float
    threshold: float = 1.0

    @property
    def difficulty(self) -> Difficulty:
        return "hard" if self.teacher - self.student >= self.threshold else "easy"


def files_of(out: Path) -> list[str]:
    """Return the names, below ``out``, of the files of all rounds so far and of the next one."""
    number, _ = stage(out)
    files = ("settings.json", "imitate.jsonl", "judged.jsonl", "generated.jsonl")
    return ["settings.json", *(f"{folder_of(Path(), n)}/{name}" for n in range(number + 2) for name in files)]


def folder_of(out: Path, number: int) -> Path:
    return out / f"round-{number}"


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a folder, or check that they are those of the existing folder.

    Raises:
        RecipeError: a setting has changed.
    """
    path = folder / "settings.json"
    if not path.exists():
        write_jsonl(path, [settings])
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if before.get(name) != value:
            raise RecipeError(
                f"{folder}: it was begun with {name} = {before.get(name)!r}, not {value!r}: take another folder, or the same setting"
            )


def weights_of(student: str) -> str:
    """Return the identity of a trained student: its path, and size and time of its weights, which change if it is replaced."""
    files = sorted(Path(student).glob("*.safetensors"))
    return fingerprint([student, [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]])


def student_of(out: Path, number: int) -> str | None:
    """Return the ``weights_of`` the student of a round."""
    path = folder_of(out, number) / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")).get("student") if path.exists() else None


def stage(out: Path) -> tuple[int, str]:
    """Return the number of the next round, and its next step: ``imitate``, or ``student`` (one trained on its ``imitate.jsonl``)."""
    number = 0
    while (folder_of(out, number) / "generated.jsonl").exists():
        number += 1
    return number, "student" if (folder_of(out, number) / "imitate.jsonl").exists() else "imitate"


def instructions(seeds: Sequence[str], out: Path, number: int) -> tuple[list[str], list[str]]:
    """Return training pool and cache pool of a round: the last round's new instructions (at first the seeds), and all so far."""
    pool, latest = list(dict.fromkeys(seeds)), list(dict.fromkeys(seeds))
    for n in range(number):
        latest = [row["instruction"] for _, row in read_jsonl(folder_of(out, n) / "generated.jsonl")]
        pool += latest
    return latest, pool


def imitate(
    train: Sequence[str], teacher: TextModel, out: Path, number: int, sampling: Sampling, *, chat: bool = True
) -> tuple[list[Row], Tally]:
    """Write rows with the teacher's answers to ``imitate.jsonl``, for training the student."""
    rows, tally = sequence_level([_item(i) for i in train], teacher, out / "teacher.jsonl", sampling, chat=chat)
    if not rows:
        raise RecipeError(f"round {number}: no usable answer of the teacher to {len(train)} instructions ({dict(tally.dropped)})")
    write_jsonl(folder_of(out, number) / "imitate.jsonl", rows)
    return rows, tally


def discriminate(
    cache: Sequence[str],
    teacher: TextModel,
    student: TextModel,
    referee: TextModel,
    out: Path,
    number: int,
    *,
    answering: Sampling,
    rating: Sampling,
    threshold: float = 1.0,
) -> tuple[list[Judged], Tally]:
    """Rate both models' answers in both orders, and write the ratings to ``judged.jsonl``.

    Instructions without a usable answer of the teacher, or without two ratings in each order, are dropped.
    """
    folder = folder_of(out, number)
    prompted = [(_item(i).key, _item(i).messages) for i in cache]
    tally, usable = Tally(rows=len(cache), candidates=len(cache)), []
    for instruction, prompt, (reply,) in zip(cache, prompted, ask(teacher, out / "teacher.jsonl", prompted, answering), strict=True):
        if reason := cut_short(reply) or (None if reply.text.strip() else "empty"):
            tally.drop(f"the teacher's answer is {reason}")
        else:
            usable.append((instruction, prompt, reply.text.strip()))
    student_answers = [
        reply.text.strip() for (reply,) in ask(student, folder / "student.jsonl", [prompt for _, prompt, _ in usable], answering)
    ]
    prompts = []
    for (instruction, (key, _), teacher_answer), answer in zip(usable, student_answers, strict=True):
        prompts += [
            (f"{key}/teacher first", [_user(referee_prompt(instruction, teacher_answer, answer))]),
            (f"{key}/student first", [_user(referee_prompt(instruction, answer, teacher_answer))]),
        ]
    replies = ask(referee, folder / "referee.jsonl", prompts, rating, replaceable=True)
    judged = []
    for n, (instruction, _, _) in enumerate(usable):
        first, second = ratings(replies[2 * n][0].text), ratings(replies[2 * n + 1][0].text)
        if first is None or second is None:
            tally.drop("no two ratings by the referee")
        else:
            judged.append(Judged(instruction, (first[0] + second[1]) / 2, (first[1] + second[0]) / 2, threshold))
    tally.kept = len(judged)
    if not judged and not usable:
        raise RecipeError(f"round {number}: the teacher gave no usable answer to {len(cache)} instructions ({dict(tally.dropped)})")
    if not judged:
        raise RecipeError(
            f"round {number}: the referee gave no two ratings for any of {len(usable)} instructions; see {folder}/referee*.jsonl. Give "
            "another --referee or --referee-url: the same command goes on in this folder"
        )
    rows = [{"instruction": j.instruction, "teacher": j.teacher, "student": j.student, "difficulty": j.difficulty} for j in judged]
    write_jsonl(folder / "judged.jsonl", rows)
    return judged, tally


def generate(
    judged: Sequence[Judged],
    cache: Sequence[str],
    generator: TextModel,
    out: Path,
    number: int,
    sampling: Sampling,
    *,
    count: int,
    seed: int = 0,
    threshold: float = 0.7,
    tries: int = 4,
) -> tuple[list[str], Tally]:
    """Write ``count`` new instructions to ``generated.jsonl``: half like hard ones, half like easy ones.

    At most ``tries * count`` are requested, so there may be fewer. Without hard (easy) instructions, all are like the others.

    Raises:
        RecipeError: there is not a single new instruction.
    """
    folder = folder_of(out, number)
    pool, tally = Pool(cache, threshold), Tally(rows=len(judged))
    by: dict[Difficulty, list[str]] = {d: [j.instruction for j in judged if j.difficulty == d] for d in ("hard", "easy")}
    wanted: dict[Difficulty, int] = {"hard": count - count // 2, "easy": count // 2}
    if not by["hard"] or not by["easy"]:
        wanted = {d: count if by[d] else 0 for d in by}
    new: list[Row] = []
    for difficulty, number_wanted in wanted.items():
        draw = random.Random(f"{seed}/{number}/{difficulty}")
        accepted = 0
        for attempt in range(tries):
            if accepted == number_wanted:
                break
            # Each attempt asks for as many as were wanted at first: the keys stay the same whatever came of them.
            models = [draw.choice(by[difficulty]) for _ in range(number_wanted)]
            prompts = [(f"{difficulty}/{attempt}/{n}", [_user(generate_prompt(m, difficulty))]) for n, m in enumerate(models)]
            for model, replies in zip(models, ask(generator, folder / "generator.jsonl", prompts, sampling), strict=True):
                tally.candidates += 1
                text = replies[0].text.strip()
                if accepted == number_wanted:
                    tally.drop("more than were wanted")
                elif reason := cut_short(replies[0]) or _useless(text):
                    tally.drop(reason)
                elif not pool.add(text):
                    tally.drop(f"ROUGE-L above {threshold:g} to another instruction")
                else:
                    new.append({"instruction": text, "like": model, "difficulty": difficulty})
                    accepted += 1
    tally.kept = len(new)
    if not new:
        raise RecipeError(f"round {number}: no new instruction among {tally.candidates} of the generator ({dict(tally.dropped)})")
    write_jsonl(folder / "generated.jsonl", new)
    return [row["instruction"] for row in new], tally


def referee_prompt(instruction: str, first: str, second: str) -> str:
    return (
        f"Instruction: {instruction}\nFirst answer: {first}\nSecond answer: {second}\n"
        "Rate how helpful, relevant, accurate and detailed each answer is, from 1 to 10. Begin with a line of the two ratings alone."
    )


def generate_prompt(instruction: str, difficulty: Difficulty) -> str:
    return f"Instruction: {instruction}\nWrite one new instruction {_KIND_OF_NEW[difficulty]}. Write only the instruction."


def ratings(reply: str) -> tuple[float, float] | None:
    """Return the two ratings in [1, 10] on the first line that is not empty; None unless there are exactly two."""
    first = next((line for line in reply.splitlines() if line.strip()), "")
    numbers = [float(whole + part) for whole, part in _RATING.findall(first)]
    return (numbers[0], numbers[1]) if len(numbers) == 2 and all(1 <= f <= 10 for f in numbers) else None


def _useless(text: str) -> str | None:
    if len(text.split()) <= 3:
        return "three words or fewer"
    if not text[0].isalnum():
        return "begins with punctuation"
    return None


def _item(instruction: str) -> Item:
    return Item(fingerprint(instruction), (_user(instruction),))


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
