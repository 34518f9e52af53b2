"""Skipped steps, rollbacks, stop requests: as pure decisions."""

import math
import os
import signal

import pytest

from megagrow.config import RecoveryConfig
from megagrow.train.health.recovery import WINDOW, RollBack, StepGuard, is_spike, remember
from megagrow.train.health.signals import StopRequest, signal_name


def judge(guard, loss, norm=1.0, *, recent=(), step=7, losses=None):
    """One step: asks before the update and after it; returns the fault."""
    guard.begin(recent)
    applied = guard.accept(loss, norm)
    return guard.passes_over(step=step, losses=losses or [loss], grad_norm=norm, applied=applied)


def test_good_steps_pass():
    guard = StepGuard(RecoveryConfig(), scaled=False)
    assert [judge(guard, x) for x in (3.0, 300.0, 2.0)] == [None] * 3


@pytest.mark.parametrize(
    ("loss", "norm", "says"),
    [
        (math.nan, 1.0, "the loss is not finite"),
        (math.inf, 1.0, "the loss is not finite"),
        (2.0, math.inf, "the gradient is not finite (norm inf)"),
        (2.0, math.nan, "the gradient is not finite (norm nan)"),
    ],
)
def test_a_step_that_is_not_finite_leaves_no_update(loss, norm, says):
    guard = StepGuard(RecoveryConfig(skip=1), scaled=False)
    guard.begin(())
    assert not guard.accept(loss, norm)
    text = guard.passes_over(step=7, losses=[2.0, loss], grad_norm=norm, applied=False)
    assert text.startswith(says)
    assert ("on rank 1" in text) == (not math.isfinite(loss))


def test_as_many_in_a_row_as_allowed():
    guard = StepGuard(RecoveryConfig(skip=2), scaled=False)
    assert judge(guard, math.nan) and judge(guard, math.nan)
    with pytest.raises(RollBack, match="step 7: the loss is not finite") as caught:
        judge(guard, math.nan)
    assert caught.value.ranks == ["nan on rank 0"]
    # A good step in between restarts the count.
    assert judge(guard, math.nan) and judge(guard, 2.0) is None and judge(guard, math.nan)


def test_an_update_that_cannot_be_taken_back():
    guard = StepGuard(RecoveryConfig(skip=9), scaled=False)
    guard.begin(())
    with pytest.raises(RollBack):
        guard.passes_over(step=1, losses=[math.nan], grad_norm=1.0, applied=True)


def test_what_deepspeed_passes_over_without_asking():
    guard = StepGuard(RecoveryConfig(), scaled=False)
    guard.begin(())
    assert guard.passes_over(step=1, losses=[2.0], grad_norm=math.inf, applied=False)
    scaled = StepGuard(RecoveryConfig(), scaled=True)
    scaled.begin(())
    assert scaled.passes_over(step=1, losses=[2.0], grad_norm=math.inf, applied=False) is None


def test_spikes():
    recent = [2.0] * WINDOW
    assert not is_spike(5.0, recent, None)
    assert not is_spike(100.0, recent[:3], 2.0)  # too few to compare with
    assert is_spike(4.1, recent, 2.0) and not is_spike(3.9, recent, 2.0)
    assert not is_spike(4.1, [*recent[:8], *[9.0] * 9], 2.0)
    guard = StepGuard(RecoveryConfig(spike=2.0), scaled=False)
    assert "over 2 times the recent 2.0000" in judge(guard, 5.0, recent=recent)


def test_the_window_slides():
    recent = ()
    for number in range(WINDOW + 5):
        recent = remember(recent, float(number))
    assert recent == tuple(float(x) for x in range(5, WINDOW + 5))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_noted_and_what_they_did_before_comes_back(number):
    before = signal.getsignal(number)
    stop = StopRequest()
    with stop.listening():
        assert stop.signal == 0
        stop.deferring = True
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.signal == number and signal_name(stop.signal) == number.name
    assert signal.getsignal(number) == before
