import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.report.axis import axis, linear_ticks, log_ticks, squeezed
from megagrow.report.chart import Marker, Series, Span, chart


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(), max_size=6), st.booleans(), st.booleans(), st.booleans())
def test_an_axis_holds_its_values_and_its_ticks(values, log, zero, snap):
    made = axis(values, log=log, zero=zero, snap=snap)
    assert made.low < made.high
    assert len(made.ticks) == len(made.labels) <= 14
    for tick in made.ticks:
        assert -1e-6 <= made.place(tick) <= 1 + 1e-6
    for value in values:
        if abs(value) < 1e139 and (not made.log or value > 1e-139):
            assert -1e-6 <= made.place(value) <= 1 + 1e-6


def test_ticks_are_round():
    assert linear_ticks(0, 7.37, 5) == [0, 2, 4, 6]
    assert linear_ticks(0, 0.001, 5) == [0, 0.0002, 0.0004, 0.0006, 0.0008, 0.001]
    assert log_ticks(1e3, 1e9, 5)[0] == 1e3
    assert set(log_ticks(2.2, 8.5, 5)) >= {3, 4, 6, 8}


def test_an_axis_is_logarithmic_where_a_linear_one_would_squeeze_the_run():
    assert not squeezed(range(1, 1000))
    assert squeezed([1.5**n for n in range(40)])


def test_a_gap_breaks_the_curve_and_marker_labels_stay_apart():
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 2.0), (4.0, 1.0)]
    x, y = axis([0, 4]), axis([1, 2])
    markers = [Marker(at, f"operator {i}", "title") for i, at in enumerate((1.0, 1.1, 1.2, 3.9))]
    html = chart(
        title="t",
        note="n",
        x=x,
        y=y,
        x_label="x",
        series=[Series("s", points, "main")],
        markers=markers,
    )
    root = ElementTree.fromstring(html)
    (path,) = root.iter("path")
    assert path.get("d").count("M") == 2
    assert "nan" not in html
    labels = [text for text in root.iter("text") if text.get("class") == "label"]
    assert [text.text for text in labels] == [marker.label for marker in markers]
    heights = [text.get("y") for text in labels[:3]]
    assert len(set(heights)) == 3  # one above the other
    assert labels[3].get("y") in heights  # far away: reuses an existing row


def test_a_long_curve_is_thinned_and_keeps_its_peak():
    points = [(float(i), 1.0 if i != 12345 else 9.0) for i in range(50_000)]
    html = chart(
        title="t",
        note="n",
        x=axis([0, 5e4]),
        y=axis([0, 9]),
        x_label="x",
        series=[Series("s", points, "raw")],
    )
    assert len(html) < 60_000
    (path,) = ElementTree.fromstring(html).iter("path")
    downs = [float(pair.split(",")[1]) for pair in re.findall(r"[\d.]+,[\d.-]+", path.get("d"))]
    assert min(downs) == 0.0  # y grows downwards: the top of the plot


@pytest.mark.parametrize("points", [[], [(math.nan, 1.0)], [(1.0, math.inf)]])
def test_nothing_to_draw_says_so(points):
    html = chart(
        title="t",
        note="n",
        x=axis([]),
        y=axis([]),
        x_label="x",
        series=[Series("s", points, "main")],
    )
    assert "Nothing was logged" in html
    assert not list(ElementTree.fromstring(html).iter("svg"))


def test_a_lone_point_can_be_seen():
    html = chart(
        title="t",
        note="n",
        x=axis([1]),
        y=axis([2]),
        x_label="x",
        series=[Series("s", [(1.0, 2.0)], "main")],
    )
    assert len(list(ElementTree.fromstring(html).iter("circle"))) == 1


def test_an_interval_is_a_line_from_its_low_end_to_its_high_end():
    series = [
        Series("s", [(1.0, 0.5)], "c1", marked=True, spans=[Span(1.0, 0.25, 0.75)]),
        Series("t", [(1.0, 0.5)], "c2"),
    ]
    html = chart(title="t", note="n", x=axis([0, 2]), y=axis([0, 1]), x_label="x", series=series)
    root = ElementTree.fromstring(html)
    *_, span = root.iter("path")
    assert (span.get("class"), span.get("d")) == ("line c1", "M500.0,750.0L500.0,250.0")
    assert len(list(root.iter("path"))) == 3
