"""The emulator detects defects: a missing barrier or output makes results wrong.

Each mutant is the kernels' source with one line changed, compiled in its own namespace.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from megagrow.ops import build, library, references
from megagrow.ops.schemas import define


@dataclass(frozen=True)
class Mutant:
    """One change: in a file, `before` becomes `after`; and the unit and op that it affects."""

    name: str
    file: str
    before: str
    after: str
    unit: str
    op: str


def barrier(name, context, unit, op):
    """The mutant without the barrier in a part of reduce.h."""
    return Mutant(
        name, "common/reduce.h", context, context.replace("  __syncthreads();\n", ""), unit, op
    )


MUTANTS = [
    barrier(
        "no_barrier_before_warps_meet",
        "shared[warp()] = x;\n  __syncthreads();\n",
        "xent",
        "softmax_stats",
    ),
    barrier(
        "no_barrier_before_shared_memory_is_used_again",
        "x = warp_reduce(x, op);\n  __syncthreads();\n  return x;",
        "norm",
        "layer_norm",
    ),
    barrier(
        "no_barrier_before_columns_are_summed",
        "+ lane()] = sum;\n  __syncthreads();\n",
        "act",
        "bias_gelu_backward",
    ),
    Mutant("output_left_out", "act.cuh", "    store(out + row * n, i, o);\n", "", "act", "swiglu"),
]


def arguments(op):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "softmax_stats": (randn(3, 300), torch.tensor([0, 7, 299]), 0),
        "layer_norm": (randn(3, 300), None, randn(300), randn(300), 1e-5),
        "bias_gelu_backward": (randn(9, 70), randn(9, 70), randn(70)),
        "swiglu": (randn(3, 64),),
    }[op]


def is_right(namespace, op):
    """Whether an op of a namespace matches the reference."""
    args = arguments(op)
    results = getattr(getattr(torch.ops, namespace), op)(*args)
    wanted = references.REFERENCES[op](*args)
    if isinstance(results, torch.Tensor):
        results, wanted = (results,), (wanted,)
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(results, wanted, strict=True)
    )


def in_both_schedules(namespace, op, monkeypatch):
    """The results of `is_right`, ascending and descending; an error counts as wrong."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    answers = []
    try:
        for reverse in "01":
            monkeypatch.setenv("MEGAGROW_EMULATOR_REVERSE", reverse)
            try:
                answers.append(is_right(namespace, op))
            except RuntimeError:
                answers.append(False)
    finally:
        torch.use_deterministic_algorithms(False)
    return answers


def mutated(mutant, folder):
    """A copy of the sources with the change."""
    shutil.copytree(build.SOURCES, folder)
    path = folder / mutant.file
    text = path.read_text()
    assert text.count(mutant.before) >= 1, "the text to change is gone"
    path.write_text(text.replace(mutant.before, mutant.after, 1))
    return folder


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fails(mutant, tmp_path, monkeypatch):
    with library.using("emulated"):
        assert in_both_schedules(library.EMULATED, mutant.op, monkeypatch) == [True, True]
    namespace = f"megagrow_{mutant.name}"
    schemas = define(namespace)
    torch.ops.load_library(
        str(
            build.emulated_library(
                namespace=namespace,
                sources=mutated(mutant, tmp_path / "csrc"),
                units=[[mutant.unit]],
                flags=["-O0"],
            )
        )
    )
    assert not all(in_both_schedules(namespace, mutant.op, monkeypatch))
    del schemas


PLANTED = Mutant(
    "out_of_bounds", "act.cuh", "if (i >= n / V) return;", "if (i > n / V) return;", "act", "swiglu"
)
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


@pytest.mark.slow
@pytest.mark.parametrize("planted", [False, True])
def test_the_sanitizers_see_an_access_out_of_bounds(planted, tmp_path):
    sources = mutated(PLANTED, tmp_path / "csrc") if planted else build.SOURCES
    library_file = build.emulated_library(
        namespace="megagrow_sanitized", sources=sources, units=[["act"]], flags=SANITIZED
    )
    code = (
        "import torch\n"
        "from megagrow.ops.schemas import define\n"
        "schemas = define('megagrow_sanitized')\n"
        f"torch.ops.load_library({str(library_file)!r})\n"
        "torch.ops.megagrow_sanitized.swiglu(torch.randn(3, 64))\n"
    )
    names = ("libasan.so", "libubsan.so")
    preload = " ".join(
        subprocess.check_output([build.cxx(), f"-print-file-name={name}"], text=True).strip()
        for name in names
    )
    environment = os.environ | {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == planted, done.stderr[-2000:]
    assert ("AddressSanitizer" in done.stderr) == planted
