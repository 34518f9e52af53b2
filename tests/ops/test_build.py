"""Builds, the choice of the implementation, and the messages if a build is impossible."""

import pytest
import torch

from megagrow.errors import ConfigError
from megagrow.ops import build, library
from megagrow.ops.__main__ import main


def test_without_nvcc_there_is_one_line(monkeypatch):
    monkeypatch.setattr(build, "nvcc", lambda: None)
    line = build.optional_cuda_library({})
    assert "not built, PyTorch's own ops serve: nvcc" in line and "\n" not in line
    assert "MEGAGROW_CUDA=0" in build.optional_cuda_library({"MEGAGROW_CUDA": "0"})
    with pytest.raises(build.BuildError, match="nvcc"):
        build.optional_cuda_library({"MEGAGROW_CUDA": "1"})


def test_a_compiler_that_fails_is_quoted():
    with pytest.raises(build.BuildError, match=r"ended with 3:\nno such thing"):
        build.run_compilers([["sh", "-c", "echo no such thing >&2; exit 3"]])


def test_targets_are_pytorchs_names(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build.architectures() == ["8.0", "9.0a", "10.0"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;10.0+PTX")
    assert build.architectures() == ["8.0", "9.0a", "10.0"]
    assert build.gencode("9.0a") == "-gencode=arch=compute_90a,code=sm_90a"


def test_sources_change_the_key(tmp_path):
    (tmp_path / "a.cuh").write_text("1")
    before = build.source_hash(sources=tmp_path)
    assert before == build.source_hash(sources=tmp_path) != build.source_hash("x", sources=tmp_path)
    (tmp_path / "a.cuh").write_text("2")
    assert before != build.source_hash(sources=tmp_path)


def test_modes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no such choice"), library.using("fast"):
        pass
    with pytest.raises(ConfigError, match="=cuda: no CUDA device"), library.using("cuda"):
        pass
    x = torch.zeros(1)
    for mode in ("auto", "reference"):
        with library.using(mode) as active:
            assert not library.own("rms_norm", x)
            assert "PyTorch's own ops" in active.reason
    with library.using("emulated"):
        assert library.own("rms_norm", x) and not library.own("rms_norm", x.int())


def test_a_library_that_does_not_load_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build, "CUDA_LIBRARY", tmp_path / "damaged.so")
    with library.using("auto") as active:
        assert "not built (python -m megagrow.ops --build cuda)" in active.reason
    (tmp_path / "damaged.so").write_bytes(b"no library")
    with library.using("auto") as active:
        assert "do not load" in active.reason


def test_the_command_says_what_is_active(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "serving:" in text and "MEGAGROW_KERNELS" in text and "NVIDIA apex" in text
