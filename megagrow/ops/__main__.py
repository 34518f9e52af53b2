"""`python -m megagrow.ops`: shows which backend is active and why; builds and checks kernels."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

EXAMPLES = """\
examples:
  python -m megagrow.ops                     what is active, and why
  python -m megagrow.ops --build cuda        compile the kernels for this machine's GPUs
  python -m megagrow.ops --check             compile for all targets: registers and spills

MEGAGROW_KERNELS=auto|cuda|emulated|reference chooses; TORCH_CUDA_ARCH_LIST names the targets
(8.0;9.0a;10.0).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, do, print; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megagrow.ops",
        description="What serves the fused ops on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--build", choices=("cuda", "emulated"), help="compile a library")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compile the CUDA sources for sm_80, sm_90a, sm_100 (no GPU needed); fail on spills",
    )
    options = parser.parse_args(arguments)
    from megagrow.errors import MegagrowError
    from megagrow.ops import build

    try:
        if options.build:
            make = build.cuda_library if options.build == "cuda" else build.emulated_library
            print(f"built {make()}")
            return 0
        if options.check:
            return _check()
        print(describe())
    except (MegagrowError, build.BuildError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def describe() -> str:
    """A text report: what is active, what is installed, and what could be built."""
    import torch

    from megagrow.ops import build, installed, library, third_party
    from megagrow.ops.schemas import SCHEMAS

    active = library.active()
    libraries = {
        "NVIDIA apex": installed.apex_installed(),
        "Transformer Engine": installed.transformer_engine_installed(),
        "Liger": installed.liger_installed(),
    }
    names = sorted({name.rstrip("_").removesuffix("_backward") for name in SCHEMAS})
    wins = ", ".join(sorted(active.wins)) or "none (no benchmark on this device shows a win)"
    rows = [
        ("serving", active.reason),
        ("asked for", f"MEGAGROW_KERNELS={os.environ.get('MEGAGROW_KERNELS', 'auto')}"),
        ("own ops", ", ".join(names)),
        ("own ops on", ", ".join(sorted(active.served)) or "no device here"),
        ("under torch.compile", wins if active.served else "none"),
        ("CUDA library", f"{build.CUDA_LIBRARY}{_state(build.CUDA_LIBRARY.exists())}"),
        ("nvcc", build.nvcc() or "not found"),
        ("C++ compiler", build.cxx() or "not found"),
        ("CUDA targets", ", ".join(build.architectures())),
        ("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"),
        ("other libraries", ", ".join(f"{k}{_state(v)}" for k, v in libraries.items())),
        ("ops.backend", f"one of own, {', '.join(third_party.BACKENDS)}; set in a run's config"),
    ]
    return "\n".join(f"{name + ':':<21}{value}" for name, value in rows)


def _state(here: bool) -> str:
    return "" if here else " (not here)"


def _check() -> int:
    from megagrow.ops.check import check

    report = check()
    print(report.table())
    if report.undefined:
        print(f"\nundefined symbols: {', '.join(report.undefined)}", file=sys.stderr)
    for kernel in report.spilling:
        print(f"spills {kernel.spilled_bytes} bytes: {kernel.name} on {kernel.target}")
    return int(bool(report.spilling or report.undefined))


if __name__ == "__main__":
    sys.exit(main())
