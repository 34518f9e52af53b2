import json
import math

import pytest

from megagrow.errors import DataError
from megagrow.files import write_atomically
from megagrow.report.log import encode_line, read_metrics


def test_numbers_that_are_not_finite_come_back_and_the_file_is_strict_json(tmp_path):
    line = {"event": "step", "a": math.nan, "b": math.inf, "c": [-math.inf, {"d": math.nan}]}
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode_line(line))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["b"] == "inf"
    (back,) = read_metrics(path)
    assert math.isnan(back["a"]) and back["b"] == math.inf
    assert back["c"][0] == -math.inf and math.isnan(back["c"][1]["d"])


def test_every_cut_of_the_last_line_is_passed_over_or_whole(tmp_path):
    first, last = encode_line({"event": "a"}), encode_line({"event": "b", "t": "é"})
    path = tmp_path / "metrics.jsonl"
    for cut in range(len(last) + 1):
        path.write_bytes(first + last[:cut])
        events = [line["event"] for line in read_metrics(path)]
        assert events == (["a", "b"] if cut >= len(last) - 1 else ["a"])


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"\0\0",
        b"[1]",
        b'{"step": 1}',
        b'{"event": 3}',
        b'{"event": "a", "x": NaN}',
        b"[" * 100_000,
        b'{"event": "a", "x": ' + b"9" * 5000 + b"}",
    ],
)
def test_damage_before_the_end_is_named_by_file_and_line(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode_line({"event": "a"}) + damage + b"\n" + encode_line({"event": "b"}))
    with pytest.raises(DataError) as caught:
        read_metrics(path)
    assert f"{path}, line 2" in str(caught.value)
    assert "delete line 2" in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
