"""A long run uses no more than a short one: memory, descriptors, threads."""

import gc
import json
import os
from pathlib import Path

import pytest

from tests.jobs import events, launch, log_of, settings, write_config

KIB = 1024


def _measured(rank, every, path):
    """Record at regular intervals what the process holds."""
    from megagrow.train.loop import Trainer

    take_step = Trainer._step

    def measuring(self):
        take_step(self)
        if self.state.step % every == 0:
            gc.collect()
            status = Path("/proc/self/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines())
            held = {
                "step": self.state.step,
                "memory": int(fields["RssAnon"].split()[0]) * KIB,
                "descriptors": len(os.listdir("/proc/self/fd")),
                "threads": int(fields["Threads"]),
                "objects": len(gc.get_objects()),
            }
            with open(f"{path}.{rank}", "a", encoding="utf-8") as stream:
                stream.write(json.dumps(held) + "\n")

    Trainer._step = measuring


@pytest.mark.parametrize(
    ("world", "steps", "warm", "kib"),
    [
        # PyTorch records the last 2,000 collectives, and allocates memory until it has as many.
        (1, 200, 100, 16),
        pytest.param(1, 5000, 1000, 1, marks=pytest.mark.slow),
        pytest.param(2, 3000, 1000, 1, marks=pytest.mark.slow),
    ],
)
def test_memory_descriptors_threads_and_objects_are_flat_after_the_warm_up(
    tmp_path, dataset, world, steps, warm, kib
):
    """Including validations, saves and the log's mirror for TensorBoard."""
    mapping = settings(
        dataset,
        tmp_path / "run",
        model={"layers": 1},
        stages=[{"until": {"steps": steps}}],
        train={"validate_every": 50, "log_every": 100, "tensorboard": True},
        checkpoint={"every": 50, "keep": 2},  # the first is well inside the warm-up
        recovery={"spike": 3.0},
    )
    config = write_config(tmp_path / "run.yaml", mapping)
    path = tmp_path / "held"
    [outcomes] = launch(
        world, ["--config", config], hook=(_measured, warm // 5, path), timeout=3600.0
    )
    assert [o.status for o in outcomes] == [0] * world, outcomes[0].err
    assert len(events(log_of(config), "step")) == steps
    for rank in range(world):
        held = [json.loads(line) for line in Path(f"{path}.{rank}").read_text().splitlines()]
        after = [one for one in held if one["step"] >= warm]
        assert after[-1]["step"] == steps
        for name in ("descriptors", "threads"):
            # A thread may have a file open at one sample and not at another: none may grow.
            first, last = after[: len(after) // 2], after[len(after) // 2 :]
            assert min(one[name] for one in last) <= min(one[name] for one in first), (name, held)
        grown = {name: after[-1][name] - after[0][name] for name in ("memory", "objects")}
        assert grown["memory"] < (steps - warm) * kib * KIB, (grown, held)
        assert grown["objects"] < steps - warm, (grown, held)  # not one a step
