import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config.load import parse_config
from megagrow.errors import ConfigError
from megagrow.schedule import LearningRate, Rewarm, learning_rate
from megagrow.schedule.learning_rate import Moved, Phase
from megagrow.train.run_plan import plan_run

KINDS = ["wsd", "cosine", "linear", "constant"]


def rates(**settings):
    schedule = LearningRate(**{"peak": 1.0, "total_steps": 20, "warmup": 5, **settings})
    return [schedule.at(step) for step in range(schedule.total_steps + 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_climbs_from_one_part_to_the_peak(kind):
    assert rates(kind=kind, peak=3.0)[:5] == pytest.approx([0.6, 1.2, 1.8, 2.4, 3.0])
    assert rates(kind=kind, warmup=0)[0] == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_peak_and_floor_are_exact(kind, floor):
    peak = 0.1 + 0.2
    found = rates(kind=kind, floor=floor, peak=peak, decay=0.3)
    assert found[4] == found[5] == peak
    assert found[20] == (peak if kind == "constant" else peak * floor)
    beyond = LearningRate(peak, 20, kind=kind, floor=floor, decay=0.3).at(1000)
    assert beyond == found[20]


def test_wsd_decays_in_a_straight_line_over_the_last_steps():
    found = rates(kind="wsd", decay=0.25, floor=0.2)
    assert found[5:15] == [1.0] * 10
    assert found[15:] == pytest.approx([1.0, 0.84, 0.68, 0.52, 0.36, 0.2])


def test_no_update_has_a_rate_of_zero():
    for kind in KINDS:
        assert min(rates(kind=kind, floor=0.0)[:20]) > 0


def test_linear():
    found = rates(kind="linear", floor=0.5)
    assert found[5:] == pytest.approx([1 - 0.5 * i / 15 for i in range(16)])


def test_cosine():
    found = rates(kind="cosine", floor=0.1)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 15)) / 2 for i in range(16)]
    assert found[5:] == pytest.approx(expected, rel=1e-12)


def test_constant_ignores_decay_and_floor():
    assert rates(kind="constant", decay=0.5, floor=0.5, warmup=0) == [1.0] * 21


def test_wsd_without_decay_is_constant():
    assert rates(kind="wsd", decay=0.0, warmup=0) == [1.0] * 21


def test_rewarm_climbs_back_to_the_schedule():
    plain = rates(kind="cosine")
    found = rates(kind="cosine", rewarms=(Rewarm(8, 4), Rewarm(15, 0)))
    factors = [now / then for now, then in zip(found[:20], plain[:20], strict=True)]
    assert factors == pytest.approx([1.0] * 8 + [0.25, 0.5, 0.75, 1.0] + [1.0] * 8)


def test_overlapping_rewarms_take_the_smaller_factor():
    found = rates(kind="constant", warmup=0, rewarms=(Rewarm(0, 10), Rewarm(4, 2)))
    assert found[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    found = rates(kind="constant", warmup=0, rewarms=(Rewarm(0, 4), Rewarm(2, 4)))
    assert found[:7] == pytest.approx([0.25, 0.5, 0.25, 0.5, 0.75, 1.0, 1.0])


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    total=st.integers(2, 300),
    warm_part=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    floor=st.floats(0, 1),
)
def test_rises_then_falls_without_a_jump(kind, total, warm_part, decay, floor):
    warmup = int(warm_part * total * 0.9)
    schedule = LearningRate(1.0, total, warmup=warmup, kind=kind, decay=decay, floor=floor)
    found = [schedule.at(step) for step in range(total + 1)]
    assert all(b >= a for a, b in pairwise(found[:warmup]))
    assert all(b <= a + 1e-12 for a, b in pairwise(found[warmup:]))
    assert all(floor - 1e-12 <= rate <= 1.0 for rate in found[warmup:])
    # Adjacent rates differ by no more than the steepest straight line; a cosine is steeper than the
    # line through its ends by pi / 2.
    length = {"wsd": schedule.decay_steps, "constant": total}.get(kind, total - warmup)
    steepest = max(1 / max(1, warmup), math.pi / 2 / max(1, length))
    assert all(abs(b - a) <= steepest + 1e-12 for a, b in pairwise(found))


@pytest.mark.parametrize(
    ("warmup", "decay", "kind", "most"),
    [(19, 0.1, "wsd", 18), (21, 0.1, "cosine", 20), (100, 0.0, "wsd", 20), (1, 1.0, "wsd", 0)],
)
def test_a_warm_up_that_does_not_fit_is_refused(warmup, decay, kind, most):
    with pytest.raises(ConfigError) as caught:
        LearningRate(1.0, 20, warmup=warmup, decay=decay, kind=kind)
    message = str(caught.value)
    assert f"schedule.warmup = {warmup}" in message
    assert f"at most {most}" in message


def test_a_warm_up_that_just_fits():
    assert rates(warmup=18, decay=0.1)[17:] == pytest.approx([1.0, 1.0, 0.5, 0.0])
    assert rates(kind="cosine", warmup=20)[19] == 1.0


def test_from_a_configuration():
    config = parse_config(
        {
            "model": {"layers": 1, "hidden": 4, "heads": 1, "ffn": 4, "sequence": 4},
            "data": {"path": "d"},
            "batch": {"global": 1, "micro": 1},
            "stages": [{"until": {"steps": 50}}],
            "optimizer": {"lr": 0.5},
            "schedule": {"name": "linear", "warmup": 7, "decay": 0.2, "floor": 0.3},
        }
    )
    found = learning_rate(config, total_steps=50, rewarms=[(20, 5)])
    assert found == LearningRate(0.5, 50, 7, "linear", 0.2, 0.3, (Rewarm(20, 5),))


def _run(kind="wsd", *, total, warmup=10, restarts=(), moved=(), decay=0.1, floor=0.0):
    config = parse_config(
        {
            "model": {"layers": 1, "hidden": 4, "heads": 1, "ffn": 4, "sequence": 4},
            "data": {"path": "d"},
            "batch": {"global": 1, "micro": 1},
            "stages": [{"until": {"steps": total}}],
            "optimizer": {"lr": 1.0},
            "schedule": {"name": kind, "warmup": warmup, "decay": decay, "floor": floor},
        }
    )
    return learning_rate(config, total_steps=total, restarts=restarts, moved=moved)


@pytest.mark.parametrize("at", [650, 800])
def test_before_a_restart_the_rate_is_that_of_a_run_without_it(at):
    plain, set_back = _run(total=1000), _run(total=1000, restarts=[(at, 1.776)])
    assert [set_back.at(step) for step in range(at)] == [plain.at(step) for step in range(at)]
    assert set_back.at(at - 1) == 1.0
    assert set_back.position(at) == round(at / 1.776)
    assert 0 < set_back.at(999) < 0.02  # and the decay still ends with the run


EVENTS = st.lists(
    st.tuples(st.integers(1, 190), st.sampled_from(["restart", "moved"]), st.floats(0.5, 2.5)),
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    warmup=st.integers(0, 60),
    decay=st.floats(0, 0.5),
    floor=st.floats(0, 1),
    events=EVENTS,
)
def test_the_rate_up_to_any_step_does_not_depend_on_what_comes_after(
    kind, warmup, decay, floor, events
):
    """Restarts and moved ends, in any order; nor does the rate jump where an end moves."""
    ends, restarts, moved = [200], [], []
    so_far = [(0, _run(kind, total=200, warmup=warmup, decay=decay, floor=floor))]
    for step, what, size in sorted(events):
        if what == "restart":
            restarts.append((step, max(size, 1.0)))
        else:
            moved.append((step, ends[-1]))
            ends.append(step + max(1, round((ends[-1] - step) * size)))
        if step >= ends[-1]:
            return
        run = _run(kind, total=ends[-1], warmup=warmup, decay=decay, floor=floor,
                   restarts=restarts, moved=moved)  # fmt: skip
        so_far.append((step, run))
    last = so_far[-1][1]
    stops = [step for step, _ in so_far[1:]] + [ends[-1]]
    for (start, run), stop in zip(so_far, stops, strict=True):
        assert [run.at(step) for step in range(stop)] == [last.at(step) for step in range(stop)]
        assert stop >= start
    set_back = {step for step, _ in restarts}
    for step, _ in moved:
        if step in set_back or step < warmup:
            continue
        # The rate at this step does not change with the end; its slope may.
        known = [run for at, run in so_far if at < step][-1]
        assert last.at(step) == pytest.approx(known.at(step), abs=1e-12)
    steepest = max(last.at(step) for step in range(ends[-1]))
    assert min(last.at(step) for step in range(ends[-1])) >= 0 and steepest <= 1.0 + 1e-12


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("total", [120, 300])
def test_a_falling_rate_goes_on_from_where_it_is_when_a_rule_moves_the_end(kind, total):
    run = LearningRate(1.0, total, warmup=5, kind=kind, moved=(Moved(80, 200),))
    before = LearningRate(1.0, 200, warmup=5, kind=kind)
    assert [run.at(step) for step in range(81)] == [before.at(step) for step in range(81)]
    assert all(b < a for a, b in pairwise(run.at(step) for step in range(5, total + 1)))
    assert run.at(total) == pytest.approx(0.0, abs=1e-12) and run.at(total - 1) > 0


def test_a_plateau_takes_the_new_end_and_decays_into_it():
    run = LearningRate(1.0, 300, warmup=5, decay=0.2, moved=(Moved(80, 200),))
    assert run.decay_steps == 60 and run.at(239) == 1.0 and run.at(270) == pytest.approx(0.5)
    # Fewer steps are left than the decay needs: all of them decay, from the current rate.
    short = LearningRate(1.0, 90, warmup=5, decay=0.2, moved=(Moved(80, 200),))
    assert short.at(80) == 1.0 and short.at(85) == pytest.approx(0.5)


# --- stages with their own rates ----------------------------------------------------------


def test_a_peak_of_a_stage_stays_until_another_has_one():
    phases = (Phase(5, 10, 2.0), Phase(12, 20, 0.5))
    found = rates(kind="constant", warmup=0, phases=phases)
    assert found == [1.0] * 5 + [2.0] * 7 + [0.5] * 9
    # The run's own schedule continues: its value times the peak.
    plain, own = (rates(kind="cosine", warmup=2, phases=p) for p in ((), phases))
    assert own[:5] == plain[:5] and own[12:] == [rate * 0.5 for rate in plain[12:]]


def test_a_decay_of_a_stage_ends_with_it():
    found = rates(kind="constant", warmup=0, phases=(Phase(4, 10, 1.0, 4, 0.2), Phase(10, 20, 1.0)))
    assert found[:7] == [1.0] * 7 and found[10:] == [1.0] * 11
    assert found[6:10] == pytest.approx([1.0, 0.8, 0.6, 0.4])


def _staged(stages, *, total, kind, decay):
    """The rate of a run that begins with these stages; the last one lasts to the end."""
    config = parse_config(
        {
            "model": {"layers": 1, "hidden": 4, "heads": 1, "ffn": 4, "sequence": 4},
            "data": {"path": "d"},
            "batch": {"global": 1, "micro": 1},
            "stages": [
                {"until": {"steps": end}, "optimizer": optimizer, "schedule": schedule}
                for end, optimizer, schedule in [*stages, (total, None, None)]
            ],
            "schedule": {"name": kind, "warmup": 3, "decay": decay},
        }
    )
    return plan_run(config, world=1, vocabulary=8).learning_rate


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["wsd", "constant"]),
    stages=st.lists(
        st.tuples(
            st.integers(10, 30),
            st.sampled_from([None, 1e-3, 3e-3]),
            st.integers(0, 5),
            st.sampled_from([None, 0.1, 0.5]),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_the_rates_of_a_stage_do_not_depend_on_later_stages(kind, stages):
    """Except for wsd's decay at the end of the run, which is not compared."""
    ends, known = 0, []
    for number, (steps, lr, warmup, decay) in enumerate(stages):
        ends += steps
        schedule = {"decay": decay} if decay else {}
        schedule |= {"warmup": warmup} if warmup and number else {}
        known.append((ends, {"lr": lr} if lr else {}, schedule))
    total = ends + 400
    whole = _staged(known, total=total, kind=kind, decay=0.1)
    for number, (end, _, _) in enumerate(known):
        before = _staged(known[: number + 1], total=total, kind=kind, decay=0.1)
        assert [before.at(step) for step in range(end)] == [whole.at(step) for step in range(end)]
    start = 0
    peak = 1e-3
    for end, optimizer, schedule in known:
        peak = optimizer.get("lr", peak)
        inside = [whole.at(step) for step in range(start, end)]
        assert max(inside) <= peak and all(rate > 0 for rate in inside)
        first = schedule.get("warmup", 1 if start else 3)
        assert inside[0] == pytest.approx(peak / first)
        if "decay" not in schedule:
            assert inside[-1] == peak
        else:
            length = max(1, round(schedule["decay"] * (end - start)))
            assert inside[-1] == pytest.approx(peak / length)
        start = end


def test_a_decay_of_the_last_stage_takes_the_place_of_the_runs():
    config = {
        "model": {"layers": 1, "hidden": 4, "heads": 1, "ffn": 4, "sequence": 4},
        "data": {"path": "d"}, "batch": {"global": 1, "micro": 1},
        "stages": [{"until": {"steps": 50}}, {"until": {"steps": 100}, "schedule": {"decay": 0.4}}],
        "optimizer": {"lr": 1.0}, "schedule": {"decay": 0.1, "warmup": 0},
    }  # fmt: skip
    rate = plan_run(parse_config(config), world=1, vocabulary=8).learning_rate
    assert rate.at(80) == 1.0 and rate.at(90) == pytest.approx(0.5)
    assert rate.at(99) == pytest.approx(1 / 20)


@pytest.mark.parametrize(("steps", "warmup"), [(5, 0), (40, 4), (1000, 100), (10**6, 100)])
def test_without_a_given_warm_up_a_short_run_has_a_short_one(steps, warmup):
    def rate(**schedule):
        run = {
            "model": {"layers": 1, "hidden": 8, "heads": 2, "ffn": 8, "sequence": 4},
            "data": {"path": "x"}, "batch": {"global": 2, "micro": 2},
            "stages": [{"until": {"steps": steps}}], "schedule": schedule,
        }  # fmt: skip
        return learning_rate(parse_config(run), total_steps=steps)

    assert rate().warmup == warmup
    assert rate(warmup=1).warmup == 1
