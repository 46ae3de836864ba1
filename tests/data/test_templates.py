"""Chat templates that write the date give the same prompts on any day."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import tiny
from training import trainers

from kdkernels.data.templates import chat_text, date_of
from kdkernels.data.tokenization import load_examples
from kdkernels.teachers.local import prompt_ids

DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '. ' }}" + tiny.TEMPLATE
IN_A_MACRO = "{% macro day() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ day() }}" + tiny.TEMPLATE
ROWS = [{"messages": [{"role": "user", "content": "the fox"}], "response": "sleeps"}]


def tokenizer(template: str = DATED) -> Any:
    result = tiny.tokenizer()
    result.chat_template = template
    return result


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (DATED, "Today: 01 Mar 2026. "),
        (IN_A_MACRO, "2026-03-01"),
        ("{{ strftime_now('%-d/%-m %H:%M 5%%d ') }}" + tiny.TEMPLATE, "1/3 00:00 5%d "),
    ],
)
def test_template_writes_the_given_date(template: str, text: str) -> None:
    dated = tokenizer(template)
    (example,) = load_examples(ROWS, dated, date="2026-03-01")
    assert text in dated.decode(example.student_ids)
    assert example.date == "2026-03-01"
    assert dated.decode(prompt_ids(dated, ROWS[0]["messages"], datetime.date(2026, 3, 1))).startswith(text)


def test_default_date_is_today() -> None:
    dated, today = tokenizer(), datetime.date.today()
    (example,) = load_examples(ROWS, dated)
    assert example.date in (today.isoformat(), datetime.date.today().isoformat())
    assert chat_text(dated, ROWS[0]["messages"], date=datetime.date(2026, 3, 1)) != chat_text(dated, ROWS[0]["messages"])


def test_example_of_a_template_without_a_date_has_none() -> None:
    (example,) = load_examples(ROWS, tiny.tokenizer(), date="2026-03-01")
    assert example.date is None
    assert date_of(tiny.tokenizer(), "2026-03-01") is None


def test_text_that_is_not_a_date_is_refused() -> None:
    with pytest.raises(ValueError, match=r"date '1 March': give year, month and day, such as 2026-11-28"):
        load_examples(ROWS, tokenizer(), date="1 March")


def test_trainer_uses_the_date_of_its_arguments(tmp_path: Any) -> None:
    from training import TEMPLATE, make_tokenizer

    words = make_tokenizer(template="{{ strftime_now('%-d') }}" + TEMPLATE)
    make = trainers(tmp_path, words)
    (march,), (april,) = (make(rows=ROWS, template_date=date).train_dataset[0] for date in ("2026-03-01", "2026-04-02"))
    assert words.decode(march.student_ids[:1]) == "1"
    assert words.decode(april.student_ids[:1]) == "2"
    today = make(rows=ROWS)
    assert today.args.template_date == today.train_dataset[0][0].date, "a resumed run reads the date from the saved arguments"
