"""The growth benchmark: what it counts is correct; timings are not tested."""

import gc
import json
import re

import pytest

from benchmarks import growth_table
from benchmarks.cases import Case, check, config_for, model_for, read_layout, standard_cases
from benchmarks.command_line import main
from benchmarks.growth import measure
from benchmarks.memory import PeakMemory, copy_seconds, resident_bytes, tensor_bytes
from megagrow.config import LayoutConfig
from megagrow.errors import ConfigError, GrowthError
from megagrow.growth.plan import grown_model
from megagrow.models.catalog import build_catalog
from megagrow.savings.machine import write_json
from tests.ranks import run_ranks

DATA, TENSOR = LayoutConfig(zero=1), LayoutConfig(tensor=2, zero=0)


def _measure_all(comm, cases, model, staging_mib, scratch):
    return [measure(comm, case, model, staging_mib, scratch) for case in cases]


def test_growth_is_measured(tmp_path):
    cases = [Case(DATA, TENSOR), Case(TENSOR, TENSOR), Case(DATA, DATA, operator="depth_stack")]
    model = model_for(1e5, operator="width", factor=2, vocab=100)
    results, other = run_ranks(2, _measure_all, cases, model, 0.5, str(tmp_path))
    assert results[0]["ranks"] == other[0]["ranks"]
    for result in results:
        assert result["files_give_the_same"] is True
        assert {"close", "start", "transfer", "publish", "copy", "save", "load"} == set(
            result["seconds"]
        )
        for rank in result["ranks"]:
            assert 0 <= rank["least_bytes"] <= rank["crossed_bytes"] <= rank["foreign_bytes"]
            assert 0 <= rank["staging_bytes"] <= 2**19
            assert rank["tensor_bytes"] > rank["old_state_bytes"] + rank["new_state_bytes"] > 0
    crossed = [sum(r["crossed_bytes"] for r in result["ranks"]) for result in results]
    assert crossed[0] > 0 and crossed[1] == 0, "copies stay with their source"
    assert list(tmp_path.iterdir()) == [], "the checkpoint is gone"
    text = growth_table.table(results)
    assert all(str(case) in text for case in cases) and "within the limit" in text
    write_json(tmp_path / "deep" / "growth.json", {"results": results})
    written = json.loads((tmp_path / "deep" / "growth.json").read_text())
    assert written["results"][0]["world"] == 2 and written["versions"]["torch"]


@pytest.mark.parametrize("operator", ["width", "depth_stack"])
@pytest.mark.parametrize("parameters", [1e6, 2e8, 1e9])
def test_the_model_is_large_enough(operator, parameters):
    model = model_for(parameters, operator=operator, factor=2)
    grown = build_catalog(grown_model(model, operator=operator, factor=2))
    assert parameters <= grown.parameters <= max(1.3 * parameters, 6e6)


def test_the_standard_cases_can_all_be_measured():
    cases = standard_cases(4)
    assert len(cases) >= 8 and {case.operator for case in cases} == {"width", "depth_stack"}
    for case in cases:
        check(case, model_for(2e8, operator=case.operator, factor=2), world=4)
    with pytest.raises(ConfigError, match="--ranks 4"):
        standard_cases(3)


def test_layouts_are_read():
    layout = read_layout("data=2,tensor=2,zero=1", world=4, option="--to-layout")
    assert (layout.tensor, layout.pipeline, layout.zero) == (2, 1, 1)
    assert config_for(Case(layout, DATA), model_for(1e5, operator="width", factor=2, vocab=9),
                      world=4, staging_mib=1.0).stages[0].layout is None  # fmt: skip
    for bad in ("tensor", "tensor=0", "speed=2", "tensor=3", "data=3", "pipeline=2,zero=3"):
        with pytest.raises(ConfigError, match="--to-layout"):
            read_layout(bad, world=4, option="--to-layout")


def test_what_cannot_grow_is_refused_before_processes_start():
    with pytest.raises(GrowthError):
        check(Case(DATA, DATA, operator="no_such"), model_for(1e5, operator="width", factor=2),
              world=2)  # fmt: skip
    odd = model_for(1e5, operator="width", factor=2).model_copy(update={"ffn": 3})
    with pytest.raises(ConfigError, match="ffn"):
        check(Case(LayoutConfig(tensor=2), DATA), odd, world=2)


def test_memory_is_seen():
    import torch

    gc.collect()  # what earlier tests left must not go in between
    before = tensor_bytes()
    block = torch.ones(64 << 18)
    twin = block.view(2, -1)
    assert tensor_bytes() - before == block.numel() * 4 == twin.numel() * 4
    del block, twin
    # Not in the same place: the list of all objects of this process takes memory as well.
    with PeakMemory() as peak:
        start = resident_bytes()
        block = torch.ones(64 << 18)  # above what the C library keeps for reuse
        del block
    assert 60 << 20 < peak.bytes - start < 90 << 20
    assert copy_seconds(1 << 20, device=torch.device("cpu")) > 0


def test_a_job_starts_its_own_processes(capsys, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "growth.json"
    status = main(
        ["growth", "--ranks", "2", "--parameters", "1e5", "--from-layout", "data=2,zero=1",
         "--to-layout", "tensor=2,zero=0", "--json", str(out), "--files", str(tmp_path)]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert status == 0 and re.search(r"width x2, zero=1 -> tensor=2,zero=0", said)
    assert json.loads(out.read_text())["results"][0]["files_give_the_same"] is True
    assert main(["growth", "--ranks", "2", "--to-layout", "tensor=7"]) == 1
    assert "--to-layout" in capsys.readouterr().err
