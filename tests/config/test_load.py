import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config.load import dump_config, known_keys, load_config, parse_config
from megagrow.errors import ConfigError

TEXT = """
model: {layers: 2, hidden: 32, heads: 2, ffn: 128, sequence: 16}
data: {path: data/x}
batch: {global: 16, micro: 4}
stages:
  - until: {tokens: 1e6}
  - {until: {steps: 1e4}, grow: {operator: width}}
optimizer:
  # all lines are comments
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(TEXT)
    return file


def refusal(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_loads_with_defaults_and_overrides(path):
    config = load_config(
        path, ["optimizer.lr=2e-3", "batch.global=32", "stages.0.until.tokens=5e5"]
    )
    assert config.optimizer.lr == 2e-3
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.batch.global_ == 32
    assert config.stages[0].until.tokens == 500_000
    assert config.stages[1].until.steps == 10_000
    assert config.model.vocab is None


def test_an_integer_may_stand_for_a_real_number_but_nothing_else_is_converted(path):
    assert load_config(path, ["optimizer.lr=1"]).optimizer.lr == 1.0
    assert "found:    2.0 (number)" in refusal(path, "model.layers=2.0")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.layers=two", ["model.layers", "two (text)", "an integer"]),
        ("model.layers='2'", ["model.layers", "2 (text)", "an integer"]),
        ("model.layers=true", ["model.layers", "true", "an integer"]),
        ("model.layers=0", ["model.layers", "0 (integer)", "greater than 0"]),
        ("layout.zero=true", ["layout.zero", "an integer"]),
        ("layout.zero=4", ["layout.zero", "4 (integer)", "less than or equal to 3"]),
        ("train.tensorboard=yes", ["train.tensorboard", "yes (text)", "true or false"]),
        ("optimizer.lr=.inf", ["optimizer.lr", "a finite number"]),
        ("optimizer.lr=high", ["optimizer.lr", "high (text)", "a number"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas[1]", "missing"]),
        ("optimizer.betas=0.9", ["optimizer.betas", "a list"]),
        ("schedule.name=step", ["schedule.name", "'wsd', 'cosine', 'linear' or 'constant'"]),
        ("run.dir=5", ["run.dir", "5 (integer)", "text"]),
        ("model=gpt2", ["model", "gpt2 (text)", "a section"]),
        ("deepspeed=[]", ["deepspeed", "a section"]),
        ("stages=[]", ["stages", "more items"]),
        ("stages={}", ["stages", "a list"]),
        ("stages.1.grow.factor=1", ["stages[1].grow.factor", "greater than or equal to 2"]),
        ("stages.1.until.tokens=3", ["stages[1].until", "exactly one", "steps and tokens"]),
        ("stages.1.until={}", ["stages[1].until", "exactly one", "none"]),
        ("stages.0.grow={operator: width}", ["stages[0].grow", "cannot grow"]),
        ("model.init_std=wide", ["model.init_std", "wide (text)", "a number"]),
        ("model.init_std={head: .1}", ["model: init_std.head", "tie_embeddings"]),
        ("model.init_std={matrices: x}", ["model.init_std.matrices\n", "x (text)", "'fan_in'"]),
        ("model.init_std={matrices: 0}", ["model.init_std.matrices\n", "greater than 0"]),
        ("model.heads=3", ["hidden = 32", "heads = 3", "multiple of 3", "33"]),
        ("batch.micro=5", ["batch", "global = 16", "micro = 5", "20"]),
        ("data={}", ["data.path", "missing"]),
    ],
)
def test_wrong_values(path, override, says):
    message = refusal(path, override)
    assert "1 wrong setting" in message
    for part in says:
        assert part in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.layer=3", "model.layer: unknown key\n    fix:      did you mean model.layers?"),
        ("batch.gloabl=3", "did you mean batch.global?"),
        ("batch.global_=3", "did you mean batch.global?"),
        ("stages.1.grow.operater=x", "stages[1].grow.operater: unknown key"),
        ("stages.1.grow.operater=x", "did you mean stages[1].grow.operator?"),
        ("model.init_std={embeding: 1}", "did you mean model.init_std.embedding?"),
        ("optimiser.lr=1", "optimiser: unknown key\n    fix:      did you mean optimizer?"),
        ("lr=1", "did you mean optimizer.lr?"),
        ("model.qqq=1", "expected: one of family, layers, hidden"),
    ],
)
def test_unknown_keys_name_the_nearest(path, override, says):
    assert says in refusal(path, override)


def test_all_faults_are_named_at_once(path):
    message = refusal(path, "model.layers=two", "data.pth=3", "batch.micro=0")
    assert "3 wrong settings" in message
    assert all(key in message for key in ("model.layers", "data.pth", "batch.micro"))
    assert str(path) in message


def test_missing_sections_are_named(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("run: {dir: x}\nmodel:\n")
    message = refusal(file)
    for key in ("model", "data", "batch", "stages"):
        assert f"  {key}: missing" in message


@pytest.mark.parametrize(
    ("content", "says"),
    [("- 1\n", "list at the top"), ("", "an empty file"), ("text", "text at the top")],
)
def test_a_file_without_settings(tmp_path, content, says):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert says in refusal(file)


def test_a_file_that_cannot_be_read(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.yaml")
    assert "Is a directory" in refusal(tmp_path)


def test_syntax_error_names_file_and_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  layers: [1\ndata: x\n")
    assert f"{file}, line 3" in refusal(file)


def test_dump_loads_back_equal(path, tmp_path):
    config = load_config(
        path,
        [
            "deepspeed={a: {b: null, c: '1e6', d: [1, 2.5, yes]}}",
            "run.dir='1e6'",
            "data.tokenizer=größe.model",
            "stages.1.layout={zero: 2}",
            "model.init_std={embedding: 0.5, matrices: fan_in}",
        ],
    )
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(copy) == config
    assert config.deepspeed == {"a": {"b": None, "c": "1e6", "d": [1, 2.5, "yes"]}}


@settings(max_examples=50, deadline=None)
@given(
    lr=st.floats(min_value=1e-300, max_value=1e300),
    flops=st.floats(min_value=1e-300, max_value=1e300),
    seed=st.integers(min_value=0, max_value=2**63 - 1),
    text=st.text(),
)
def test_dump_keeps_every_digit(tmp_path_factory, lr, flops, seed, text):
    file = tmp_path_factory.getbasetemp() / "digits.yaml"
    config = parse_config(
        {
            "model": {"layers": 1, "hidden": 4, "heads": 1, "ffn": 4, "sequence": 4},
            "data": {"path": "d"},
            "batch": {"global": 1, "micro": 1},
            "stages": [{"until": {"flops": flops}}],
            "optimizer": {"lr": lr},
            "run": {"seed": seed},
            "train": {"wandb": {"project": text}},
        }
    )
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


def test_parse_config_refuses_what_is_not_plain_data():
    with pytest.raises(ConfigError, match="plain data"):
        parse_config({"model": object()})


def test_known_keys_reach_into_lists_and_use_the_written_names():
    keys = set(known_keys())
    assert {"batch.global", "stages[i].until.tokens", "stages[i].layout.zero"} <= keys
    assert not any(key.endswith("_") for key in keys)
