"""Other libraries are recognised by features that only they have."""

import sys

import pytest

from megagrow.ops import installed


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Creates packages in a temporary folder: packages("apex/optimizers") and so on."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("amp_C", "apex", "transformer_engine", "liger_kernel"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def make(path):
        folder = tmp_path
        for part in path.split("/"):
            folder /= part
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").write_text("raise AssertionError('looking must not import')")

    return make


def test_the_unrelated_package_of_apex_name_is_not_apex(packages):
    packages("apex")
    assert not installed.apex_installed()


@pytest.mark.parametrize("path", ["amp_C", "apex/optimizers"])
def test_apex_is_known_by_what_only_nvidias_has(packages, path):
    packages(path)
    assert installed.apex_installed()


@pytest.mark.parametrize(
    ("look", "path"),
    [
        (installed.transformer_engine_installed, "transformer_engine/pytorch"),
        (installed.liger_installed, "liger_kernel/ops"),
    ],
)
def test_other_libraries(packages, look, path):
    packages(path.split("/")[0])
    assert not look()
    packages(path)
    assert look()
