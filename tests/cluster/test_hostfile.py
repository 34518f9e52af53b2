import pytest

from megagrow.cluster.hostfile import Host, read_hostfile
from megagrow.errors import ConfigError


def test_hosts_in_their_order(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\n\nnode2 slots=4   # the fast one\n10.0.0.1\tslots=8\n")
    assert read_hostfile(path) == (Host("node2", 4), Host("10.0.0.1", 8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# nothing\n\n", "names no host"),
        ("a slots=1\n\na slots=2\n", r":3: host a is there twice"),
        ("a\n", r":1: the number of ranks is missing(.|\n)*write: a slots=N"),
        ("a 4\n", "number of ranks is missing"),
        ("a slots=4 max=8\n", "is not alone"),
        ("a slots=0\n", "from 1 to 1024"),
        ("a slots=-1\n", "from 1 to 1024"),
        ("a slots=two\n", "from 1 to 1024"),
        ("a slots=²\n", "from 1 to 1024"),
        ("-oProxyCommand=evil slots=1\n", "no host name"),
        ("a;b slots=1\n", "no host name"),
    ],
)
def test_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_hostfile(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_bytes(b"\xff")]
)
def test_no_file_of_text(tmp_path, make):
    path = tmp_path / "hosts"
    make(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(path)
