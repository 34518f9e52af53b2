"""Error messages' fixes work: each proposed command is run in the situation that proposes it.

Every text of the project that proposes a command is found in the source; one that is in no table
here fails.  Options and settings named in errors must exist.
"""

import ast
import functools
import json
import os
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from megagrow.checkpoint.convert.registry import detect
from megagrow.checkpoint.convert.run import Job, convert
from megagrow.checkpoint.convert.summary import describe
from megagrow.cli import benchmark
from megagrow.cluster import launchers
from megagrow.config.load import known_keys, load_config
from megagrow.data.dataset import open_dataset
from megagrow.data.run_data import open_data
from megagrow.errors import CheckpointError, ConfigError, DataError, MegagrowError
from megagrow.report import page
from megagrow.train.checkpoints import fingerprints
from megagrow.train.fingerprints import require_run, require_same_data
from megagrow.train.grow_offline import plan_offline
from megagrow.train.run_config import load_run
from tests.checkpoint.states import save_model, to
from tests.cli.fuzz import call, load
from tests.jobs import REPOSITORY, main, settings, write_config

FOLDERS = ("megagrow", "launch", "benchmarks")
SOURCES = sorted(path for name in FOLDERS for path in (REPOSITORY / name).rglob("*.py"))
COMMAND = re.compile(
    r"python (?:launch/\w+\.py|-m [\w.]+)|launch/prepare_data\.py --|pip install|apt install|"
    r"\bmake (?:setup|quickstart|test|kernels)\b|\bmv \{\}|\bsrun "
)


# --- the texts ------------------------------------------------------------------------------


def skeleton(node):
    """A text in the source with {} for substitutions; None for anything but a text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (skeleton(node.left) or "{}") + (skeleton(node.right) or "{}")
    if isinstance(node, ast.IfExp):
        return f"{skeleton(node.body)} | {skeleton(node.orelse)}"
    return None


def documentation(tree):
    """The nodes that are docstrings or --help examples."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            yield node.body[0].value
        if isinstance(node, ast.Assign) and "EXAMPLES" in ast.unparse(node.targets[0]):
            yield node.value
        yield from (k.value for k in getattr(node, "keywords", ()) if k.arg == "examples")


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def texts():
    """(file, line, skeleton) of non-documentation texts, in files with commands."""
    for path in SOURCES:
        if not re.search(
            r"python|launch/|pip |apt |\bmake |\bmv |srun |\[\w+\]'", path.read_text()
        ):
            continue
        tree = tree_of(path)
        passed_over = {id(node) for node in documentation(tree)}
        parts = set()
        for node in ast.walk(tree):
            if id(node) in passed_over or id(node) in parts:
                parts |= {id(child) for child in ast.iter_child_nodes(node)}
                continue
            text = skeleton(node)
            if text is not None:
                parts |= {id(child) for child in ast.walk(node)}
                yield path.relative_to(REPOSITORY), node.lineno, text


@functools.cache
def commands():
    return {text for _, _, text in texts() if COMMAND.search(text)}


# --- states in which an error proposes a command ---------------------------------------------


@pytest.fixture
def state(tmp_path, dataset, monkeypatch):
    """A working directory with data and the configuration of a run."""
    monkeypatch.chdir(tmp_path)
    os.symlink(REPOSITORY / "launch", tmp_path / "launch")
    write_config(tmp_path / "run.yaml", settings(dataset, tmp_path / "run"))
    (tmp_path / "words.txt").write_text("a few words and some more\n\n" * 400)
    return tmp_path


def proposed(error):
    """An error's fix, as one line."""
    found = re.search(r"  fix:      (.*)", str(error), re.DOTALL)
    assert found, error
    return " ".join(found[1].split())


def run_command(line):
    """Run a command as a shell would: a script of launch/ in this process, or `mv`."""
    words = shlex.split(line)
    if words[0] == "mv":
        os.rename(*words[1:])
        return
    assert words[0] == "python" and words[1].startswith("launch/"), line
    said = call(load(Path(words[1]).stem), words[2:])
    assert said.status == 0, (line, said.text)


def command_in(text):
    """The command in a proposal, without the surrounding words."""
    found = re.search(r"(?:python launch/|mv )[^;]*", text)
    assert found, text
    return re.split(r",? (?:with the|where TEXT|then )", found[0])[0].rstrip(",; ")


def refuses(kind, work, *args, **more):
    with pytest.raises(kind) as caught:
        work(*args, **more)
    return proposed(caught.value)


def a_missing_dataset(state):
    fix = refuses(DataError, open_dataset, "data/mine")
    run_command(
        command_in(fix).replace("TEXT", "words.txt") + " --vocab-size 270 --documents paragraph"
    )
    open_dataset("data/mine")


def a_text_in_the_place_of_a_dataset(state):
    before = (state / "words.txt").read_bytes()
    fix = refuses(DataError, open_dataset, "words.txt")
    # The text has few words for the default vocabulary.
    run_command(command_in(fix) + " --vocab-size 270 --documents paragraph")
    open_dataset(re.search(r"data\.path=(\S+)", fix)[1])
    assert (state / "words.txt").read_bytes() == before


def a_damaged_dataset(state):
    run_command("python launch/prepare_data.py --input words.txt --output data/mine "
                "--vocab-size 270 --documents paragraph --validation-fraction 0.1")  # fmt: skip
    made = open_dataset("data/mine").fingerprint
    manifest = Path("data/mine/dataset.json")
    record = json.loads(manifest.read_text())
    record["content"]["train"]["tokens"] += 1
    manifest.write_text(json.dumps(record))
    run_command(command_in(refuses(DataError, open_dataset, "data/mine")))
    assert open_dataset("data/mine").fingerprint == made


def a_configuration_that_tells_how_its_data_was_made(state):
    text = yaml.safe_dump(settings("data/mine", state / "run"))
    (state / "run.yaml").write_text(
        "# Prepared by\n#   python launch/prepare_data.py --input words.txt --output data/mine \\\n"
        "#       --vocab-size 270 --documents paragraph --validation-fraction 0.2\n" + text
    )
    refused = main(["--config", "run.yaml", "--dry-run"])
    assert refused.status == 1
    run_command(command_in(proposed(refused.err)))
    assert main(["--config", "run.yaml", "--dry-run"]).status == 0


def a_target_that_is_taken(state):
    path, _ = save_model(state / "from")
    (state / "taken").mkdir()
    job = Job(path, state / "taken", "huggingface")
    run_command(command_in(refuses(CheckpointError, convert, job)))
    convert(job)


def a_step_that_is_saved(state):
    path, _ = save_model(state / "root")
    run_command(command_in(refuses(CheckpointError, save_model, state / "root")))
    assert save_model(state / "root")[0] == path


def a_report_that_cannot_be_written(state):
    run = state / "run"
    run.mkdir()
    (run / "config.yaml").write_text("")
    (run / "report.html").mkdir()
    fix = refuses(DataError, page.write_report, run)
    (run / "report.html").rmdir()  # "free space", the other half
    run_command(command_in(fix))
    assert (run / "report.html").is_file()


def _weights(state):
    """A checkpoint of a model of the run's data that belongs to no run."""
    config = load_config("run.yaml")
    data = open_data(config)
    model = config.model.model_copy(update={"vocab": data.vocab_size})
    return save_model(state / "bare", model, fingerprints=fingerprints(data))[0], data


def a_growth_of_another_format(state):
    path, _ = _weights(state)
    to(path, state / "export", "huggingface")
    from megagrow.config import GrowConfig

    grow = GrowConfig(operator="width")
    fix = refuses(CheckpointError, plan_offline, state / "export", grow)
    run_command(command_in(fix) + " --operator width")
    assert "hidden 16" in describe(_opened(Path("imports/export")), format_name="", checksums="")


def a_start_that_does_not_say_its_model(state):
    config = load_config("run.yaml")
    data = open_data(config)
    model = config.model.model_copy(update={"vocab": data.vocab_size})
    untold = {"run": {"seed": 1}}
    path, _ = save_model(state / "bare", model, fingerprints=fingerprints(data), config=untold)
    mapping = settings(data.path, state / "run", init={"from": str(path)})
    write_config(state / "start.yaml", mapping)
    fix = refuses(CheckpointError, load_run, "start.yaml")
    run_command(command_in(fix).replace("RUN.yaml", "run.yaml"))
    told = re.search(r"then (init.from=\S+)", fix)[1]
    assert load_run("start.yaml", [told]).model == model


def a_script_that_is_missing(state):
    fix = refuses(MegagrowError, launchers.require_script, [])
    words = shlex.split(command_in(fix).replace("FILE", "run.yaml"))
    options = load("supervise").parse(words[2:])
    launchers.require_script(options.script)
    assert load("supervise")._logs_of(options.script) == state / "run" / "logs"


def a_benchmark_that_is_not_installed(state):
    for name in benchmark.IN_A_CHECKOUT:
        fix = refuses(ConfigError, benchmark.parse, [name])
        words = shlex.split(command_in(fix).replace("...", "--help"))
        said = call(load(Path(words[1]).stem), words[2:])
        assert said.status == 0 and f" {name} [-h] " in said.text


def _opened(path):
    fmt, at = detect(path)
    return fmt.open_source(at)


def _starts(state, fix, data):
    """A run on the data with the proposed setting, without a model of its own."""
    mapping = settings(data, state / "new")
    del mapping["model"]
    write_config(state / "new.yaml", mapping)
    setting = re.search(r"init.from=[^\s,]+", fix)[0]
    return load_run("new.yaml", [setting]).model


def test_weights_that_belong_to_no_run_start_one(state):
    path, data = _weights(state)
    to(path, state / "export", "huggingface")
    to(state / "export", state / "weights", "native", allow_other_tokenizer=True)
    fix = refuses(CheckpointError, require_run, _opened(state / "weights"))
    assert _starts(state, fix, data.path).hidden == load_config("run.yaml").model.hidden


def test_weights_of_other_data_start_a_run_on_it(state):
    path, data = _weights(state)
    (state / "other.txt").write_text("other words, and others again\n\n" * 300)
    # With the same tokenizer, so that the weights mean the same.
    run_command(f"python launch/prepare_data.py --input other.txt --output other --tokenizer "
                f"{data.path}/{data.first.content.tokenizer_file} --documents paragraph "
                "--validation-fraction 0.2")  # fmt: skip
    write_config(state / "new.yaml", settings(state / "other", state / "new"))
    other = open_data(load_config("new.yaml"))
    fix = refuses(CheckpointError, require_same_data, _opened(path), other)
    assert _starts(state, fix, state / "other").hidden == load_config("run.yaml").model.hidden


# --- which text is tried by which test ----------------------------------------------------------

# By the beginning of the text.
TRIED = {
    "python launch/prepare_data.py {}, where TEXT": a_missing_dataset,
    "python launch/prepare_data.py {}, then data.path": a_text_in_the_place_of_a_dataset,
    "python launch/prepare_data.py {}": a_damaged_dataset,
    "give another --to, or move it away: mv": a_target_that_is_taken,
    "resume from it, or move it away: mv": a_step_that_is_saved,
    "free space, then python launch/report.py": a_report_that_cannot_be_written,
    "python launch/grow.py --from {} --to {}": a_growth_of_another_format,
    "python launch/convert.py --from {} --to imports/run": a_start_that_does_not_say_its_model,
    "python launch/supervise.py --ranks 2": a_script_that_is_missing,
    "clone megagrow's repository": a_benchmark_that_is_not_installed,
}
ALSO_TRIED = (a_configuration_that_tells_how_its_data_was_made,)
# What no test on this machine can try, and why.
READ = {
    "srun --ntasks-per-node 1 python launch/supervise.py": "needs Slurm; its options are checked",
    "install it (Debian, Ubuntu: apt install pdsh)": "installs a system package",
    "pip install": "installs a package; its name is checked",
    "build them: python -m megagrow.ops --build cuda": "needs nvcc; its options are checked",
    "if it is no longer needed, move it away: mv": "as the two other commands of that kind",
    "None | made by python launch/report.py": "no error's: where the report of a run would be",
    "install one (Debian, Ubuntu: apt install gcc)": "installs a system package",
    "install the same versions on all hosts: pip install": "installs packages",
    "python -m megagrow.ops": "the name of a command",
    "the CUDA kernels are not built (python -m megagrow.ops": "needs nvcc",
    "prepare the data with the weights' own": "which file that is, is not known",
    "make the dataset again with launch/prepare_data.py --overwrite": "as a damaged dataset's",
}


def covering(text):
    """The table entry for a text: its longest matching beginning."""
    entries = [entry for entry in {**TRIED, **READ} if text.startswith(entry)]
    return max(entries, key=len, default=None)


def test_every_command_that_is_proposed_is_tried():
    missing = sorted(text for text in commands() if covering(text) is None)
    assert not missing, "proposed and tried by no case here:\n" + "\n".join(missing)
    used = {covering(text) for text in commands()}
    assert set(TRIED) | set(READ) == used, "no text begins so any more"


@pytest.mark.parametrize(
    "case", [*TRIED.values(), *ALSO_TRIED], ids=lambda case: case.__name__.replace("_", " ")
)
def test_the_fix_makes_the_first_command_work(state, case):
    case(state)


# --- options, settings and packages that errors name ------------------------------------------


def known_options():
    """Every option of every command, and options of other programs that errors mention."""
    found = {
        "--master_port", "--num_gpus", "--nnodes", "--ntasks-per-node",  # launchers
        "--ckpt-convert-format", "--ckpt-convert-save", "--load",  # Megatron's
        "--num-layers-per-virtual-pipeline-stage",
        "--build",  # python -m megagrow.ops
    }  # fmt: skip
    for path in (REPOSITORY / "launch").glob("*.py"):
        module = load(path.stem)
        found |= set(re.findall(r"--[a-z][\w-]*", call(module, ["--help"]).text))
        if path.stem == "benchmark":
            for kind in re.findall(r"^    (\w+)  ", call(module, ["--help"]).text, re.MULTILINE):
                found |= set(re.findall(r"--[a-z][\w-]*", call(module, [kind, "--help"]).text))
    return found


def fixes():
    """(file, line, text) of everything given as `fix=`."""
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            for keyword in node.keywords if isinstance(node, ast.Call) else ():
                if keyword.arg == "fix" and skeleton(keyword.value):
                    yield path.relative_to(REPOSITORY), node.lineno, skeleton(keyword.value)


def test_options_that_fixes_name_exist():
    known = known_options()
    wrong = [
        f"{path}:{line}: {option} in {text!r}"
        for path, line, text in fixes()
        for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", text)
        if option not in known
    ]
    assert not wrong, "\n".join(wrong)


def test_settings_that_fixes_name_exist():
    known = {key.replace("[i]", "") for key in known_keys()}
    machine = {"machine.nodes"}
    sections = {key.partition(".")[0] for key in known if "." in key}
    wrong = []
    for path, line, text in fixes():
        for key in re.findall(r"(?<![\w./-])([a-z]+\.[a-z_]+(?:\.[a-z_]+)*)(?=[=\s,;:)]|$)", text):
            head = key.partition(".")[0]
            if head in sections and head != "deepspeed" and key not in known | machine:
                wrong.append(f"{path}:{line}: {key} in {text!r}")
    assert not wrong, "\n".join(wrong)


def test_extras_that_fixes_install_exist():
    setup = (REPOSITORY / "setup.py").read_text()
    sources = "".join(path.read_text() for path in SOURCES)
    named = set(re.findall(r"megagrow\[(\w+)\]", sources))
    assert named and all(f'"{extra}": [' in setup for extra in named), named


# --- examples of --help and of the README ------------------------------------------------------

MADE = ("runs/", "data/quickstart", "data/stdlib", "data/corpus", "exports/", "imports/", "plans/",
        "/tmp", "/shared/run", "OUT", "hosts")  # fmt: skip


def help_texts():
    for path in sorted((REPOSITORY / "launch").glob("*.py")):
        module = load(path.stem)
        text = call(module, ["--help"]).text
        yield path.stem, text
        if path.stem == "benchmark":
            for kind in re.findall(r"^    (\w+)  ", text, re.MULTILINE):
                yield f"benchmark {kind}", call(module, [kind, "--help"]).text


def examples(text):
    """The commands in the examples, with continued lines joined."""
    joined = text.partition("examples:\n")[2].replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if "launch/" in line and "#" not in line]


def test_examples_name_what_is_there_and_overwrite_nothing_of_the_repository():
    seen = 0
    for command, text in help_texts():
        for line in examples(text):
            seen += 1
            words = shlex.split(line)
            for before, word in pairwise(words):
                value = word.rpartition("=")[2]
                if before in ("--output", "--to", "--json", "--svg", "--work"):
                    continue  # made there
                if "/" not in value and not re.search(r"\.(ya?ml|jsonl?|md|txt|svg)$", value):
                    continue
                if "://" in value:
                    continue  # an object store's
                placeholder = re.fullmatch(r"[A-Z_]+(?:[./].*)?", value)
                if placeholder or value.startswith(MADE) or re.match(r"[\w.-]+:\d+$", value):
                    continue
                assert (REPOSITORY / value).exists(), f"{command}: {value} in {line}"
            for option in ("--json", "--svg", "--output", "--to"):
                written = re.search(rf"{option} (\S+)", line)
                made = written and written[1].startswith(("runs/", "data/"))  # git ignores both
                assert not written or made or not (REPOSITORY / written[1]).exists(), line
    assert seen > 20


def test_a_benchmark_shows_its_own_examples_alone():
    for command, text in help_texts():
        _, _, kind = command.partition(" ")
        if kind:
            shown = re.findall(r"launch/benchmark\.py (\w+)", text)
            assert shown and set(shown) == {kind}, (command, shown)


def test_a_configuration_from_the_readme_alone_passes(state, dataset):
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- minimal configuration -->\n```yaml\n(.*?)```", text, re.DOTALL)
    assert found, "the README has no minimal configuration"
    mapping = yaml.safe_load(found[1])
    assert {"model", "data", "batch", "stages"} <= set(mapping)
    mapping["data"]["path"] = str(dataset)
    write_config(state / "mine.yaml", mapping)
    dry = main(["--config", "mine.yaml", "--dry-run"])
    assert dry.status == 0, dry.err


def test_all_wrong_settings_of_a_file_are_reported_at_once(state, dataset):
    mapping = settings(dataset, state / "run", optimizer={"lr": -1}, batch={"global": 7})
    mapping["model"] |= {"hidden": "wide", "layer": 3}
    del mapping["stages"]
    write_config(state / "wrong.yaml", mapping)
    said = main(["--config", "wrong.yaml", "--dry-run"]).err
    for words in ("5 wrong settings", "optimizer.lr", "batch: global = 7", "model.hidden",
                  "did you mean model.layers?", "stages: missing"):  # fmt: skip
        assert words in said, said


def test_forms_that_are_nearly_right_are_reported_the_right_one(state):
    dashes = main(["--config", "run.yaml", "--optimizer.lr=1e-3"])
    assert dashes.status == 2 and "settings have no dashes: optimizer.lr=1e-3" in dashes.err
    (state / "blank.yaml").write_text(
        (state / "run.yaml").read_text().replace("steps: 3", "steps:3")
    )
    assert "a blank after the colon: steps: 3" in main(["--config", "blank.yaml"]).err
    path, _ = _weights(state)
    grown = call(load("grow"), ["--from", str(path), "--to", "x", "--operator", "width",
                                "--target", "layer=6"])  # fmt: skip
    assert grown.status == 1 and "did you mean target.layers?" in grown.text
    machine = call(load("plan"), ["--config", "run.yaml", "--machine", "MISSING"])
    assert "--machine MISSING: cannot be read" in machine.text and "--config" not in machine.text
