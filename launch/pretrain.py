"""Train a language model that grows while it trains; see --help."""

import os
import sys

if __name__ == "__main__":
    # Python puts a script's own directory first in its search path, and would take inspect.py and
    # evaluate.py here for the modules of those names.
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != here]
    from megagrow.cli.program import run_program
    from megagrow.cli.train import main

    run_program(main)
