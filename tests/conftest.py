"""The environment of all tests, and of the processes they start; set before torch is imported."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.objects import Server

os.environ.setdefault("OMP_NUM_THREADS", "1")
# MEGAGROW_TEST_DEVICE=cuda runs on a GPU what can be run there (kernels/gpu_check.sh).
os.environ.setdefault("DS_ACCELERATOR", os.environ.get("MEGAGROW_TEST_DEVICE", "cpu"))
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking must not keep from forking
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# DeepSpeed finds ninja on PATH, also where pytest runs without the environment activated.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"

# A property holds however busy the machine is.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared dataset of the jobs of `tests.jobs`."""
    from tests.jobs import make_dataset  # which imports torch

    return make_dataset(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="session")
def s3_server() -> Iterator["Server"]:
    """A local S3 server with an empty bucket; tests use URLs of their own in it."""
    from tests.objects import Server

    server = Server()
    yield server
    server.kill()


@pytest.fixture
def s3(s3_server: "Server", monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of a directory of this test's own on it; this process is its client."""
    s3_server.use(monkeypatch)
    return s3_server.url(re.sub(r"\W+", "-", request.node.nodeid))


@pytest.fixture(autouse=True)
def no_job() -> Iterator[None]:
    """No test joins a job in this process: it is changed for good.  `jobs.launch` makes others."""
    yield
    left = [name for name in os.environ if name.startswith(_OF_A_RANK)]
    for name in left:
        del os.environ[name]
    assert not left, f"the test left in the environment: {left}"
    # megagrow.engine.comm.start makes this thread flush denormal numbers to zero.
    joined = sys.float_info.min / 2 == 0
    if joined:
        sys.modules["torch"].set_flush_denormal(False)
    assert not joined, "the test joined a job in this process"


_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_",
              "TORCHELASTIC_USE_AGENT_STORE")  # fmt: skip
