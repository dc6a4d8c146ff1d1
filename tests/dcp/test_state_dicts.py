"""DCP's `state_dict` helpers with each of their options, through a checkpoint and back."""

import pytest
import ranks
import state_dicts
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

import ckpt_cloud


@pytest.mark.parametrize(
    ("layout", "values"),
    [
        ("fsdp2", {}),
        ("fsdp2", {"full_state_dict": True}),
        ("fsdp2", {"cpu_offload": True}),
        ("fsdp2", {"strict": False}),
        ("ddp", {"flatten_optimizer_state_dict": True}),
        ("fsdp1", {"cpu_offload": True}),
    ],
    ids=str,
)
def test_option(tmp_path, layout, values):
    url = f"file://{tmp_path}/run/step-1"
    assert ranks.run(2, state_dicts.round_trip, tmp_path, url, layout, values) == [(True, True)] * 2


def test_model_and_optimizer_one_at_a_time(tmp_path):
    assert ranks.run(2, state_dicts.one_at_a_time, tmp_path, f"file://{tmp_path}/run/step-1", "fsdp2") == [True] * 2


def test_full_state_on_rank_0_and_broadcast_from_it(tmp_path):
    assert ranks.run(2, state_dicts.by_rank_0, tmp_path, f"file://{tmp_path}/run/step-1") == [(True, True)] * 2


def test_a_flat_optimizer_state_into_another_layout(tmp_path):
    assert ranks.run(4, state_dicts.across, tmp_path, f"file://{tmp_path}/run/step-1") == [(True, True)] * 4


def test_frozen_parameters_are_left_out(tmp_path):
    assert ranks.run(2, state_dicts.frozen, tmp_path, f"file://{tmp_path}/run/step-1") == [(True,) * 4] * 2


def network(value):
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(3, 3), "head": torch.nn.Linear(3, 2)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


@pytest.mark.filterwarnings("ignore:Getting submodules only:FutureWarning")
@pytest.mark.parametrize("keep", [True, False])
def test_submodule_prefixes(file_url, keep):
    """A submodule's state, with and without the way to it; `rename` adds what was left out."""
    model = network(1.0)
    options = StateDictOptions(keep_submodule_prefixes=keep)
    state = get_model_state_dict(model, submodules={model["head"]}, options=options)
    assert set(state) == {f"{'head.' if keep else ''}{name}" for name in ("weight", "bias")}
    ckpt_cloud.save(state, checkpoint_id=file_url)
    other = network(2.0)
    ckpt_cloud.load(other.state_dict(), checkpoint_id=file_url, keys="head", rename=None if keep else {"head": ""})
    assert other["head"].weight.eq(1).all()
    assert other["body"].weight.eq(2).all()


class Transparent(torch.nn.Module):
    """Its state has the names of the module inside, as those of torch's wrappers that use `_fqn_modifiers`."""

    def __init__(self, value):
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(self.inner.weight, value)
        torch.nn.init.constant_(self.inner.bias, value)
        self._register_state_dict_hook(self._without)
        self.register_load_state_dict_pre_hook(self._within)

    def _fqn_modifiers(self):
        return {"weight": "inner", "bias": "inner"}

    def _without(self, module, state, prefix, *args):
        for name in [name for name in state if name.startswith(f"{prefix}inner.")]:
            state[name.replace("inner.", "", 1)] = state.pop(name)

    def _within(self, module, state, prefix, *args):
        for name in [name for name in state if name.startswith(prefix)]:
            state[f"{prefix}inner.{name.removeprefix(prefix)}"] = state.pop(name)


def test_fqn_modifiers(file_url):
    options = StateDictOptions(dsd_fqn_modifiers="_fqn_modifiers")
    state = get_model_state_dict(Transparent(1.0), options=options)
    assert set(state) == {"weight", "bias"}
    ckpt_cloud.save(state, checkpoint_id=file_url)
    other = Transparent(2.0)
    state = get_model_state_dict(other, options=options)
    ckpt_cloud.load(state, checkpoint_id=file_url, strict=True)
    set_model_state_dict(other, state, options=options)
    assert other.inner.weight.eq(1).all()


class WithExtra(torch.nn.Linear):
    """Has state that is not a tensor."""

    def __init__(self, extra):
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self):
        return {"version": self.extra}

    def set_extra_state(self, state):
        self.extra = state["version"]


def test_extra_state(file_url):
    ckpt_cloud.save({"model": get_model_state_dict(WithExtra(5))}, checkpoint_id=file_url)
    other = WithExtra(0)
    state = {"model": get_model_state_dict(other)}
    ckpt_cloud.load(state, checkpoint_id=file_url, strict=True)
    set_model_state_dict(other, state["model"])
    assert other.extra == 5
