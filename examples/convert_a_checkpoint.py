"""A checkpoint in every format, and back: the values are compared, bit for bit.

python examples/convert_a_checkpoint.py runs/tiny
"""

import sys
from pathlib import Path

import torch

import megagrow
from megagrow.state.boxes import whole

FORMATS = ("native", "huggingface", "deepspeed", "universal", "megatron", "dcp")


def main() -> None:
    """Convert a run's newest checkpoint to each format, in another layout where it has one."""
    run, out = sys.argv[1], Path("converted")
    before = megagrow.open_checkpoint(run)
    for name in FORMATS:
        tensor = 2 if name in ("native", "deepspeed", "megatron") else None
        report = megagrow.convert_checkpoint(
            run, out / name, to_format=name, tensor=tensor, verify=True
        )
        after = megagrow.open_checkpoint(out / name)
        equal = all(
            torch.equal(
                before.read(tensor.name, "master", whole(tensor.shape)),
                after.read(tensor.name, "master", whole(tensor.shape)),
            )
            for tensor in before.catalog
        )
        print(f"{name:<12} {report.survey.bytes:>12,} bytes  weights equal: {equal}")
        for line in report.survey.left_out:
            print(f"{'':<12} left out: {line}")


if __name__ == "__main__":
    main()
