"""The last number of an answer; every expected value is written by hand."""

from decimal import Decimal

import pytest

from qaflora_edge.evaluation.last_number import as_number, is_number, last_number

# Answer -> what it may stand for, in any order.
ANSWERS = [
    ("#### 12", "12"),
    ("The answer is 12.", "12"),
    ("6 and 6 make **12**", "12"),
    ("It costs $12", "12"),
    ("12.50", "12.5"),
    ("12,5 euros", "12.5"),
    ("1,234", "1234 1.234"),
    ("1.234", "1234 1.234"),
    ("1.234,50 €", "1234.5"),
    ("$1,234.50.", "1234.5"),
    ("1,234,567", "1234567"),
    ("1,23,456 rupees", "123456"),
    ("2,000", "2000"),
    ("2.000", "2000 2"),
    ("0,500", "0.5"),
    ("1'234", "1234"),
    ("Всего 3 400 рублей", "3400 400"),
    ("80\u00a0000 $", "80000 0"),
    ("一共是18。", "18"),
    ("１，２３４ 个", "1234 1.234"),
    ("٣٬٤٠٠", "3400"),
    ("١٢٫٥", "12.5"),
    ("४२", "42"),
    ("\\boxed{42}", "42"),
    ("\\boxed{1{,}234} dollars, by 3 steps", "1234 1.234"),
    ("#### 12 eggs\nin 3 days", "12"),
    ("#### $1,234.50\n", "1234.5"),
    ("#### 1. Count the eggs\nThere are 16 of them.\n#### 2. Step\nIt is 18", "18"),
    ("#### Step 3: add\n5 + 6 = 11", "11"),
    ("#### -7%", "-7"),
    ("\\boxed{x = 12} #### 5 of 7", "12"),
    ("#### 5\nno:\n#### 7", "7"),
    ("so 7 ####", "7"),
    (".5", "0.5"),
    ("$.50", "0.5"),
    ("-.5", "-0.5"),
    ("so ...5", "5"),
    ("(3,-5)", "-5"),
    ("-5", "-5"),
    ("−5", "-5"),
    ("= -$5", "-5"),
    ("$-5", "-5"),
    ("8 - 3", "3"),
    ("8-3", "3"),
    ("pages 3–5", "5"),
    ("COVID-19", "19"),
    ("x2", "2"),
    ("12kg", "12"),
    ("50%", "50"),
    ("10:30", "30"),
    ("3,4,5", "5"),
    ("1.5,2.5", "2.5"),
    ("1e3", "1000"),
    ("1.2.3", "3"),
    ("", ""),
    ("none", ""),
    ("####", ""),
    ("9" * 200, ""),
    ("12 " * 60, "12"),
]


@pytest.mark.parametrize(("answer", "values"), ANSWERS)
def test_the_last_number_by_hand(answer: str, values: str) -> None:
    assert last_number(answer) == {Decimal(value) for value in values.split()}


def test_values_are_compared_and_not_digits() -> None:
    assert is_number("18.00 dollars", Decimal(18))
    assert not is_number("18.01", Decimal(18))


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (18, "18"),
        (2.5, "2.5"),
        ("18", "18"),
        (" -1,234.5 ", "-1234.5"),
        ("1e3", "1000"),
        (0.1, "0.1"),
    ],
)
def test_numbers_of_tasks(value: object, number: str) -> None:
    assert as_number(value) == Decimal(number)


NOT_NUMBERS = [
    True,
    None,
    "",
    "ten",
    "1,2",
    "0,125",
    "1234,567",
    "1.2.3",
    "5 eggs",
    "١",
    [5],
    "nan",
]


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_what_is_no_number_of_a_task(value: object) -> None:
    assert as_number(value) is None
