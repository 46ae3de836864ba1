"""Judges and referees: missing verdicts do not count, agreement is reported, and a failed judge can be replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from scripted import Scripted, last
from typer.testing import CliRunner

from kdkernels import cli

pytest.importorskip("rapidfuzz")  # near-duplicates; part of the extra [train]

from kdkernels.cli.recipes.shared import Teacher, option_of
from kdkernels.recipes import disco, lion
from kdkernels.recipes.rows import Item, RecipeError, Sampling, Tally, ask, cut_short, once_each, read_jsonl
from kdkernels.teachers.local import LocalModel
from kdkernels.teachers.text import REFUSED, Reply, Request

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
LABELS = ["good", "bad"]


def texts(count: int, label: str = "good") -> list[Item]:
    return [
        Item(f"k{n}", ({"role": "user", "content": ""},), None, {"text": f"film {n} was fine", "label": label}, f"row {n}")
        for n in range(count)
    ]


def judged_text(request: Request) -> str:
    return last(request).split("\n")[0].removeprefix("Text: ")


def run(
    judge: Callable[[Request], str], tmp_path: Path, votes: int = 1, count: int = 1
) -> tuple[list[disco.Counterfactual], Tally, Scripted]:
    model = Scripted(judge)
    counterfactuals, tally = disco.counterfactuals(
        texts(count), LABELS, Scripted(lambda _: "NEW words"), model, tmp_path,
        filling=Sampling(), judging=Sampling(temperature=1.0 if votes > 1 else 0.0, samples=votes),
    )  # fmt: skip
    return counterfactuals, tally, model


# Missing verdicts


def test_missing_verdict_on_the_original_drops_all_its_pairs(tmp_path: Path) -> None:
    counterfactuals, tally, model = run(lambda request: "bad" if "NEW" in judged_text(request) else "I cannot say", tmp_path)
    assert (counterfactuals, tally.dropped) == ([], {"the judge names no label for the original text": 1})
    assert len(model.requests) == 1, "the new text is not judged"


def test_missing_verdicts_on_new_texts_are_counted_separately(tmp_path: Path) -> None:
    counterfactuals, tally, _ = run(lambda request: "hm" if "NEW" in judged_text(request) else "good", tmp_path)
    assert (counterfactuals, tally.dropped) == ([], {"the judge names no label for the new text": 1})


@pytest.mark.parametrize(
    ("verdicts", "count"),
    [(["bad", "bad", "bad"], 1), (["bad", "bad", "?"], 1), (["bad", "?", "?"], 0), (["bad", "good", "?"], 0), (["?", "?", "?"], 0)],
)
def test_votes_without_a_label_do_not_count_unless_they_are_the_majority(tmp_path: Path, verdicts: list[str], count: int) -> None:
    def judge(request: Request) -> str:
        return verdicts[int(request.key.split("/")[-2])] if "NEW" in judged_text(request) else "good"

    counterfactuals, tally, _ = run(judge, tmp_path, votes=3)
    assert len(counterfactuals) == count
    assert tally.candidates == tally.kept + sum(tally.dropped.values())


# Agreement


def test_agreement_with_the_given_labels_is_counted(tmp_path: Path) -> None:
    def judge(request: Request) -> str:
        return "bad" if "NEW" in judged_text(request) else {"1": "bad", "2": "hm"}.get(judged_text(request).split()[1], "good")

    _, tally, _ = run(judge, tmp_path, count=6)
    assert (tally.agreed, tally.judged) == (4, 6)


@pytest.mark.parametrize(
    ("agreed", "judged", "warns"), [(20, 40, True), (40, 40, False), (4, 4, False), (2, 4, True), (0, 3, True), (36, 40, False)]
)
def test_agreement_at_chance_is_detected(agreed: int, judged: int, warns: bool) -> None:
    assert disco.at_chance(Tally(agreed=agreed, judged=judged), LABELS) == warns


@pytest.mark.parametrize(("answer", "warns"), [("good", False), ("bad", True)])
def test_disco_command_reports_agreement_and_warns_at_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, warns: bool
) -> None:
    def reply(request: Request) -> str:
        if "Fill the blank" in last(request):
            return "NEW"
        return "bad" if "NEW" in judged_text(request) else answer

    monkeypatch.setattr(Teacher, "_load", lambda *_: Scripted(reply))
    data = tiny.write(tmp_path / "d.jsonl", [{"text": f"film {n} was fine", "label": "good"} for n in range(8)])
    result = runner.invoke(
        cli.app, ["recipe", "disco", "--data", str(data), "--labels", "good,bad", "--out", str(tmp_path / "out"), "--teacher", "t"]
    )
    output = " ".join(result.output.split())
    assert f"The judge agrees with {0 if warns else 8} of 8 labels of the data ({'0' if warns else '100'}%)" in output
    assert ("guesses would agree as often" in output) == warns
    assert "--threshold" in output or not warns, "the reason for a drop names its option"


# Replacing a referee


def test_failed_referee_is_replaced_in_the_same_folder(tmp_path: Path) -> None:
    """Use a real model's log, which contains the model's name."""
    seeds = [f"Describe thing number {n}" for n in range(3)]
    teacher, student = Scripted(lambda _: "A good answer."), Scripted(lambda _: "poor")

    class Referee(LocalModel):
        def __init__(self, name: str, verdict: str) -> None:
            super().__init__(tiny.model(312), tiny.tokenizer(), name=name)
            self.verdict, self.count = verdict, 0

        def _generate(self, batch: Any) -> Any:
            self.count += len(batch)
            replies = super()._generate(batch)
            for reply in replies:
                reply.text = self.verdict
            return replies

    def judge(referee: Any) -> list[lion.Judged]:
        return lion.discriminate(seeds, teacher, student, referee, tmp_path, 0, answering=Sampling(), rating=Sampling(4))[0]

    failed, better = Referee("failed", "no idea"), Referee("better", "8 4")
    with pytest.raises(RecipeError, match="another --referee or --referee-url: the same command goes on in this folder"):
        judge(failed)
    with pytest.warns(UserWarning, match=r"referee\.jsonl holds replies of another model or seed: .* in referee-2\.jsonl"):
        judged = judge(better)
    assert [j.difficulty for j in judged] == ["easy"] * 3
    with pytest.warns(UserWarning, match="referee-2"):
        judge(better)
    assert (failed.count, better.count) == (6, 6), "no request is repeated"
    with pytest.raises(RecipeError):
        judge(failed)
    assert failed.count == 6


# Rated instructions


def test_instructions_without_a_teachers_answer_are_not_rated(tmp_path: Path) -> None:
    seeds = [f"Describe thing number {n}" for n in range(4)]

    def teach(request: Request) -> Reply:
        number = int(last(request)[-1])
        return Reply(request.key, ["A whole answer.", "cut in the", "", "whole"][number], ["stop", "length", "stop", "stop"][number])

    student, referee = Scripted(lambda _: "poor"), Scripted(lambda _: "7 7")
    judged, tally = lion.discriminate(
        seeds, Scripted(teach), student, referee, tmp_path, 0, answering=Sampling(), rating=Sampling()
    )  # fmt: skip
    assert [j.instruction for j in judged] == [seeds[0], seeds[3]]
    assert (len(student.requests), len(referee.requests)) == (2, 4)
    assert tally.dropped == {"the teacher's answer is cut off at max_tokens": 1, "the teacher's answer is empty": 1}
    with pytest.raises(RecipeError, match="no usable answer to 4 instructions"):
        lion.discriminate(
            seeds, Scripted(lambda _: ""), student, referee, tmp_path / "b", 0, answering=Sampling(), rating=Sampling()
        )  # fmt: skip


# Reasons for drops


def test_cut_replies_have_one_reason() -> None:
    assert cut_short(Reply("k", "text", "length")) == "cut off at max_tokens"
    assert cut_short(Reply("k", "text", "content_filter")) == "cut off (finish_reason content_filter)"
    assert cut_short(Reply("k", "", REFUSED)) == "refused by the server"
    assert cut_short(Reply("k", "text", "stop")) is None


@pytest.mark.parametrize(
    ("reason", "option"),
    [
        ("cut off at max_tokens", "--max-tokens"), ("the teacher's answer is cut off at max_tokens", "--max-tokens"),
        ("label moved by 0.5 or less", "--threshold"), ("more than 3 rationales", "--most"), ("more than were wanted", "--count"),
        ("ROUGE-L above 0.7 to another instruction", "--rouge"), ("empty", ""),
        ("no alternating questions and answers", "--samples, --teacher"), ("no rationale before the answer", "--instruction, --samples"),
        ("blank left empty", "--samples, --teacher"), ("nothing changed", "--samples, --teacher"),
    ],
)  # fmt: skip
def test_reasons_for_drops_name_their_option(reason: str, option: str) -> None:
    assert option_of(reason) == option


def test_log_stores_the_finish_reason_of_a_rationale(tmp_path: Path) -> None:
    def make(keys: list[str]) -> list[dict[str, Any]]:
        return [{"text": "", "finish_reason": "length"} if key == "b" else {"text": key} for key in keys]

    first = once_each(tmp_path / "log.jsonl", ["a", "b"], make)
    again = once_each(tmp_path / "log.jsonl", ["a", "b"], lambda keys: [])
    assert [(entry["text"], entry.get("finish_reason")) for entry in first] == [
        (entry["text"], entry.get("finish_reason")) for entry in again
    ]
    (tmp_path / "old.jsonl").write_text(json.dumps({"key": "a/0123456789ab", "text": "of an earlier version"}) + "\n")
    assert once_each(tmp_path / "old.jsonl", ["a/0123456789ab"], make)[0]["text"] == "of an earlier version"
    assert [row["key"] for _, row in read_jsonl(tmp_path / "log.jsonl")] == ["a", "b"]


def test_logs_of_other_roles_are_not_replaced(tmp_path: Path) -> None:
    from kdkernels.teachers.replies import OtherRequest

    class Other:
        def complete(self, requests: Any, log: Path) -> list[Reply]:
            raise OtherRequest(f"{log.name} is another's")

    with pytest.raises(OtherRequest, match=r"fill\.jsonl"):
        ask(Other(), tmp_path / "fill.jsonl", [("k", [{"role": "user", "content": "x"}])], Sampling())
