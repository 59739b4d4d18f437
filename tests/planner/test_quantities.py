from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lathe.errors import RequestError
from lathe.planner.quantities import bytes_text, count_text, flops_text, parse_count, seconds_text, written


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("40M", 40_000_000),
        ("40m", 40_000_000),
        ("1.2B", 1_200_000_000),
        ("100G", 100_000_000_000),
        ("300k", 300_000),
        ("2T", 2_000_000_000_000),
        ("40,000,000", 40_000_000),
        ("40_000_000", 40_000_000),
        (" 7 ", 7),
        (7, 7),
        (1e6, 1_000_000),
    ],
)
def test_a_count_is_read_as_people_write_it(text: str | float, value: int) -> None:
    assert parse_count(text, "tokens") == value


@pytest.mark.parametrize(
    "text", ["", "abc", "-5", "0", "0.2", "1e", "4 M x", "M", "1e400", "nan", "9" * 50, "20E", True]
)
def test_anything_else_is_one_line(text: str) -> None:
    with pytest.raises(RequestError) as raised:
        parse_count(text, "tokens")
    assert str(raised.value).startswith("tokens=")
    assert "\n" not in str(raised.value)


@given(st.integers(1, 10**17))
def test_what_is_written_is_within_a_half_percent(value: int) -> None:
    assert parse_count(count_text(value), "x") == pytest.approx(value, rel=0.006)


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (count_text, 0, "0"),
        (count_text, 999, "999"),
        (count_text, 999.6, "1.00k"),
        (count_text, 60_506_624, "60.5M"),
        (count_text, 405_853_388_800, "406B"),
        (bytes_text, 512, "512 B"),
        (bytes_text, 1024, "1.00 KiB"),
        (bytes_text, 2_950_672_384, "2.75 GiB"),
        (flops_text, 1_480_000_000, "1.48 GFLOP"),
        (seconds_text, 0.0000123, "12.3 µs"),
        (seconds_text, 0.0123, "12.3 ms"),
        (seconds_text, 59.94, "59.9 s"),
        (seconds_text, 600, "10.0 min"),
        (seconds_text, 7300, "2.03 h"),
        (seconds_text, 86400 * 12, "12.0 days"),
    ],
)
def test_a_quantity_is_written_in_three_digits(write: Callable[[float], str], value: float, text: str) -> None:
    assert write(value) == text


def test_fields_are_written_as_the_command_line_reads_them() -> None:
    assert written({"d_ff": 2048, "tied": False, "d_embed": None, "sharing": "all"}) == (
        "d_ff=2048 tied=false d_embed=none sharing=all"
    )
