"""The argparse types of the commands."""

import argparse

import pytest
import torch

from megagrow.arguments import Parser, as_output, number


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


@pytest.mark.parametrize("kind", ["store", "append"])
def test_an_option_that_is_given_twice_is_an_error_and_not_its_last_value(kind, capsys):
    parser = Parser()
    parser.add_argument("--input", action=kind)
    parser.add_argument("--text", nargs="+")
    if kind == "append":  # meant to be repeated
        assert parser.parse_args(["--input", "a", "--input=b"]).input == ["a", "b"]
    else:
        for words in (["--input", "a", "--input=b"], ["--inp=a", "--input", "a"]):
            with pytest.raises(SystemExit):
                parser.parse_args(words)
            assert "argument --input: given twice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--text", "a", "--text", "b"])
    assert "give all values after one" in capsys.readouterr().err
    assert parser.parse_args(["--input", "a"]).text is None  # it starts anew each time


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(argparse.ArgumentTypeError):
            as_output(str(path))
    assert as_output(str(tmp_path / "new" / "x.json")) == tmp_path / "new" / "x.json"
    assert as_output(str(tmp_path / "file")) == tmp_path / "file"
    assert not (tmp_path / "new").exists()
