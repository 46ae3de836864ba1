"""Lion: ratings in both orders, hard and easy instructions, new instructions, and interrupted loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Killed, Scripted, last
from typer.testing import CliRunner

from kdkernels import cli

pytest.importorskip("rapidfuzz")  # near-duplicates; part of the extra [train]

from kdkernels.cli.recipes.shared import Teacher
from kdkernels.recipes import lion
from kdkernels.recipes.near import rouge_l
from kdkernels.recipes.rows import RecipeError, Sampling, read_jsonl
from kdkernels.teachers.text import Reply, Request

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
SEEDS = [f"Describe the colour of thing number {n}" for n in range(6)]


@pytest.mark.parametrize(
    ("reply", "ratings"),
    [
        ("8 5", (8, 5)),
        ("\n  8.5, 10\nThe first is better, 9 at best.", (8.5, 10)),
        ("8/10 and 7/10", (8, 7)),
        ("First: 8, second: 7.", (8, 7)),
        ("8", None),
        ("8 7 6", None),
        ("11 5", None),
        ("0 5", None),
        ("85 5", None),
        ("Both are good.\n8 5", None),
        ("", None),
    ],
)
def test_ratings_are_read_from_the_first_line(reply: str, ratings: tuple[float, float] | None) -> None:
    assert lion.ratings(reply) == ratings


@given(st.integers(1, 10), st.integers(1, 10))
def test_ratings_are_read_in_every_style(a: int, b: int) -> None:
    for form in ("{} {}", "{},{}", "{}/10, {}/10", "**{}** **{}**", "Ratings: {} {}."):
        assert lion.ratings(form.format(a, b)) == (a, b)


def judged_by(referee: Any, tmp_path: Path) -> tuple[list[lion.Judged], Any]:
    teacher, student = Scripted(lambda _: "GOOD"), Scripted(lambda _: "poor")
    return lion.discriminate(SEEDS, teacher, student, Scripted(referee), tmp_path, 0, answering=Sampling(), rating=Sampling())


def test_preference_for_the_first_answer_cancels_out(tmp_path: Path) -> None:
    judged, tally = judged_by(lambda _: "9 3", tmp_path)
    assert {(j.teacher, j.student, j.difficulty) for j in judged} == {(6, 6, "easy")}
    assert tally.kept == len(SEEDS)


def test_hard_means_a_mean_difference_of_at_least_one(tmp_path: Path) -> None:
    def referee(request: Request) -> str:
        number = int(last(request).split("\n")[0][-1])
        teacher_first = last(request).index("GOOD") < last(request).index("poor")
        # Differences in the two orders. The last referee gives no ratings in the second order.
        first, second = [(1, 1), (1, 0), (2, 0), (0, 2), (-1, -1), (3, None)][number]
        gap = first if teacher_first else second
        if gap is None:
            return "I cannot say"
        return f"{5 + gap} 5" if teacher_first else f"5 {5 + gap}"

    judged, tally = judged_by(referee, tmp_path)
    assert [j.difficulty for j in judged] == ["hard", "easy", "hard", "hard", "easy"]
    assert [j.teacher - j.student for j in judged] == [1, 0.5, 1, 1, -1]
    assert tally.dropped == {"no two ratings by the referee": 1}
    rows = [row for _, row in read_jsonl(tmp_path / "round-0" / "judged.jsonl")]
    assert [row["difficulty"] for row in rows] == ["hard", "easy", "hard", "hard", "easy"]


def test_referee_without_ratings_raises(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no two ratings for any of 6 instructions"):
        judged_by(lambda _: "fine", tmp_path)
    assert not (tmp_path / "round-0" / "judged.jsonl").exists()


def new_instruction(request: Request) -> str:
    """Return an instruction of six words that differs from all others."""
    kind, attempt, number = request.key.split("/")[:3]
    return " ".join(f"{word}{kind}{attempt}{number}" for word in ("Write", "some", "poem", "about", "blue", "boats"))


JUDGED = [lion.Judged(SEEDS[0], 9, 2), lion.Judged(SEEDS[1], 9, 3), lion.Judged(SEEDS[2], 5, 5)]


def test_new_instructions_are_half_hard_half_easy(tmp_path: Path) -> None:
    generator = Scripted(new_instruction)
    new, tally = lion.generate(JUDGED, SEEDS, generator, tmp_path, 0, Sampling(temperature=1.0), count=5)
    rows = [row for _, row in read_jsonl(tmp_path / "round-0" / "generated.jsonl")]
    assert [row["difficulty"] for row in rows] == ["hard"] * 3 + ["easy"] * 2
    assert {row["like"] for row in rows[:3]} <= {SEEDS[0], SEEDS[1]}
    assert {row["like"] for row in rows[3:]} == {SEEDS[2]}
    assert [row["instruction"] for row in rows] == new
    assert (tally.kept, len(generator.requests)) == (5, 5)
    only_hard, _ = lion.generate(JUDGED[:2], SEEDS, generator, tmp_path, 1, Sampling(temperature=1.0), count=4)
    assert len(only_hard) == 4


def test_short_cut_and_near_duplicate_instructions_are_dropped(tmp_path: Path) -> None:
    texts = ["too short now", "?what is this then", SEEDS[5], SEEDS[5] + " please", "A wholly other request for you", "cut off in the"]

    def answer(request: Request) -> Reply:
        number = int(request.key.split("/")[2])
        return Reply(request.key, texts[number], "length" if number == 5 else "stop")

    new, tally = lion.generate(JUDGED[:2], SEEDS, Scripted(answer), tmp_path, 0, Sampling(), count=6, tries=2)
    assert new == [texts[4]]
    assert tally.dropped == {
        "three words or fewer": 2, "begins with punctuation": 2, "ROUGE-L above 0.7 to another instruction": 5, "cut off at max_tokens": 2
    }  # fmt: skip
    assert tally.candidates == tally.kept + sum(tally.dropped.values()) == 12
    with pytest.raises(RecipeError, match="no new instruction among 24"):
        lion.generate(JUDGED[:2], SEEDS, Scripted(lambda _: SEEDS[0]), tmp_path, 1, Sampling(), count=6)
    assert not (tmp_path / "round-1" / "generated.jsonl").exists()


class Loop:
    """Run the command with scripted models. With a ``budget``, ``Killed`` is raised after that many requests."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out = tmp_path / "lion"
        self.data = tmp_path / "seeds.jsonl"
        self.data.write_text("".join(json.dumps({"prompt": s}) + "\n" for s in SEEDS))
        self.requests = 0
        self.budget: int | None = None
        monkeypatch.setattr(Teacher, "_load", lambda _, path, *__: self.model(path))

    def model(self, path: str) -> Scripted:
        if path == "missing":
            raise RecipeError("no folder of a transformers model")
        return Scripted(lambda request: self.answer(path, request))

    def answer(self, path: str, request: Request) -> str:
        if self.budget is not None and self.requests >= self.budget:
            raise Killed
        self.requests += 1
        text = last(request)
        if "Rate how" in text:
            gap = text.count("7") or 0
            return f"{4 + gap} 4" if "First answer: teacher:" in text else f"4 {4 + gap}"
        if "Write one new" in text:
            return new_instruction(request)
        return f"{path}: {text}"

    def __call__(self, *arguments: str) -> Any:
        return runner.invoke(
            cli.app,
            ["recipe", "lion", "--data", str(self.data), "--out", str(self.out), "--teacher", "teacher", "--count", "4", *arguments],
            catch_exceptions=not self.budget,
        )

    def files(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.out)): p.read_bytes() for p in sorted(self.out.rglob("*")) if p.is_file()}


def test_two_rounds_write_one_file_for_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tmp_path, monkeypatch)
    result = loop()
    assert result.exit_code == 0, result.output
    assert [row["response"] for _, row in read_jsonl(loop.out / "round-0" / "imitate.jsonl")] == [f"teacher: {s}" for s in SEEDS]
    assert "Train the student on" in result.output
    before = loop.requests
    assert "Train the student on" in loop().output
    assert loop.requests == before
    assert loop("--student", "student").exit_code == 0
    assert {p.name for p in (loop.out / "round-0").iterdir()} == {
        "imitate.jsonl", "student.jsonl", "referee.jsonl", "judged.jsonl", "generator.jsonl", "generated.jsonl", "settings.json"
    }  # fmt: skip
    new = [row["instruction"] for _, row in read_jsonl(loop.out / "round-0" / "generated.jsonl")]
    assert [row["messages"][0]["content"] for _, row in read_jsonl(loop.out / "round-1" / "imitate.jsonl")] == new
    assert max(rouge_l(a, b) for a in new for b in SEEDS) <= 0.7
    # The student of this round must be a new one, trained on the last round's rows.
    result = loop("--student", "student")
    assert "is done with this student" in result.output
    assert not (loop.out / "round-1" / "generated.jsonl").exists()
    (tmp_path / "student2").mkdir()
    assert loop("--student", str(tmp_path / "student2")).exit_code == 0
    judged = [row["instruction"] for _, row in read_jsonl(loop.out / "round-1" / "judged.jsonl")]
    assert judged == SEEDS + new
    assert lion.stage(loop.out) == (2, "student")


def test_killed_and_repeated_loop_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = Loop(tmp_path / "a", monkeypatch)
    assert whole().exit_code == whole("--student", "s").exit_code == 0
    expected, total = whole.files(), whole.requests
    loop = Loop(tmp_path / "b", monkeypatch)
    kills = 0
    for arguments in ((), ("--student", "s")):
        while True:
            loop.budget = loop.requests + 5
            try:
                assert loop(*arguments).exit_code == 0
                break
            except Killed:
                kills += 1
    assert kills >= 5
    assert loop.files() == expected
    assert loop.requests == total


def test_other_settings_and_another_student_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tmp_path, monkeypatch)
    assert loop().exit_code == 0
    result = loop("--seed", "1")
    assert result.exit_code == 2
    assert "it was begun with seed = 0, not 1" in result.output
    loop.budget = loop.requests + 8
    with pytest.raises(Killed):
        loop("--student", "one")
    loop.budget = None
    result = loop("--student", "two")
    assert result.exit_code == 2
    assert "it was begun with student =" in result.output
    assert loop("--student", "one").exit_code == 0


def test_killed_round_continues_with_imitation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tmp_path, monkeypatch)
    assert loop().exit_code == loop("--student", "s").exit_code == 0
    (loop.out / "round-1" / "imitate.jsonl").unlink()
    expected = loop.files()
    assert loop("--student", "s").exit_code == 0
    assert {name: data for name, data in loop.files().items() if name != "round-1/imitate.jsonl"} == expected
    assert lion.stage(loop.out) == (1, "student")


def test_missing_student_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tmp_path, monkeypatch)
    assert loop().exit_code == 0
    result = loop("--student", "missing")
    assert (result.exit_code, "no folder of a transformers model" in result.output) == (2, True)
    assert loop("--student", "s").exit_code == 0


@pytest.mark.parametrize("option", [("--count", "0"), ("--rouge", "1"), ("--rouge", "0")])
def test_invalid_options_of_lion_raise_before_any_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: tuple[str, str]) -> None:
    loop = Loop(tmp_path, monkeypatch)
    result = loop(*option)
    assert (result.exit_code, option[0] in result.output, loop.requests) == (2, True, 0)
    assert not loop.out.exists()


def test_each_model_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tmp_path, monkeypatch)
    output = " ".join(loop().output.split())
    assert "6/6 replies in teacher.jsonl" in output
    assert "teacher: 6 replies (0 from the log), 0 retries" in output
    output = " ".join(loop("--student", "s").output.split())
    for bar in ("6/6 replies in student.jsonl", "12/12 replies in referee.jsonl", "4/4 replies in generator.jsonl"):
        assert bar in output
    assert "student: 6 replies (0 from the log)" in output
    assert "referee:" not in output, "the teacher is also the referee and is named once"
