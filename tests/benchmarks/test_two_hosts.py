"""The campaign on two hosts: it adds to what there was, and finds what differs."""

import json

import pytest

from benchmarks import commands
from benchmarks.command_line import parse
from benchmarks.faults import hosts
from benchmarks.faults.two_hosts import KINDS, TwoHosts, table

EARLIER = {
    "runs": 2,
    "differences": [],
    "every_fault": [
        {"kind": kind, "step": 30, "copies": True, "seconds": 9.5, "again": 30, "memory": True}
        for kind in KINDS
    ],
}


def test_it_adds_to_an_earlier_campaign(tmp_path):
    campaign = TwoHosts(tmp_path, seed=1, earlier=json.loads(json.dumps(EARLIER)))
    result = campaign.result()
    assert result["faults"] == len(KINDS) and result["every_fault"] == EARLIER["every_fault"]
    assert all(
        row["faults"] == row["resumed_from_memory"] == 1 for row in result["by_kind"].values()
    )
    assert "bit for bit" in table(result)
    assert "DIFFERENCES" in table({**result, "differences": ["run_3: step differ"]})


@pytest.mark.cluster
@pytest.mark.skipif(hosts.missing() != "", reason=hosts.missing() or "-")
def test_two_faults(tmp_path):
    file = tmp_path / "result.json"
    options = parse(["two_hosts", "--faults", "2", "--json", str(file), "--seed", "3"])
    result, _ = commands.two_hosts(options)
    assert result["faults"] == 2 and result["differences"] == []
    assert json.loads(file.read_text())["every_fault"] == result["every_fault"]


def test_a_machine_without_such_hosts_is_told_why(monkeypatch):
    monkeypatch.setattr(hosts, "missing", lambda: "not installed: pdsh")
    with pytest.raises(commands.ConfigError, match="not installed: pdsh"):
        commands.two_hosts(parse(["two_hosts"]))
