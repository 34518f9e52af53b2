import math

import pytest

from megagrow.report.units import binary_bytes, duration, human, number_text, signed, whole


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.6, "1 k"),
        (1234567, "1.23 M"),
        (999_999_999, "1 G"),
        (4.2e13, "42 T"),
        (3.14e23, "314 Z"),
        (-1500, "−1.5 k"),
        (math.nan, "not a number"),
        (-math.inf, "−∞"),
    ],
)
def test_human(value, text):
    assert human(value) == text


def test_human_puts_the_prefix_before_the_unit():
    assert human(45.2e9, "FLOP/s") == "45.2 GFLOP/s"
    assert human(12, "tokens/s") == "12 tokens/s"


def test_signed_tells_the_direction_and_the_power():
    assert signed(0.1832) == "+0.183"
    assert signed(-2.04e-6) == "−2×10⁻⁶"
    assert signed(0.0) == "±0"


def test_other_numbers():
    assert number_text(3.25) == "3.25"
    assert number_text(1.5e-7) == "1.5×10⁻⁷"
    assert whole(1234567) == "1\u202f234\u202f567"
    assert binary_bytes(64 << 20) == "64 MiB"
    assert binary_bytes(0) == "0 B"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.42 s"),
        (59.96, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3599.7, "1 h 00 min"),
        (187200, "2 d 04 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
