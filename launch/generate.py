"""Generate text with a checkpoint; see --help."""

import os
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != here]  # as in pretrain.py
    from megagrow.cli.generate import main
    from megagrow.cli.program import run_program

    run_program(main)
