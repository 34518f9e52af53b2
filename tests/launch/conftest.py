from jobs import dataset  # noqa: F401 - a fixture
