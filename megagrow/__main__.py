"""`python -m megagrow COMMAND ...`: the same as the command `megagrow`."""

import sys

from megagrow.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
