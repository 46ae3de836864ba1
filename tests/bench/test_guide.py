"""The guide's experiment: data, student, held-out metrics, comparison at equal steps and equal time, and transcripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from training import make_model
from transformers import AutoModelForCausalLM

from benchmarks import report
from benchmarks.learning import comparison, guide, pair, sentences
from kdkernels.data.example import Example


def test_training_and_held_out_sentences_share_no_pair() -> None:
    train, held_out = sentences.sentences()
    assert (len(set(train)), len(set(held_out))) == (sentences.TRAIN, sentences.HELD_OUT)

    def pairs(side: list[str]) -> set[tuple[str, str]]:
        words = [sentence.replace(".", "").replace(",", "").split() for sentence in side]
        return {(next(w for w in row if w in sentences.COLOURS), next(w for w in row if w in sentences.THINGS)) for row in words}

    assert not pairs(train) & pairs(held_out)
    assert sentences.sentences() == (train, held_out)


def test_only_the_teachers_prompt_has_the_example(tmp_path: Path) -> None:
    sentences.write_prompts(tmp_path)
    row = json.loads((tmp_path / "held-out-prompts.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert [turn["role"] for turn in row["messages"]] == ["system", "user"]
    assert row["teacher_messages"] == [*sentences.EXAMPLE, row["messages"][1]]


def test_student_has_evenly_spread_layers_of_the_teacher(tmp_path: Path) -> None:
    assert sentences.spread(4, 30) == [0, 10, 19, 29]
    teacher, tokenizer = make_model(32, 5, 64, intermediate_size=64), tiny.tokenizer()
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="expected 2 to 5"):
        sentences.make_student(tmp_path / "teacher", tmp_path / "student", 6)
    sentences.make_student(tmp_path / "teacher", tmp_path / "student", 3)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    for index, layer in zip((0, 2, 4), student.model.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(teacher.model.layers[index].parameters(), layer.parameters(), strict=True))
    student.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)  # generation needs a cache entry for each layer


def greedy_examples(model: Any) -> list[Example]:
    """Return the model's greedy answers, and the same answers with another last token."""
    model.generation_config.eos_token_id = None
    prompts = [torch.tensor([[first, first + 3, first + 1]]) for first in range(3, 7)]
    answers = [model.generate(prompt, max_new_tokens=4, do_sample=False)[0].tolist() for prompt in prompts]
    answers += [[*ids[:-1], (ids[-1] + 1) % model.config.vocab_size] for ids in answers]
    return [Example(ids, range(2, 6), [7, *ids], range(3, 7)) for ids in answers]


@torch.no_grad()
def test_exact_match_equals_greedy_decoding() -> None:
    student, teacher = tiny.model(64, seed=0).eval(), tiny.model(64, seed=1).eval()
    examples = greedy_examples(student)
    figures = pair.HeldOut(examples, teacher).measure(student)
    assert figures[comparison.EXACT] == 50.0
    q, p = (
        torch.cat([
            model(torch.tensor([list(getattr(e, f"{view}_ids"))])).logits[0, list(getattr(e, f"{view}_scored"))].log_softmax(-1)
            for e in examples
        ])
        for model, view in ((student, "student"), (teacher, "teacher"))
    )  # fmt: skip
    assert figures[comparison.KL] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-3)


def curve(*seconds: float, exact: float) -> list[dict[str, float]]:
    """Return a curve whose exact match rises linearly from 0 to ``exact``."""
    share = [index / (len(seconds) - 1) for index in range(len(seconds))]
    return [
        {"step": 16.0 * i, comparison.CPU: t, comparison.EXACT: s * exact, comparison.CE: 1 - s, comparison.KL: 1 - s}
        for i, (t, s) in enumerate(zip(seconds, share, strict=True))
    ]


def test_metrics_at_a_time_are_interpolated() -> None:
    slow = curve(0.0, 10.0, 30.0, exact=80.0)
    assert comparison.at_time(slow, 20.0)[comparison.EXACT] == pytest.approx(60.0)
    assert comparison.at_time(slow, 30.0)[comparison.EXACT] == comparison.at_time(slow, 99.0)[comparison.EXACT] == 80.0


def test_equal_time_is_the_time_of_the_fastest_run() -> None:
    record = {"curves": [{"cross-entropy": curve(0.0, 10.0, exact=50.0), "slow": curve(0.0, 20.0, exact=80.0)}]}
    assert comparison.equal_steps(record)[0]["slow"][comparison.EXACT] == 80.0
    (run,) = comparison.equal_time(record)
    assert run["cross-entropy"][comparison.EXACT] == 50.0
    assert run["slow"][comparison.EXACT] == pytest.approx(40.0)


def test_gain_is_divided_by_the_deviation_of_the_difference() -> None:
    runs = [{"cross-entropy": {comparison.CE: 2.0 + d}, "better": {comparison.CE: 1.0 - d}} for d in (-0.1, 0.0, 0.1)]
    assert comparison.gains(runs, comparison.CE)["better"] == pytest.approx(1.0 / 0.02**0.5)


def test_table_shows_how_many_seeds_a_method_has() -> None:
    runs = [{"cross-entropy": curve(0.0, 10.0, exact=exact)} for exact in (50.0, 40.0)]
    runs[0]["slow"] = curve(0.0, 20.0, exact=80.0)
    record = {"environment": {"cpu": "a CPU", "torch": "2", "date": "2026-01-01"}, "curves": runs, "sweeps": {}}
    blocks = comparison.blocks(record)
    assert "| cross-entropy | 45.0 ± 7.1 |" in blocks["guide equal steps"]()
    assert "| slow | 80.0 (1 of 2 seeds) |" in blocks["guide equal steps"]()
    assert blocks["guide gains"]() == "Not known yet: a deviation needs two seeds."


def test_exact_match_compares_stripped_texts() -> None:
    texts = [["a", "b"], ["a ", "a"]]
    rows = [{"response": "a", "texts": [{"model": f"m{i}", "text": text} for i, text in enumerate(row)]} for row in texts]
    assert guide.exact_match(rows) == {"m0": 100.0, "m1": 50.0}


def test_transcript_shows_command_and_final_output() -> None:
    assert guide.printed("10 %\r100 %  \n\n\x1b[1mdone\x1b[0m\n") == "100 %\ndone"
    step = {"name": "x", "command": "kdkernels train --a 1 --b 2", "printed": "done", "seconds": 3, "CPU seconds": 2}
    assert guide.transcript({"steps": [step]}, "x") == (
        "```sh\nkdkernels train --a 1 --b 2\n```\n\n```text\ndone\n```\n\n3 s by the clock, 2 s of CPU time."
    )
    assert guide.wrapped("kdkernels train --a 1 --b 2", width=22) == "kdkernels train --a 1 \\\n    --b 2"


def test_transcript_of_a_training_shows_first_and_last_logs() -> None:
    logs = [f"step {number} of 90: loss 1" for number in range(10, 100, 10)]
    step = {"name": "x", "command": "true", "printed": "\n".join(["before", *logs, "after"]), "seconds": 3, "CPU seconds": 2}
    lines = guide.transcript({"steps": [step]}, "x").split("```text\n")[1].split("\n```")[0].split("\n")
    assert lines == ["before", *logs[:2], "...", logs[-1], "after"]


def test_guide_shows_the_committed_results() -> None:
    root = Path(guide.__file__).parents[2]
    page = (root / "docs" / "guide.md").read_text(encoding="utf-8")
    redrawn, stale = report.redraw_text("docs/guide.md", page, {}, report.other_blocks(root / "benchmarks" / "results"))
    assert (stale, redrawn) == ([], page)
    names = {step.name for step in guide.steps(6, 4, 5e-4)}
    assert all(f"<!-- bench: guide {name} -->" in page for name in names)
