"""Train a language model that grows while it trains; see --help."""

import os
import sys

if __name__ == "__main__":
    # Python searches a script's own directory first, and would take the inspect.py and the
    # evaluate.py that are here for the modules of these names.
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != here]
    from megagrow.cli.program import run_program
    from megagrow.cli.train import main

    run_program(main)
