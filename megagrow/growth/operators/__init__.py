"""The growth operators, one file per kind."""
