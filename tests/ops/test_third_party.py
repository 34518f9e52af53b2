"""Another library is used only if it is installed, selected and correct."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megagrow import ops
from megagrow.errors import ConfigError
from megagrow.ops import third_party
from tests.ops.device import DEVICE

INSTALLED = [name for name, backend in third_party.BACKENDS.items() if backend.installed()]


@pytest.fixture(autouse=True)
def choose_again():
    yield
    third_party.choose("own")


def stand_in(monkeypatch, **functions):
    """A library on this test's device, under the name of a real one."""
    right = {
        "rms_norm": lambda x, w, eps: F.rms_norm(x, w.shape, w, eps),
        "swiglu": lambda gate, up: F.silu(gate) * up,
        "adamw": third_party._plain_adamw,
    }
    backend = dataclasses.replace(
        third_party.BACKENDS["liger"],
        functions=right | functions,
        installed=lambda: True,
        device=DEVICE,
    )
    monkeypatch.setitem(third_party.BACKENDS, "liger", backend)


def test_a_library_that_is_not_installed_is_refused(monkeypatch):
    absent = dataclasses.replace(third_party.BACKENDS["apex"], installed=lambda: False)
    monkeypatch.setitem(third_party.BACKENDS, "apex", absent)
    with pytest.raises(ConfigError, match=r"ops.backend: apex is not installed(.|\n)*unrelated"):
        ops.choose("apex")


def test_a_chosen_library_serves_what_it_has(monkeypatch):
    calls = []

    def rms_norm(x, weight, eps):
        calls.append(x)
        return F.rms_norm(x, weight.shape, weight, eps)

    stand_in(monkeypatch, rms_norm=rms_norm)
    ops.choose("liger")
    assert third_party.chosen() == "liger"
    calls.clear()
    x, w, b = torch.randn(3, 8, device=DEVICE), *torch.randn(2, 8, device=DEVICE)
    y, z = ops.add_rms_norm(x, x, w, 1e-5)
    torch.testing.assert_close(y, F.rms_norm(2 * x, (8,), w, 1e-5))
    ops.layer_norm(x, w, b, 1e-5)
    assert len(calls) == 1 and torch.equal(calls[0], z)
    ops.choose("own")
    ops.rms_norm(x, w, 1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("op", "wrong", "found"),
    [
        ("rms_norm", lambda x, w, eps: F.rms_norm(x, w.shape, w, eps) * 1.05, "relative error"),
        ("rms_norm", lambda x, w, eps: F.rms_norm(x, w.shape, w, eps).detach(), "grad"),
        ("swiglu", lambda gate, up: (F.silu(gate) * up)[..., :-1], "shape"),
        ("swiglu", lambda gate: gate, "TypeError"),
        ("adamw", lambda p, g, m, v, **numbers: p.sub_(numbers["lr"] * g), "relative error"),
    ],
)
def test_a_library_that_computes_wrongly_is_refused(monkeypatch, op, wrong, found):
    stand_in(monkeypatch, **{op: wrong})
    with pytest.raises(ConfigError, match=rf"fails the numerical check of {op}(.|\n)*{found}"):
        ops.choose("liger")
    assert third_party.chosen() == "own"


@pytest.mark.skipif(DEVICE == "cpu", reason="real libraries need a GPU")
@pytest.mark.parametrize("name", INSTALLED or ["own"])
def test_installed_libraries_pass_the_check(name):
    ops.choose(name)
    assert third_party.chosen() == name
