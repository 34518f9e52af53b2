"""Prepare a tokenizer and an indexed dataset from text; see --help."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megagrow.arguments import Parser, as_file, as_path, as_path_text, whole
from megagrow.data.formats import FORMATS
from megagrow.data.request import DTYPES, Adoption, Request
from megagrow.errors import exit_status

EXAMPLES = """\
  # the source files of Python's standard library, about 30 MB of text
  python launch/prepare_data.py --input stdlib --output data/stdlib_bytes --workers 2 \\
      --tokenizer configs/tokenizers/bytes.json --validation-fraction 0.02

  # one text file: one document, the end of which validates
  python launch/prepare_data.py --input BOOK.txt --output data/book

  # token files that exist, where they are: Megatron-LM's, nanoGPT's, llm.c's, NumPy's
  python launch/prepare_data.py --tokens OLD.bin --tokenizer TOKENIZER.json --output data/old

  # JSONL with a ready tokenizer
  python launch/prepare_data.py --input CORPUS.jsonl --text-key text \\
      --tokenizer TOKENIZER.json --output data/corpus --workers 16

The same command resumes an interrupted run;
until then its work is in OUTPUT.work, which may be removed.
"""


def parse(arguments: Sequence[str] | None = None) -> Request | Adoption:
    """Parse the command line into what to prepare.

    Raises:
        DataError: options are out of range, or mutually exclusive.
    """
    parser = Parser(
        description="Make a tokenizer and an indexed dataset (Megatron's .bin/.idx) from text.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        type=as_path_text,
        help="a file or a directory of text or JSON records, plain or compressed (gzip, bzip2, xz, "
        "zstd), or of tables (Parquet, Arrow, a saved Hugging Face dataset); or 'stdlib'",
    )
    source.add_argument(
        "--tokens",
        nargs="+",
        type=as_path,
        metavar="PATH",
        help="token files that exist, read where they are: Megatron-LM's PREFIX (.bin and .idx), "
        "llm.c's or raw *.bin, *.npy, or directories of these",
    )
    add(
        "--validation-tokens",
        nargs="+",
        type=as_path,
        metavar="PATH",
        help="the same, to validate on (default: the last of --tokens, by --validation-fraction)",
    )
    add("--output", required=True, type=as_path, help="directory to make")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--tokenizer", type=as_file, help="a .model or tokenizer.json to use")
    kind.add_argument(
        "--vocab-size",
        type=whole(1, 2**31 - 1),
        default=Request.vocab_size,
        help="of the tokenizer to train (default %(default)s)",
    )
    add(
        "--tokenizer-sample",
        type=whole(1, 2**40),
        default=Request.tokenizer_sample,
        metavar="CHARACTERS",
        help="of text to train the tokenizer on (default %(default)s)",
    )
    add(
        "--validation-fraction",
        type=float,
        default=Request.validation_fraction,
        help="of the tokens (default %(default)s)",
    )
    add(
        "--seed",
        type=whole(0),
        default=Request.seed,
        help="of split and sample (default %(default)s)",
    )
    add(
        "--workers",
        type=whole(1, 4096),
        default=Request.workers,
        help="processes (default %(default)s)",
    )
    add(
        "--dtype",
        choices=(*DTYPES, "uint32", "int64"),
        default=Request.dtype,
        help="token type; auto is uint16 for vocabularies below 65500, and for raw --tokens",
    )
    add("--glob", default=Request.glob, help="files of a directory (default %(default)r)")
    add(
        "--format",
        choices=FORMATS,
        default=Request.format,
        help="what all files are: text as it stands, or JSON records, one a line or an array of "
        "them; auto looks into each file, and asks where it could be either",
    )
    add(
        "--text-key",
        metavar="KEY",
        help="of the text in a JSON record (default 'text'); given, all files must be JSON",
    )
    add(
        "--documents",
        choices=("file", "paragraph"),
        default=Request.documents,
        help="a text file is one document, or many separated by blank lines (default %(default)s)",
    )
    add(
        "--eod",
        metavar="NAME",
        help="special token of --tokenizer that ends a document (default: from the tokenizer or "
        "its tokenizer_config.json)",
    )
    add(
        "--bos",
        metavar="NAME",
        help="special token that begins a document, or 'none' (default: the one that the "
        "tokenizer itself puts there, if it does)",
    )
    add("--overwrite", action="store_true", help="replace a dataset made otherwise")
    options = vars(parser.parse_args(arguments))
    tokens, validation = options.pop("tokens"), options.pop("validation_tokens")
    if tokens is None:
        if validation is not None:
            parser.error("argument --validation-tokens: only with --tokens")
        if options["dtype"] not in DTYPES:
            parser.error(f"argument --dtype: {options['dtype']} is only for --tokens")
        return Request(**options)
    taken = ("output", "validation_fraction", "eod", "bos", "overwrite")
    known = {"input", "tokenizer", "dtype", *taken}
    for name, value in options.items():
        if name not in known and value != getattr(Request, name):
            parser.error(f"argument --{name.replace('_', '-')}: only with --input")
    if options["tokenizer"] is None:
        parser.error("argument --tokens: also give --tokenizer, the one that made them")
    return Adoption(
        tokens=tokens,
        validation=validation,
        tokenizer=options["tokenizer"],
        dtype=None if options["dtype"] == "auto" else options["dtype"],
        **{name: options[name] for name in taken},
    )


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    request = parse(arguments)
    if isinstance(request, Adoption):
        from megagrow.data.adopt import adopt

        print("\n".join(adopt(request)[1]))
        return
    from megagrow.data.prepare import prepare
    from megagrow.data.summary import summary

    print("\n".join(summary(prepare(request))))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and prepare; returns the exit status."""
    try:
        return exit_status(lambda: run(arguments))
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        return 130
