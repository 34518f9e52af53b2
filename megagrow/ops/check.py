"""Compile the CUDA sources for every target, without a GPU: registers, spills, undefined symbols.

A kernel that spills registers to memory, or keeps an array there, fails the check.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megagrow.ops import build

# Symbols that only the CUDA part of PyTorch exports.
OF_TORCH_CUDA = frozenset({"aoti_torch_get_current_cuda_stream"})


@dataclass(frozen=True)
class Kernel:
    """ptxas' report on one kernel for one target.

    Attributes:
        name: demangled if c++filt is available.
        target: such as sm_90a.
        registers: per thread.
        spilled_bytes: per thread, the larger of the spills and the stack frame; the stack holds
            arrays that are indexed dynamically and so cannot be in registers.
    """

    name: str
    target: str
    registers: int
    spilled_bytes: int


@dataclass(frozen=True)
class OpsReport:
    """All kernels, and the library's symbols that neither PyTorch nor the system defines."""

    kernels: list[Kernel]
    undefined: list[str]

    @property
    def spilling(self) -> list[Kernel]:
        """The kernels that fail the check."""
        return [kernel for kernel in self.kernels if kernel.spilled_bytes]

    def table(self) -> str:
        """A text table of kernels, registers and spills by source file and target."""
        lines = [f"{'kernel':<28}{'target':<9}{'variants':>9}{'registers':>15}{'spilled':>9}"]
        families = sorted({(_family(k.name), k.target) for k in self.kernels})
        for family, target in families:
            these = [k for k in self.kernels if (_family(k.name), k.target) == (family, target)]
            registers = [k.registers for k in these]
            spilled = sum(k.spilled_bytes for k in these)
            spread = f"{min(registers)} to {max(registers)}"
            lines.append(f"{family:<28}{target:<9}{len(these):>9}{spread:>15}{spilled:>9}")
        return "\n".join(lines)


def check(architectures: Sequence[str] = build.ARCHITECTURES) -> OpsReport:
    """Compile and link for all targets, about a minute; cached by the sources' hash.

    Raises:
        BuildError: nvcc is missing or fails.
    """
    compiler = build.nvcc()
    if compiler is None:
        raise build.BuildError("nvcc is neither in CUDA_HOME nor on PATH")
    version = build.run_compilers([[compiler, "--version"]])[0]
    key = build.source_hash(*architectures, version, torch.__version__)
    kept = build.cache() / f"check_{key}.json"
    if kept.exists():
        data = json.loads(kept.read_text(encoding="utf-8"))
        return OpsReport([Kernel(**k) for k in data["kernels"]], data["undefined"])
    report = _compile(compiler, architectures)
    if key != build.source_hash(*architectures, version, torch.__version__):
        raise build.BuildError("the sources were changed while they were compiled")
    temporary = kept.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(report)), encoding="utf-8")
    os.replace(temporary, kept)
    return report


def _compile(compiler: str, architectures: Sequence[str]) -> OpsReport:
    targets = [build.gencode(name) for name in architectures]
    with tempfile.TemporaryDirectory() as place:
        objects: list[Path] = []
        commands: list[list[str | Path]] = []
        for number, unit in enumerate(build.UNITS):
            text = Path(place) / f"unit{number}.cu"
            text.write_text(build.unit_text(unit), encoding="utf-8")
            objects.append(text.with_suffix(".o"))
            commands.append(
                [*build.nvcc_command(compiler), *targets, "-Xptxas", "-v",
                 "-c", text, "-o", objects[-1]]
            )  # fmt: skip
        output = "\n".join(build.run_compilers(commands))
        library = Path(place) / "library.so"
        build.run_compilers([[compiler, "-shared", *targets, *objects, "-o", library]])
        undefined = _undefined(library)
    return OpsReport(_kernels(output), undefined)


_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def _kernels(output: str) -> list[Kernel]:
    found: list[Kernel] = []
    name = target = ""
    spilled = 0
    for line in output.splitlines():
        if entry := _ENTRY.search(line):
            name, target, spilled = entry[1], entry[2], 0
        elif spills := _SPILLS.search(line):
            spilled = max(int(spills[1]), int(spills[2]) + int(spills[3]))
        elif (registers := _REGISTERS.search(line)) and name:
            found.append(Kernel(name, target, int(registers[1]), spilled))
            name = ""
    names = _demangled([kernel.name for kernel in found])
    return [
        Kernel(name, k.target, k.registers, k.spilled_bytes)
        for name, k in zip(names, found, strict=True)
    ]


def _demangled(names: Sequence[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return list(names)
    done = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    )  # fmt: skip
    return done.stdout.splitlines()


def _family(name: str) -> str:
    found = re.search(r"mg::(\w+)<", name) or re.search(r"mg\d+(\w+?)I", name)
    return found[1] if found else name[:27]


def _undefined(library: Path) -> list[str]:
    """Symbols that would be missing when the library is loaded into a GPU build of PyTorch."""
    tool = shutil.which("nm")
    if tool is None:
        return []

    def symbols(path: Path, which: str) -> set[str]:
        text = build.run_compilers([[tool, "-D", which, path]])[0]
        rows = [line.split() for line in text.splitlines()]
        return {row[-1] for row in rows if row and (len(row) < 2 or row[-2] not in ("w", "v"))}

    # A version after @ belongs to the C or C++ library.
    wanted = {name for name in symbols(library, "--undefined-only") if "@" not in name}
    torch_cpu = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    return sorted(wanted - symbols(torch_cpu, "--defined-only") - OF_TORCH_CUDA)
