"""What other programs read of an export: Megatron-Bridge, vLLM and llama.cpp's converter.

None of them runs here (docs/exports.md). These tests check what they ask of the files.
"""

import json

import pytest
import safetensors

from megagrow.checkpoint.convert.run import Job, convert
from megagrow.checkpoint.interface.own_tokenizer import NO_TOKENIZER
from megagrow.models.registry import FAMILIES
from tests.checkpoint.states import save_model
from tests.data.small_tokenizers import TEXT, lossless
from tests.toys import featured_models, toy_model

transformers = pytest.importorskip("transformers")

FEATURED = featured_models(vocab=320)
MODELS = {
    family: FEATURED.get(family) or toy_model(family=family, vocab=320)
    for family in FAMILIES
    if FAMILIES[family].huggingface is not None
}
# transformers has 1 / attention_scale squared as an integer.
MODELS["gemma2"] = MODELS["gemma2"].model_copy(update={"attention_scale": 0.5})
# Of these AutoTokenizer takes its own class, whatever tokenizer_config.json says.
THEIR_OWN = {"qwen2"}
# llama.cpp's names of architectures, where they are not those of transformers.
GGUF = {"mistral": "llama", "gpt_neox": "gptneox"}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """By family: an export in several files, with a tokenizer."""
    home = tmp_path_factory.mktemp("exports")
    tokenizer = lossless(home / "tokenizer.model", size=300, texts=[TEXT] * 20)
    made = {}
    for family, model in MODELS.items():
        source, _ = save_model(home / family, model, fingerprints={"data": "d"})
        out = home / f"{family}-out"
        given = NO_TOKENIZER if family in THEIR_OWN else tokenizer
        convert(Job(source, out, "huggingface", tokenizer=given, file_bytes=6000))
        made[family] = out
    return made


@pytest.mark.parametrize("family", MODELS)
def test_what_megatron_bridge_asks_for(exports, family):
    """AutoBridge goes by `architectures`, and reads tensors by the index, from safetensors."""
    out = exports[family]
    config = transformers.AutoConfig.from_pretrained(out, local_files_only=True)
    [architecture] = config.architectures
    assert architecture.endswith("ForCausalLM") or architecture == "GPT2LMHeadModel"
    assert type(config) is getattr(transformers, architecture).config_class
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 1 and set(index["weight_map"].values()) == set(files)
    held, size = {}, 0
    for name in files:
        with safetensors.safe_open(out / name, framework="pt") as file:
            for key in list(file.keys()):
                held[key] = name
                tensor = file.get_tensor(key)
                size += tensor.numel() * tensor.element_size()
    assert held == index["weight_map"] and size == index["metadata"]["total_size"]
    assert not [path for path in out.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    model = transformers.AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if MODELS[family].tie_embeddings \
        else set()  # fmt: skip
    # Pythia's files keep the older name, which transformers changes when it loads.
    renamed = {"embed_out.weight": "lm_head.weight"}
    assert {renamed.get(name, name) for name in held} == set(model.state_dict()) - tied
    assert (out / "README.md").is_file()
    if family in THEIR_OWN:
        return
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).is_file(), name
    assert transformers.AutoTokenizer.from_pretrained(out, local_files_only=True).eos_token
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id is not None


@pytest.mark.parametrize("family", MODELS)
def test_ggufs_names_cover_every_tensor(exports, family):
    """The table of names that convert_hf_to_gguf.py uses; the converter itself is in no package."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    kind = json.loads((exports[family] / "config.json").read_text())["model_type"]
    wanted = GGUF.get(kind, kind)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    table = gguf.get_tensor_name_map(arch, MODELS[family].layers)
    index = json.loads((exports[family] / "model.safetensors.index.json").read_text())
    for name in index["weight_map"]:
        assert table.get_name(name, try_suffixes=(".weight", ".bias")), name
