"""A number in an answer is read whole or not at all, in every style that models use."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdkernels.recipes.answers import extract, normalise, same
from kdkernels.recipes.numbers import boxed, read_numbers

NUMBERS = {
    r"5 \mu m": "5", "1,250.50": "2501/2", "1.250,50": "2501/2", "1'250": "1250", "1 250": "1250", "1\u202f250": "1250",
    "1\u00a0250": "1250", "1_000": "1000", r"1\,000": "1000", "1{,}000": "1000", "12,34,567": "1234567", "1,5": "3/2", "0,500": "1/2",
    "1.000.000": "1000000", "1 1/2": "3/2", "1½": "3/2", "½": "1/2", "-1½": "-3/2", r"2\frac{1}{2}": "5/2", r"\dfrac{3}{4}": "3/4",
    r"-\frac{1}{2}": "-1/2", r"\frac{-1}{2}": "-1/2", r"\frac12": "1/2", r"\frac{1{,}000}{3}": "1000/3", "3 / 4": "3/4", "1.5e3": "1500",
    "1.5E-3": "3/2000", "1.5 \u00d7 10^3": "1500", r"1.5 \times 10^{3}": "1500", "10^6": "1000000", "10³": "1000", "1.5x10^3": "1500",
    "2^10": "1024", "2**10": "1024", "10^-2": "1/100", r"3 \cdot 10^{-2}": "3/100", "15.5kg": "31/2", "60mph": "60", "5%": "5",
    "50 %": "50", r"50\%": "50", r"\sqrt{16} = 4": "4", "10k": "10000", "2 million": "2000000", "1.5 billion": "1500000000",
    "3 thousand dollars": "3000", "5 hundred thousand": "500000", "3 + 4 = 7": "7", "3 \u00d7 4 = 12": "12",
    "2 cats and 3 dogs = 5 animals": "5", "-$5": "-5", "$-5": "-5", "-€5": "-5", "US$5": "5", "€1.250,50": "2501/2", "5€": "5",
    "minus 3": "-3", "negative 3": "-3", "- 5": "-5", "x = - 5": "-5", "x=-5": "-5", "+3": "3", "9.8 m/s^2": "49/5", "5 m2": "5",
    "5 cm²": "5", "90°": "90", r"90^\circ": "90", r"90^{\circ}": "90", r"5\,\text{cm}": "5", "$5$": "5", "**5**": "5", "*5*": "5",
    "_5_": "5", "(5)": "5", "5.": "5", ".5": "1/2", "4.0": "4", "007": "7", "#5": "5", "3 1/2 cups": "7/2", "10/2": "5",
    "5!": "5", "~5": "5", "≈ 5": "5", "3.14159": "314159/100000", r"\boxed{12}": "12", "10 000 000": "10000000",
    "-0.5": "-1/2", "\u22127": "-7", "12 345,67": "1234567/100", "1 hundred": "100", "2.5cm": "5/2", "5 million people": "5000000",
    r"\$5.50": "11/2", "1.5e3kg": "1500", r"1\ 000": "1000", "1~000": "1000", r"5 \text{ apples}": "5",
    r"\left(\frac{1}{2}\right)": "1/2", r"\tfrac{1}{2}": "1/2", "1 \u2044 2": "1/2", "10**3": "1000", "1/3 cup": "1/3", "- 1/2": "-1/2",
    "-1 1/2": "-3/2",
}  # fmt: skip

NOT_NUMBERS = (
    "3 ± 0.1", "2 π", "e^{2}", "1.5.2", "1,234,56", "1,2,3", r"\frac{x}{2}", r"\frac{\sqrt{3}}{2}", r"\frac{\frac{1}{2}}{3}", "1/0",
    "12/05/2024", "2024-05-06", "1e999999999", "2x", "3i", r"2\pi", "2π", r"2\sqrt{3}", "√2", "10K", "5M", "10-5", "10 - 5", "3 + 4",
    "3*4", "3x4", "5-10 minutes", "5 to 10", "1, 2, 3", "3 and 4", "10 minus 3", "±3", "3:30", "2h30", "m^2", "a1b2c3", "H2O", "COVID-19",
    "1/2/3", "six", "", r"\frac{1}{2}x", "2/3x",
)  # fmt: skip
REPLIES = {
    "Answer: 7 because 3 and 4 are 7 and not 8": "7", "Answer: 1 000": "1000", "Answer: 60mph after 2 hours": "60",
    r"So the total is \boxed{1{,}000}.": "1000", r"Answer: $\frac{1}{2}$": "1/2", "Answer: 3 + 4 = 7": "7", "Answer: 5 since x=2": "5",
    "Answer: 5 km in 2 hours": "5", "Answer: Total = 3 boxes = 36 pencils": "36", "It is 4.\n- 5 apples": "5", "#### 42": "42",
    "Answer: 3 kg + 4 kg = 7 kg": "7", r"Answer: $3 \times 4 = 12$ apples": "12", r"The answer is \boxed{\frac{3}{4}}": "3/4",
    r"The answer is 5 or so. No: \boxed{6}": "6", r"I think \boxed{5}. The answer is 6.": "6", "Answer: √2 which is about 1.41": None,
    "so 5 at 3:30": None, "Answer: 10-15": None, "Answer: 2x": None, r"\boxed{2\sqrt{3}} of 5": None,
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_number_is_read_whole(text: str, value: str) -> None:
    assert normalise(text, "number") == value
    assert normalise(text, "number", first=True) == value


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_text_with_several_numbers_is_not_read_in_part(text: str) -> None:
    assert normalise(text, "number") is None
    assert normalise(text, "number", first=True) is None


@pytest.mark.parametrize(("reply", "value"), REPLIES.items())
def test_final_number_of_a_reply_is_extracted(reply: str, value: str | None) -> None:
    assert extract(reply, "number") == value


def test_part_of_an_answer_does_not_match() -> None:
    for reply, part in (
        (r"\boxed{1{,}000}", "0"),
        ("Answer: 15.5kg", "15"),
        ("Answer: 1.5e3", "1"),
        ("Answer: 1 1/2", "1"),
        ("2.5 million", "2.5"),
    ):
        assert not same(reply, part, "number")


def test_boxes_with_choices_and_words_are_read() -> None:
    assert extract(r"so it is \boxed{\text{Paris}}", "text") == "paris"
    assert extract(r"so it is \boxed{\textbf{B}}", "choice") == "B"
    assert boxed(r"\boxed{1} then \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert boxed(r"\boxed{never closed") is None


STYLES = (
    "{:,}",
    "{:_}",
    "{}",
    "${:,}",
    r"\boxed{{{}}}",
    "**{:,}**",
    "{} kg",
    "{}kg",
    "{:,} dollars",
    "about {:,}.",
    "= {}",
    r"\({}\)",
    "{}%",
)


@given(st.integers(-(10**12), 10**12), st.sampled_from(STYLES))
def test_integers_are_read_in_every_style(number: int, style: str) -> None:
    assert read_numbers(style.format(number)) == [number]


@given(
    st.decimals(min_value=-(10**6), max_value=10**6, places=3),
    st.sampled_from([("{:,}", ",."), ("{:,}", ".,"), ("{:,}", " ,"), ("{:,}", "'.")]),
)
def test_decimals_are_read_with_every_thousands_separator(number: Fraction, style: tuple[str, str]) -> None:
    form, (group, point) = style
    text = form.format(number).replace(",", "\0").replace(".", point).replace("\0", group)
    values = read_numbers(text)
    assert len(values) == 1
    # Three digits after a single comma are thousands in one style and decimals in the other, so a small number is ambiguous.
    assert values[0] == Fraction(number) or (abs(number) < 1000 and point == ",")


@given(st.text(alphabet="0123456789.,'_ /-+*^xe%:kg\\{}$", max_size=14))
def test_random_text_gives_fractions_or_none(text: str) -> None:
    for value in read_numbers(text):
        assert value is None or isinstance(value, Fraction)


@given(st.text(alphabet="0123456789.,", min_size=1, max_size=10).filter(lambda text: text[0].isdigit() and text[-1].isdigit()))
def test_digits_with_points_and_commas_are_one_number_or_none(text: str) -> None:
    digits = Fraction(text.replace(",", "").replace(".", ""))
    values = read_numbers(re.sub(r"[.,]+", lambda some: some[0][0], text))
    assert len(values) == 1
    assert values[0] in {None, *(digits / 10**places for places in range(len(text)))}
