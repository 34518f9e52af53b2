"""Conversion: layouts, formats, resumption, verification, refusals."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megagrow.checkpoint import NativeCheckpoint
from megagrow.checkpoint.convert import run as converting
from megagrow.checkpoint.convert.registry import FORMATS, detect
from megagrow.checkpoint.convert.run import Job, convert, survey
from megagrow.errors import CheckpointError, LockError, MegagrowError
from megagrow.lock import holding_output
from megagrow.models.catalog import build_catalog
from megagrow.state.layout import Layout
from tests.checkpoint.states import GQA, assert_same, contents, opened, save_model, to
from tests.toys import toy_model

LAYOUTS = [
    Layout(),
    Layout(data=3, zero=1),
    Layout(tensor=2, zero=0),
    Layout(pipeline=3, zero=1),
    Layout(tensor=2, pipeline=2, data=2, zero=1),
    Layout(data=2, zero=3),
    Layout(tensor=2, data=2, zero=2),
]
PAIRS = [pair for pair in itertools.product(LAYOUTS, LAYOUTS) if pair[0] != pair[1]][::4]


@pytest.mark.parametrize(("before", "after"), PAIRS, ids=lambda layout: str(layout))
def test_native_layouts_change_and_no_bit_does(tmp_path, before, after):
    path, state = save_model(tmp_path, layout=before)
    target = to(path, tmp_path / "new", "native", layout=after)
    new = NativeCheckpoint.open(target)
    assert (new.layout, len(new.files)) == (after, after.world)
    assert_same(contents(target), state.tensors)
    old = NativeCheckpoint.open(path)
    assert (new.step, new.config, new.run_state) == (old.step, old.config, old.run_state)
    assert new.fingerprints == old.fingerprints


@pytest.mark.parametrize("fmt", ["native", "dcp"])
@pytest.mark.parametrize("model", [{}, GQA | {"tie_embeddings": False}], ids=["gpt2", "llama"])
def test_round_trip_with_optimizer_state_is_the_identity(tmp_path, fmt, model):
    path, state = save_model(tmp_path, toy_model(**model), layout=Layout(data=2, zero=1))
    away = to(path, tmp_path / "away", fmt, layout=Layout(tensor=2, pipeline=2, zero=1))
    back = to(away, tmp_path / "back", "native", layout=Layout(data=2, zero=1))
    assert_same(contents(back), state.tensors)
    old, new = NativeCheckpoint.open(path), NativeCheckpoint.open(back)
    for what in ("step", "catalog", "slots", "layout", "config", "run_state", "fingerprints"):
        assert getattr(new, what) == getattr(old, what), what


@pytest.mark.parametrize("fmt", ["huggingface", "dcp"])
def test_formats_chain(tmp_path, fmt):
    path, state = save_model(tmp_path)
    other = to(path, tmp_path / "hf", "huggingface")
    target = to(other, tmp_path / "target", fmt)
    assert_same(contents(target), state.tensors, slots={"master"})


def test_element_types_change_as_asked_and_the_rounding_is_reported(tmp_path):
    path, state = save_model(tmp_path)
    job = Job(path, tmp_path / "half", "native", dtype=torch.bfloat16)
    report = convert(job, verify=True)
    assert 0 < max(greatest for _, greatest in report.rounded.values()) < 2**-8
    wanted = {pair: values.bfloat16() for pair, values in state.tensors.items()}
    assert_same(contents(tmp_path / "half"), wanted)
    # The conversion back rounds nothing.
    report = convert(Job(tmp_path / "half", tmp_path / "wide", "native", dtype=torch.float32),
                     verify=True)  # fmt: skip
    assert report.rounded == {}


def test_several_workers(tmp_path):
    path, state = save_model(tmp_path)
    stated = []
    target = to(
        path,
        tmp_path / "new",
        "native",
        layout=Layout(data=3, zero=1),
        workers=2,
        moved=stated.append,
    )
    assert_same(contents(target), state.tensors)
    assert sum(stated) == survey(Job(path, target, "native", layout=Layout(data=3, zero=1))).bytes


def test_dry_run_tells_bytes_and_writes_nothing(tmp_path):
    path, _ = save_model(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    about = survey(Job(path, tmp_path / "new", "huggingface"))
    assert sorted(tmp_path.rglob("*")) == before
    to(path, tmp_path / "new", "huggingface")
    files = ("model.safetensors", "megagrow.json")
    assert about.bytes == sum((tmp_path / "new" / name).stat().st_size for name in files)
    slots = ("exp_avg", "exp_avg_sq")
    assert tuple(item.name for item in about.left_out) == slots
    assert survey(Job(tmp_path / "new", tmp_path / "x", "native")).made == slots


# --- kill and resume ----------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from megagrow.checkpoint.convert import run as c
from megagrow.checkpoint.interface import file_writer as writing
from megagrow.state.layout import Layout
from megagrow.models.catalog import build_catalog
point, at = sys.argv[3], int(sys.argv[4])
def dying(function):
    count = [0]
    def call(*args, **named):
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1
        return function(*args, **named)
    return call
owner = {"write_past_cache": writing, "fsync": os}.get(point, c)
setattr(owner, point, dying(getattr(owner, point)))
job = c.Job(Path(sys.argv[1]), Path(sys.argv[2]), "native", layout=Layout(data=4, zero=1))
c.convert(job, workers=1)
"""


@pytest.mark.parametrize(
    ("point", "at", "kept"),
    [("write_past_cache", 0, 0), ("write_past_cache", 2, 2), ("_write", 3, 3), ("fsync", 1, 1),
     ("_sync_tree", 0, 4), ("_commit", 0, 4)],
)  # fmt: skip
def test_a_killed_conversion_goes_on(tmp_path, point, at, kept):
    path, state = save_model(tmp_path / "run")
    target = tmp_path / "new"
    dead = subprocess.run(
        [sys.executable, "-c", KILLED, path, target, point, str(at)], cwd=Path.cwd(), check=False
    )
    assert dead.returncode == -9
    assert not target.exists()
    report = convert(Job(path, target, "native", layout=Layout(data=4, zero=1)), verify=True)
    assert report.kept == kept
    assert_same(contents(target), state.tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "run"]


def interrupted(tmp_path, monkeypatch):
    """A conversion to four files, interrupted after two."""
    path, state = save_model(tmp_path / "run")
    job = Job(path, tmp_path / "new", "native", layout=Layout(data=4, zero=1))
    write, calls = converting._write, []

    def failing(site, index):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(index)
        return write(site, index)

    with monkeypatch.context() as patch:
        patch.setattr(converting, "_write", failing)
        with pytest.raises(KeyboardInterrupt):
            convert(job, workers=1)
    (work,) = tmp_path.glob("new.converting-*")
    return job, state, work


def test_what_a_killed_run_left_is_compared_not_believed(tmp_path, monkeypatch):
    job, state, work = interrupted(tmp_path, monkeypatch)
    file = work / "out/rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    first, second = (line for line in (work / "done.jsonl").read_text().splitlines() if line)
    # A line cut short by a kill, and one for a piece that does not exist.
    (work / "done.jsonl").write_text(f'{first}\n\n{second[:-3]}\n\n[99, ["00000000"]]\n')
    assert convert(job, verify=True).kept == 0
    assert_same(contents(job.target), state.tensors)


def test_another_source_does_not_go_on_with_the_work_of_the_first(tmp_path, monkeypatch):
    job, _, work = interrupted(tmp_path, monkeypatch)
    path, state = save_model(tmp_path / "other", seed=9)
    other = Job(path, job.target, "native", layout=job.layout)
    assert convert(other).kept == 0
    assert_same(contents(job.target), state.tensors)
    assert work.exists()


def test_the_same_conversion_does_not_run_twice_at_once(tmp_path, monkeypatch):
    job, *_ = interrupted(tmp_path, monkeypatch)
    with holding_output(job.target), pytest.raises(LockError, match="another job is writing"):
        convert(job)
    assert convert(job).kept  # what was done before is still there


@pytest.mark.parametrize(
    ("sealed", "says"), [(True, "CRC-32"), (False, r"final_norm.*not what was converted")]
)
def test_a_result_that_differs_is_never_committed(tmp_path, monkeypatch, sealed, says):
    """Its checksums reveal it, or without them the comparison with the source."""
    path, _ = save_model(tmp_path)
    sink = FORMATS["huggingface"].open_sink

    def spoiled(request):
        made = sink(request)
        conclude = made.conclude

        def spoil(directory, checksums):
            conclude(directory, checksums)
            file = directory / "model.safetensors"
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)

        made.conclude = spoil
        return made

    monkeypatch.setitem(
        FORMATS, "huggingface",
        FORMATS["huggingface"].__class__(**{**vars(FORMATS["huggingface"]), "open_sink": spoiled}),
    )  # fmt: skip
    if not sealed:
        monkeypatch.setattr("megagrow.checkpoint.convert.run.write_seal", lambda *_: None)
    with pytest.raises(CheckpointError, match=says):
        convert(Job(path, tmp_path / "hf", "huggingface"), verify=True)
    assert not (tmp_path / "hf").exists()


# --- refusals -----------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path):
    path, _ = save_model(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        convert(Job(path, tmp_path / "there", "dcp"))
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tensor=3), "cannot be cut into 3 equal parts"),
        (Layout(pipeline=9), "9 pipeline stages"),
        (Layout(pipeline=2, data=2, zero=2), "ZeRO 2 does not go with pipeline 2"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(tmp_path, layout, message):
    path, _ = save_model(tmp_path)
    with pytest.raises(MegagrowError, match=message):
        convert(Job(path, tmp_path / "new", "native", layout=layout))
    assert not (tmp_path / "new").exists()


def test_a_damaged_source_is_refused_and_the_target_stays_away(tmp_path):
    path, _ = save_model(tmp_path / "run")
    file = path / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: tensor"):
        convert(Job(path, tmp_path / "new", "dcp"))
    assert not (tmp_path / "new").exists()


def test_formats_are_detected_or_refused_by_name(tmp_path):
    path, _ = save_model(tmp_path / "run/checkpoints")
    assert detect(tmp_path / "run")[0].name == "native"
    assert detect(tmp_path / "run")[1] == path
    for fmt in ("dcp", "huggingface"):
        assert detect(to(path, tmp_path / fmt, fmt))[0].name == fmt
    with pytest.raises(CheckpointError, match="no checkpoint of a known format"):
        detect(tmp_path)
    with pytest.raises(CheckpointError, match="nothing by that name"):
        detect(tmp_path / "nowhere")
    (tmp_path / "dcp/config.json").write_text("{}")
    (tmp_path / "dcp/model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="several formats"):
        detect(tmp_path / "dcp")
    assert detect(tmp_path / "dcp", "dcp")[0].name == "dcp"


# --- memory -------------------------------------------------------------------------------

PEAK = """
import sys, resource
from pathlib import Path
from megagrow.checkpoint.convert.run import Job, convert
from megagrow.state.layout import Layout
from megagrow.models.catalog import build_catalog
source, target, fmt, layout = sys.argv[1:5]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(Job(Path(source), Path(target), fmt, layout=eval(layout)), workers=1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_bounded_whatever_the_tensors(tmp_path):
    # One tensor has 100 MB, more than the conversion may use.
    model = toy_model(vocab=200_000, hidden=128, heads=4, ffn=16, layers=1, tie_embeddings=True)
    path, _ = save_model(tmp_path / "run", model)
    biggest = 200_000 * 128 * 4
    for fmt, layout in (("native", "Layout(tensor=2, data=2, zero=1)"), ("huggingface", "None")):
        command = [sys.executable, "-c", PEAK, path, tmp_path / fmt, fmt, layout]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(result.stdout) < biggest, fmt
    assert opened(tmp_path / "native").bytes > 3 * biggest


# --- the command --------------------------------------------------------------------------


def command(*arguments):
    return subprocess.run(
        [sys.executable, "launch/convert.py", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_converts_and_says_what_it_leaves_out(tmp_path):
    path, state = save_model(tmp_path / "run")
    where = ("--from", path, "--to", tmp_path / "hf", "--to-format", "huggingface")
    dry = command(*where, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "left out: exp_avg, exp_avg_sq" in dry.stdout
    assert not (tmp_path / "hf").exists()
    done = command(*where, "--verify", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "rounded: embedding.token master" in done.stdout
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"
    again = command(*where)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert state


def test_the_command_takes_the_layout_in_parts(tmp_path):
    path, _ = save_model(tmp_path / "run", layout=Layout(data=2, zero=1))
    done = command(
        "--from", tmp_path / "run", "--to", tmp_path / "new", "--to-format", "native",
        "--tensor", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert NativeCheckpoint.open(tmp_path / "new").layout == Layout(tensor=2, zero=1)
    done = command("--from", path, "--to", tmp_path / "three", "--to-format", "native", "--zero", 3)
    assert NativeCheckpoint.open(tmp_path / "three").layout == Layout(data=2, zero=3), done.stderr


# --- weights that a run starts from -------------------------------------------------------


def test_a_run_starts_from_imported_weights(tmp_path):
    path, state = save_model(tmp_path / "run", toy_model(**GQA))
    weights = to(path, tmp_path / "hf", "huggingface")
    model = toy_model(**GQA | {"dropout": 0.1, "init_std": 0.02, "sequence": 4})
    config = {"model": model.model_dump(mode="json", by_alias=True), "run": {"seed": 5}}
    job = {"config": config, "fingerprints": {"data": "d1"}, "run_state": {"step": 0}}
    native = NativeCheckpoint.open(to(weights, tmp_path / "start", "native", **job))
    assert native.catalog == build_catalog(model)
    assert (native.config, native.fingerprints) == (config, {"data": "d1"})
    assert (native.step, native.run_state) == (0, {"step": 0})
    assert_same(contents(native.path), state.tensors, slots={"master"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_eps": 1e-3}, r"model\.norm_eps"),
        ({"rope_theta": 5e5}, r"model\.rope_theta"),
        ({"layers": 3}, r"layers\.2"),
        ({"family": "gpt2"}, "another model"),
    ],
)
def test_a_run_of_another_model_does_not(tmp_path, change, message):
    path, _ = save_model(tmp_path / "run", toy_model(**GQA))
    weights = to(path, tmp_path / "hf", "huggingface")
    config = {"model": toy_model(**GQA | change).model_dump(mode="json", by_alias=True)}
    with pytest.raises(CheckpointError, match=message):
        convert(Job(weights, tmp_path / "start", "native", config=config))


def test_a_target_that_another_job_made_meanwhile_leaves_no_work(tmp_path, monkeypatch):
    """Both saw that nothing is there; the second one gets the lock when the first has ended."""
    path, _ = save_model(tmp_path / "run")
    target = tmp_path / "out"
    opened = converting.survey_of

    def first_ends(*arguments):
        target.mkdir()
        return opened(*arguments)

    monkeypatch.setattr(converting, "survey_of", first_ends)
    with pytest.raises(CheckpointError, match="already"):
        convert(Job(path, target, "native"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_a_lock_that_a_killed_job_left_beside_its_result_is_removed(tmp_path):
    path, _ = save_model(tmp_path / "run")
    target = tmp_path / "out"
    convert(Job(path, target, "native"))
    code = (
        "import os, sys; from pathlib import Path; from megagrow.lock import holding_output\n"
        "with holding_output(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, target], cwd=Path.cwd(), check=False)
    assert (tmp_path / ".out.lock").exists()
    with pytest.raises(CheckpointError, match="already"):
        convert(Job(path, target, "native"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]
