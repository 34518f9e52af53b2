"""DeepSpeed's universal checkpoints: round trips, and engines that resume from them."""

import itertools
import shutil

import pytest
import torch

from megagrow.checkpoint.containers.torch_reader import read_torch_file
from megagrow.checkpoint.formats.deepspeed import source as deepspeed
from megagrow.checkpoint.formats.deepspeed import universal_source as universal
from megagrow.errors import CheckpointError
from megagrow.models.catalog import build_catalog
from megagrow.state.layout import Layout
from tests.checkpoint.foreign import WholeSource, differing, open_checkpoint, write_checkpoint
from tests.engine.plays import Job
from tests.ranks import run_ranks
from tests.toys import random_state, toy_model, toy_models

FORMAT = universal.FORMAT


def whole_source(model, **options):
    state = random_state(build_catalog(model), seed=6, dtype=torch.float32)
    return WholeSource(model, state, **options)


@pytest.mark.parametrize(
    ("name", "model"), list(toy_models()), ids=[name for name, _ in toy_models()]
)
def test_what_is_written_is_read_again(name, model, tmp_path):
    source = whole_source(model)
    for layout in (Layout(), Layout(tensor=2, zero=1), Layout(pipeline=3, zero=1)):
        path = write_checkpoint(FORMAT, source, tmp_path / str(layout.world), layout)
        back = open_checkpoint(FORMAT, path)
        back.verify()
        assert differing(source, back) is None, layout
        assert back.step == source.step and back.run_state == source.run_state
        assert back.config["model"] == source.config["model"]


def test_it_is_not_taken_for_a_checkpoint_of_the_other_kind(tmp_path):
    source = whole_source(toy_model())
    path = write_checkpoint(FORMAT, source, tmp_path / "u", Layout())
    other = write_checkpoint(deepspeed.FORMAT, source, tmp_path / "d", Layout())
    for at in (path, path / "global_step7_universal"):
        assert FORMAT.find(at) is not None and deepspeed.FORMAT.find(at) is None
    for at in (other, other / "global_step7"):
        assert FORMAT.find(at) is None and deepspeed.FORMAT.find(at) is not None


def test_missing_and_damaged_files_are_named(tmp_path):
    source = whole_source(toy_model(layers=1))
    good = write_checkpoint(FORMAT, source, tmp_path / "good", Layout())
    files = sorted(p.relative_to(good) for p in good.rglob("*.pt") if p.name in ("fp32.pt",))
    assert len(files) == len(source.catalog)
    for name, change in itertools.product(files, ("missing", "cut", "flipped")):
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        path = bad / name
        data = path.read_bytes()
        if change == "missing":
            path.unlink()
        elif change == "cut":
            path.write_bytes(data[: len(data) // 2])
        else:
            values = read_torch_file(path).value["param"]
            data = bytearray(data)
            data[values.start + 5] ^= 1
            path.write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(FORMAT, bad).verify()
        assert change == "missing" or path.parent.name in str(caught.value)


def load_and_go_on(comm, root, cases):
    """Losses of an uninterrupted run, and of engines that load its universal form."""

    class UniversalJob(Job):
        """A job whose engine loads universal checkpoints."""

        def _engine(self, layout):
            passed = {"checkpoint": {"load_universal": True}}
            self.config = self.config.model_copy(update={"deepspeed": passed})
            return super()._engine(layout)

    answers = []
    for number, (family, vocab, layout, target) in enumerate(cases):
        model = toy_model(init_std=0.2, family=family, vocab=vocab)
        job = Job(comm, model=model, layout=layout)
        job.train(2)
        saved, there = root / f"{number}", root / f"{number}u"
        client = {"megagrow": {"config": {"model": model.model_dump(mode="json", by_alias=True)}}}
        job.engine._deepspeed.save_checkpoint(str(saved), client_state=client)
        job.train(2)
        expected = job.losses[2:]
        job.engine.close()
        if comm.rank == 0:
            source = open_checkpoint(deepspeed.FORMAT, saved)
            write_checkpoint(FORMAT, source, there, target)
        comm.barrier()
        job = UniversalJob(comm, model=model, layout=target, fresh=False)
        job.engine._deepspeed.load_checkpoint(str(there))
        for state in job.engine._deepspeed.basic_optimizer.state.values():
            # DeepSpeed's ZeRO 3 gives all groups one step tensor, which each group then increments.
            state["step"] = state["step"].clone()
        job.step = 2
        job.train(2)
        answers.append((layout, target, expected, job.losses))
        job.engine.close()
    return answers


def test_deepspeed_goes_on_from_it(tmp_path):
    plain = [Layout(data=2, zero=z) for z in range(4)]
    cases = [
        ("gpt2", 13, plain[0], plain[1]),
        ("llama", 13, plain[1], plain[2]),
        ("llama", 14, plain[2], plain[3]),
        ("gpt2", 13, plain[3], Layout(tensor=2, zero=1)),
        ("llama", 13, plain[1], Layout(tensor=2, zero=1)),
        ("llama", 13, plain[1], Layout(pipeline=2, zero=1)),
    ]
    for answers in run_ranks(2, load_and_go_on, tmp_path, cases, timeout=300.0):
        for layout, target, expected, losses in answers:
            assert losses == pytest.approx(expected, rel=1e-5, abs=0.0), (layout, target)
