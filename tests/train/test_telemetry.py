"""Destinations of scalars besides the log."""

import socket
import sys
import types
import urllib.request

import pytest

from megagrow.config import Config
from megagrow.errors import ConfigError, TrainingError
from megagrow.train.health.run_lock import run_id
from megagrow.train.logging.metrics import MetricsLog
from megagrow.train.logging.telemetry import Prometheus, TensorBoard, open_mirrors
from tests.train.logs import log_growth, log_step


def config(run_dir, **train):
    return Config.model_validate(
        {
            "run": {"dir": str(run_dir)},
            "model": {"layers": 1, "hidden": 8, "heads": 2, "ffn": 16, "sequence": 8, "vocab": 16},
            "data": {"path": "data/none"},
            "batch": {"global": 2, "micro": 1},
            "stages": [{"until": {"steps": 3}}],
            "train": {"tensorboard": False, **train},
        }
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = tmp_path / "tensorboard"
    log = MetricsLog(tmp_path, mirrors=[TensorBoard(board, first_step=0)])
    for step in range(1, 7):
        log_step(log, step, loss=float(step))
    log_growth(log, 4, 1)
    log.close()
    log = MetricsLog(tmp_path, mirrors=[TensorBoard(board, first_step=5)], resume_step=4)
    for step in range(5, 8):
        log_step(log, step, loss=10.0 * step)
    log.validation(step=7, tokens=1, flops=2, val_loss=3.5, growth_stage=0)
    log.close()

    events = EventAccumulator(str(board))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60), (7, 70)]
    assert [event.value for event in events.Scalars("validation/loss")] == [3.5]
    assert [event.value for event in events.Scalars("growth/parameters")] == [40]


def test_nothing_is_made_that_was_not_asked_for(tmp_path):
    assert open_mirrors(config(tmp_path), first_step=0) == []
    assert list(tmp_path.iterdir()) == []


def test_prometheus_tells_the_newest_values(tmp_path):
    port = free_port()
    mirrors = open_mirrors(config(tmp_path, prometheus_port=port), first_step=0)
    log = MetricsLog(tmp_path, mirrors=mirrors)
    log_step(log, 1, loss=9.0)
    log_step(log, 2, loss=2.5)
    log.pace(step=2, rank=3, host="h1", ratio=1.75)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    for line in (
        "megagrow_train_loss 2.5",
        "megagrow_train_step 2.0",
        "megagrow_pace_slowest_rank 3.0",
        "megagrow_pace_slowest_ratio 1.75",
    ):
        assert line in text.splitlines()
    log.close()
    Prometheus(port).close()  # the port is free again


def test_prometheus_listens_where_it_says_and_by_default_on_this_host_alone(tmp_path, capsys):
    for address, stated in ((None, "127.0.0.1"), ("0.0.0.0", "0.0.0.0")):
        port = free_port()
        more = {} if address is None else {"prometheus_address": address}
        [mirror] = open_mirrors(config(tmp_path, prometheus_port=port, **more), first_step=0)
        assert mirror._server.server_address == (stated, port)
        assert f"http://{stated}:{port}/metrics" in capsys.readouterr().err
        mirror.close()


def test_a_server_of_metrics_that_has_ended_is_reported_once(capsys):
    mirror = Prometheus(free_port())
    mirror.scalars("train", 1, {"loss": 1.0})
    assert capsys.readouterr().err == ""
    mirror.close()
    for step in (2, 3):
        mirror.scalars("train", step, {"loss": 1.0})
    assert capsys.readouterr().err.count("continues without it") == 1


def test_the_id_of_a_run_is_random_and_stays_in_its_directory(tmp_path, monkeypatch):
    """Equal paths on two machines are two runs; a directory that is moved stays the same run."""
    calls = []
    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda **given: calls.append(given["id"])
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    place = tmp_path / "run"
    for then in (lambda: place.rename(tmp_path / "moved"), lambda: None):
        place.mkdir()
        open_mirrors(config(place, wandb={"project": "p"}), first_step=0)
        then()
    (tmp_path / "moved" / "below").mkdir()
    open_mirrors(config(tmp_path / "moved", wandb={"project": "p"}), first_step=3)
    assert calls[0] != calls[1] and calls[2] == calls[0]
    assert run_id(place) == calls[1] and run_id(place, new=True) != calls[1]


def test_a_damaged_id_of_a_run_is_refused(tmp_path):
    (tmp_path / "run_id").write_text("no id/\n")
    with pytest.raises(TrainingError, match=r"run_id: not a valid run id"):
        run_id(tmp_path)


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"train.prometheus_port = {port}"):
            open_mirrors(config(tmp_path, prometheus_port=port), first_step=0)


@pytest.mark.parametrize(
    ("module", "train", "key"),
    [
        ("prometheus_client", {"prometheus_port": 9100}, "train.prometheus_port"),
        ("wandb", {"wandb": {"project": "p"}}, "train.wandb"),
        ("torch.utils.tensorboard", {"tensorboard": True}, "train.tensorboard"),
    ],
)
def test_a_library_that_is_not_installed(tmp_path, monkeypatch, module, train, key):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as caught:
        open_mirrors(config(tmp_path, **train), first_step=0)
    assert key in str(caught.value) and "pip install" in str(caught.value)


def test_weights_and_biases_goes_on_in_the_same_run(tmp_path, monkeypatch):
    """A stand-in for the library, which requires an account: records its calls."""
    calls, logged, finished = [], [], []
    run = types.SimpleNamespace(log=logged.append, finish=lambda: finished.append(True))
    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda **given: calls.append(given) or run
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    wanted = config(tmp_path, wandb={"project": "growing", "mode": "offline"})
    for first_step in (0, 3):
        log = MetricsLog(tmp_path, mirrors=open_mirrors(wanted, first_step=first_step))
        log_step(log, 2, loss=2.5)
        log.close()
    assert [call["id"] for call in calls] == [calls[0]["id"]] * 2
    assert calls[0]["project"] == "growing" and calls[0]["resume"] == "allow"
    assert calls[0]["mode"] == "offline" and calls[0]["config"]["batch"]["global"] == 2
    assert logged[0]["train/loss"] == 2.5 and logged[0]["train/step"] == 2
    assert finished == [True, True]
