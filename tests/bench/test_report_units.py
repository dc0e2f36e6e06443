"""Numbers are written with a unit, and what is written says the number to its last digit."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.report import units

PREFIXES = {
    "p": 1e-12,
    "n": 1e-9,
    "u": 1e-6,
    "m": 1e-3,
    "": 1.0,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
}
BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}


def parse(text: str, unit: str) -> float:
    """The number that a reader takes from the text."""
    number, _, shown = text.partition(" ")
    if unit == "B":
        return float(number) * BYTES[shown]
    assert shown.endswith(unit)
    return float(number) * PREFIXES[shown.removesuffix(unit)]


@given(st.floats(1e-12, 1e6), st.sampled_from([-1, 1]))
def test_seconds_read_back_within_rounding(size: float, sign: int) -> None:
    value = sign * size
    assert parse(units.format_seconds(value), "s") == pytest.approx(value, rel=0.0051)


@given(st.floats(1e-3, 1e17), st.sampled_from(["FLOP/s", "B/s"]))
def test_rates_read_back_within_rounding(value: float, unit: str) -> None:
    # Without a prefix below one, small rates keep three digits as they are.
    assert parse(units.format_quantity(value, unit), unit) == pytest.approx(value, rel=0.0051)


@given(st.integers(0, 2**58))
def test_bytes_read_back_within_rounding(value: int) -> None:
    assert parse(units.format_value("sent_B", value), "B") == pytest.approx(value, rel=0.0051)


@given(st.integers(0, 2**53))
def test_counted_bytes_are_written_in_full(value: int) -> None:
    text = units.format_value("sent_B", value, exact=True)
    assert int(text.removesuffix(" B").replace(",", "")) == value


@given(st.floats(1e-9, 1e5))
def test_three_digits_are_enough_and_no_more_are_written(value: float) -> None:
    number = units.format_seconds(value).split()[0]
    assert re.fullmatch(r"\d{1,3}(\.\d{1,3})?|\d+", number)
    assert sum(letter.isdigit() for letter in number.lstrip("0.")) >= (3 if value < 1000 else 4)


@given(st.floats(1e-9, 1e3), st.floats(0.5, 1.0), st.floats(1.0, 2.0))
def test_an_interval_shares_the_unit_of_its_value(value: float, below: float, above: float) -> None:
    text = units.format_interval("time_s", value, value * below, value * above)
    shown, low, high = re.fullmatch(r"(.+) \[(.+), (.+)\]", text).groups()  # type: ignore[union-attr]
    unit = shown.split()[1]
    assert parse(f"{low} {unit}", "s") == pytest.approx(value * below, rel=0.0051)
    assert parse(f"{high} {unit}", "s") == pytest.approx(value * above, rel=0.0051)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("time_s", 0.0123, "12.3 ms"),
        ("time_s", 0.00099996, "1.00 ms"),
        ("time_s", 59.0, "59.0 s"),
        ("time_s", 0, "0 s"),
        ("sent_B", 4096, "4 KiB"),
        ("sent_B", 5000, "4.88 KiB"),
        ("memory_bytes", 1.5 * 2**30, "1.50 GiB"),
        ("vector_float32_all_flops", 6.15e11, "615 GFLOP/s"),
        ("bytes_per_s", 2.39e10, "23.9 GB/s"),
        ("page_fault_s_per_byte", 1.1e-10, "110 ps/B"),
        ("speedup", 1.2345, "1.23x"),
        ("roof_fraction", 0.333, "33.3 %"),
        ("cores", 2, "2"),
        ("vector_lanes_float32", 16, "16"),
    ],
)
def test_the_unit_comes_from_the_end_of_the_key(key: str, value: float, text: str) -> None:
    assert units.format_value(key, value) == text


@pytest.mark.parametrize("value", [None, math.nan])
def test_nothing_is_written_as_a_dash(value: float | None) -> None:
    assert units.format_seconds(value) == "-"
    assert units.format_ratio(value) == "-"
    assert units.format_interval("time_s", value, 1.0, 2.0) == "-"
    assert units.format_number(value) == "-"


def test_an_interval_without_bounds_is_its_value() -> None:
    assert units.format_interval("time_s", 0.5, None, 0.6) == "500 ms"


@given(st.floats())
def test_any_float_can_be_written(value: float) -> None:
    for unit in ("s", "B", "FLOP/s", "x", "%", "", "percent", "s/B"):
        assert units.format_quantity(value, unit).strip()
    assert units.format_number(value)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1e-6, "s", "1 us"),
        (100.0, "s", "100 s"),
        (65536, "B", "64 KiB"),
        (1e11, "FLOP/s", "100 G"),
        (0.25, "", "0.25"),
    ],
)
def test_ticks_are_short(value: float, unit: str, text: str) -> None:
    assert units.format_tick(value, unit) == text


@given(st.text())
def test_text_has_no_control_characters_left(text: str) -> None:
    assert units.text_of(text).isprintable()
    assert len(units.text_of(text, 10)) <= 10
