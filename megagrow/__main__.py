"""`python -m megagrow COMMAND ...`: the same as the command `megagrow`."""

from megagrow.cli.main import program

if __name__ == "__main__":
    program()
