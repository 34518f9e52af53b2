"""Checks at the start; ranks with other host names or disks play several hosts."""

import shutil
import socket
import time
from dataclasses import replace

import pytest

from megagrow.errors import ConfigError, DataError, TrainingError
from megagrow.train.health import preflight
from megagrow.train.health.preflight import Facts, code_hash, require_agreement, require_clocks
from tests.jobs import launch, log_of, settings, write_config

SAME = Facts(rank=0, host="h0", code="c0", versions="torch 2", config="x", data="d", clock=1e9)


def ranks(*changes):
    """Facts of ranks on separate hosts."""
    return [
        replace(SAME, **{"rank": n, "host": f"h{n}", **change}) for n, change in enumerate(changes)
    ]


@pytest.mark.parametrize(
    ("change", "kind", "parts"),
    [
        ({"code": "c1"}, ConfigError, ["megagrow's files", "c1 for rank 2 on h2", "c0, as rank 0"]),
        ({"versions": "torch 1"}, ConfigError, ["torch 1 for rank 2 on h2", "constraints.txt"]),
        ({"data": "e"}, DataError, ["dataset", "e for rank 2 on h2"]),
    ],
)
def test_a_host_that_differs(change, kind, parts):
    require_agreement(ranks({}, {}, {}), settings_of=list)
    with pytest.raises(kind) as error:
        require_agreement(ranks({}, {}, change), settings_of=list)
    assert all(part in str(error.value) for part in parts), error.value


def test_another_configuration_is_reported_by_its_keys():
    settings = [{"optimizer.lr": 0.1, "same": 1}, {"optimizer.lr": 0.2, "same": 1, "more": 3}]
    with pytest.raises(ConfigError) as error:
        require_agreement(ranks({}, {"config": "y"}), settings_of=lambda: settings)
    text = str(error.value)
    assert "found:    optimizer.lr = 0.2, more = 3 for rank 1 on h1" in text
    assert "expected: optimizer.lr = 0.1, no more, as rank 0 on h0 has" in text


def test_many_hosts_are_not_all_named():
    with pytest.raises(ConfigError, match=r"rank 4 on h4 and 95 more\n"):
        require_agreement(ranks({}, *[{"code": "c1"}] * 99), settings_of=list)


def test_clocks():
    require_clocks(ranks({}, {"clock": 1e9 + preflight.CLOCK_SKEW}))
    with pytest.raises(TrainingError) as error:
        require_clocks(ranks({}, {"clock": 1e9 + 3600}, {}))
    text = str(error.value)
    assert "3600 s apart" in text and "02:46:40 UTC for rank 1 on h1" in text and "NTP" in text


def test_code_hash_sees_names_and_contents(tmp_path, monkeypatch):
    package = tmp_path / "megagrow"
    shutil.copytree(preflight.Path(preflight.megagrow.__file__).parent, package,
                    ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    seen = [code_hash()]
    monkeypatch.setattr(preflight.megagrow, "__file__", str(package / "__init__.py"))
    code_hash.cache_clear()
    assert code_hash() == seen[0]
    (package / "state/layout.py").rename(package / "layout2.py")
    for change in (lambda: None, lambda: (package / "errors.py").open("a").write("#")):
        change()
        code_hash.cache_clear()
        seen.append(code_hash())
    assert len(set(seen)) == 3
    code_hash.cache_clear()


# --- in real jobs -------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path, dataset):
    return write_config(
        tmp_path / "run.yaml", settings(dataset, tmp_path / "run", batch={"global": 12})
    )


def play_two_hosts(rank):
    """Every rank is its own host, with its own directory."""
    socket.gethostname = lambda: f"h{rank}"


def one_by_one(config, hook, *extra, world=3):
    """The same error on all ranks, reported by rank 0; nothing is left behind."""
    [outcomes] = launch(world, ["--config", config, *extra], hook=hook)
    assert [o.status for o in outcomes] == [1] * world
    assert not list(config.parent.rglob(".megagrow-preflight*"))
    return outcomes[0].err


def lie(rank, name, liar):
    """Rank `liar` is on another host, where something differs."""
    play_two_hosts(rank)
    if rank != liar:
        return
    if name == "clock":
        now = time.time
        time.time = lambda: now() + 1000
    if name == "code":
        preflight.code_hash = lambda: "another"


@pytest.mark.parametrize(
    ("name", "message"), [("clock", "1000 s apart"), ("code", "another for rank 2 on h2")]
)
def test_all_ranks_refuse(config, name, message):
    assert message in one_by_one(config, (lie, name, 2))


def hide_files(rank, liar):
    """This rank does not see the others' files, and they do not see its files."""
    play_two_hosts(rank)
    preflight._SEEN_WITHIN = 0.3
    if rank == liar:
        preflight._appears = lambda path, content: path.name == f"from_rank_{liar}"


@pytest.mark.parametrize(("liar", "pair"), [(2, "h2 and h0"), (0, "h0 and h1")])
def test_a_run_directory_that_is_not_shared(config, liar, pair):
    assert f"{pair} do not share it" in one_by_one(config, (hide_files, liar))


def fill_disk(rank):
    preflight.shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000)


def test_too_little_disk(config):
    message = one_by_one(config, (fill_disk,), world=1)
    # Two growths make 14,176 parameters, each with its two moments, in fp32.
    assert "1 kB free" in message and f"{14_176 * 12 / 1000:.0f} kB" in message
    # There is no checkpoint yet that a lower checkpoint.keep could delete.
    assert "larger disk" in message and "checkpoint.keep" not in message


def lie_about_settings(rank):
    """Rank 1 has another configuration, which its own files may say."""
    play_two_hosts(rank)
    flat = preflight._flat
    if rank == 1:
        more = {"": [("optimizer.other", 7)]}
        preflight._flat = lambda value, key="": [*flat(value, key), *more.get(key, [])]


def test_another_configuration_is_refused_by_all(config):
    message = one_by_one(config, (lie_about_settings,))
    assert "found:    optimizer.other = 7 for rank 1 on h1" in message
    assert "expected: no optimizer.other, as rank 0 on h0 has" in message


def test_hosts_that_agree(config):
    [outcomes] = launch(3, ["--config", config, "train.stop_after_steps=1"],
                        hook=(play_two_hosts,))  # fmt: skip
    assert [o.status for o in outcomes] == [0, 0, 0]
    assert log_of(config)[-1]["event"] == "end"
    assert not list(config.parent.rglob(".megagrow-preflight*"))
