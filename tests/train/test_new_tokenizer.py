"""A larger tokenizer at the start of a run: rows by text, in every layout, out again."""

import json
import shutil

import pytest
import sentencepiece
import torch
import transformers

from megagrow.checkpoint import NativeCheckpoint, newest
from megagrow.checkpoint.convert.registry import detect
from megagrow.checkpoint.interface.model_of import model_of
from megagrow.data.prepare import Request, prepare
from megagrow.data.tokenizer import load_tokenizer, train_sentencepiece
from megagrow.state.boxes import whole
from tests.jobs import command, events, launch, log_of, main, train, trajectory, write_config
from tests.train.released import run_from, save_released, their_loss

NAMES = ("llama-3.2", "pythia")  # tied and untied
PADDED = 328  # rows of the old models; 320 tokens


def text_of(dataset):
    return dataset.with_suffix(".txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def larger(dataset, tmp_path_factory):
    """Data prepared with a larger tokenizer, of another corpus and in another order."""
    home = tmp_path_factory.mktemp("larger")
    lines = [*text_of(dataset).split("\n\n"), *["zxw qv growing growing models é"] * 60]
    (home / "new.model").write_bytes(train_sentencepiece(lines, vocab_size=380))
    prepare(
        Request(
            input=str(dataset.with_suffix(".txt")), output=home / "data",
            tokenizer=home / "new.model", documents="paragraph", validation_fraction=0.1,
        )
    )  # fmt: skip
    return home / "data"


@pytest.fixture(scope="module")
def models(dataset, larger, tmp_path_factory):
    """By name: (the released model, the same with the rows of the new tokens made by hand)."""
    home = tmp_path_factory.mktemp("models")
    made = {}
    for name in NAMES:
        path = save_released(home / name, name, dataset, vocab_size=PADDED)
        made[name] = path, by_hand(path, larger, home / f"{name}-by-hand")
    return made


def pieces_by_hand(path, larger):
    """By new id, the old ids of which it is the mean, from the models' own pieces."""
    files = path / "tokenizer.model", larger / "tokenizer.model"
    old, new = (sentencepiece.SentencePieceProcessor(model_file=str(file)) for file in files)
    ids = {old.id_to_piece(i): i for i in range(old.get_piece_size())}
    names = [new.id_to_piece(i) for i in range(new.get_piece_size())]
    rows = [[ids[n]] if n in ids else old.encode(n.replace("\u2581", " ")) for n in names]
    return rows, [n in ids for n in names]


def by_hand(path, larger, target):
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    rows, _ = pieces_by_hand(path, larger)
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        made = [torch.stack([t.weight[r].mean(0) for r in rows]) for t in tables]
        model.resize_token_embeddings(len(rows), mean_resizing=False)
        for table, values in zip(
            [model.get_input_embeddings(), model.get_output_embeddings()], made, strict=True
        ):
            table.weight.copy_(values)
    model.save_pretrained(target)
    return target


def grow(larger, **more):
    return {"operator": "vocab", "tokenizer": str(larger), **more}


def run(models, larger, home, name, layout=None, **changes):
    stages = [{"grow": grow(larger, **changes.pop("grow", {})), "until": {"steps": 2}}]
    given = {"schedule": {"warmup": 1}, "checkpoint": {"every": 100}} | changes
    made = run_from(
        models[name][0], larger, home / "run", stages=stages, layout=layout or {"zero": 1}, **given
    )
    return write_config(home / "run.yaml", made)


@pytest.fixture(scope="module")
def alone(models, larger, tmp_path_factory):
    home = tmp_path_factory.mktemp("alone")
    paths = {}
    for name in NAMES:
        (home / name).mkdir()
        paths[name] = run(models, larger, home / name, name)
    jobs = launch(1, *(["--config", path] for path in paths.values()))
    assert not (bad := [o.err[-1500:] for [o] in jobs if o.status]), bad
    said = {key: o.err for key, [o] in zip(paths, jobs, strict=True)}
    return {key: (log_of(path), said[key], path) for key, path in paths.items()}


def test_the_first_loss_is_that_of_the_model_made_by_hand(alone, models, larger):
    for name, (lines, said, _) in alone.items():
        [first, *_] = events(lines, "validation")
        assert abs(first["val_loss"] - their_loss(models[name][1], larger)) <= 1e-5, name
        rows, same = pieces_by_hand(models[name][0], larger)
        assert sum(same) > 250 and len(rows) == 380
        assert f"tokens: 320 -> 380, compared by their texts with {models[name][0]}" in said
        assert f"{sum(same)} keep their rows" in said
        assert f"{380 - sum(same)} are new, each the mean of the rows of its pieces" in said
        assert "that of the data is the growth's, by its SHA-256" in said
        assert "growth at step 0: vocab to vocab 380 (kept)" in said


LAYOUTS = {"tensor": (2, {"tensor": 2, "zero": 0}), "pipeline": (2, {"pipeline": 2, "zero": 0}),
           "zero 3": (2, {"zero": 3})}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_the_same(alone, models, larger, tmp_path, layout):
    world, section = LAYOUTS[layout]
    paths = {}
    for name in NAMES:
        (tmp_path / name).mkdir()
        paths[name] = run(models, larger, tmp_path / name, name, layout=section)
    jobs = launch(world, *(["--config", path] for path in paths.values()))
    assert not (bad := [o.err[-1500:] for job in jobs for o in job if o.status]), bad
    for name, path in paths.items():
        for kind, key in (("validation", "val_loss"), ("step", "loss")):
            pairs = zip(events(log_of(path), kind), events(alone[name][0], kind), strict=True)
            assert all(abs(a[key] - b[key]) <= 1e-5 for a, b in pairs), (name, kind)


def test_it_goes_on_without_the_source_and_its_tokenizer(models, larger, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(models["pythia"][0], source)
    config = run({"pythia": (source, None)}, larger, tmp_path, "pythia", checkpoint={"every": 1})
    whole_run = trajectory(train(1, config, f"run.dir={tmp_path / 'whole'}"))
    train(1, config, "train.stop_after_steps=1")
    shutil.rmtree(source)
    assert trajectory(train(1, config)) == whole_run
    checkpoint = NativeCheckpoint.open(newest(tmp_path / "run/checkpoints"))
    assert model_of(checkpoint).vocab == 380
    assert checkpoint.config["stages"][0]["grow"]["target"]["vocab"] == 380


def test_an_export_has_the_new_tokenizer_and_the_same_logits(alone, models, larger, tmp_path):
    _, _, config = alone["llama-3.2"]
    run_dir = config.with_suffix("")
    out = tmp_path / "export"
    assert command("convert").main(
        ["--from", str(run_dir), "--to", str(out), "--to-format", "huggingface"]
    ) == 0  # fmt: skip
    check_export(out, larger)
    last = events(alone["llama-3.2"][0], "validation")[-1]["val_loss"]
    assert abs(their_loss(out, larger) - last) <= 1e-5


def check_export(out, larger):
    held = transformers.AutoTokenizer.from_pretrained(out)
    ours = load_tokenizer(larger / "tokenizer.model")
    for text in ("growing models", " bada  é\n", "zxw qv"):
        assert held(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


@pytest.mark.parametrize("name", NAMES)
def test_growing_a_directory_gives_the_model_made_by_hand(models, larger, tmp_path, name, capsys):
    out = tmp_path / "out"
    status = command("grow").main(
        ["--from", str(models[name][0]), "--to", str(out), "--operator", "vocab",
         "--tokenizer", str(larger)]
    )  # fmt: skip
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "vocabulary  tokens: 320 -> 380" in said.out
    wanted = transformers.AutoModelForCausalLM.from_pretrained(models[name][1])
    found = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.randint(0, 380, (2, 16), generator=torch.manual_seed(1))
    with torch.no_grad():
        difference = (found(tokens).logits - wanted(tokens).logits).abs().max()
    assert difference <= 1e-6
    check_export(out, larger)
    assert abs(their_loss(out, larger) - their_loss(models[name][1], larger)) <= 1e-6
    # It starts a run on data of the new tokenizer, which is its own now.
    config = write_config(tmp_path / "run.yaml", run_from(out, larger, tmp_path / "run"))
    checked = main(["--config", config, "--dry-run"])
    assert checked.status == 0, checked.err
    assert "that of the data is the checkpoint's" in checked.out


def test_moments_of_a_run_go_by_their_text(models, larger, dataset, tmp_path):
    """From a run's checkpoint: old rows keep their moments, and new ones start without."""
    before = write_config(
        tmp_path / "before.yaml", run_from(models["pythia"][0], dataset, tmp_path / "before")
    )
    train(1, before)
    source = tmp_path / "before"
    config = run({"pythia": (source, None)}, larger, tmp_path, "pythia",
                 checkpoint={"every": 1}, optimizer={"lr": 1e-9, "betas": [0.9, 0.95]},
                 schedule={"warmup": 0})  # fmt: skip
    lines = train(1, config, "train.stop_after_steps=1")
    assert events(lines, "step")
    old = detect(source)[0].open_source(detect(source)[1])
    new = NativeCheckpoint.open(newest(tmp_path / "run/checkpoints"))
    young = new.run_state["rules"]["young"]
    rows, same = pieces_by_hand(models["pythia"][0], larger)
    for name in ("embedding.token", "output.weight"):
        assert young[name]["rows"] and young[name]["born"] == 4
        table = new.catalog[name]
        values = new.read(name, "exp_avg", whole(table.shape))
        earlier = old.read(name, "exp_avg", whole(old.catalog[name].shape))
        # One step later: m = 0.9 m + 0.1 g; rows of tokens that did not occur have no gradient.
        if name == "embedding.token":
            unseen = [i for i in range(380) if (values[i] == 0).all()]
            assert any(not same[i] for i in unseen)
            quiet = [i for i in range(380) if same[i] and torch.equal(
                values[i], 0.9 * earlier[rows[i][0]])]  # fmt: skip
            assert quiet


def test_what_is_refused(models, larger, dataset, tmp_path):
    config = run(models, larger, tmp_path, "pythia")

    def refused(*overrides):
        outcome = main(["--config", config, "--dry-run", *overrides])
        assert outcome.status == 1
        return outcome.err

    # Data of another tokenizer than the growth's.
    error = refused(f"stages.0.grow.tokenizer={models['pythia'][0]}")
    assert "stages[0].grow.tokenizer: the data was prepared with a larger one" in error
    error = refused(f"data.path={dataset}")
    assert "was not prepared with stages[0].grow.tokenizer" in error
    # In the middle of a run, or without a checkpoint to start from.
    later = [{"until": {"steps": 1}}, {"grow": grow(larger), "until": {"steps": 2}}]
    later[1]["grow"]["target"] = {"vocab": 380}
    error = refused(f"data.path={dataset}", f"stages={json.dumps(later)}")
    assert "stages[1].grow.tokenizer: a run has one dataset" in error
    assert "fewer rows than the tokenizer has tokens" in refused(
        'stages.0.grow.target={"vocab": 350}'
    )
    assert "no tokenizer" in refused(f"stages.0.grow.tokenizer={tmp_path}")
    # Another tokenizer than that of the weights.
    error = refused(f"stages.0.grow.old_tokenizer={larger}")
    assert "stages[0].grow.old_tokenizer" in error and "is not the tokenizer of this model" in error


def test_tokens_that_would_be_lost(models, larger, dataset, tmp_path, capsys):
    other = tmp_path / "other.model"
    lines = ["only these few words and no others at all"] * 90 + ["xyz" * 9, "quick jumps"] * 40
    other.write_bytes(train_sentencepiece(lines, vocab_size=290))
    words = ["--from", str(models["pythia"][0]), "--operator", "vocab", "--tokenizer", str(other),
             "--target", "vocab=328", "--dry-run"]  # fmt: skip
    assert command("grow").main(words) == 1
    error = capsys.readouterr().err
    assert "does not have all tokens of" in error and "grow.allow_dropped=true" in error
    assert command("grow").main([*words, "--allow-dropped"]) == 0
    said = capsys.readouterr().out
    assert "are lost (grow.allow_dropped)" in said and "rows without a token: 8 -> 38" in said


def test_a_checkpoint_of_a_run_stays_on_its_data(alone, larger, capsys, tmp_path):
    _, _, config = alone["pythia"]
    words = ["--from", str(config.with_suffix("")), "--operator", "vocab", "--tokenizer",
             str(larger), "--to", str(tmp_path / "out")]  # fmt: skip
    assert command("grow").main(words) == 1
    assert "a run has one dataset, and so one tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_whose_tokenizer_is_not_known(models, larger, dataset, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(models["pythia"][0], bare)
    (bare / "tokenizer.model").unlink()
    words = ["--from", str(bare), "--operator", "vocab", "--tokenizer", str(larger), "--dry-run"]
    assert command("grow").main(words) == 1
    assert "give its tokenizer.json or .model" in capsys.readouterr().err
    assert command("grow").main([*words, "--old-tokenizer", str(dataset)]) == 0
    said = capsys.readouterr().out
    assert "not compared" in said and "320 -> 380" in said
