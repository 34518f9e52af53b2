"""Convert a checkpoint between formats and layouts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagrow.arguments import Parser, as_path, as_path_or_url, as_path_text, number, whole
from megagrow.errors import exit_status
from megagrow.state.precision import ELEMENTS

if TYPE_CHECKING:  # they need PyTorch, whose import takes a second: not for --help
    from megagrow.checkpoint.convert.run import ConversionReport, Job, Survey

EXAMPLES = """\
  # another layout: from the run's own to tensor 2 x pipeline 2
  python launch/convert.py --from runs/quickstart --to runs/other/checkpoints/step_00000400 \\
      --to-format native --tensor 2 --pipeline 2 --verify

  # for transformers' from_pretrained, with the tokenizer
  python launch/convert.py --from runs/quickstart --to exports/quickstart \\
      --to-format huggingface --tokenizer data/stdlib_bytes

  # weights to start a run from: configs/quickstart.yaml then goes on with --resume imports/model
  python launch/convert.py --from MODEL --to imports/model --to-format native \\
      --config configs/quickstart.yaml

  # from an object store, or to one: any URL that fsspec knows
  python launch/convert.py --from s3://bucket/run --to exports/model --to-format huggingface

  # twice as deep on the way, from one format to another
  python launch/convert.py --from MODEL --to exports/deeper --to-format huggingface \\
      --grow operator=depth_stack factor=2
"""
# Those of `megagrow.checkpoint.convert.registry`, in its order.
FORMATS = {
    "native": "megagrow's own, in any layout",
    "huggingface": "GPT-2 and LLaMA directories of Hugging Face: parameters in safetensors, "
    "config.json",
    "deepspeed": "what DeepSpeed's engine saves, ZeRO 0 to 3, pipelines",
    "universal": "DeepSpeed's universal checkpoint, for load_universal",
    "megatron": "Megatron-LM's classic mp_rank_* grid (--ckpt-format torch)",
    "dcp": "torch.distributed.checkpoint with full names",
}
_BUFFER_MIB = 64
# Options that do not tell what the result is to be.
_OWN = ("workers", "buffer_mib", "dry_run", "verify", "local_rank")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    formats = "\n".join(f"  {name:<12} {about}" for name, about in FORMATS.items())
    parser = Parser(description=__doc__, examples=f"{EXAMPLES}\nformats:\n{formats}")
    add = parser.add_argument
    add(
        "--from",
        dest="source",
        type=as_path_or_url,
        required=True,
        metavar="PATH|URL",
        help="a checkpoint, or a run directory: its newest one; or the URL of one in an object "
        "store, which is downloaded to TMPDIR first",
    )
    add("--from-format", choices=FORMATS, help="by default what it looks like")
    add(
        "--to",
        dest="target",
        type=as_path_or_url,
        required=True,
        metavar="PATH|URL",
        help="the directory to make; nothing may be there; a URL is uploaded from TMPDIR",
    )
    add("--to-format", choices=FORMATS, required=True, help="of the result")
    for axis in ("tensor", "pipeline", "data"):
        add(
            f"--{axis}",
            type=whole(1),
            metavar=axis[0].upper(),
            help=f"{axis}-parallel size of the result; without any size, the source's layout",
        )
    add("--zero", type=int, choices=range(4), metavar="Z", help="ZeRO stage of the result")
    add("--dtype", choices=ELEMENTS, help="element type; by default nothing is rounded")
    add(
        "--tokenizer",
        type=as_path,
        metavar="PATH",
        help="tokenizer file or directory to carry along, or none; by default the model's own",
    )
    add(
        "--allow-other-tokenizer",
        action="store_true",
        help="take a tokenizer that is not the model's, by the SHA-256 that the checkpoint holds",
    )
    add(
        "--vocab-size",
        type=whole(1),
        metavar="N",
        help="true vocabulary, where the source tells only the padded table (megatron)",
    )
    add(
        "--ignore",
        nargs="+",
        default=(),
        metavar="NAME",
        help="settings of the source that change nothing, or copies of which the first is right",
    )
    add(
        "--family",
        metavar="NAME",
        help="family of the model, where the source fits several (deepspeed, universal, megatron)",
    )
    add(
        "--config",
        type=as_path_text,
        metavar="FILE",
        help="run configuration whose run is to start from the result (weights without a run)",
    )
    add(
        "--shard-gib",
        type=number(above=0, most=2**40),
        metavar="N",
        help="greatest file, for formats that cut by size (default 5)",
    )
    add(
        "--workers",
        type=whole(1, 4096),
        metavar="N",
        help="threads; by default one more than cores",
    )
    add(
        "--buffer-mib",
        type=whole(1, 2**30),
        default=_BUFFER_MIB,
        metavar="N",
        help="memory for values in each thread (default %(default)s)",
    )
    add(
        "--grow",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="grow the model on the way: a `grow` section, such as operator=width_fresh factor=2",
    )
    add("--dry-run", action="store_true", help="print bytes, disk and memory needed, and end")
    add("--verify", action="store_true", help="read the result back and compare every value")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    from megagrow.checkpoint.convert.remote import as_local, as_target

    if options.dry_run and not isinstance(options.target, Path):
        options.target = Path(options.target.rpartition("/")[2] or "checkpoint")
        print(f"to {options.target} here; a real run uploads it")
    with as_local(options.source) as source, as_target(options.target) as target:
        for place, path in ((options.source, source), (options.target, target)):
            if place != path:
                print(f"{place} by way of {path}")
        _run(argparse.Namespace(**{**vars(options), "source": source, "target": target}))
    if target != options.target:
        print(f"{options.target}: uploaded")


def _run(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from megagrow.checkpoint.convert.run import convert, survey
    from megagrow.train.conversion import conversion

    asked = {name: value for name, value in vars(options).items() if name not in _OWN}
    job = conversion(**asked)
    settings = {"workers": options.workers, "buffer_bytes": options.buffer_mib << 20}
    about = survey(job, **settings)
    print(describe(about, job))
    if options.dry_run:
        return
    with tqdm(
        total=about.bytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False
    ) as bar:
        report = convert(job, **settings, verify=options.verify, moved=lambda n: _advance(bar, n))
    print(conclusion(report, job))


def _advance(bar: Any, count: int) -> None:
    bar.update(count)


def describe(about: Survey, job: Job) -> str:
    """What will be done, in lines for a person to read."""
    grown = {"growth": str(job.transform)} if job.transform is not None else {}
    rows = {
        "from": f"{about.source} ({about.source_format})",
        **grown,
        "to": f"{job.target} ({job.target_format})",
        "files": f"{about.files:,} with {about.bytes:,} bytes",
        "disk": f"{about.disk_bytes:,} bytes needed, {about.free_bytes:,} free; no temporary copy",
        "memory": f"at most {about.memory_bytes:,} bytes of values, in {about.workers} threads",
    }
    lines = [f"{name:<9}{value}" for name, value in rows.items()]
    return "\n".join((*lines, *_differences(about)))


def _differences(about: Survey) -> list[str]:
    """What the source holds and the result will not, and the other way round."""
    from megagrow.checkpoint.interface.accounting import enumerated, summary

    lines = [f"left out: {line}" for line in summary(about.left_out)]
    if about.made:
        lines.append(f"zeros: {enumerated(about.made)} (the source has none)")
    return lines


def conclusion(report: ConversionReport, job: Job) -> str:
    """What was done."""
    rate = report.survey.bytes / max(report.seconds, 1e-9) / 1e9
    done = f"{report.survey.bytes:,} bytes in {report.seconds:.1f} s, {rate:.2f} GB/s"
    lines = [f"{job.target}: {done}"]
    lines += report.notes
    if report.kept:
        lines.append(f"{report.kept} files were already there from a run that was interrupted")
    for (tensor, slot), (count, greatest) in sorted(report.rounded.items()):
        lines.append(f"rounded: {tensor} {slot}: {count:,} values, by up to {greatest:.1e} of the "
                     "greatest")  # fmt: skip
    if report.verified:
        how = "rounded to the new element type" if report.rounded else "bit for bit"
        whose = "the source's" if job.transform is None else "what the growth makes of the source"
        lines.append(f"verified: every value that the result holds is {whose}, {how}")
        for whose, words in (
            ("source", "verified"),
            ("given", "not the source's, but as --config says or as of a new run"),
            ("neither", "not the source's, or not held"),
        ):
            items = [what for what, origin in report.described.items() if origin == whose]
            if items:
                lines.append(f"{words}: {', '.join(items)}")
        if job.tokenizer is not None:
            lines.append("not compared: the tokenizer's files")
        lines += _differences(report.survey)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and turn an error that the user can fix into a message and a status."""
    options = parse(arguments)
    try:
        return exit_status(lambda: run(options))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
