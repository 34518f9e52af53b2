"""The CUDA sources, compiled for every target; no GPU is needed."""

import pytest

from megagrow.ops import build
from megagrow.ops.check import _kernels, check

needs_nvcc = pytest.mark.skipif(
    build.nvcc() is None, reason="no nvcc in CUDA_HOME or on PATH: CUDA sources not compiled"
)


@needs_nvcc
def test_every_kernel_compiles_for_every_target_and_none_spills():
    report = check()
    print(report.table())
    targets = {kernel.target for kernel in report.kernels}
    assert targets == {"sm_80", "sm_90a", "sm_100"}
    assert not report.spilling
    # Nothing that a GPU build of PyTorch lacks, so the library will load there.
    assert report.undefined == []
    every = (
        "norm_forward norm_backward adamw copy_boxes softmax_stats softmax_gradient "
        "swiglu_backward bias_gelu_backward rotate sum_rows"
    )
    for name in every.split():
        for target in targets:
            assert any(name in k.name and k.target == target for k in report.kernels), name


def test_spills_are_read_from_what_the_assembler_prints():
    text = (
        "ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z1fv\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    (kernel,) = _kernels(text)
    assert (kernel.target, kernel.registers, kernel.spilled_bytes) == ("sm_80", 255, 16)
