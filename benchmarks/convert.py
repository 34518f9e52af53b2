"""Conversion of a training state, compared with `cp` and with DeepSpeed's own converter.

A synthetic GPT-2 with Adam's state is written twice, in our format and as DeepSpeed's engine would
save it.  Each contender is a separate command, timed from start to end, start-up included;
reported with the peak memory of all its processes together and the peak disk space that it used
beyond its output.  `cp` is followed by `sync` of every file, because the conversions fsync theirs;
DeepSpeed's does not, and is not made to.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from megagrow.checkpoint.convert.job import PIECE_BYTES
from megagrow.checkpoint.convert.registry import FORMATS
from megagrow.checkpoint.interface.file_writer import LEAST_BUFFER_BYTES, write_piece
from megagrow.checkpoint.interface.format import SinkRequest, cut
from megagrow.checkpoint.interface.meta import CheckpointMeta
from megagrow.config import ModelConfig
from megagrow.errors import ConfigError
from megagrow.models.catalog import build_catalog
from megagrow.state.boxes import Box
from megagrow.state.catalog import ADAM_SLOTS
from megagrow.state.layout import Layout

BEFORE = Layout(tensor=2, pipeline=2, data=2, zero=1)
AFTER = Layout(tensor=1, pipeline=4, data=2, zero=1)
_SAMPLE_SECONDS = 0.1
_NOISE = 1 << 20  # values of noise


@dataclass(frozen=True)
class Measured:
    """One run of a contender; CPU time is summed over its processes."""

    seconds: float
    cpu_seconds: float
    memory_bytes: int
    disk_bytes: int
    temporary_bytes: int


class _Noise:
    """A state of any size whose values are a function of their position."""

    def __init__(self, model: ModelConfig) -> None:
        self.path, self.step, self.layout = Path("noise"), 100, Layout()
        self.catalog, self.slots = build_catalog(model), ADAM_SLOTS
        self.config = {"model": model.model_dump(mode="json", by_alias=True)}
        self.run_state = {"optimizer_step": self.step}
        self.fingerprints: dict[str, str] = {}
        self._values = torch.randn(2 * _NOISE, generator=torch.manual_seed(0)) * 0.02

    def dtype(self, tensor: str, slot: str) -> torch.dtype:
        return torch.float32

    def read(
        self, tensor: str, slot: str, box: Box, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        # A row of noise, shifted by the other indices: cheap, and no two positions are alike.
        shape = self.catalog[tensor].shape
        number = 3 * list(self.catalog).index(self.catalog[tensor])
        number += [s.name for s in self.slots].index(slot)
        first = box.offset[-1] + 7919 * number % _NOISE
        values = self._values[first : first + box.shape[-1]].expand(box.shape)
        stride = 1
        for axis in reversed(range(len(shape) - 1)):
            steps = torch.arange(box.offset[axis], box.offset[axis] + box.shape[axis]) * stride
            values = values + steps.view([-1] + [1] * (len(shape) - 1 - axis)) * 1e-6
            stride *= shape[axis]
        values = values.abs() if slot == "exp_avg_sq" else values
        return values if out is None else out.copy_(values)


def model_of(parameters: float) -> ModelConfig:
    """A GPT-2 with about this many parameters; for 350e6 it is GPT-2 medium."""
    layers, vocab = (24, 50257) if parameters >= 100e6 else (4, 4001)
    hidden = 64
    while 12 * layers * hidden**2 + (vocab + 1024) * hidden < parameters:
        hidden += 64
    sizes = {"layers": layers, "hidden": hidden, "heads": hidden // 64, "ffn": 4 * hidden}
    return ModelConfig.model_validate({**sizes, "sequence": 1024, "vocab": vocab})


def measure(parameters: float, directory: Path, rounds: int) -> dict[str, Any]:
    """Measure all contenders in turn.

    Args:
        parameters: approximate size of the model.
        directory: on the disk to be measured; its contents are deleted afterwards.
        rounds: turns per contender; DeepSpeed's converter has one.

    Raises:
        ConfigError: the disk has too little space.
    """
    model = model_of(parameters)
    count = build_catalog(model).parameters
    needed = 12 * count * 5
    if shutil.disk_usage(directory).free < needed:
        raise ConfigError(
            f"--directory {directory}: too little disk space",
            found=f"{shutil.disk_usage(directory).free:,} bytes free",
            expected=f"{needed:,} bytes",
        )
    with tempfile.TemporaryDirectory(prefix="megagrow-convert-", dir=directory) as made:
        room = Path(made)
        sources = {name: room / "source" / name for name in ("native", "deepspeed")}
        for name, path in sources.items():
            _write(_Noise(model), name, path)
        results: dict[str, list[Measured]] = {}
        commands = _commands(sources, room / "target")
        for turn in range(rounds):
            for name, command in commands.items():
                if turn == 0 or not name.startswith("ds_to_universal"):
                    results.setdefault(name, []).append(_run(command, room))
                    shutil.rmtree(room / "target", ignore_errors=True)
        sizes = {name: _tree_bytes(path) for name, path in sources.items()}
    return {
        "benchmark": "convert",
        "model": model.model_dump(by_alias=True),
        "parameters": count,
        "layouts": [str(BEFORE), str(AFTER)],
        "source_bytes": sizes,
        "runs": {n: [vars(run) for run in runs] for n, runs in results.items()},
        "summary": _summary(results, sizes),
    }


def _write(source: _Noise, name: str, path: Path) -> None:
    meta = CheckpointMeta(
        source.catalog, source.slots, BEFORE, source.config, source.fingerprints, source.run_state
    )
    dtypes = {(t.name, s.name): torch.float32 for t in meta.catalog for s in meta.slots}
    sink = FORMATS[name].open_sink(SinkRequest(meta=meta, step=source.step, dtypes=dtypes))
    sums: dict[str, list[str]] = {}
    for plan in sink.files:
        (path / plan.name).parent.mkdir(parents=True, exist_ok=True)
        for piece in cut(plan, PIECE_BYTES):
            sums.setdefault(plan.name, []).extend(
                write_piece(
                    path / plan.name,
                    piece,
                    source,  # type: ignore[arg-type]
                    buffer_bytes=LEAST_BUFFER_BYTES,
                )
            )
    sink.conclude(path, sums)


def _commands(sources: Mapping[str, Path], target: Path) -> dict[str, list[str]]:
    """The contenders' commands, by name."""
    python = sys.executable

    def ours(source: str, fmt: str) -> list[str]:
        to = ["--from", str(sources[source]), "--to", str(target), "--to-format", fmt]
        axes = [axis for axis in ("tensor", "pipeline", "data", "zero")
                if axis in FORMATS[fmt].options]  # fmt: skip
        layout = [f"--{axis}={getattr(AFTER, axis)}" for axis in axes]
        return [python, "-m", "megagrow", "convert", *to, *layout]

    def copied(source: str) -> list[str]:
        script = 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +'
        return ["sh", "-c", script, "sh", str(sources[source]), str(target)]

    tag = next(sources["deepspeed"].glob("global_step*"))
    theirs = ["-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(tag)]
    return {
        "cp native": copied("native"),
        "native to native": ours("native", "native"),
        "cp deepspeed": copied("deepspeed"),
        "deepspeed to deepspeed": ours("deepspeed", "deepspeed"),
        "deepspeed to universal": ours("deepspeed", "universal"),
        "ds_to_universal": [python, *theirs, "--output_folder", str(target)],
    }


def _run(command: Sequence[str], room: Path) -> Measured:
    """Run a command and monitor its memory and disk usage."""
    os.sync()
    before = _tree_bytes(room)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    memory = most = 0
    with tempfile.TemporaryFile() as log:
        cpu = _children_seconds()
        begin = time.perf_counter()
        process = psutil.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        looked = begin
        while process.poll() is None:
            time.sleep(_SAMPLE_SECONDS)
            memory = max(memory, _resident(process))
            if time.perf_counter() - looked > 1.0:
                most = max(most, _tree_bytes(room) - before)
                looked = time.perf_counter()
        seconds = time.perf_counter() - begin
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{command}: {log.read().decode()[-3000:]}")
    left = _tree_bytes(room) - before
    return Measured(seconds, _children_seconds() - cpu, memory, left, max(0, most - left))


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _resident(process: psutil.Process) -> int:
    """Resident bytes of a process and its descendants; shared memory is counted for each."""
    total = 0
    try:
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    except psutil.Error:
        pass
    return total


def _tree_bytes(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except OSError:
                continue
    return total


def _summary(
    results: Mapping[str, Sequence[Measured]], sizes: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """Rates, and ratios to the copy and to DeepSpeed's converter."""
    seconds = {name: statistics.median(r.seconds for r in runs) for name, runs in results.items()}
    rate = {name: results[name][0].disk_bytes / seconds[name] / 1e9 for name in results}
    summary = {}
    for name, runs in results.items():
        told = {
            "seconds": seconds[name],
            "cpu_seconds": statistics.median(run.cpu_seconds for run in runs),
            "gb_per_second": rate[name],
            "memory_mib": max(run.memory_bytes for run in runs) / 2**20,
            "temporary_mib": max(run.temporary_bytes for run in runs) / 2**20,
        }
        source = name.split()[0]
        if " to " in name:
            told["rate_over_cp"] = rate[name] / rate[f"cp {source}"]
        if name == "deepspeed to universal":
            told["times_faster_than_ds_to_universal"] = seconds["ds_to_universal"] / seconds[name]
        summary[name] = told
    return summary


def table(result: Mapping[str, Any]) -> str:
    """The summary as lines of text."""
    lines = [
        f"{result['parameters']:,} parameters with Adam's state, {' -> '.join(result['layouts'])}",
        f"{'':<24}{'seconds':>9}{'CPU s':>8}{'GB/s':>7}{'of cp':>7}"
        f"{'MiB memory':>12}{'MiB temporary':>15}",
    ]
    for name, told in result["summary"].items():
        ratio = f"{told['rate_over_cp']:.2f}" if "rate_over_cp" in told else ""
        lines.append(
            f"{name:<24}{told['seconds']:>9.1f}{told['cpu_seconds']:>8.1f}{told['gb_per_second']:>7.2f}{ratio:>7}"
            f"{told['memory_mib']:>12,.0f}{told['temporary_mib']:>15,.0f}"
        )
    faster = result["summary"]["deepspeed to universal"]["times_faster_than_ds_to_universal"]
    lines.append(f"to universal: {faster:.1f} times as fast as DeepSpeed's own converter")
    return "\n".join(lines)
