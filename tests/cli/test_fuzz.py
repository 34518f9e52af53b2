"""No wrong value causes a traceback, status 0 or leftover files."""

import os
import random
import re
from pathlib import Path

import pytest

from megagrow.config.load import known_keys, load_config
from megagrow.data.run_data import open_data
from megagrow.train.checkpoints import fingerprints
from megagrow.train.state import RunState
from tests.checkpoint.states import save_model, to
from tests.cli import fuzz
from tests.cli.fuzz import (
    VALUES,
    WouldStartError,
    call,
    filled,
    inside,
    left_behind,
    load,
    make_places,
    snapshot,
)
from tests.jobs import REPOSITORY, WIDTH, settings, write_config

SEED = 20
FEW = 4  # cases per command in the default run
# Options for which any text is valid: names, texts and places to write to.
FREE = {
    "--output", "--to", "--json", "--svg", "--logs", "--glob", "--text-key", "--env", "--address",
    "--work", "--keep", "--only", "--files", "--directory",
}  # fmt: skip
WRONG = ("negative", "nan of C", "text", "below a file", "a missing path", "huge integer")


@pytest.fixture(scope="session")
def home(tmp_path_factory, dataset):
    """What commands need in addition to the wrong value."""
    home = make_places(tmp_path_factory.mktemp("fuzz"))
    (home / "text.txt").write_text("words of a text, and more words\n\n" * 40)
    mapping = settings(
        dataset, home / "run",
        stages=[{"until": {"steps": 3}}, {"grow": WIDTH, "until": {"steps": 9}}],
    )  # fmt: skip
    config = load_config(write_config(home / "run.yaml", mapping))
    data = open_data(config)
    model = config.model.model_copy(update={"vocab": data.vocab_size})
    bare, _ = save_model(home / "bare", model, fingerprints=fingerprints(data))
    to(bare, home / "export", "huggingface")
    to(
        home / "export", home / "checkpoint" / "step_00000000", "native",
        config=config.model_copy(update={"model": model}).model_dump(mode="json", by_alias=True),
        fingerprints=fingerprints(data), run_state=RunState().to_json(),
    )  # fmt: skip
    (home / "machine.yaml").write_text(
        (REPOSITORY / "configs" / "machines" / "h100.yaml").read_text()
    )
    (home / "job.py").write_text("")
    return home


def start_nothing(monkeypatch):
    """Commands stop where they would start processes or training."""

    def would_start(*_, **__):
        raise WouldStartError("would start")

    import torch.multiprocessing

    from benchmarks import commands
    from benchmarks.faults import processes, shim
    from megagrow.cli import supervise
    from megagrow.engine import comm
    from megagrow.savings import command as saving

    monkeypatch.setattr(comm, "start", would_start)
    monkeypatch.setattr(saving, "start", would_start)
    monkeypatch.setattr(commands, "run_job", would_start)
    monkeypatch.setattr(processes, "begin", would_start)
    monkeypatch.setattr(shim, "build", lambda directory: directory)
    for module in (commands.departing, commands.converting, commands.fused):
        monkeypatch.setattr(module, "measure", would_start)
    monkeypatch.setattr(torch.multiprocessing, "spawn", would_start)
    monkeypatch.setattr(supervise, "_hub", would_start)


def commands(home):
    """Every command with arguments that it accepts."""
    config, checkpoint = str(home / "run.yaml"), str(home / "checkpoint")
    return {
        "pretrain": ["--config", config],
        "pretrain --dry-run": ["--config", config, "--dry-run"],
        "grow": ["--from", checkpoint, "--to", "grown", "--operator", "width"],
        "convert": ["--from", checkpoint, "--to", "converted", "--to-format", "huggingface"],
        "inspect": [checkpoint],
        "plan": ["--config", config, "--tokens", "1e6", "--stages", "2"],
        "plan --machine": ["--config", config, "--machine", str(home / "machine.yaml"),
                           "machine.nodes=1", "batch.global=64"],
        "prepare_data": ["--input", str(home / "text.txt"), "--output", "made",
                         "--vocab-size", "290", "--documents", "paragraph",
                         "--validation-fraction", "0.2"],
        "evaluate": [checkpoint, "--text", str(home / "text.txt"),
                     "--tokenizer", str(home / "run.yaml")],
        "generate": [checkpoint, "--tokenizer", str(home / "run.yaml")],
        "report": ["run"],
        "compare": ["run"],
        "supervise": ["--ranks", "1", str(home / "job.py")],
        **{f"benchmark {kind}": [kind] for kind in
           ("growth", "throughput", "operators", "convert", "kernels", "mfu", "faults",
            "dynamics")},
        "benchmark savings": [
            "savings", "--config", str(REPOSITORY / "configs/bench/cpu_savings.yaml"),
            "--dry-run",
        ],
    }  # fmt: skip


def cases_of(name, base):
    """(words, description) of all wrong command lines of a command."""
    module = load(name.split()[0])
    first = base[:1] if name.startswith("benchmark") else []
    found = []
    for option, takes_value in fuzz.options_of(module, *first):
        for kind, value in VALUES.items():
            if not takes_value:
                if kind in ("text", "nothing"):
                    found.append(([f"{option}={value}"], f"{option} {kind}"))
                continue
            found.append(([f"{option}={value}"], f"{option} {kind}"))
        if takes_value:
            found.append(([option], f"{option} without a value"))
    positional = {"inspect", "evaluate", "generate", "report", "compare", "supervise"}
    for kind, value in VALUES.items():
        found.append(([value], f"an argument: {kind}"))
        if name in positional and value:
            found.append((("=", value), f"in the place of its argument: {kind}"))
    return found


def try_one(name, base, words, what, *, home, place):
    """Run one wrong command line; returns what is wrong with the outcome, if anything."""
    place.mkdir(parents=True)
    words = [filled(word, home) for word in words]
    if words and words[0] == "=":
        arguments = [words[1] if word == base[0] else word for word in base]
        if name == "supervise":
            arguments = [*base[:-1], words[1]]
    elif name == "supervise":  # what follows the script is the script's
        arguments = [*words, *base]
    else:
        arguments = [*base, *words]
    before, outside = snapshot(place), snapshot(home)
    with inside(place):
        said = call(load(name.split()[0]), arguments)
    faults = []
    if "Traceback" in said.text or re.search(r"\b\w*Error:", said.text.replace("ImportError:", "")):
        faults.append("an exception's words")
    if "Input should be" in said.text or "not permitted" in said.text:
        faults.append("pydantic's words")
    if len(said.text) > 20_000:
        faults.append(f"{len(said.text)} characters")
    if said.status == 0:
        make_places(home)  # a right value may have written there
        option = what.split()[0]
        if option not in FREE and what.split(" ", 1)[-1] in WRONG and option.startswith("--"):
            faults.append("status 0")
    elif "would start" not in said.text:
        left = left_behind(place, before) + left_behind(home, outside)
        if left:
            faults.append(f"left {left[:4]}")
        if not said.text.strip():
            faults.append("no word")
    return [f"{name} {what}: {fault}\n{said.text[-700:]}" for fault in faults]


def sweep(monkeypatch, home, tmp_path, *, name, few):
    start_nothing(monkeypatch)
    base = commands(home)[name]
    cases = cases_of(name, base)
    if few:
        cases = random.Random(SEED).sample(cases, FEW)
    faults = []
    for number, (words, what) in enumerate(cases):
        place = tmp_path / str(number)
        try:
            faults += try_one(name, base, words, what, home=home, place=place)
        except Exception as error:
            faults.append(f"{name} {what}: raises {type(error).__name__}: {str(error)[:300]}")
    assert not faults, f"{len(faults)} of {len(cases)}:\n" + "\n".join(faults)


NAMES = [
    "pretrain", "pretrain --dry-run", "grow", "convert", "inspect", "plan", "plan --machine",
    "prepare_data", "evaluate", "generate", "report", "compare", "supervise", "benchmark growth",
    "benchmark throughput", "benchmark savings", "benchmark operators", "benchmark convert",
    "benchmark kernels", "benchmark mfu", "benchmark faults", "benchmark dynamics",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_few_wrong_command_lines(monkeypatch, home, tmp_path, name):
    sweep(monkeypatch, home, tmp_path, name=name, few=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_wrong_command_line(monkeypatch, home, tmp_path, name):
    sweep(monkeypatch, home, tmp_path, name=name, few=False)


def settings_cases():
    keys = [key.replace("[i]", ".1").replace("stages.1", "stages.1") for key in known_keys()]
    return [(key, kind) for key in keys for kind in VALUES]


def sweep_settings(monkeypatch, home, tmp_path, cases):
    """Every setting with every wrong value, as a single-process dry run."""
    start_nothing(monkeypatch)
    faults = []
    module = load("pretrain")
    base = ["--config", str(home / "run.yaml"), "--dry-run"]
    (tmp_path / "here").mkdir()
    with inside(tmp_path / "here"):
        outside = snapshot(home)
        for key, kind in cases:
            try:
                said = call(module, [*base, f"{key}={filled(VALUES[kind], home)}"])
            except Exception as error:
                faults.append(f"{key} {kind}: raises {type(error).__name__}: {str(error)[:300]}")
                continue
            if "Input should be" in said.text or re.search(r"\b[A-Z]\w*Error:", said.text):
                faults.append(f"{key} {kind}: {said.text[-500:]}")
            if said.status != 0 and not re.search("^(error|usage): ", said.text, re.MULTILINE):
                faults.append(f"{key} {kind}: {said.status} {said.text[:300]}")
            if os.listdir("."):
                faults.append(f"{key} {kind}: left {os.listdir('.')}")
        if snapshot(home) != outside:
            faults.append("something else was touched")
    assert not faults, f"{len(faults)} of {len(cases)}:\n" + "\n".join(faults)


def test_some_settings_with_wrong_values(monkeypatch, home, tmp_path):
    sweep_settings(monkeypatch, home, tmp_path, random.Random(SEED).sample(settings_cases(), 60))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_every_setting_with_every_wrong_value(monkeypatch, home, tmp_path, part):
    sweep_settings(monkeypatch, home, tmp_path, settings_cases()[part::4])


def test_the_arguments_that_are_varied_are_right_by_themselves(monkeypatch, home, tmp_path):
    """Otherwise every refusal would have another cause than the value."""
    start_nothing(monkeypatch)
    wrong = {"evaluate", "generate", "report", "compare"}  # whose whole success takes a run
    with inside(tmp_path):
        for name in ("pretrain", "pretrain --dry-run", "grow", "convert", "inspect", "plan",
                     "plan --machine", "prepare_data", "supervise"):  # fmt: skip
            said = call(load(name.split()[0]), commands(home)[name])
            assert said.status == 0 or "would start" in said.text, (name, said.text)
    assert set(NAMES) >= wrong and Path(tmp_path).exists()
