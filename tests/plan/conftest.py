"""Fixtures of the tests of what a run would be."""

from jobs import dataset  # noqa: F401 - a fixture
