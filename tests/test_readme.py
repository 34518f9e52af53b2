"""The README's tables are those that the program prints."""

from pathlib import Path

from megagrow.growth.table import markdown

README = Path(__file__).parent.parent / "README.md"


def test_growth_tables_are_printed_by_the_program():
    assert markdown().strip() in README.read_text(encoding="utf-8")
