"""Costs on a machine, and the planner's command."""

import subprocess
import sys

import pytest
import yaml

from megagrow.config import Config, UntilConfig
from megagrow.config.load import load_config, load_settings
from megagrow.errors import ConfigError
from megagrow.forecast.cost import Received
from megagrow.forecast.machine import MachineConfig, growth_time
from megagrow.plan.on_machine import best_layout, place_stage, require_layout
from megagrow.train.run_plan import plan_run
from tests.jobs import REPOSITORY, command, launch, main, make_dataset, settings, write_config

CONFIGS = REPOSITORY / "configs"


def plan_command(arguments):
    return command("plan").main([str(argument) for argument in arguments])


def small_run(**sections):
    base = {
        "model": {"layers": 4, "hidden": 64, "heads": 4, "ffn": 256, "sequence": 32, "vocab": 128},
        "data": {"path": "none"}, "batch": {"global": 16, "micro": 1},
        "schedule": {"warmup": 1}, "stages": [{"until": {"steps": 5}}],
        "precision": {"dtype": "bf16"},
    }  # fmt: skip
    return Config.model_validate(base | sections)


def test_step_time_by_hand():
    """Two pipeline stages, two-way tensor parallelism, four data ranks; every term spelled out."""
    machine = MachineConfig(nodes=2, gpus=8, flops=1e12, efficiency=0.5, intra=1e9, inter=1e8)
    config = small_run(layout={"tensor": 2, "pipeline": 2, "zero": 1})
    plan = plan_run(config, world=16, vocabulary=None)
    step = place_stage(config, plan, 0, machine).step
    block = 2 * (4 * 64 * 64 + 2 * 64 * 256 + 2 * 32 * 64)
    head = 2 * 64 * 128
    flops = 3 * (4 * block + head) * 16 * 32
    # The stage with two blocks and the head has most of it.
    uneven = (2 * block + head) * 2 / (4 * block + head)
    compute = flops * uneven / (16 * 1e12 * 0.5)
    assert step.compute == pytest.approx(compute)
    assert step.bubble == pytest.approx(compute / 4)  # 4 micro-batches
    stream = 32 * 64 * 2
    assert step.tensor == pytest.approx(0.5 * 8 * stream * 2 * 4 / 1e9)
    assert step.pipeline == pytest.approx(2 * stream * 4 / 1e8)
    # 4 data ranks x 2 tensor ranks are the 8 of one node.
    held = plan.placement(0)
    numel = max(
        sum(held.local(t, 0).numel for _, ts in held.groups(pipe) for t in ts) for pipe in (0, 1)
    )
    assert step.data == pytest.approx(0.75 * 2 * numel * 2 / 1e9)
    assert step.mfu == pytest.approx(flops / (16 * 1e12) / step.total)


def test_growth_time_takes_the_slowest_rank():
    machine = MachineConfig(nodes=2, gpus=2, memory_bandwidth=1e10, intra=1e9, inter=1e8, disk=1e6)
    counts = {
        0: Received(local=500, foreign=0, crossed=0, least=0, by_holder={}),
        1: Received(local=0, foreign=3000, crossed=3000, least=3000, by_holder={0: 1000, 3: 2000}),
    }
    found = growth_time(counts, machine, old_bytes=4_000_000, new_bytes=8_000_000)
    assert (found.rank, found.intra, found.inter) == (1, 1000, 2000)
    assert found.seconds == pytest.approx(6000 / 1e10 + 1000 / 1e9 + 2000 / 1e8)
    assert found.files_seconds == pytest.approx(6.0)


def test_layouts_fit_and_the_fastest_is_taken():
    config = small_run()
    roomy = MachineConfig(nodes=2, gpus=4, memory=1e9)
    found = best_layout(config, config.model, roomy)
    assert found.layout.world == 8 and found.memory < 0.9e9
    # With less memory than that layout needs, another is found, or none.
    tight = roomy.model_copy(update={"memory": float(found.memory)})
    other = require_layout(config, config.model, tight)
    assert other.layout != found.layout and other.memory <= 0.9 * found.memory
    assert other.step.total >= found.step.total
    with pytest.raises(ConfigError, match="no layout of 8 devices"):
        require_layout(config, config.model, roomy.model_copy(update={"memory": 1e4}))
    # Whatever ends the first stage, a first stage without a step too.
    at_once = config.stages[0].model_copy(update={"until": UntilConfig(steps=0)})
    assert (
        best_layout(config.model_copy(update={"stages": [at_once]}), config.model, roomy) == found
    )


_HUGE = """
import resource, sys
from megagrow.config.load import load_config, load_settings
from megagrow.forecast.machine import MachineConfig
from megagrow.plan.on_machine import describe_on_machine
config, machine = load_config(sys.argv[1]), load_settings(MachineConfig, sys.argv[2], ["nodes=512"])
begin = resource.getrusage(resource.RUSAGE_SELF)
print(describe_on_machine(config, machine, rank=1777))
end = resource.getrusage(resource.RUSAGE_SELF)
# Not ru_maxrss, which counts what the process that forked this one had.
peak = next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]
print(end.ru_utime - begin.ru_utime, int(peak) * 1024)
"""


def test_530_billion_parameters_on_4096_ranks():
    """One rank's part: its memory stays below 1 GiB; the target for its time is 10 s."""
    out = subprocess.run(
        [sys.executable, "-c", _HUGE, CONFIGS / "scale/mt530b_4096.yaml",
         CONFIGS / "machines/h100.yaml"], capture_output=True, text=True, check=True, timeout=300
    ).stdout.splitlines()  # fmt: skip
    assert out[0].startswith("512 nodes x 8 devices; 529.6 billion parameters")
    assert "tensor 8 x pipeline 16 x data 32, ZeRO 1" in out[2]
    seconds, memory = map(float, out[-1].split())
    assert memory < 2**30
    print(f"planned in {seconds:.2f} s of CPU, {memory / 2**20:.0f} MiB")


def test_a_plan_is_a_run_that_can_start(tmp_path, capsys):
    target = tmp_path / "target.yaml"
    write_config(target, small_run(
        model={"layers": 8, "hidden": 64, "heads": 4, "ffn": 256, "sequence": 32, "vocab": 128},
        run={"dir": str(tmp_path / "run")},
    ).model_dump(mode="json", by_alias=True, exclude_none=True))  # fmt: skip
    machine = write_config(tmp_path / "machine.yaml", {"nodes": 1, "gpus": 4, "memory": 1e9})
    status = plan_command(
        ["--config", target, "--tokens", "1e9", "--law", "chinchilla", "--stages", "2",
         "--machine", machine, "--output", tmp_path / "plan"]
    )  # fmt: skip
    text = capsys.readouterr().out
    assert status == 0, text
    assert "predicted saving at equal loss" in text and "growth into stage 1" in text
    for name in ("config.yaml", "plan.html", "plan.svg"):
        assert (tmp_path / "plan" / name).stat().st_size > 500
    assert "no plan.svg" not in text
    planned = yaml.safe_load((tmp_path / "plan/config.yaml").read_text())
    assert len(planned["stages"]) == 2 and "grow" in planned["stages"][1]
    outcome = main(["--config", tmp_path / "plan/config.yaml", "--dry-run", "--world", 4])
    assert outcome.status == 0, outcome.err
    last = plan_run(load_config(tmp_path / "plan/config.yaml"), world=4, vocabulary=None).stages[-1]
    assert (last.model.layers, last.model.hidden) == (8, 64)
    # The budget is what training the target on this many tokens takes.
    from megagrow.models.flops import train_flops_per_token

    assert last.plan.end_flops == pytest.approx(1e9 * train_flops_per_token(last.model), rel=0.01)


def test_a_law_fitted_to_runs(tmp_path, capsys):
    """Three sizes trained for real; the planner fits their logs and plans with an interval."""
    data = make_dataset(tmp_path / "toy")
    runs, commands = [], []
    for hidden in (4, 8, 16):
        mapping = settings(
            data, tmp_path / f"h{hidden}", stages=[{"until": {"steps": 40}}],
            model={"hidden": hidden, "ffn": 2 * hidden}, schedule={"name": "constant"},
            train={"validate_every": 100, "validation_samples": 2, "tensorboard": False},
            checkpoint={"every": 100},
        )  # fmt: skip
        commands.append(["--config", write_config(tmp_path / f"h{hidden}.yaml", mapping)])
        runs.append(tmp_path / f"h{hidden}")
    assert all(o.status == 0 for [o] in launch(1, *commands))
    target = settings(data, tmp_path / "target", model={"layers": 4, "hidden": 32, "ffn": 64})
    status = plan_command(
        ["--config", write_config(tmp_path / "t.yaml", target), "--flops", "1e10",
         "--stages", "2", "--bootstrap", "20", "--fit", *runs]
    )  # fmt: skip
    text = capsys.readouterr().out
    assert status == 0, text
    assert "law: fitted" in text and "bootstrap samples of the fit" in text
    assert "fitted n_power" in text


def test_what_is_wrong_is_said(tmp_path, capsys):
    config = CONFIGS / "paper/base.yaml"
    assert plan_command(["--config", config]) == 1
    assert "neither a budget nor a machine" in capsys.readouterr().err
    assert plan_command(["--config", config, "--tokens", "1e9", "--law", "moore"]) == 1
    assert "no such scaling law" in capsys.readouterr().err
    assert plan_command(["--config", config, "--tokens", "1e9", "--fit", tmp_path]) == 1
    assert "cannot read the run's log" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="nodez"):
        load_settings(MachineConfig, CONFIGS / "machines/h100.yaml", ["nodez=3"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *[(["--tokens", value], "--tokens: not a number") for value in ("0", "nan", "inf")],
        (["--tokens=-1e9"], "--tokens: not a number"),
        *[(["--flops", value], "--flops: not a number") for value in ("0", "-1", "nan", "inf")],
        *[(["--flops", "1e15", "--stages", value], "--stages: not") for value in ("0", "-2")],
        (["--flops", "1e15", "--bootstrap", "0"], "--bootstrap: not a number"),
        (["--flops", "1e15", "--growth-loss", "nan"], "--growth-loss: not a number"),
        (["--flops", "1e15", "--growth-loss", "-1"], "--growth-loss: not a number"),
        (["--flops", "1e15", "--rank", "0"], "--rank counts the bytes"),
        (["--flops", "1e15", "--rank", "-1"], "--rank: not a number"),
        (["--flops", "1e15", "--operators", ","], "--operators: a plan takes"),
        (["--flops", "1e15", "--operators", "depth_stack,depth_interleave"], "--operators: a plan"),
        (["--flops", "1e15", "--operators", "vocab"], "--operators: a plan takes"),
        (["--flops", "1e15", "--operators", "depth_stak"], "no such growth operator"),
    ],
)
def test_numbers_that_nothing_can_be_planned_with_are_refused(tmp_path, capsys, arguments, said):
    config = write_config(tmp_path / "run.yaml", small_run().model_dump(mode="json", by_alias=True))
    assert plan_command(["--config", config, *arguments]) != 0
    error = capsys.readouterr().err
    assert said in error and "fix:" in error and "Traceback" not in error


@pytest.mark.parametrize(("checkpointing", "times"), [("none", 4), ("selective", 4), ("full", 5)])
def test_recomputation_reduces_the_stream_again(checkpointing, times):
    machine = MachineConfig(nodes=1, gpus=2)
    model = small_run().model.model_dump() | {"activation_checkpointing": checkpointing}
    config = small_run(model=model, layout={"tensor": 2})
    step = place_stage(config, plan_run(config, world=2, vocabulary=None), 0, machine).step
    stream = 32 * 64 * 2
    assert step.tensor == pytest.approx(0.5 * 2 * times * stream * 4 * 16 / machine.intra)
