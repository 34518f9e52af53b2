"""Every format holds every kind of model, grown or not, in every layout that it can express.

A cell is (format, the run's growths, layout): written from a native checkpoint, read
back, compared in every tensor and slot that the format holds.  The impossible is refused by name.
"""

import itertools

import pytest
import torch

from megagrow.checkpoint.convert.registry import FORMATS
from megagrow.checkpoint.convert.run import Job, convert
from megagrow.checkpoint.interface.model_of import model_of
from megagrow.errors import ConfigError
from megagrow.models.catalog import build_catalog
from megagrow.state.layout import Layout
from tests.checkpoint.grown import HISTORIES, save_grown
from tests.checkpoint.states import contents, opened

LAYOUTS = {
    "alone": Layout(),
    "data": Layout(data=2, zero=1),
    "tensor": Layout(tensor=2),
    "pipeline": Layout(pipeline=2),
}
# What a format cannot express, by its name and that of the axis.
NO_PLACE = {
    ("huggingface", "data"), ("huggingface", "tensor"), ("huggingface", "pipeline"),
    ("universal", "data"), ("megatron", "data"),
}  # fmt: skip
WEIGHTS_ALONE = {"huggingface"}


CELLS = [
    (history, fmt, layout)
    for history, fmt, layout in itertools.product(HISTORIES, FORMATS, LAYOUTS)
    if history not in ("composed", "by_rule") or layout == "tensor"
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """By history: (checkpoint, its model, its values)."""
    made = {}
    for history in HISTORIES:
        path, model = save_grown(tmp_path_factory.mktemp(history), history)
        made[history] = path, model, contents(path)
    return made


@pytest.mark.parametrize(("history", "fmt", "layout"), CELLS)
def test_a_model_is_the_same_in_every_format_however_it_has_grown(
    history, fmt, layout, sources, tmp_path, monkeypatch
):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # no crash is in question here
    path, model, wanted = sources[history]
    job = Job(path, tmp_path / "out", fmt, layout=LAYOUTS[layout])
    if (fmt, layout) in NO_PLACE:
        with pytest.raises(ConfigError, match=f"format {fmt} cannot express .*{layout}"):
            convert(job, workers=1)
        assert not job.target.exists()
        return
    convert(job, workers=1)
    back = opened(job.target)
    held = {slot.name for slot in back.slots}
    assert held == ({"master"} if fmt in WEIGHTS_ALONE else {slot for _, slot in wanted})
    found = contents(job.target)
    assert set(found) == {pair for pair in wanted if pair[1] in held}
    for pair, values in found.items():
        assert torch.equal(values, wanted[pair]) and values.dtype == wanted[pair].dtype, pair
    native = opened(path)
    read = model_of(back)
    assert build_catalog(read) == build_catalog(model) == native.catalog == back.catalog
    if fmt in WEIGHTS_ALONE:
        return
    assert read == model
    for what in ("step", "config", "run_state", "fingerprints"):
        assert getattr(back, what) == getattr(native, what), what
