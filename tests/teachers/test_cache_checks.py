"""Cached log-probabilities are validated when written and when read. Errors name the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from caches import view
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from typer.testing import CliRunner

from kdkernels import cli
from kdkernels.data.example import Example
from kdkernels.data.tokenization import load_examples
from kdkernels.teachers.cache import CacheError, Identity, open_cache, shards, write_cache
from kdkernels.teachers.cache.api import check_tops, from_replies, score, write_topk
from kdkernels.teachers.cache.checks import SLACK, check_logprobs

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
IDENTITY = Identity("t", "1", "float32", "", "", 300, 300, "topk", k=3, temperature=1.0, dtype="float32")
ROWS = [{"prompt": "the ", "response": "fox sleeps"}, {"prompt": "a ", "response": "dog sings"}]
BAD = {
    "probabilities": ([0.6, 0.3, 0.05], r"0\.6, above 0: of probabilities take the logarithm"),
    "logits": ([7.0, 5.0, -1.0], "7, above 0"),
    "one positive value in the last column": ([-1.0, -2.0, 0.5], r"0\.5, above 0"),
    "NaN after the first column": ([-1.0, float("nan"), -3.0], "NaN"),
    "infinity": ([float("inf"), -1.0, -2.0], "inf, above 0"),
    "more than a distribution": ([-0.1, -0.2, -3.0], r"3 tokens sum to 1\.773, more than 1.*at one temperature"),
}


@pytest.fixture(scope="module")
def text() -> Any:
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def examples(text: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    return load_examples(tiny.write(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS), text)


def tops_of(examples: list[Example], bad: list[float]) -> list[Any]:
    """Return valid log-probabilities, except for ``bad`` at the second token of the second example."""
    tops = []
    for example in examples:
        count = len(example.teacher_scored)
        tops.append((np.tile(np.arange(3, dtype=np.int32), (count, 1)), np.tile(np.float32([-1, -2, -3]), (count, 1))))
    tops[1][1][1] = bad
    return tops


@pytest.mark.parametrize("case", BAD)
def test_write_topk_refuses_what_is_not_a_log_probability(tmp_path: Path, examples: list[Example], case: str) -> None:
    values, message = BAD[case]
    with pytest.raises(CacheError, match=rf"rows\.jsonl, row 2, token 2 of the response: .*{message}"):
        write_topk(examples, tops_of(examples, values), tmp_path / "c", IDENTITY)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rounding_errors_and_impossible_tokens_are_accepted(tmp_path: Path, examples: list[Example], dtype: str) -> None:
    identity = Identity("t", "1", "float32", "", "", 300, 300, "topk", k=3, temperature=1.0, dtype=dtype)
    above = float(np.log1p(SLACK / 2)) - np.log(2)  # two tokens that sum to 1.005, and one that is impossible
    write_topk(examples, tops_of(examples, [above, above, -np.inf]), tmp_path / "c", identity)
    cache = open_cache(tmp_path / "c")
    mass = cache.targets(view(examples, cache.salt)).logprobs.double().exp().sum(-1)
    assert (mass <= 1 + 1e-6).all(), "the mass is at most 1 again"


def test_repeated_tokens_and_wrong_shapes_are_refused(examples: list[Example]) -> None:
    tops = tops_of(examples, [-1, -2, -3])
    tops[0][0][0] = [4, 9, 4]
    with pytest.raises(CacheError, match="row 1: a token is named twice"):
        check_tops(examples, tops)
    with pytest.raises(CacheError, match=r"row 1: .* for \d+ scored tokens"):
        check_tops(examples, [(ids[1:], values[1:]) for ids, values in tops])


@pytest.mark.parametrize("case", ["probabilities", "NaN after the first column", "more than a distribution"])
def test_prompt_logprobs_of_a_server_are_checked(tmp_path: Path, examples: list[Example], case: str) -> None:
    values, message = BAD[case]

    class Server:
        settings = None

        def run(self, jobs: Any, log: Path) -> list[dict[str, Any]]:
            entries = []
            for number, job in enumerate(jobs):
                count = len(examples[number].teacher_scored)
                rows = [values if number else [-1.0, -2.0, -3.0]] * count
                entries.append({"key": job.key, "ids": [[0, 1, 2]] * count, "prompt_logprobs": rows})
            return entries

    with pytest.raises(CacheError, match=rf"rows\.jsonl, row 2, token 1 of the response: .*{message}"):
        score(Server(), examples, 3, tmp_path / "log")  # type: ignore[arg-type]


def test_invalid_log_probabilities_of_replies_raise_with_the_row(tmp_path: Path, text: Any) -> None:
    def logprobs_of(ids: list[int], value: float) -> list[dict[str, Any]]:
        return [
            {"token": f"token_id:{id}", "logprob": value, "top_logprobs": [{"token": f"token_id:{id}", "logprob": value}]} for id in ids
        ]

    rows = []
    for row, value in zip(ROWS, (-0.5, 0.75), strict=True):
        (example,) = load_examples([row], text)
        rows.append({**row, "teacher_logprobs": logprobs_of([example.teacher_ids[u + 1] for u in example.teacher_scored], value)})
    data = tiny.write(tmp_path / "answers.jsonl", rows)
    with pytest.raises(CacheError, match=r"answers\.jsonl, row 2, token 1 of the response: a log-probability is 0\.75, above 0"):
        from_replies(rows, load_examples(data, text), text)
    folder = tmp_path / "tokenizer"
    text.save_pretrained(folder)
    command = ["cache", "--from-replies", "--tokenizer", str(folder), "--data", str(data), "--out", str(tmp_path / "c")]
    result = runner.invoke(cli.app, command)
    assert result.exit_code == 2
    assert "answers.jsonl, row 2" in result.output
    assert not (tmp_path / "c").exists()


def test_alternatives_are_checked_and_must_have_the_same_temperature(text: Any) -> None:
    (example,) = load_examples(ROWS[:1], text)
    scored = [example.teacher_ids[u + 1] for u in example.teacher_scored]

    def row(logprob: float, listed: float, unknown_token: float) -> dict[str, Any]:
        return {
            **ROWS[0],
            "teacher_logprobs": [
                {"token": f"token_id:{id}", "logprob": logprob,
                 "top_logprobs": [{"token": f"token_id:{id}", "logprob": listed}, {"token": "not one token", "logprob": unknown_token}]}
                for id in scored
            ],
        }  # fmt: skip

    for values, message in (
        ((-0.5, -0.5, 3.0), "row 1, token 1 of the response: a log-probability is 3, above 0"),
        ((-0.5, -0.5, -0.2), "sum to 1.425, more than 1"),
        ((-0.2, -1.5, -2.0), r"its log-probability is -0\.2, and -1\.5 among the alternatives: both must be at one temperature"),
    ):
        with pytest.raises(CacheError, match=message):
            from_replies([row(*values)], [example], text)


class Logits:
    """A teacher whose logits are zeros, and ``row`` from scored token ``since`` on."""

    def __init__(self, since: int, row: torch.Tensor) -> None:
        self.vocab_size, self._since, self._row = len(row), since, row

    def targets(self, view: Any) -> torch.Tensor:
        logits = torch.zeros(view.scored.numel(), self.vocab_size)
        logits[self._since :] = self._row
        return logits


@pytest.mark.parametrize(("kind", "options"), [("topk", {"dtype": "float32"}), ("sampled", {"seed": 0})])
def test_nan_from_a_model_raises_with_the_row(tmp_path: Path, examples: list[Example], kind: Any, options: dict[str, Any]) -> None:
    identity = Identity("t", "1", "float32", "", "", 300, 300, kind, k=3, temperature=1.0, **options)
    row, first = torch.zeros(300), len(examples[0].teacher_scored)
    row[7] = torch.nan
    with pytest.raises(CacheError, match=r"rows\.jsonl, row 2, token 1 of \d+: the teacher gives values that are not finite"):
        write_cache(Logits(first, row), examples, tmp_path / "c", identity)  # type: ignore[arg-type]


def test_reading_a_cache_with_invalid_values_raises(tmp_path: Path, examples: list[Example]) -> None:
    """Bypass the check when writing, as earlier versions did; the manifest is valid."""
    for case in ("probabilities", "more than a distribution"):
        folder, values = tmp_path / case, BAD[case][0]

        def write(path: Path, keys: Any, counts: Any, columns: Any, values: Any = values) -> None:
            columns["logprobs"][-1] = values
            shards.write_parquet(path, keys, counts, columns)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kdkernels.teachers.cache.api.write_parquet", write)
            write_topk(examples, tops_of(examples, [-1, -2, -3]), folder, IDENTITY)
        cache = open_cache(folder)
        with pytest.raises(CacheError, match=rf"000000\.parquet, .*{BAD[case][1]}"):
            cache.targets(view(examples, cache.salt))


@given(arrays.arrays(np.float32, (4, 3), elements=st.floats(-20, 2, width=32)))
def test_check_accepts_exactly_the_distributions(values: Any) -> None:
    ids = np.tile(np.arange(3, dtype=np.int32), (4, 1))
    mass = np.exp(values.astype(np.float64)).sum(-1)
    valid = bool((values <= SLACK).all() and (mass <= 1 + SLACK).all())
    try:
        check_logprobs(ids, values, lambda row: f"row {row}")
    except CacheError as error:
        assert not valid
        row = int(str(error).split(":")[0].split()[1])
        assert values[row].max() > SLACK or mass[row] > 1 + SLACK
    else:
        assert valid
