"""`python -m megagrow COMMAND ...`, which is what the command `megagrow` does."""

from megagrow.cli.main import program

if __name__ == "__main__":
    program()
