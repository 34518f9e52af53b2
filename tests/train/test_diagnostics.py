"""Growth diagnostics of runs: when, what, the same after a resume; and the mixing time."""

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from megagrow.forecast.fit import Validated
from megagrow.forecast.mixing import Mixing
from megagrow.forecast.scaling import ScalingLaw
from megagrow.report.run import summarize
from tests.jobs import events, launch, log_of, settings, stages, train, trajectory
from tests.jobs import write_config as write

KEYS = {"parameter_share", "gradient_share", "update_share", "participation", "dead_units"}
LAW = ScalingLaw("test", 1.5, 1000.0, 0.4, 500.0, 0.5, "tokens", True)


def timeless(lines):
    return [
        {key: value for key, value in line.items() if key != "time"}
        for line in lines
        if line["event"] in ("growth_diagnostics", "mixing", "validation")
    ]


def mapping_of(dataset, path, **changes):
    train_section = {"growth_diagnostics": 2, "validate_every": 1, "validation_samples": 10,
                     "log_every": 1, "tensorboard": True}  # fmt: skip
    law = {"floor": 0.5, "n_scale": 100.0, "n_power": 0.01, "s_scale": 100.0, "s_power": 0.3}
    return settings(
        dataset, path, stages=stages(ends=(6, 10, 14), rewarm=0), train=train_section,
        schedule={"name": "constant", "warmup": 1}, growth={"law": law, "points": 3}, **changes,
    )  # fmt: skip


def test_they_are_made_after_growths_and_change_nothing(tmp_path, dataset):
    config = write(tmp_path / "run.yaml", mapping_of(dataset, tmp_path / "run"))
    lines = train(2, config)
    found = events(lines, "growth_diagnostics")
    assert [line["step"] for line in found] == [8, 10, 12, 14]
    widened, deepened = found[:2], found[2:]
    assert all(line.keys() > KEYS | {"twin_cosine"} for line in widened)
    # Copied layers are new as a whole, and have no twins; the MLP's shares are of both.
    assert all(line.keys() > KEYS and "twin_cosine" not in line for line in deepened)
    assert widened[0]["parameter_share"] == pytest.approx(0.75)
    assert deepened[0]["parameter_share"] == pytest.approx(0.5)
    assert all(0 < line["gradient_share"] < 1 and line["dead_units"] < 1 for line in found)
    off = ["train.growth_diagnostics=null", f"run.dir={tmp_path / 'off'}"]
    plain = train(2, config, *off)
    assert trajectory(plain) == trajectory(lines)
    assert not events(plain, "growth_diagnostics") and not events(plain, "mixing")
    assert "foretold" not in events(plain, "growth")[0]
    assert events(lines, "growth")[0]["foretold"]["floor"] == 0.5
    assert len(summarize(lines).diagnoses) == 4
    assert "Growth diagnostics" in (tmp_path / "run" / "report.html").read_text()
    scalars = list((tmp_path / "run" / "tensorboard").iterdir())
    assert any(b"growth_diagnostics/participation" in path.read_bytes() for path in scalars)


def test_a_resumed_run_tells_the_same(tmp_path, dataset):
    mapping = mapping_of(dataset, tmp_path / "chain")
    config = write(tmp_path / "run.yaml", mapping)
    straight = ["--config", config, f"run.dir={tmp_path / 'straight'}"]
    chain = [["--config", config, f"train.stop_after_steps={n}"] for n in (3, 7, 9, 12)]
    outcomes = launch(2, straight, *chain, ["--config", config])
    assert all(o.status == 0 for ranks in outcomes for o in ranks), outcomes
    one, two = log_of(config), log_of(config, straight[-1])
    assert trajectory(one) == trajectory(two)
    assert timeless(one) == timeless(two)
    mixed = events(two, "mixing")
    assert mixed, "the law foretells little of the larger model, so that it is reached"
    stated = [o.err for o in outcomes[0] if "where a fresh model is foretold to be" in o.err]
    assert stated and mixed[0]["loss"] <= mixed[0]["foretold"]


# --- mixing time --------------------------------------------------------------------------


def losses_of(n, tokens):
    return LAW.floor + (LAW.n_scale / n) ** LAW.n_power + (LAW.s_scale / tokens) ** LAW.s_power


def seen(mixing, tokens, loss, *, settled=True):
    return mixing.after(Validated(tokens // 10, tokens, tokens * 6, loss), settled=settled)


@examples(max_examples=40, deadline=None)
@given(
    small=st.integers(50, 2000),
    factor=st.floats(1.2, 8.0),
    count=st.integers(6, 40),
    lead=st.floats(0.01, 0.3),
    steps=st.integers(0, 6),
)
def test_it_ends_where_the_curve_of_a_fresh_model_is_met(small, factor, count, lead, steps):
    """Validations that follow the law exactly predict the larger model exactly."""
    large, mixing = round(small * factor) + 1, Mixing()
    for number in range(1, count + 1):
        tokens = 1000 * number
        mixing = seen(mixing, tokens, losses_of(small, tokens))
    born = 1000 * count
    mixing = mixing.grown(LAW, small=small, large=large, tokens=born, points=5)
    assert mixing.validations == () and mixing.met is None
    for ahead in (0, 5000, 50_000):
        wanted = losses_of(large, born + ahead)
        assert mixing.foretold(born + ahead) == pytest.approx(wanted, rel=2e-2)
    assert Mixing.from_json(mixing.to_json()) == mixing
    for number in range(1, steps + 1):  # above the curve, by less and less
        tokens = born + 1000 * number
        mixing = seen(mixing, tokens, mixing.foretold(tokens) + lead / number)
        assert mixing.met is None
    at = born + 1000 * (steps + 1)
    mixing = seen(mixing, at, mixing.foretold(at) - 1e-9)
    assert mixing.met == at - born
    later = seen(mixing, at + 1000, 100.0)
    assert later.met == mixing.met, "it has ended for good"
    assert Mixing.from_json(later.to_json()) == later


def test_without_enough_to_fit_nothing_is_foretold():
    mixing = Mixing()
    for tokens in range(1000, 5000, 1000):
        mixing = seen(mixing, tokens, losses_of(100, tokens))
    few = mixing.grown(LAW, small=100, large=200, tokens=4000, points=5)
    assert few.curve is None and few.foretold(9000) is None and few.met is None
    assert seen(few, 5000, 0.1).met is None
    same = mixing.grown(LAW, small=100, large=100, tokens=4000, points=2)
    assert same.curve is None
    # A floor above the losses is not used.
    low = Mixing()
    for tokens in range(1000, 9000, 1000):
        low = seen(low, tokens, losses_of(100, tokens) - 3.5)
    assert low.grown(LAW, small=100, large=200, tokens=9000, points=5).floor == 0.0


def test_validations_of_a_warm_up_and_of_the_start_are_left_out():
    mixing = seen(Mixing(), 0, 9.0)
    mixing = seen(mixing, 1000, 8.0, settled=False)
    mixing = seen(mixing, 2000, 7.0)
    again = seen(mixing, 2000, 6.0)
    assert [one.loss for one in again.validations] == [6.0]
