"""Text to a tokenizer and an indexed dataset; see --help."""

from __future__ import annotations

import sys
from pathlib import Path

from megagrow.cli import Parser
from megagrow.data.prepare import DTYPES, Request, prepare
from megagrow.errors import MegagrowError

EXAMPLES = """\
  # the source files of Python's standard library, about 30 MB of text
  python launch/prepare_data.py --input stdlib --output data/stdlib --workers 2

  # JSONL with a ready tokenizer
  python launch/prepare_data.py --input CORPUS.jsonl --text-key text \\
      --tokenizer TOKENIZER.json --output data/corpus --workers 16

A run that was stopped goes on where it was when the same command is given again;
until then its work lies in OUTPUT.work, which may be removed.
"""


def parse(arguments: list[str] | None = None) -> Request:
    """The command line as a request."""
    parser = Parser(
        description="Make a tokenizer and an indexed dataset (Megatron's .bin/.idx) from text.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add(
        "--input",
        required=True,
        help="a text file, a .jsonl file, a directory of such, or 'stdlib'",
    )
    add("--output", required=True, type=Path, help="directory to make")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--tokenizer", type=Path, help="a .model or tokenizer.json to use")
    kind.add_argument(
        "--vocab-size",
        type=int,
        default=Request.vocab_size,
        help="of the tokenizer to train (default %(default)s)",
    )
    add(
        "--tokenizer-sample",
        type=int,
        default=Request.tokenizer_sample,
        metavar="CHARACTERS",
        help="of text to train the tokenizer on (default %(default)s)",
    )
    add(
        "--validation-fraction",
        type=float,
        default=Request.validation_fraction,
        help="of the documents (default %(default)s)",
    )
    add("--seed", type=int, default=Request.seed, help="of split and sample (default %(default)s)")
    add("--workers", type=int, default=Request.workers, help="processes (default %(default)s)")
    add(
        "--dtype",
        choices=DTYPES,
        default=Request.dtype,
        help="token type; auto is uint16 for vocabularies below 65500",
    )
    add("--glob", default=Request.glob, help="files of a directory (default %(default)r)")
    add(
        "--text-key",
        default=Request.text_key,
        help="key of the text in a JSONL line (default %(default)r)",
    )
    add(
        "--documents",
        choices=("file", "paragraph"),
        default=Request.documents,
        help="a text file is one document, or many parted by blank lines (default %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace a dataset made otherwise")
    return Request(**vars(parser.parse_args(arguments)))


def main() -> int:
    """Prepare; returns the exit status."""
    try:
        outcome = prepare(parse())
    except MegagrowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    data = outcome.data
    print(f"{data.path}: " + ("prepared" if outcome.fresh else "already prepared"))
    for name, split in (("train", data.content.train), ("validation", data.content.validation)):
        print(f"  {name:<12}{split.documents:>12,} documents {split.tokens:>16,} tokens")
    print(f"  vocabulary  {data.vocab_size:>12,} tokens, {data.content.tokenizer_file}")
    if data.made["unreadable_files"]:
        example = data.made["unreadable_examples"][0]
        print(f"  left out    {data.made['unreadable_files']:>12,} not UTF-8, such as {example}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
