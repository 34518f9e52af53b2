"""Other programs load checkpoints of grown runs as they are."""

import itertools
import subprocess
import sys

import pytest
import torch

from megagrow.checkpoint.convert.load_model import load_model
from megagrow.checkpoint.convert.run import Job, convert
from megagrow.checkpoint.interface.model_of import model_of
from megagrow.growth.optimizer_rules import OptimizerRules
from megagrow.state.boxes import whole
from megagrow.state.layout import Layout
from megagrow.state.placement import PLACEHOLDER
from tests.checkpoint.grown import save_grown
from tests.checkpoint.states import opened
from tests.engine import plays
from tests.jobs import REPOSITORY
from tests.ranks import run_ranks

HISTORIES = ("fresh", "wider", "deeper", "twice")
CUT = [Layout(data=2, zero=1), Layout(data=2, zero=2), Layout(data=2, zero=3),
       Layout(tensor=2), Layout(tensor=2, zero=1), Layout(pipeline=2),
       Layout(pipeline=2, zero=1)]  # fmt: skip


def load_in_deepspeed(comm, root, cases):
    """Per (history, format, layout): what differs in an engine of that model after loading it."""

    class Client(plays.Job):
        def __init__(self, source, layout, universal):
            self._found = OptimizerRules.from_json(source.run_state["rules"]), universal
            super().__init__(comm, model=model_of(source), layout=layout, fresh=False)

        def _engine(self, layout):
            self.rules, universal = self._found
            passed = {"checkpoint": {"load_universal": universal}}
            self.config = self.config.model_copy(update={"deepspeed": passed})
            return super()._engine(layout)

    found = {}
    for number, (history, fmt, layout) in enumerate(cases):
        native, target = root / f"{number}-{history}", root / f"{number}-{fmt}"
        if comm.rank == 0:
            path, _ = save_grown(native, history)
            asked = layout
            if fmt == "universal":
                asked = Layout(tensor=layout.tensor, pipeline=layout.pipeline)
            convert(Job(path, target, fmt, layout=asked), workers=1)
        comm.barrier()
        source = opened(native / "step_00000007")
        job = Client(source, layout, fmt == "universal")
        if fmt == "universal":
            add_placeholders(job.engine._deepspeed.module, target)
        path, _ = job.engine._deepspeed.load_checkpoint(str(target))
        assert path is not None
        # What it has in memory now, it saves; the optimizer's own view is what counts.
        client = {"megagrow": {"config": source.config, "run_state": source.run_state}}
        job.engine._deepspeed.save_checkpoint(str(target / "again"), client_state=client)
        comm.barrier()
        saved = opened(target / "again")
        found[history, fmt, layout] = [
            (tensor.name, slot.name)
            for tensor, slot in itertools.product(source.catalog, source.slots)
            if not torch.equal(
                saved.read(tensor.name, slot.name, whole(tensor.shape)),
                source.read(tensor.name, slot.name, whole(tensor.shape)),
            )
        ]
        job.engine.close()
    return found


def add_placeholders(module, target):
    """What DeepSpeed's own conversion writes for the placeholders of our engine's groups."""
    for name, parameter in module.named_parameters():
        if name.startswith(PLACEHOLDER):
            [folder] = target.glob("*/zero")
            (folder / name).mkdir()
            for slot in ("fp32", "exp_avg", "exp_avg_sq"):
                torch.save({"param": torch.zeros(parameter.shape)}, folder / name / f"{slot}.pt")


def assert_loads(root, world, cases):
    for found in run_ranks(world, load_in_deepspeed, root, cases, timeout=550.0):
        assert list(found) == cases
        assert all(differing == [] for differing in found.values()), found


def test_deepspeeds_engine_loads_models_that_have_grown(tmp_path):
    cases = [("wider", "deepspeed", Layout(tensor=2, zero=1)),
             ("wider", "deepspeed", Layout(pipeline=2, zero=1)),
             ("twice", "deepspeed", Layout(pipeline=2)),
             ("twice", "universal", Layout(data=2, zero=1))]  # fmt: skip
    assert_loads(tmp_path, 2, cases)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["deepspeed", "universal"])
def test_deepspeeds_engine_loads_every_model_in_every_layout(fmt, tmp_path):
    layouts = [one for one in CUT if fmt == "deepspeed" or one.zero in (1, 2)]
    assert_loads(tmp_path, 2, list(itertools.product(HISTORIES, [fmt], layouts)))
    alone = [Layout(zero=zero) for zero in ((0, 1, 2, 3) if fmt == "deepspeed" else (1, 2))]
    assert_loads(tmp_path / "alone", 1, list(itertools.product(HISTORIES, [fmt], alone)))


def expected_logits(path, tokens):
    with torch.no_grad():
        return load_model(path)[0].logits(tokens)


@pytest.mark.parametrize(
    "history",
    ["padded", *(pytest.param(h, marks=[pytest.mark.slow][h == "twice" :]) for h in HISTORIES)],
)
def test_transformers_computes_what_a_grown_model_does(history, tmp_path):
    transformers = pytest.importorskip("transformers")
    path, model = save_grown(tmp_path, history)
    convert(Job(path, tmp_path / "hf", "huggingface"), workers=1)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.randint(model.vocabulary, (3, model.sequence))
    wanted = expected_logits(path, tokens)
    with torch.no_grad():
        found = theirs.eval()(tokens).logits
    assert wanted.std() > 0.1 and (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("history", HISTORIES)
def test_torch_loads_every_slot_of_a_grown_model(history, tmp_path):
    from torch.distributed import checkpoint as dcp

    path, _ = save_grown(tmp_path, history)
    convert(Job(path, tmp_path / "dcp", "dcp", layout=Layout(tensor=2)), workers=1)
    source = opened(path)
    wanted = {}
    for tensor, slot in itertools.product(source.catalog, source.slots):
        stored = f"optimizer.state.{tensor.name}.{slot.name}"
        name = tensor.name if slot.kind == "parameter" else stored
        wanted[name] = source.read(tensor.name, slot.name, whole(tensor.shape))
    found = {name: torch.zeros_like(values) for name, values in wanted.items()}
    dcp.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(torch.equal(found[name], values) for name, values in wanted.items())


@pytest.mark.slow
def test_megatron_core_computes_what_grown_models_do(tmp_path):
    pytest.importorskip("megatron.core", reason="pip install megatron-core")
    paths = [save_grown(tmp_path / history, history)[0] for history in HISTORIES]
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.megatron_client", tmp_path / "out", *paths],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("same\n"), done.stderr[-3000:]
