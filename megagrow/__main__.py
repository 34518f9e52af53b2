"""`python -m megagrow COMMAND ...`, which is what the command `megagrow` does."""

import sys

from megagrow.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
