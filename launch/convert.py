#!/usr/bin/env python3
"""Convert a checkpoint between formats and layouts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagrow.checkpoint.convert import BUFFER_BYTES, Job, Report, Survey, convert, survey
from megagrow.checkpoint.formats import FORMATS, detect
from megagrow.errors import exit_status
from megagrow.layout import Layout

_EXAMPLES = """\
examples:
  # another layout: from the run's own to tensor 2 x pipeline 2
  python launch/convert.py --from runs/quickstart --to runs/other/checkpoints/step_00000400 \\
      --to-format native --tensor 2 --pipeline 2 --verify

  # for transformers' from_pretrained, with the tokenizer
  python launch/convert.py --from runs/quickstart --to exports/quickstart \\
      --to-format huggingface --tokenizer data/quickstart

  # weights to start a run from: runs/new.yaml then goes on with --resume imports/llama
  python launch/convert.py --from models/llama --to imports/llama --to-format native \\
      --config runs/new.yaml
"""
_DTYPES = ("float32", "bfloat16", "float16")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    formats = "\n".join(f"  {name:<12} {fmt.about}" for name, fmt in FORMATS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"formats:\n{formats}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="PATH",
        help="a checkpoint, or a run directory: its newest one",
    )
    add("--from-format", choices=FORMATS, help="by default what it looks like")
    add(
        "--to",
        dest="target",
        type=Path,
        required=True,
        metavar="PATH",
        help="the directory to make; nothing may be there",
    )
    add("--to-format", choices=FORMATS, required=True)
    for axis in ("tensor", "pipeline", "data"):
        add(
            f"--{axis}",
            type=_positive,
            metavar=axis[0].upper(),
            help=f"{axis}-parallel size of the result; without any size, the source's layout",
        )
    add("--zero", type=int, choices=range(4), metavar="Z", help="ZeRO stage of the result")
    add("--dtype", choices=_DTYPES, help="element type; by default nothing is rounded")
    add("--tokenizer", type=Path, metavar="PATH", help="tokenizer file or directory to carry along")
    add(
        "--config",
        metavar="FILE",
        help="run configuration whose run is to start from the result (weights without a run)",
    )
    add(
        "--shard-gib",
        type=float,
        default=5.0,
        metavar="N",
        help="greatest file, for formats that cut by size (default 5)",
    )
    add(
        "--workers",
        type=_positive,
        metavar="N",
        help="threads; by default one more than cores",
    )
    add(
        "--buffer-mib",
        type=_positive,
        default=BUFFER_BYTES >> 20,
        metavar="N",
        help=f"memory for values in each thread (default {BUFFER_BYTES >> 20})",
    )
    add("--dry-run", action="store_true", help="print bytes, disk and memory needed, and end")
    add("--verify", action="store_true", help="read the result back and compare every value")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    job = _job(options)
    settings = {"workers": options.workers, "buffer_bytes": options.buffer_mib << 20}
    about = survey(job, **settings)
    print(describe(about, job))
    if options.dry_run:
        return
    from tqdm import tqdm

    with tqdm(
        total=about.bytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        report = convert(job, **settings, verify=options.verify, moved=lambda n: _advance(bar, n))
    print(conclusion(report, job))


def _advance(bar: Any, count: int) -> None:
    bar.update(count)


def describe(about: Survey, job: Job) -> str:
    """What will be done, in lines for a person to read."""
    rows = {
        "from": f"{about.source} ({about.source_format})",
        "to": f"{job.target} ({job.target_format})",
        "files": f"{about.files:,} with {about.bytes:,} bytes",
        "disk": f"{about.disk_bytes:,} bytes needed, {about.free_bytes:,} free; no temporary copy",
        "memory": f"at most {about.memory_bytes:,} bytes of values, in {about.workers} threads",
    }
    if about.left_out:
        rows["left out"] = f"{', '.join(about.left_out)}: {job.target_format} has no place for them"
    if about.made:
        rows["zeros"] = f"{', '.join(about.made)}: the source has none"
    return "\n".join(f"{name:<9}{value}" for name, value in rows.items())


def conclusion(report: Report, job: Job) -> str:
    """What was done."""
    rate = report.survey.bytes / max(report.seconds, 1e-9) / 1e9
    done = f"{report.survey.bytes:,} bytes in {report.seconds:.1f} s, {rate:.2f} GB/s"
    lines = [f"{job.target}: {done}"]
    if report.kept:
        lines.append(f"{report.kept} files were already there from a run that was interrupted")
    if report.verified and not report.rounded:
        lines.append("verified: every value is the source's, bit for bit")
    for (tensor, slot), (count, greatest) in sorted(report.rounded.items()):
        lines.append(f"rounded: {tensor} {slot}: {count:,} values, by up to {greatest:.1e} of the "
                     "greatest")  # fmt: skip
    if report.rounded:
        lines.append("verified: every value is the source's, rounded to the new element type")
    return "\n".join(lines)


def _job(options: argparse.Namespace) -> Job:
    import torch

    from megagrow.train.state import RunState

    config, fingerprints = _run_to_be(options.config)
    return Job(
        source=options.source,
        source_format=options.from_format,
        target=options.target,
        target_format=options.to_format,
        layout=_layout(options),
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        tokenizer=options.tokenizer,
        file_bytes=int(options.shard_gib * 2**30),
        run_state=RunState().to_json(),
        config=config,
        fingerprints=fingerprints,
    )


def _layout(options: argparse.Namespace) -> Layout | None:
    """The layout asked for: sizes that are not given are 1, the ZeRO stage is the source's.

    Where nothing is asked for it is the source's, as far as the format has a place for it.
    """
    sizes = {axis: getattr(options, axis) for axis in ("tensor", "pipeline", "data")}
    if options.zero is None and not any(sizes.values()):
        return None
    held = FORMATS[options.to_format].axes
    fmt, path = detect(options.source, options.from_format)
    before = fmt.open_source(path).layout
    if not any(sizes.values()):
        sizes = {axis: getattr(before, axis) for axis in held}
    zero = options.zero
    if zero is None:
        zero = before.zero if "data" in held else 0
    return Layout(**{axis: size or 1 for axis, size in sizes.items()}, zero=zero)


def _run_to_be(path: str | None) -> tuple[Mapping[str, Any] | None, Mapping[str, str] | None]:
    """Configuration and fingerprints of the run that is to start from the result."""
    if path is None:
        return None, None
    from megagrow.config.load import load_config
    from megagrow.data.dataset import open_dataset
    from megagrow.train.checkpoints import fingerprints

    config = load_config(path, [])
    data = open_dataset(config.data.path, config.data.tokenizer)
    return config.model_dump(mode="json", by_alias=True), fingerprints(data)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn an error that the user can mend into a message and a status."""
    options = parse(arguments)
    try:
        return exit_status(lambda: run(options))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
