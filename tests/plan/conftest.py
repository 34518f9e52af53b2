"""Fixtures of the planning tests."""

from jobs import dataset  # noqa: F401 - a fixture
