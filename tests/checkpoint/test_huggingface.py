"""Hugging Face directories: transformers reads ours, we read theirs, and damage is refused."""

import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megagrow.checkpoint import NativeCheckpoint
from megagrow.checkpoint.convert.load_model import load_model
from megagrow.checkpoint.convert.registry import get_format
from megagrow.checkpoint.convert.run import Job, convert, survey
from megagrow.errors import CheckpointError
from megagrow.state.layout import Layout
from tests.checkpoint.states import GQA, assert_same, contents, opened, save_model, to
from tests.toys import build, toy_model

transformers = pytest.importorskip("transformers")

MODELS = {
    "gpt2-tied": {},
    "gpt2-untied": {"tie_embeddings": False},
    "llama-tied": {"family": "llama"},
    "llama-untied": {"family": "llama", "tie_embeddings": False, "rope_theta": 500.0},
    "llama-gqa": GQA | {"tie_embeddings": False, "norm_eps": 1e-3},
}


@pytest.fixture(params=MODELS, name="model")
def any_model(request):
    return toy_model(**MODELS[request.param])


def open_hf(path):
    return get_format("huggingface").open_source(path)


def test_transformers_gives_our_logits(tmp_path, model):
    path, state = save_model(tmp_path, model, layout=Layout(tensor=2, data=2, zero=1))
    target = to(path, tmp_path / "hf", "huggingface")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        target, output_loading_info=True, torch_dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.randint(model.vocabulary, (3, model.sequence), generator=torch.manual_seed(1))
    with torch.no_grad():
        found = theirs.eval()(tokens).logits
        wanted = build(model, state).eval().logits(tokens)
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() < 1e-4


def config_of(model):
    if model.family == "gpt2":
        return transformers.GPT2Config(
            n_layer=model.layers, n_embd=model.hidden, n_head=model.heads, n_inner=model.ffn,
            n_positions=model.sequence, vocab_size=model.vocabulary,
            tie_word_embeddings=model.tie_embeddings,
        )  # fmt: skip
    return transformers.LlamaConfig(
        num_hidden_layers=model.layers, hidden_size=model.hidden, num_attention_heads=model.heads,
        num_key_value_heads=model.kv_groups, head_dim=model.head_dim, intermediate_size=model.ffn,
        max_position_embeddings=model.sequence, vocab_size=model.vocabulary,
        rms_norm_eps=model.norm_eps, tie_word_embeddings=model.tie_embeddings,
        rope_theta=model.rope_theta,
    )  # fmt: skip


def their_directory(path, model, **settings):
    torch.manual_seed(3)
    made = transformers.AutoModelForCausalLM.from_config(config_of(model))
    made.save_pretrained(path, **settings)
    return made


@pytest.mark.parametrize(
    ("init_std", "stated"),
    [(0.3, 0.3), ({"embedding": 0.5, "matrices": 0.1}, 0.1), ({"matrices": "fan_in"}, None)],
)
def test_the_range_of_fresh_parameters_is_that_of_matrices(tmp_path, init_std, stated):
    path, _ = save_model(tmp_path, toy_model(init_std=init_std))
    about = survey(Job(path, tmp_path / "hf", "huggingface"))
    named = [item.name for item in about.left_out if "init_std" in item.name]
    assert len(named) == isinstance(init_std, dict)
    target = to(path, tmp_path / "hf", "huggingface")
    assert json.loads((target / "config.json").read_text()).get("initializer_range") == stated
    default = transformers.GPT2Config().initializer_range
    assert transformers.AutoConfig.from_pretrained(target).initializer_range == (stated or default)
    assert open_hf(target).config["model"]["init_std"] == (stated or default)


@pytest.mark.parametrize("sharded", [False, True])
def test_their_directory_there_and_back_is_the_identity(tmp_path, model, sharded):
    theirs = their_directory(tmp_path / "hf", model, max_shard_size="2KB" if sharded else "1GB")
    assert (tmp_path / "hf/model.safetensors.index.json").exists() == sharded
    native = to(tmp_path / "hf", tmp_path / "native", "native", layout=Layout(data=3, zero=1))
    back = to(native, tmp_path / "back", "huggingface", file_bytes=2000 if sharded else 1 << 30)
    found = {}
    for file in sorted(back.glob("*.safetensors")):
        found |= load_file(file)
    wanted = {name: t for file in (tmp_path / "hf").glob("*.safetensors")
              for name, t in load_file(file).items()}  # fmt: skip
    assert (len(list(back.glob("*.safetensors"))) > 1) == sharded
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    again = transformers.AutoModelForCausalLM.from_pretrained(back)
    for key in ("vocab_size", "tie_word_embeddings", "rope_parameters"):
        assert getattr(again.config, key, None) == getattr(theirs.config, key, None), key


def test_import_has_fresh_moments_and_a_model_to_train(tmp_path, model):
    their_directory(tmp_path / "hf", model)
    native = NativeCheckpoint.open(to(tmp_path / "hf", tmp_path / "native", "native"))
    values = contents(native.path)
    assert all(not values[pair].any() for pair in values if pair[1] != "master")
    assert (native.step, [slot.name for slot in native.slots]) == (
        0,
        ["master", "exp_avg", "exp_avg_sq"],
    )
    shape = {key: native.config["model"][key] for key in ("layers", "hidden", "ffn", "vocab")}
    assert shape == {"layers": 2, "hidden": 8, "ffn": 12, "vocab": 13}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_halves(tmp_path, dtype):
    path, state = save_model(tmp_path, toy_model(**GQA))
    half = to(path, tmp_path / "hf", "huggingface", dtype=dtype)
    back = to(to(half, tmp_path / "native", "native"), tmp_path / "back", "huggingface")
    assert (back / "model.safetensors").read_bytes() == (half / "model.safetensors").read_bytes()
    wanted = {p: v.to(dtype) for p, v in state.tensors.items() if p[1] == "master"}
    assert_same(contents(back), wanted)


def test_the_names_of_gpt2s_release_are_read(tmp_path):
    path, state = save_model(tmp_path)
    target = to(path, tmp_path / "hf", "huggingface")
    arrays = load_file(target / "model.safetensors")
    released = {name.removeprefix("transformer."): t for name, t in arrays.items()}
    for i in range(2):  # its masks, and a second copy of the tied head
        released[f"h.{i}.attn.bias"] = torch.ones(1, 1, 6, 6)
    released["lm_head.weight"] = released["wte.weight"].clone()
    save_file(released, target / "model.safetensors")
    (target / "megagrow.checksums.json").unlink()  # of the file as it was
    assert_same(contents(target), state.tensors, slots={"master"})


def cache_of(directory, root):
    """The directory as huggingface_hub keeps it: links to files named by their digest."""
    model, revision = root / "models--someone--toy", "0123456789abcdef0123456789abcdef01234567"
    snapshot, blobs = model / "snapshots" / revision, model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(revision)
    return model, snapshot


def test_hugging_faces_cache_is_read(tmp_path):
    path, state = save_model(tmp_path)
    target = to(path, tmp_path / "hf", "huggingface", file_bytes=2000)
    model, snapshot = cache_of(target, tmp_path)
    for place in (model, snapshot):
        assert_same(contents(place), state.tensors, slots={"master"})
    assert_same(contents(to(model, tmp_path / "native", "native")), state.tensors, slots={"master"})


def test_links_that_leave_the_cache_are_refused(tmp_path):
    path, _ = save_model(tmp_path)
    target = to(path, tmp_path / "hf", "huggingface")
    _, snapshot = cache_of(target, tmp_path)
    file, pipe = snapshot / "config.json", snapshot.parent.parent / "blobs" / "pipe"
    os.mkfifo(pipe)  # a plain open would block forever
    for elsewhere in (target / "config.json", "/nowhere", pipe):
        file.unlink()
        file.symlink_to(elsewhere)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            open_hf(snapshot)


# --- what cannot be expressed -------------------------------------------------------------

REFUSED = {
    "llama": [
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("rope_parameters", [1]),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"bits": 4}),
        ("model_type", "mixtral"),
        ("model_type", ["llama"]),
        ("num_key_value_heads", 3),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 10**12),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
        ("hidden_size", 16),
        ("vocab_size", 14),
        ("vocab_size", None),
        ("tie_word_embeddings", True),
        ("intermediate_size", "many"),
    ],
    "gpt2": [
        ("activation_function", "relu"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("attn_pdrop", 0.3),
        ("n_positions", 5),
        ("n_inner", 13),
        ("n_head", 3),
        ("tie_word_embeddings", False),
    ],
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_ours_is_not_is_refused_by_the_settings_name(tmp_path, family):
    shape = {"family": family, "tie_embeddings": family == "gpt2"}
    path, _ = save_model(tmp_path, toy_model(**shape))
    target = to(path, tmp_path / "hf", "huggingface")
    sound = json.loads((target / "config.json").read_text())
    for key, value in REFUSED[family]:
        changed = dict(sound)
        changed[key] = value
        (target / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError) as error:
            open_hf(target)
        assert "config.json" in str(error.value) or "tensor" in str(error.value), (key, value)
        if key in {k for k, v in REFUSED[family] if isinstance(v, bool)} - {"tie_word_embeddings"}:
            assert key in str(error.value)


def test_our_models_that_theirs_are_not_are_refused(tmp_path):
    path, _ = save_model(tmp_path, toy_model(heads=4, kv_heads=2))
    with pytest.raises(CheckpointError, match="one key/value head for each head"):
        convert(Job(path, tmp_path / "hf", "huggingface"))


# --- what is stored twice -----------------------------------------------------------------


def with_arrays(target, **arrays):
    """Add arrays to a directory, or replace them."""
    file = target / "model.safetensors"
    save_file(load_file(file) | {name.replace("__", "."): t for name, t in arrays.items()}, file)
    (target / "megagrow.checksums.json").unlink(missing_ok=True)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_head_beside_tied_embeddings_passes_only_if_it_is_the_token_table(tmp_path, family):
    path, state = save_model(tmp_path, toy_model(family=family))
    target = to(path, tmp_path / "hf", "huggingface")
    token = state.tensors["embedding.token", "master"]
    with_arrays(target, lm_head__weight=token)
    assert_same(contents(target), state.tensors, slots={"master"})
    with_arrays(target, lm_head__weight=token.double())
    assert_same(contents(target), state.tensors, slots={"master"})
    other = token.clone()
    other[-1, -1] += 1e-6
    for wrong in (other, token.bfloat16(), token[:-1].clone()):
        with_arrays(target, lm_head__weight=wrong)
        with pytest.raises(CheckpointError, match="an untied head") as caught:
            open_hf(target)
    assert "set tie_word_embeddings: false" in str(caught.value)
    # The message's advice, followed:
    with_arrays(target, lm_head__weight=other)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert torch.equal(contents(target)["output.weight", "master"], other)


def test_stored_rotary_frequencies_pass_only_if_they_are_those_of_the_config(tmp_path):
    model = toy_model(family="llama", heads=2, hidden=16, rope_theta=500.0)
    path, state = save_model(tmp_path, model)
    target = to(path, tmp_path / "hf", "huggingface")
    half = 500.0 ** -(torch.arange(0, 8, 2) / 8)
    name = "model__layers__0__self_attn__rotary_emb__inv_freq"
    for right in (half, half.bfloat16()):
        with_arrays(target, **{name: right})
        assert_same(contents(target), state.tensors, slots={"master"})
    for wrong in (half / 8, half[:-1].clone()):
        with_arrays(target, **{name: wrong})
        with pytest.raises(CheckpointError, match="not the rotary frequencies"):
            open_hf(target)


# --- settings -----------------------------------------------------------------------------

# Another value than the default for each setting that transformers' configurations have.
CHANGED = {
    "activation_function": "relu", "add_cross_attention": True, "architectures": ["X"],
    "attention_bias": True, "attention_dropout": 0.2, "attn_pdrop": 0.3, "bos_token_id": 3,
    "chunk_size_feed_forward": 2, "dtype": "float16", "embd_pdrop": 0.3, "eos_token_id": 4,
    "head_dim": 6, "hidden_act": "gelu", "hidden_size": 16, "id2label": {"0": "A"},
    "initializer_range": 0.5, "intermediate_size": 20, "is_encoder_decoder": True,
    "label2id": {"A": 0}, "layer_norm_epsilon": 0.1, "max_position_embeddings": 9,
    "mlp_bias": True, "model_type": "opt", "n_embd": 16, "n_head": 4, "n_inner": 20, "n_layer": 3,
    "n_positions": 9, "num_attention_heads": 1, "num_hidden_layers": 3, "num_key_value_heads": 1,
    "output_attentions": True, "output_hidden_states": True, "pad_token_id": 5,
    "pretraining_tp": 2, "problem_type": "regression", "reorder_and_upcast_attn": True,
    "resid_pdrop": 0.3, "return_dict": False, "rms_norm_eps": 0.1,
    "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4},
    "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False,
    "summary_activation": "tanh", "summary_first_dropout": 0.5, "summary_proj_to_labels": False,
    "summary_type": "mean", "summary_use_proj": False, "tie_word_embeddings": True,
    "transformers_version": "1.0", "use_cache": False, "vocab_size": 17, "_name_or_path": "there",
}  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_setting_of_transformers_is_refused_carried_or_listed(tmp_path, family):
    """A new setting in a release of transformers makes this test fail: it needs a decision."""
    model = toy_model(family=family, tie_embeddings=False)
    theirs = their_directory(tmp_path / "hf", model)
    sound = json.loads((tmp_path / "hf/config.json").read_text())
    tokens = torch.randint(model.vocabulary, (3, model.sequence), generator=torch.manual_seed(1))
    fates = {}
    for key in theirs.config.to_dict():
        (tmp_path / "hf/config.json").write_text(json.dumps(sound | {key: CHANGED[key]}))
        try:
            source = open_hf(tmp_path / "hf")
        except CheckpointError:
            fates[key] = "refused"
            continue
        listed = f"config.json: {key}" in {item.name for item in source.left_out}
        fates[key] = "listed" if listed else "carried"
        # Either way the result computes what transformers computes under that setting.
        changed = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "hf", dtype=torch.float32
        )
        ours, _, _ = load_model(tmp_path / "hf")
        changed.config.return_dict = True  # how results are packed
        with torch.no_grad():
            found, wanted = ours.logits(tokens), changed.eval()(tokens).logits
        assert (found - wanted).abs().max() < 1e-4, key
    assert {"refused", "listed", "carried"} == set(fates.values())
    wanted = {"layer_norm_epsilon": "carried", "activation_function": "refused"}
    if family == "llama":
        wanted = {"rms_norm_eps": "carried", "rope_parameters": "refused"}
    assert {key: fates[key] for key in wanted} == wanted and fates["eos_token_id"] == "listed"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rope_scaling": None}, None),
        ({"rope_scaling": {"rope_type": "default"}}, None),
        ({"rope_scaling": {"type": "default", "rope_theta": 10000.0}}, None),
        ({"sliding_window": None, "temperature": 0.6}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope_scaling.factor"),
        ({"rope_theta": 5e5}, "gives the base of the rotary frequencies twice"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"is_causal": False}, "is_causal"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    ],
)
def test_a_setting_that_nobody_here_knows_is_refused_by_its_name(tmp_path, settings, says):
    path, _ = save_model(tmp_path, toy_model(family="llama"))
    target = to(path, tmp_path / "hf", "huggingface")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | settings))
    if says is None:
        open_hf(target)
        return
    with pytest.raises(CheckpointError, match=says):
        open_hf(target)


# --- damage -------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="sharded")
def sharded_directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    path, _ = save_model(root, toy_model(**GQA))
    return to(path, root / "hf", "huggingface", file_bytes=3000)


def test_every_truncation_is_refused(sharded, tmp_path):
    rng = random.Random(5)
    copy = shutil.copytree(sharded, tmp_path / "copy")
    tried = 0
    for file in sorted(copy.iterdir()):
        if file.name == "README.md":  # the user's to edit
            continue
        sound = file.read_bytes()
        for length in [0, 1, 7, 8, len(sound) - 3, *(rng.randrange(len(sound)) for _ in range(15))]:
            file.write_bytes(sound[:length])
            with pytest.raises(CheckpointError, match=file.name):
                open_hf(copy)
            tried += 1
        file.write_bytes(sound)
    assert tried >= 100
    open_hf(copy)


def test_flips_in_headers_are_refused_or_change_nothing(sharded, tmp_path):
    """The format has no checksums: a flip may at most rename something that is never read."""
    rng = random.Random(6)
    copy = shutil.copytree(sharded, tmp_path / "copy")
    wanted = contents(copy)
    refused = 0
    for file in sorted(copy.glob("model*")):
        sound = file.read_bytes()
        head = 8 + int.from_bytes(sound[:8], "little") if file.suffix == ".safetensors" else None
        for _ in range(60):
            data = bytearray(sound)
            data[rng.randrange(head or len(sound))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
            try:
                found = contents(copy)
            except CheckpointError:
                refused += 1
            else:
                assert_same(found, wanted)
        file.write_bytes(sound)
    assert refused >= 200


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


HEADERS = [
    b"\xff" * 8,
    (100).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"[]",
    (2).to_bytes(8, "little") + b"{]",
    *(
        len(text).to_bytes(8, "little") + text + b"\0" * 8
        for text in (
            *(
                json.dumps({"a": changed}).encode()
                for changed in (
                    entry(dtype="F8_E4M3"), entry(dtype=["F32"]), entry(shape=[3]),
                    entry(shape=[-2]), entry(shape=[2.0]), entry(shape=[True, 2]),
                    entry(data_offsets=[0, 8, 9]), entry(data_offsets=[8, 16]),
                    entry(data_offsets=[-8, 0]), entry(data_offsets=[8, 0]), entry(extra=1), 7, [],
                    entry(shape=[2**40, 2**40]), entry(shape=[1] * 40 + [2]),
                )
            ),
            json.dumps({"a": entry(), "b": entry()}).encode(),
            b'{"a": 1, "a": 2}',
            b'{"a": ' + b"9" * 5000 + b"}",
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"\xff\xfe{}",
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("data", HEADERS, ids=range(len(HEADERS)))
def test_hostile_headers_are_refused(tmp_path, data):
    path, _ = save_model(tmp_path / "run")
    target = to(path, tmp_path / "hf", "huggingface")
    (target / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_hf(target)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", "", "\0", 7]
)
def test_an_index_that_leads_elsewhere_is_refused(sharded, tmp_path, file):
    copy = shutil.copytree(sharded, tmp_path / "copy")
    (tmp_path / "secret.safetensors").write_bytes(next(copy.glob("*.safetensors")).read_bytes())
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="outside this directory"):
        open_hf(copy)


def test_a_missing_or_foreign_shard_is_refused_by_name(sharded, tmp_path):
    for name in sorted(file.name for file in sharded.glob("*.safetensors")):
        copy = shutil.copytree(sharded, tmp_path / name)
        (copy / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            open_hf(copy)
        other = next(f for f in sorted(sharded.glob("*.safetensors")) if f.name != name)
        shutil.copy(other, copy / name)
        with pytest.raises(CheckpointError, match="index and file disagree"):
            open_hf(copy)


def test_pickled_weights_are_not_read(tmp_path):
    path, _ = save_model(tmp_path / "run")
    target = to(path, tmp_path / "hf", "huggingface")
    (target / "model.safetensors").rename(target / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="which writes safetensors"):
        opened(target)
