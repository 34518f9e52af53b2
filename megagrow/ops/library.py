"""Registration of the ops with torch.library, and the choice of the active implementation.

`torch.ops.megagrow.*` always works: the CUDA kernels handle CUDA tensors if their library is
loaded, the emulator handles CPU tensors if a test selects it, and plain PyTorch everything else.
The model first tests `own(op, x)`, and uses PyTorch's own fused ops if it is false.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from megagrow.errors import ConfigError
from megagrow.ops import build
from megagrow.ops.references import REFERENCES
from megagrow.ops.schemas import FAKES, SCHEMAS, define

Mode = Literal["auto", "cuda", "emulated", "reference"]
MODES: tuple[Mode, ...] = get_args(Mode)
NAMESPACE, EMULATED = "megagrow", "megagrow_emulated"

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_WINS = Path(__file__).with_name("compiled_wins.json")


@dataclass(frozen=True)
class Active:
    """The active implementation, and why.

    Attributes:
        mode: the value of MEGAGROW_KERNELS.
        served: by device type, the dtypes that megagrow's kernels handle.
        wins: the ops that use megagrow's kernels under torch.compile as well.
        reason: a one-line explanation.
    """

    mode: Mode
    served: Mapping[str, frozenset[torch.dtype]]
    wins: frozenset[str]
    reason: str


_active: Active | None = None
_loaded: set[Path] = set()


def own(op: str, x: Tensor) -> bool:
    """Whether to use megagrow's kernel for an op on a tensor like x.

    Under torch.compile only if a benchmark on this device has shown a win: a custom op is a fusion
    barrier.
    """
    now = _active or activate()
    if x.dtype not in now.served.get(x.device.type, ()):
        return False
    return op in now.wins if torch.compiler.is_compiling() else True


def activate(mode: str | None = None) -> Active:
    """Choose the implementation: by `mode`, or by MEGAGROW_KERNELS (``auto``), once per process.

    Raises:
        ConfigError: the mode is unknown or not available.
    """
    global _active
    _active = _choose(mode or os.environ.get("MEGAGROW_KERNELS") or "auto")
    return _active


def active() -> Active:
    """The active implementation."""
    return _active or activate()


@contextlib.contextmanager
def using(mode: Mode) -> Iterator[Active]:
    """Context manager: use another implementation temporarily (tests and benchmarks)."""
    global _active
    before = _active
    try:
        yield activate(mode)
    finally:
        _active = before


def load(library: Path) -> None:
    """Load a library of kernels once.

    Raises:
        OSError: it is damaged, or built for another PyTorch.
    """
    if library not in _loaded:
        torch.ops.load_library(str(library))
        _loaded.add(library)


def _choose(mode: str) -> Active:
    if mode not in MODES:
        raise ConfigError(
            "MEGAGROW_KERNELS: no such choice",
            found=mode,
            expected=", ".join(MODES),
            fix="unset MEGAGROW_KERNELS, or set it to one of these",
        )
    if mode == "reference":
        return Active(mode, {}, frozenset(), "PyTorch's own ops: MEGAGROW_KERNELS=reference")
    if mode == "emulated":
        return _emulated(mode)
    fault = _load_cuda()
    if fault is None:
        name = torch.cuda.get_device_name()
        return Active(mode, {"cuda": _DTYPES}, _wins_on(name), f"own CUDA kernels on {name}")
    if mode == "cuda":
        raise ConfigError(
            f"MEGAGROW_KERNELS=cuda: {fault}",
            fix="build them: python -m megagrow.ops --build cuda; or set MEGAGROW_KERNELS=auto",
        )
    return Active(mode, {}, frozenset(), f"PyTorch's own ops: {fault}")


def _emulated(mode: Mode) -> Active:
    try:
        load(build.emulated_library())
    except (build.BuildError, OSError) as error:
        raise ConfigError(
            "MEGAGROW_KERNELS=emulated: the emulator cannot be built",
            found=error,
            fix="install a C++20 compiler (g++), or set MEGAGROW_KERNELS=reference",
        ) from error
    dtypes = _DTYPES | {torch.float64}
    return Active(
        mode, {"cpu": dtypes}, frozenset(SCHEMAS), "own kernels emulated on the CPU, for tests"
    )


def _load_cuda() -> str | None:
    """Load the CUDA kernels; returns why they cannot be loaded, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not build.CUDA_LIBRARY.exists():
        return "the CUDA kernels are not built (python -m megagrow.ops --build cuda)"
    try:
        load(build.CUDA_LIBRARY)
    except OSError as error:
        return f"the CUDA kernels do not load: {str(error).splitlines()[0]}"
    return None


def _wins_on(device: str) -> frozenset[str]:
    """The ops that a benchmark found to be faster than torch.compile's code on a device."""
    table: Mapping[str, list[str]] = json.loads(_WINS.read_text(encoding="utf-8"))
    return frozenset(table.get(device, ()))


# --- registration ---------------------------------------------------------------------------


def _implementation(name: str) -> Any:
    reference = REFERENCES[name]
    emulated = getattr(getattr(torch.ops, EMULATED), name)

    def call(*args: Any) -> Any:
        if (_active or activate()).mode == "emulated":
            return emulated(*args)
        return reference(*args)

    return call


_emulated_schemas = define(EMULATED)
_library = define(NAMESPACE)
for _name in SCHEMAS:
    # The CUDA library registers its kernels under the key CUDA, which takes precedence.
    _library.impl(_name, _implementation(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", FAKES[_name], lib=_library)
