"""Fused matrices under a mapping: the import computes what the user's own module did."""

import math

import pytest
import torch
import yaml
from torch.nn import functional as F

from megagrow.checkpoint.convert.load_model import load_model
from megagrow.checkpoint.convert.run import Job, convert
from megagrow.checkpoint.formats.deepspeed.saved_optimizer import assign
from megagrow.errors import CheckpointError
from megagrow.state.boxes import whole
from megagrow.state.layout import Layout
from tests.checkpoint.states import opened

HEADS, KV, DIM, HIDDEN, FFN, VOCAB, LENGTH = 4, 2, 4, 16, 12, 13, 6


class UsersBlock(torch.nn.Module):
    """Pre-norm attention with one fused linear layer in ordinary order, and an MLP."""

    def __init__(self, llama, qkv, mlp):
        super().__init__()
        self.llama, self.qkv_order, self.mlp_order = llama, qkv, mlp
        norm = torch.nn.RMSNorm if llama else torch.nn.LayerNorm
        self.kv = KV if llama else HEADS
        sizes = {"q": HEADS * DIM, "k": self.kv * DIM, "v": self.kv * DIM}
        self.norm1, self.norm2 = norm(HIDDEN, eps=1e-5), norm(HIDDEN, eps=1e-5)
        if qkv == "parts":
            for name, size in sizes.items():
                setattr(self, name, torch.nn.Linear(HIDDEN, size, bias=not llama))
        else:
            self.fused = torch.nn.Linear(HIDDEN, sum(sizes.values()), bias=not llama)
        self.out = torch.nn.Linear(HEADS * DIM, HIDDEN, bias=not llama)
        if mlp == "parts":
            self.gate = torch.nn.Linear(HIDDEN, FFN, bias=False)
            self.up = torch.nn.Linear(HIDDEN, FFN, bias=False)
        else:
            self.wide = torch.nn.Linear(HIDDEN, FFN * (2 if llama else 1), bias=not llama)
        self.down = torch.nn.Linear(FFN, HIDDEN, bias=not llama)

    def attention(self, x):
        length = x.shape[1]
        if self.qkv_order == "parts":
            q, k, v = self.q(x), self.k(x), self.v(x)
        elif self.qkv_order == "qkv":
            q, k, v = self.fused(x).split([HEADS * DIM, self.kv * DIM, self.kv * DIM], -1)
        else:  # head by head
            each = self.fused(x).view(*x.shape[:2], self.kv, HEADS // self.kv + 2, DIM)
            q, k, v = each[:, :, :, :-2], each[:, :, :, -2], each[:, :, :, -1]
        q = q.reshape(*x.shape[:2], HEADS, DIM).transpose(1, 2)
        k, v = (t.reshape(*x.shape[:2], self.kv, DIM).transpose(1, 2) for t in (k, v))
        if self.llama:
            angle = torch.outer(torch.arange(length), 1e4 ** (-torch.arange(0, DIM, 2) / DIM))
            angle = torch.cat([angle, angle], -1)
            q, k = (t * angle.cos() + turned(t) * angle.sin() for t in (q, k))
        k, v = (t.repeat_interleave(HEADS // self.kv, 1) for t in (k, v))
        scores = (q @ k.transpose(2, 3) / math.sqrt(DIM)).masked_fill(
            torch.ones(length, length).triu(1).bool(), -math.inf
        )
        mixed = (scores.softmax(-1) @ v).transpose(1, 2)
        return self.out(mixed.reshape(*x.shape[:2], HEADS * DIM))

    def mlp(self, x):
        if not self.llama:
            return self.down(F.gelu(self.wide(x), approximate="tanh"))
        if self.mlp_order == "parts":
            gate, up = self.gate(x), self.up(x)
        else:
            gate, up = self.wide(x).chunk(2, -1)
            if self.mlp_order == "up_gate":
                gate, up = up, gate
        return self.down(F.silu(gate) * up)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def turned(x):
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class UsersTransformer(torch.nn.Module):
    def __init__(self, llama, qkv, mlp):
        super().__init__()
        self.wte = torch.nn.Embedding(VOCAB, HIDDEN)
        if not llama:
            self.wpe = torch.nn.Embedding(LENGTH, HIDDEN)
        self.blocks = torch.nn.ModuleList(UsersBlock(llama, qkv, mlp) for _ in range(2))
        norm = torch.nn.RMSNorm if llama else torch.nn.LayerNorm
        self.norm = norm(HIDDEN, eps=1e-5)

    def forward(self, tokens):
        x = self.wte(tokens)
        if hasattr(self, "wpe"):
            x = x + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.wte.weight.T


def rules(llama, qkv, mlp):
    """A mapping file's rules for such a module."""
    layer, wb = "layers.{1}", r"(weight|bias)"
    made = [
        {"match": r"wte\.weight", "name": "embedding.token"},
        {"match": rf"norm\.{wb}", "name": "final_norm.{1}"},
        {"match": rf"blocks\.(\d+)\.norm1\.{wb}", "name": f"{layer}.attention.norm.{{2}}"},
        {"match": rf"blocks\.(\d+)\.norm2\.{wb}", "name": f"{layer}.mlp.norm.{{2}}"},
        {"match": rf"blocks\.(\d+)\.out\.{wb}", "name": f"{layer}.attention.out.{{2}}"},
        {"match": rf"blocks\.(\d+)\.down\.{wb}", "name": f"{layer}.mlp.down.{{2}}"},
    ]
    if not llama:
        made.append({"match": r"wpe\.weight", "name": "embedding.position"})
    for parts, fused, name, order in (
        ("qkv", "fused", "attention.qkv", qkv), (("gate", "up"), "wide", "mlp.up", mlp)
    ):  # fmt: skip
        if order == "parts":
            made += [{"match": rf"blocks\.(\d+)\.{p}\.{wb}", "name": f"{layer}.{name}.{{2}}",
                      "part": p} for p in parts]  # fmt: skip
        else:
            rule = {"match": rf"blocks\.(\d+)\.{fused}\.{wb}", "name": f"{layer}.{name}.{{2}}"}
            made.append(rule | ({"order": order} if order else {}))
    return made


def save(root, module, *, tensor):
    """ZeRO 1 with two data ranks; under tensor parallelism each part of a fused matrix is split."""
    tag = root / "global_step3"
    tag.mkdir(parents=True)
    for rank in range(tensor):
        mine = {
            n: shared(n, p.detach(), module, rank, tensor) for n, p in module.named_parameters()
        }
        flat = torch.cat([v.reshape(-1) for v in mine.values()])
        flat = torch.cat([flat, torch.zeros(-len(flat) % 4)])
        head = {
            "module": mine, "param_shapes": [{n: v.shape for n, v in mine.items()}],
            "buffer_names": [], "global_steps": 3, "dp_world_size": 2, "mp_world_size": tensor,
        }  # fmt: skip
        torch.save(head, tag / f"mp_rank_{rank:02d}_model_states.pt")
        for data, part in enumerate(flat.chunk(2)):
            state = {0: {"step": torch.tensor(3.0), "exp_avg": part * 2, "exp_avg_sq": part**2}}
            saved = {
                "zero_stage": 1, "single_partition_of_fp32_groups": [part.clone()],
                "base_optimizer_state": {"state": state, "param_groups": [{"params": [0]}]},
            }  # fmt: skip
            name = f"zero_pp_rank_{data}_mp_rank_{rank:02d}_optim_states.pt"
            torch.save({"optimizer_state_dict": saved}, tag / name)


def shared(name, values, module, rank, tensor):
    kind = name.split(".")[-2]
    kv = module.blocks[0].kv
    if kind == "wte":
        rows = -(-VOCAB // tensor)
        padded = torch.cat([values, torch.zeros(rows * tensor - VOCAB, HIDDEN)])
        return padded[rows * rank : rows * (rank + 1)].clone()
    if kind == "fused" and module.blocks[0].qkv_order == "qkv":
        blocks = values.split([HEADS * DIM, kv * DIM, kv * DIM])
        return torch.cat([block.chunk(tensor)[rank] for block in blocks])
    if kind == "wide" and module.blocks[0].llama:
        return torch.cat([block.chunk(tensor)[rank] for block in values.chunk(2)])
    if kind in ("fused", "wide", "q", "k", "v", "gate", "up"):
        return values.chunk(tensor)[rank].clone()
    if kind in ("out", "down") and name.endswith("weight"):
        return values.chunk(tensor, 1)[rank].clone()
    return values


def imported(root, llama, qkv, mlp, *, tensor, stated):
    """(the user's module, the path of its checkpoint with a mapping file)."""
    torch.manual_seed(5)
    module = UsersTransformer(llama, qkv, mlp)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    save(root, module, tensor=tensor)
    model = {"family": "llama" if llama else "gpt2", "layers": 2, "hidden": HIDDEN, "heads": HEADS,
             "head_dim": DIM, "ffn": FFN, "sequence": LENGTH, "vocab": VOCAB}  # fmt: skip
    model |= {"kv_heads": KV} if llama else {}
    mapping = {"model": model, "tensors": stated}
    (root / "megagrow.mapping.yaml").write_text(yaml.safe_dump(mapping))
    return module, root / "global_step3"


CASES = [
    (False, "qkv", None), (False, "grouped", None), (False, "parts", None),
    (True, "qkv", "gate_up"), (True, "grouped", "up_gate"), (True, "parts", "parts"),
]  # fmt: skip


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(("llama", "qkv", "mlp"), CASES)
def test_an_imported_model_gives_the_logits_of_the_users_module(tmp_path, llama, qkv, mlp, tensor):
    stated = rules(llama, qkv, mlp)
    module, path = imported(tmp_path, llama, qkv, mlp, tensor=tensor, stated=stated)
    tokens = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    model, _, _ = load_model(path)
    with torch.no_grad():
        expected, found = module(tokens), model.logits(tokens)
    assert float(expected.abs().max()) > 1.0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    source = opened(path)  # moments go with their parameters
    first = source.catalog["layers.0.attention.qkv.weight"]
    read = {slot: source.read(first.name, slot, whole(first.shape)) for slot in
            ("master", "exp_avg", "exp_avg_sq")}  # fmt: skip
    assert torch.equal(read["exp_avg"], read["master"] * 2)
    assert torch.equal(read["exp_avg_sq"], read["master"] ** 2)


@pytest.mark.parametrize(
    ("llama", "change", "says"),
    [
        (False, {"order": None}, r"blocks\.0\.fused\.weight.*order is not specified.*`order: qkv`"),
        (True, {"order": None}, r"order is not specified"),
        (False, {"order": "gate_up"}, "names gate_up"),
        (False, {"order": None, "part": "q"}, r"shape.*part q"),
        (False, {"part": "q"}, "order .of the whole. or part, not both"),
        (False, {"order": "vqk"}, "order"),
    ],
)
def test_a_fused_matrix_whose_order_nothing_tells_is_refused(tmp_path, llama, change, says):
    stated = rules(llama, "qkv", "gate_up" if llama else None)
    fused = next(rule for rule in stated if "fused" in rule["match"])
    fused |= change
    for key in [key for key, value in fused.items() if value is None]:
        del fused[key]
    _, path = imported(tmp_path, llama, "qkv", "gate_up", tensor=1, stated=stated)
    with pytest.raises(CheckpointError, match=f"(?s){says}"):
        opened(path)


def test_gate_and_up_and_other_matrices_must_be_given_and_fit(tmp_path):
    stated = rules(True, "qkv", None)
    _, path = imported(tmp_path / "a", True, "qkv", "gate_up", tensor=1, stated=stated)
    with pytest.raises(CheckpointError, match=r"(?s)wide\.weight.*not specified.*`order: gate_up`"):
        opened(path)
    stated = rules(False, "qkv", None)
    next(r for r in stated if ".down" in r["match"])["order"] = "qkv"
    _, path = imported(tmp_path / "b", False, "qkv", None, tensor=1, stated=stated)
    with pytest.raises(CheckpointError, match="has no qkv"):
        opened(path)


def test_a_mapped_model_is_converted_to_other_layouts(tmp_path):
    stated = rules(True, "qkv", "up_gate")
    module, path = imported(tmp_path, True, "qkv", "up_gate", tensor=2, stated=stated)
    made = tmp_path / "made"
    convert(Job(path, made, "deepspeed", layout=Layout(tensor=2, zero=1)), verify=True)
    tokens = torch.randint(VOCAB, (2, LENGTH))
    with torch.no_grad():
        found = load_model(made)[0].logits(tokens)
    torch.testing.assert_close(found, module(tokens).detach(), rtol=1e-4, atol=1e-4)


# --- which parameter is which -------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "groups", "found"),
    [
        ("a33 b3 c33 d3", "33 33, 3 3", "a c, b d"),
        ("a33 b3 c33 d3", "33, 3 3", None),  # one of two is frozen: ambiguous
        ("a33 b3 c34 d3", "34, 3 3", "c, b d"),
        ("a33 b33", "33, 33", None),
        ("a33 b33", "33 33", "a b"),
        ("a33 b3", "??", None),
        ("a33 b3", "? ?", "a b"),
        ("a33 b3", "33 3 3", None),
    ],
)
def test_shapes_tell_which_parameter_is_which_or_nothing_does(parameters, groups, found):
    shapes = {name[0]: tuple(map(int, name[1:])) for name in parameters.split()}
    stated = [
        [None if one == "?" else tuple(map(int, one)) for one in group.split()]
        for group in groups.replace("??", "?").split(",")
    ]
    answer = None if found is None else [group.split() for group in found.split(",")]
    assert assign(shapes, stated) == answer
