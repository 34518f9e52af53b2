"""The kernels, compiled and active, in each schedule."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megagrow.ops import build, library
from tests.ops.device import DEVICE


@pytest.fixture(scope="session")
def compiled() -> None:
    """Compile and load the kernels: once per session, cached between sessions."""
    with library.using("cuda" if DEVICE == "cuda" else "emulated"):
        pass


@pytest.fixture(params=["ascending"] if DEVICE == "cuda" else ["ascending", "descending"])
def kernels(
    request: pytest.FixtureRequest, compiled: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """Activate megagrow's kernels, in each schedule; unwritten output is NaN."""
    monkeypatch.setenv("MEGAGROW_EMULATOR_REVERSE", str(int(request.param == "descending")))
    torch.use_deterministic_algorithms(True, warn_only=True)
    with library.using("cuda" if DEVICE == "cuda" else "emulated") as active:
        yield active
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fp64_kernels(kernels: Any) -> None:
    """Like `kernels`, for tests in fp64, which only the emulator supports."""
    if DEVICE == "cuda":
        pytest.skip("fp64 kernels are built for the emulator only")


def pytest_report_header() -> str:
    return f"kernels are tested on: {DEVICE} (C++ compiler {build.cxx()}, nvcc {build.nvcc()})"
