"""Show what a checkpoint of any format holds, and check it; see --help."""

import os
import sys

here = os.path.dirname(os.path.realpath(__file__))
elsewhere = [path for path in sys.path if os.path.realpath(path) != here]
if __name__ == "__main__":
    sys.path[:] = elsewhere  # as in pretrain.py
    from megagrow.cli.inspect_checkpoint import main
    from megagrow.cli.program import run_program

    run_program(main)
else:
    # The scripts next to this one drop its directory from their search path.  One of your own that
    # does not, and imports `inspect`, means the standard library's, so this module becomes that.
    from importlib.machinery import PathFinder

    found = PathFinder.find_spec("inspect", elsewhere)
    assert found is not None and found.loader is not None
    found.loader.exec_module(sys.modules[__name__])
