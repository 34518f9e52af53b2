"""The argparse types of the commands."""

import argparse

import pytest
import torch

from megagrow.arguments import number


def test_bounds_of_a_number():
    above, least = number(above=0), number(least=0.0, most=1.0)
    assert above("1e-9") == 1e-9 and least("0") == 0.0 and least("1") == 1.0
    for kind, text in ((above, "0"), (above, "nan"), (above, "-1"), (least, "1.1"), (least, "x")):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number"):
            kind(text)


def test_zero_is_not_above_zero_where_denormals_are_flushed():
    """As in a process that has trained; a bound of the next larger float was 0 there."""
    assert torch.set_flush_denormal(True)
    try:
        with pytest.raises(argparse.ArgumentTypeError, match="'0' is not a number above 0"):
            number(above=0)("0")
    finally:
        torch.set_flush_denormal(False)
