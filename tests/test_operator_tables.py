"""The tables of docs/growth-operators.md are those that the program prints."""

from pathlib import Path

from megagrow.growth.table import markdown

PAGE = Path(__file__).parent.parent / "docs" / "growth-operators.md"


def test_growth_tables_are_printed_by_the_program():
    assert markdown().strip() in PAGE.read_text(encoding="utf-8")
