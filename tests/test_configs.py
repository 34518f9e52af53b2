"""Every configuration that comes with megagrow passes its dry run."""

from pathlib import Path

import pytest
import yaml

from megagrow.config.load import load_settings
from megagrow.forecast.machine import MachineConfig
from megagrow.savings.campaign import Campaign
from megagrow.savings.config import SavingsConfig
from megagrow.savings.members import check
from megagrow.savings.table import plan_text
from tests.jobs import main

CONFIGS = Path(__file__).parent.parent / "configs"
# Processes, memory of each, and what else a dry run needs where no data has been prepared.
RUNS = {
    "quickstart.yaml": (2, "16GB", ["model.vocab=257"]),
    "h200_gpt2.yaml": (1, "141GB", ["model.vocab=4096"]),
    "paper/base.yaml": (8, "80GB", []),
    "paper/base_half_depth.yaml": (8, "80GB", []),
    "paper/base_half_width.yaml": (8, "80GB", []),
    "paper/large.yaml": (8, "80GB", []),
    "paper/large_half_depth.yaml": (8, "80GB", []),
    "paper/large_half_width.yaml": (8, "80GB", []),
    "llama/1b.yaml": (8, "80GB", []),
    "llama/7b.yaml": (64, "80GB", []),
    "llama/70b.yaml": (512, "80GB", []),
    "scale/gpt175b_1024.yaml": (1024, "80GB", []),
    "scale/mt530b_4096.yaml": (4096, "80GB", []),
}


@pytest.mark.parametrize("name", RUNS)
def test_dry_run(name):
    world, memory, more = RUNS[name]
    # The data of these runs is the user's: none is there.
    outcome = main(
        ["--config", CONFIGS / name, "--dry-run", "--world", world, "--memory", memory,
         "data.path=nowhere", *more]
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    stages = len(yaml.safe_load((CONFIGS / name).read_text())["stages"])
    assert f"stage {stages - 1}: " in outcome.out and "fits into" in outcome.out


def test_none_is_forgotten():
    # Those of `open` start from weights: tests/train/test_init_from.py runs them.
    others = {"machines", "bench", "cluster", "open"}
    found = {p.relative_to(CONFIGS) for p in CONFIGS.rglob("*.yaml")}
    runs = {str(path) for path in found if path.parts[0] not in others}
    assert runs == set(RUNS)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("machines/*.yaml")), ids=lambda p: p.name)
def test_machines(path):
    assert load_settings(MachineConfig, path).world > 0


SAVINGS = [path for path in CONFIGS.glob("bench/*.yaml") if path.name != "faults.yaml"]


@pytest.mark.parametrize("path", sorted(SAVINGS), ids=lambda p: p.name)
def test_savings_benchmarks(path):
    """Every run of it can be planned, and its first tasks are the sweep of the baseline."""
    config = load_settings(SavingsConfig, path)
    campaign = Campaign(config, world=1, vocab=512)
    check(campaign.members)
    tasks = campaign.missing()
    assert tasks and tasks[0].member.name == "scratch"
    assert "scratch" in plan_text(campaign)
