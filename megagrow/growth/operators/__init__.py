"""The growth operators, one file for a kind of them, and their registry."""
