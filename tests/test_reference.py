"""The pages of docs/reference/: complete, and those that docs/write_reference.py writes."""

import importlib.util
import re
from pathlib import Path

import pytest

from megagrow.cli.main import COMMANDS
from megagrow.config import Config

DOCS = Path(__file__).parent.parent / "docs"


def generator():
    spec = importlib.util.spec_from_file_location("write_reference", DOCS / "write_reference.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


PAGES = generator().PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_generator_writes(name):
    assert (DOCS / "reference" / name).read_text(encoding="utf-8") == PAGES[name](), (
        "run python docs/write_reference.py"
    )


def keys_of(schema, definition, key=""):
    """All dotted keys below a section of the JSON schema."""
    for setting, entry in definition["properties"].items():
        if "description" in entry:
            yield key + setting
        for name in re.findall(r"'#/\$defs/(\w+)'", str(entry)):
            yield from keys_of(schema, schema["$defs"][name], f"{key}{setting}.")


def test_every_setting_has_a_description_and_a_row():
    schema = Config.model_json_schema()
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    bare = [
        (name, setting)
        for name, definition in schema["$defs"].items()
        for setting, entry in definition["properties"].items()
        if "description" not in entry
    ]
    # These two exist for a clear error alone.
    assert bare == [("StageOptimizerConfig", "name"), ("StageOptimizerConfig", "offload")]
    keys = set(keys_of(schema, schema))
    assert {"optimizer.lr", "stages.until.steps", "model.rope_scaling.factor"} <= keys
    assert len(keys) > 150
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert {key.rpartition(".")[2] for key in keys} == rows


def test_every_command_has_a_section():
    page = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    assert re.findall(r"^## `megagrow (\w+)`", page, re.MULTILINE) == list(COMMANDS)
    assert "### `megagrow benchmark savings`" in page
    assert "|  |" not in page, "an option without help"
