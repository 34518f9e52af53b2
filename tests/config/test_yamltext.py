import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config.yamltext import read_yaml, write_yaml
from megagrow.errors import ConfigError


def one(text):
    return read_yaml(f"a: {text}", source="test")["a"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e6", 1_000_000),
        ("5E+5", 500_000),
        ("-2e3", -2000),
        ("1_000", 1000),
        ("010", 10),
        ("0xff", 255),
        ("1e-3", 1e-3),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("=", "="),
        ("0o17", 15),
        ("1e20", 10**20),
        ("2.0", 2.0),
        ("2.0e3", 2000.0),
        ("'1e6'", "1e6"),
        ("1e6b", "1e6b"),
        ("e5", "e5"),
        ("-", "-"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    if text == "-":
        text = "'-'"
    found = one(text)
    assert found == value
    assert type(found) is type(value)


def test_a_directive_does_not_change_the_rules():
    assert read_yaml("%YAML 1.1\n---\na: yes\nb: 010", source="t") == {"a": "yes", "b": 10}


def test_nan():
    assert math.isnan(one(".nan"))


def test_merge_keys_and_anchors():
    text = "base: &b {x: 1, y: 2}\nmore: {<<: *b, y: 3}"
    assert read_yaml(text, source="t")["more"] == {"x": 1, "y": 3}


def ninefold(first, form):
    """Each level has nine aliases of the previous one."""
    lines = [f"a0: &a0 {first}"]
    for level in range(1, 40):
        aliases = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {form.format(aliases)}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", ["run.yaml, line 3", "key 'a' is given twice", "line 1"]),
        ("a:\n  x: 1\n  x: 2", ["line 3", "'x'"]),
        ("a: [1,\nb: 2", ["run.yaml, line 2", "valid YAML"]),
        ("a:\n\tb: 1", ["line 2"]),
        ("1: x", ["line 1", "key 1 is not text"]),
        ("? [a]\n: x", ["line 1", "is not text"]),
        ("a: !!python/name:os.system", ["line 1", "is not allowed"]),
        ("a: !!binary aGk=", ["is not allowed"]),
        ("a: !!timestamp 2024-01-02", ["line 1", "is not allowed"]),
        ("a: !!set {x}", ["is not allowed"]),
        ("a: !!bool 3", ["run.yaml", "not of its type"]),
        ("a: !!int ''", ["run.yaml", "not of its type"]),
        ("a: &x [*x]", ["recursive"]),
        ("a: &x {b: *x}", ["line 1", "recursive"]),
        ("a: *x", ["line 1", "undefined alias"]),
        ("a: " + "[" * 150 + "]" * 150, ["line 1", "nested deeper"]),
        ("a: " + "[" * 5000, ["nested deeper"]),
        (ninefold("[1]", "[{}]"), ["run.yaml, line 6", "more than 100,000 values"]),
        (ninefold("{x: 1}", "{{<<: [{}]}}"), ["run.yaml, line 6", "more than 100,000 values"]),
        ("a: " + "9" * 50, ["line 1", "a number of 50 digits"]),
        ("a: 0x" + "f" * 5000, ["a number of 5002 digits"]),
        ("---\na: 1\n---\nb: 2", ["another document"]),
        (b"a: \xff\xfe", ["run.yaml", "UTF-8"]),
        ("a: \x01", ["run.yaml"]),
    ],
)
def test_refused(text, says):
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, source="run.yaml")
    for part in says:
        assert part in str(caught.value)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(
        ["1e6", "yes", "0o7", "1_0", "2024-01-02", "<<", "1:30", "~", ".inf", "=", ""]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), plain, max_size=4))
def test_what_is_written_is_read_back(data):
    text = write_yaml(data)
    assert read_yaml(text, source="t") == data


def test_other_readers_read_the_same():
    data = {"a": ["1e6", "1e-3", "yes", "1:30", "0x1", "=", "2024-01-02"], "b": [1e-8, 1e22, 0.1]}
    assert yaml.safe_load(write_yaml(data)) == data
