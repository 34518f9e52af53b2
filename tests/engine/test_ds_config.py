"""DeepSpeed's configuration."""

import pytest

from megagrow.config import Config
from megagrow.engine.deepspeed.config import deepspeed_config
from megagrow.errors import ConfigError
from megagrow.state.layout import Layout


def _config(deepspeed=None, **batch):
    return Config(
        model={"layers": 1, "hidden": 8, "heads": 2, "ffn": 8, "sequence": 4, "vocab": 9},
        data={"path": "x"},
        batch={"global": 12, "micro": 2} | batch,
        stages=[{"until": {"steps": 1}}],
        deepspeed=deepspeed or {},
    )


def test_batches_and_stage():
    found = deepspeed_config(_config(), Layout(data=3, zero=2), parameters=1001)
    assert found["train_batch_size"] == 12
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 2
    assert found["zero_optimization"]["stage"] == 2
    assert found["zero_optimization"]["reduce_bucket_size"] == 1002
    assert found["gradient_clipping"] == 1.0


def test_buckets_are_bounded():
    found = deepspeed_config(_config(), Layout(), parameters=10**10)
    assert found["zero_optimization"]["allgather_bucket_size"] < 10**8


def test_extra_keys_pass_through():
    extra = {"flops_profiler": {"enabled": False}, "zero_optimization": {"overlap_comm": False}}
    found = deepspeed_config(_config(extra), Layout(zero=1), parameters=100)
    assert found["flops_profiler"] == {"enabled": False}
    assert found["zero_optimization"]["overlap_comm"] is False
    assert found["zero_optimization"]["stage"] == 1
    same = {"zero_optimization": {"stage": 1}}
    assert deepspeed_config(_config(same), Layout(zero=1), parameters=100)


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ({"train_batch_size": 99}, "deepspeed.train_batch_size"),
        ({"zero_optimization": {"stage": 3}}, "deepspeed.zero_optimization.stage"),
        ({"zero_optimization": 2}, "deepspeed.zero_optimization"),
    ],
)
def test_a_clash_names_its_key(extra, where):
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(_config(extra), Layout(zero=1), parameters=100)
    assert str(caught.value).startswith(f"{where}: megagrow sets this itself")
    assert f"remove {where}" in str(caught.value)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"(?s)batch\.global = 12.*set batch\.global=16"):
        deepspeed_config(_config(), Layout(data=4), parameters=100)
