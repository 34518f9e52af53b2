"""Everything in DeepSpeed's files is carried or listed as left out, and results are complete."""

import itertools
import json

import pytest
import torch

from megagrow.checkpoint.convert.run import Job, convert
from megagrow.errors import ConfigError
from megagrow.state.boxes import whole
from megagrow.state.catalog import slots_of
from megagrow.state.layout import Layout
from tests.checkpoint.states import opened

TRAINED = {"wte.weight": (5, 3), "h.weight": (3, 3), "h.bias": (3,)}


def users_files():
    """ZeRO 1 of one rank: two groups, a tied table, a frozen matrix in bf16, two buffers."""
    generator = torch.Generator().manual_seed(2)
    values = {n: torch.randn(shape, generator=generator) for n, shape in TRAINED.items()}
    groups = [["wte.weight", "h.weight"], ["h.bias"]]
    flat = [torch.cat([values[n].reshape(-1) for n in names]) for names in groups]
    state = {
        i: {"step": torch.tensor(3.0), "exp_avg": part * 2, "exp_avg_sq": part**2}
        for i, part in enumerate(flat)
    }
    options = [{"lr": 0.1 * (i + 1), "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1 * i,
                "params": [i]} for i in range(2)]  # fmt: skip
    module = dict(values)
    module["head.weight"] = module["wte.weight"]
    module["frozen.weight"] = torch.randn(3, 2, generator=generator).bfloat16()
    module["steps"], module["scale"] = torch.tensor(9), torch.arange(3.0)
    head = {
        "module": module, "param_shapes": [{n: values[n].shape for n in names} for names in groups],
        "buffer_names": ["steps", "scale"], "shared_params": {"head.weight": "wte.weight"},
        "global_steps": 3, "dp_world_size": 1, "mp_world_size": 1, "skipped_steps": 1,
        "lr_scheduler": {"last_epoch": 3}, "ds_config": {}, "ds_version": "0.19.8",
    }  # fmt: skip
    optim = {
        "zero_stage": 1, "single_partition_of_fp32_groups": flat, "clip_grad": 0.7,
        "base_optimizer_state": {"state": state, "param_groups": options},
    }  # fmt: skip
    return head, optim


def write(root, head, optim):
    tag = root / "global_step3"
    tag.mkdir(parents=True)
    torch.save(head, tag / "mp_rank_00_model_states.pt")
    name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": optim}, tag / name)
    return tag


def everything(source):
    return {
        (t.name, s.name): source.read(t.name, s.name, whole(t.shape))
        for t in source.catalog for s in slots_of(t, source.slots)
    }  # fmt: skip


ROUTES = [
    *(("deepspeed", Layout(data=data, zero=zero)) for data, zero in
      itertools.product((1, 2, 3), (0, 1, 2, 3))),
    ("universal", None), ("dcp", Layout(data=2, zero=1)), ("native", Layout(data=3, zero=3)),
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "layout"), ROUTES)
def test_every_result_has_all_of_a_users_model(fmt, layout, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    source = opened(path := write(tmp_path, *users_files()))
    assert not source.left_out
    job = Job(path, tmp_path / "out", fmt, layout=layout)
    convert(job, workers=1, verify=True)
    back = opened(job.target)
    assert not back.left_out
    # ZeRO 0 lists parameters in the module's order, which is not the order of the groups.
    of = {tensor.name: tensor for tensor in back.catalog}
    assert {t.name: (t.training, t.aliases, t.shape) for t in source.catalog} == {
        n: (t.training, t.aliases, t.shape) for n, t in of.items()
    }
    wanted, found = everything(source), everything(back)
    assert set(wanted) == set(found)
    for pair, values in wanted.items():
        assert found[pair].dtype == values.dtype and torch.equal(found[pair], values), pair
    engine, same = source.run_state["deepspeed"], back.run_state["deepspeed"]
    assert same["groups"] == engine["groups"]
    assert same["head"]["lr_scheduler"] == {"last_epoch": 3} and same["head"]["skipped_steps"] == 1
    assert [(tuple(g["tensors"]), g["options"]["lr"]) for g in same["groups"]] == [
        (("wte.weight", "h.weight"), 0.1), (("h.bias",), 0.2)
    ]  # fmt: skip
    state = {t.name: t.training for t in source.catalog}
    assert state["frozen.weight"] == "frozen" and state["steps"] == state["scale"] == "buffer"


def test_torch_loads_every_name_of_a_dcp_result(tmp_path):
    """There a tied parameter is stored under all its names."""
    from torch.distributed import checkpoint as dcp

    path = write(tmp_path, *users_files())
    convert(Job(path, tmp_path / "out", "dcp"), workers=1)
    module = users_files()[0]["module"]
    loaded = {name: torch.zeros_like(values) for name, values in module.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "out", no_dist=True)
    for name, values in module.items():
        assert torch.equal(loaded[name], values), name


# --- what is added to the files is carried or named ---------------------------------------


def in_module(head, optim):
    head["module"]["extra.table"] = torch.ones(2)


def in_buffers(head, optim):
    head["module"]["extra.table"] = torch.ones(2, dtype=torch.int32)
    head["buffer_names"].append("extra.table")


def in_aliases(head, optim):
    head["module"]["extra.table"] = head["module"]["h.weight"]


def without_elements(head, optim):
    head["module"]["extra.table"] = torch.ones(0, 3)


def in_states(head, optim):
    for state in optim["base_optimizer_state"]["state"].values():
        state["extra"] = state["exp_avg"] * 3


def in_one_state(head, optim):
    state = optim["base_optimizer_state"]["state"]
    state[0]["max_exp_avg_sq"] = state[0]["exp_avg"]


def as_known_slot(head, optim):
    for state in optim["base_optimizer_state"]["state"].values():
        state["square_avg"] = state["exp_avg"] * 3


def as_number(head, optim):
    for state in optim["base_optimizer_state"]["state"].values():
        state["extra"] = 4


def as_option(head, optim):
    optim["base_optimizer_state"]["param_groups"][0]["extra"] = "yes"


def as_tensor_option(head, optim):
    optim["base_optimizer_state"]["param_groups"][0]["extra"] = torch.ones(3)


def beside_the_optimizer(head, optim):
    optim["extra"] = {"a": 1}


def of_the_client(head, optim):
    head["extra"] = {"epoch": 3, "names": ["a"]}


def tensor_of_the_client(head, optim):
    head["extra"] = {"epoch": torch.ones(3)}


def numbered_by_the_client(head, optim):
    head["extra"] = {1: "JSON would make this key a text"}


def dealt_out(head, optim):
    head["ds_config"]["zero_optimization"] = {"round_robin_gradients": True}


ADDITIONS = {
    in_module: "extra.table", in_buffers: "extra.table", in_aliases: "extra.table",
    without_elements: "extra.table", in_states: "extra", in_one_state: "max_exp_avg_sq",
    as_known_slot: "square_avg", as_number: "extra", as_option: "extra",
    as_tensor_option: "extra", beside_the_optimizer: "extra", of_the_client: "extra",
    tensor_of_the_client: "extra", numbered_by_the_client: "extra",
    dealt_out: "round_robin_gradients",
}  # fmt: skip


def assert_named(source, name):
    carried = {n for t in source.catalog for n in (t.name, *t.aliases)}
    carried |= {slot.name for slot in source.slots}
    engine = json.dumps(source.run_state.get("deepspeed"))
    out = [one.name for one in source.left_out if name in one.name]
    assert name in carried or f'"{name}"' in engine or out
    assert all(one.reason for one in source.left_out)


@pytest.mark.parametrize("add", ADDITIONS, ids=lambda add: add.__name__)
def test_what_is_added_to_deepspeeds_files_is_carried_or_named(add, tmp_path):
    head, optim = users_files()
    add(head, optim)
    assert_named(opened(write(tmp_path, head, optim)), ADDITIONS[add])


def test_a_file_of_another_kind_is_named(tmp_path):
    tag = write(tmp_path, *users_files())
    torch.save({}, tag / "layer_0_expert_3_mp_rank_00_model_states.pt")
    [out] = opened(tag).left_out
    assert out.name == "layer_0_expert_3_mp_rank_00_model_states.pt"


def changed(path, change):
    value = torch.load(path, weights_only=False)
    change(value)
    torch.save(value, path)


@pytest.mark.parametrize(
    ("file", "change", "name"),
    [
        ("zero/h.bias/extra.pt", None, "extra"),
        ("zero/extra.pt", None, "extra"),
        ("zero/h.bias/momentum_buffer.pt", None, "momentum_buffer"),
        ("zero/h.bias/fp32.pt", lambda v: v.update(extra=1), "extra"),
        ("zero/optimizer_state.pt", lambda v: v.update(extra=1), "extra"),
        ("mp_rank_00_model_states.pt", lambda v: v.update(extra=torch.ones(2)), "extra"),
        ("mp_rank_00_model_states.pt", lambda v: v["module"].update(extra=torch.ones(2)), "extra"),
        ("mp_rank_00_model_states.pt", lambda v: v["module"].update(extra="text"), "extra"),
    ],
)
def test_what_is_added_to_a_universal_checkpoint_is_carried_or_named(file, change, name, tmp_path):
    path = write(tmp_path, *users_files())
    convert(Job(path, tmp_path / "out", "universal"), workers=1)
    tag = tmp_path / "out" / "global_step3_universal"
    (tag / "megagrow.checksums.json").unlink()
    if change is None:
        torch.save(torch.ones(3), tag / file)
    else:
        changed(tag / file, change)
    assert_named(opened(tag), name)


def test_tensors_at_different_steps_are_not_laid_into_one(tmp_path):
    """ZeRO 0 counts steps per parameter, the other stages per group."""
    head, optim = users_files()
    path = write(tmp_path / "a", head, optim)
    convert(Job(path, tmp_path / "zero0", "deepspeed", layout=Layout()), workers=1)
    file = tmp_path / "zero0" / "global_step3" / "mp_rank_00_model_states.pt"
    (file.parent / "megagrow.checksums.json").unlink()

    def late(value):
        value["optimizer"]["state"][1]["step"] = torch.tensor(2.0)

    changed(file, late)
    convert(Job(file.parent, tmp_path / "same", "deepspeed"), workers=1)
    back = torch.load(tmp_path / "same/global_step3/mp_rank_00_model_states.pt", weights_only=False)
    assert [float(s["step"]) for s in back["optimizer"]["state"].values()] == [3.0, 2.0, 3.0]
    with pytest.raises(ConfigError, match=r"(?s)not at one step.*h\.weight.*--zero 0"):
        convert(Job(file.parent, tmp_path / "flat", "deepspeed", layout=Layout(zero=1)))
