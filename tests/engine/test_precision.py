"""The number formats in the dry run and the log are those that a live engine computes in."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megagrow.config import Config
from megagrow.engine.deepspeed.config import deepspeed_config
from megagrow.engine.optimizers import muon
from megagrow.engine.precision import precisions
from megagrow.errors import ConfigError
from megagrow.plan.dry_run import describe
from megagrow.state.layout import Layout
from megagrow.state.optimizers import ADAMW
from megagrow.train.grow_live import fill_fresh, start_engine
from megagrow.train.run_plan import plan_run
from megagrow.train.state import RunState
from tests.ranks import run_ranks
from tests.toys import toy_model

MANY = 16  # micro-batches; a power of two, so that a sum in fp32 of as many equal numbers is exact
SUMS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base")
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = [
    ({"zero": 0}, "none"),
    ({"zero": 1}, "none"),
    ({"zero": 2}, "none"),
    ({"zero": 3}, "none"),
    ({"pipeline": 2, "zero": 0}, "none"),
    ({"pipeline": 2, "zero": 1}, "none"),
    ({"zero": 1}, "cpu"),
    ({"zero": 2}, "cpu"),
    ({"zero": 3}, "cpu"),
]
# What the user passes through to DeepSpeed is reported as well.
PASSED = [
    {"communication_data_type": "bf16"},
    {"data_types": {"grad_accum_dtype": "bf16"}},
]


def settings(layout, dtype, *, batch, offload="none", **sections):
    return Config.model_validate(
        {
            "model": toy_model(init_std=0.2).model_dump(by_alias=True),
            "data": {"path": "nowhere"},
            "layout": layout,
            "precision": {"dtype": dtype, "initial_scale_power": 4},
            "batch": {"global": batch, "micro": 1},
            "schedule": {"warmup": 1},
            "stages": [{"until": {"steps": 5}}],
            **sections,
            "optimizer": {"grad_clip": 0.0, "offload": offload} | sections.get("optimizer", {}),
        }
    )


def _step(comm, config):
    """One step on one sample per rank, repeated: the gradients, and the formats of the sums."""
    plan = plan_run(config, world=comm.world, vocabulary=None)
    engine = start_engine(config=config, stage=plan.stages[0], state=RunState(), comm=comm)
    fill_fresh(engine, config=config, comm=comm)
    gradients, types, originals = {}, set(), {name: getattr(dist, name) for name in SUMS}
    module = next(engine._deepspeed.module.parameters()).dtype

    def catch():
        for group in engine._optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    gradients[id(p)] = p.grad.detach().float().clone().flatten()

    def spy(name):
        def call(*args, **more):
            first = args[0] if args else more.get("tensor", more.get("output"))
            tensor = first[0] if isinstance(first, list) else first
            if tensor.numel() > 64:
                types.add(tensor.dtype)
            return originals[name](*args, **more)

        return call

    engine._optimizer.before_step = catch
    for name in SUMS:
        setattr(dist, name, spy(name))
    length, vocabulary = config.model.sequence + 1, config.model.vocabulary
    sample = (np.arange(length)[None] * (3 + engine.coordinates.data)) % vocabulary
    engine.train_step((sample for _ in range(engine.accumulation)), lr=0.0, seed=1)
    for name, function in originals.items():
        setattr(dist, name, function)
    masters = {p.dtype for group in engine._optimizer.param_groups for p in group["params"]}
    masters |= {
        value.dtype
        for state in engine._optimizer.state.values()
        for key, value in state.items()
        if key != "step"
    }
    used = engine.precisions
    engine._optimizer.before_step = None
    engine.close()
    return torch.cat(list(gradients.values())), types, module, masters, used


def _measure(comm, cases):
    found = []
    for layout, dtype, offload, passed in cases:
        ranks = comm.world // layout.get("pipeline", 1)
        sections = {"offload": offload, "deepspeed": passed}
        # Two equal numbers are summed without rounding in any format.
        two, *_ = _step(comm, settings(layout, dtype, batch=ranks * 2, **sections))
        config = settings(layout, dtype, batch=ranks * MANY, **sections)
        many, types, module, kept, used = _step(comm, config)
        error = float((many - two).norm() / two.norm())
        rounded = bool((many == many.to(TORCH[dtype]).float()).all())
        said = describe(config, world=comm.world)
        found.append((error, rounded, types, module, kept, used, said))
    return found


def _check(cases):
    [found, _] = run_ranks(2, _measure, cases)
    for (layout, dtype, offload, passed), (
        error,
        rounded,
        types,
        module,
        kept,
        used,
        said,
    ) in zip(cases, found, strict=True):
        what = f"{layout} {dtype} offload {offload} {passed}: {error:.1e}, {rounded}, {types}"
        assert module == TORCH[used.compute], what
        assert kept == {TORCH[used.state]}, what
        assert used.micro_batches == MANY and str(used) in said, what
        if used.accumulation == "fp32":
            assert error < (1e-5 if dtype != "fp16" else 1e-4), what  # which loses its subnormals
        else:
            assert error > (1e-3 if used.accumulation == "bf16" else 5e-4), what
        assert (used.caveat is None) == (used.accumulation == "fp32"), what
        assert used.caveat is None or used.caveat in said, what
        if layout["zero"] == 0 and "pipeline" not in layout:
            assert types == {TORCH[used.reduction]}, what
        elif "pipeline" not in layout and used.accumulation == "fp32" != dtype:
            # Half the sum of two 16-bit numbers that differ needs more bits than they have.
            assert rounded == (used.reduction != "fp32"), what


def test_what_is_said_is_what_a_bf16_engine_does():
    cases = [({"zero": zero}, "bf16", "none", {}) for zero in range(4)]
    cases.append(({"pipeline": 2, "zero": 1}, "bf16", "none", {}))
    _check(cases + [({"zero": 2}, "bf16", "none", passed) for passed in PASSED])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_what_is_said_is_what_every_engine_does(dtype):
    _check([(layout, dtype, offload, {}) for layout, offload in LAYOUTS])


def test_gradients_are_summed_in_fp32_wherever_deepspeed_can():
    def formats(zero, dtype="bf16", offload="none", batch=8, **passed):
        config = settings({"zero": zero}, dtype, batch=batch, offload=offload, deepspeed=passed)
        found = deepspeed_config(config, Layout(data=2, zero=zero), parameters=8)
        formats = precisions(found, optimizer=ADAMW, gpu=False)
        return formats.accumulation, formats.reduction

    for dtype in ("bf16", "fp16"):
        for zero in (1, 2, 3):
            assert formats(zero, dtype) == ("fp32", "fp32")
        assert formats(3, dtype, "cpu") == ("fp32", "fp32")
        # Rejected by DeepSpeed; passed through a 16-bit buffer.
        assert formats(0, dtype) == formats(1, dtype, "cpu") == (dtype, "fp32")
        # There is only one gradient.
        assert formats(1, dtype, batch=2) == (dtype, "fp32")
    assert formats(1, data_types={"grad_accum_dtype": "bf16"}) == ("bf16", "fp32")
    assert formats(1, communication_data_type="bf16") == ("fp32", "bf16")


@pytest.mark.parametrize(
    "passed",
    [
        {"bf16": {"bf16_master_weights_and_grads": True}},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        {"fp16": {"fp16_master_weights_and_grads": True}},
        {"data_types": {"param_dtype": "bf16"}},
    ],
)
def test_no_format_changes_behind_the_back_of_precision(passed):
    config = settings({"zero": 1}, "bf16", batch=2, deepspeed=passed)
    [(section, inside)] = passed.items()
    with pytest.raises(ConfigError, match=f"deepspeed.{section}.{next(iter(inside))}: number"):
        deepspeed_config(config, Layout(data=2, zero=1), parameters=8)


def _newton_schulz(comm, dtype):
    """The matrices of two steps of Muon, and the result in a live engine."""
    seen, original = [], muon.orthogonalised

    def spy(matrix, **more):
        update = original(matrix, **more)
        seen.append((matrix.clone(), update.clone()))
        return update

    muon.orthogonalised = spy
    config = settings({"zero": 1}, dtype, batch=2, optimizer={"name": "muon"})
    *_, formats = _step(comm, config)
    muon.orthogonalised = original
    return [
        (update.double(), original(matrix.double(), iteration=torch.float64))
        for matrix, update in seen
    ], formats


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_newton_schulz_keeps_the_precision_of_fp32_on_a_cpu(dtype):
    [(updates, formats)] = run_ranks(1, _newton_schulz, dtype)
    assert formats.newton_schulz == "fp32" and "Newton-Schulz fp32" in str(formats)
    assert len(updates) > 4
    for found, expected in updates:
        # In fp16, DeepSpeed's own choice, it is 2e-2.
        assert float((found - expected).norm() / expected.norm()) < 2e-5


def _finite_losses_infinite_gradients(comm, cases):
    return [_finite_loss_infinite_gradient(comm, zero, dtype) for zero, dtype in cases]


def _finite_loss_infinite_gradient(comm, zero, dtype):
    config = settings({"zero": zero}, dtype, batch=comm.world * 2)
    plan = plan_run(config, world=comm.world, vocabulary=None)
    engine = start_engine(config=config, stage=plan.stages[0], state=RunState(), comm=comm)
    fill_fresh(engine, config=config, comm=comm)
    asked = []

    def accept(loss, norm):
        asked.append((loss, norm))
        return math.isfinite(loss) and math.isfinite(norm)

    sample = np.arange(config.model.sequence + 1)[None] % config.model.vocabulary
    first = engine.train_step([sample] * 2, lr=1e-3, seed=1, accept=accept)
    parameter = next(p for p in engine._deepspeed.module.parameters() if p.requires_grad)
    hook = parameter.register_hook(lambda gradient: gradient * math.inf)
    second = engine.train_step([sample] * 2, lr=1e-3, seed=2, accept=accept)
    hook.remove()
    engine.close()
    return first, second, asked


def test_a_step_is_judged_by_its_own_gradient():
    """Not by the previous one, whose norm DeepSpeed's engine still reports during the update."""
    cases = [(1, "bf16"), (2, "bf16"), (3, "bf16"), (0, "bf16"), (1, "fp32")]
    [found] = run_ranks(1, _finite_losses_infinite_gradients, cases)
    for case, (first, second, asked) in zip(cases, found, strict=True):
        assert first.applied and first.grad_norm > 0, case
        assert asked[0][1] == pytest.approx(first.grad_norm), case
        assert math.isfinite(second.loss) and not second.applied, case
