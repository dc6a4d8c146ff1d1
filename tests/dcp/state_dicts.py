"""`StateDictOptions` on ranks; what ranks do in test_state_dicts.py."""

import torch
import torch.distributed as dist
from cases import same
from layouts import trained, whole
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import ckpt_cloud


def round_trip(url, layout, values):
    """Saves what the options give, loads what they give for another model, and sets it with them."""
    options = StateDictOptions(**values)
    model, optimizer = trained(layout, seed=1, steps=2)
    saved = whole(model, optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    ckpt_cloud.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=url)

    other, others = trained(layout, seed=2, steps=1)
    model_state, optimizer_state = get_state_dict(other, others, options=options)
    state = {"model": model_state, "optimizer": optimizer_state}
    result = ckpt_cloud.load(state, checkpoint_id=url, strict=True)
    set_state_dict(other, others, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options)
    return same(whole(other, others), saved), result == ckpt_cloud.LoadResult()


def one_at_a_time(url, layout):
    """Model and optimizer by the functions of their own."""
    model, optimizer = trained(layout, seed=1, steps=2)
    saved = whole(model, optimizer)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    ckpt_cloud.save(state, checkpoint_id=url)
    other, others = trained(layout, seed=2, steps=1)
    state = {"model": get_model_state_dict(other)}
    ckpt_cloud.load(state, checkpoint_id=url)
    set_model_state_dict(other, state["model"])
    state = {"optimizer": get_optimizer_state_dict(other, others)}
    ckpt_cloud.load(state, checkpoint_id=url)
    set_optimizer_state_dict(other, others, state["optimizer"])
    return same(whole(other, others), saved)


def by_rank_0(url):
    """Rank 0 alone has the full state, saves it, loads it, and broadcasts it to all."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = trained("fsdp2", seed=1, steps=2)
    saved = whole(model, optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    first = dist.get_rank() == 0
    alone = bool(model_state) == first
    if first:
        ckpt_cloud.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=url, no_dist=True)
    dist.barrier()

    other, others = trained("fsdp2", seed=2, steps=1)
    model_state, optimizer_state = get_state_dict(other, others, options=options)
    if first:
        state = {"model": model_state, "optimizer": optimizer_state}
        ckpt_cloud.load(state, checkpoint_id=url, no_dist=True, strict=True)
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    # Not `set_state_dict`: torch takes a rank without a model state for one that wants the optimizer alone, and hangs.
    set_model_state_dict(other, model_state, options=broadcast)
    set_optimizer_state_dict(other, others, optimizer_state, options=broadcast)
    return alone, same(whole(other, others), saved)


def across(url):
    """A flattened optimizer state from one layout into another."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = trained("2-D", seed=1, steps=2)
    saved = whole(model, optimizer)
    ckpt_cloud.save(
        {
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
            "model": get_model_state_dict(model),
        },
        checkpoint_id=url,
    )
    other, others = trained("fsdp2", seed=2, steps=1)
    state = {
        "optimizer": get_optimizer_state_dict(other, others, options=options),
        "model": get_model_state_dict(other),
    }
    flat = any(name.startswith("state.up.weight.") for name in state["optimizer"])
    ckpt_cloud.load(state, checkpoint_id=url, strict=True)
    set_model_state_dict(other, state["model"])
    set_optimizer_state_dict(other, others, state["optimizer"], options=options)
    return flat, same(whole(other, others), saved)


def frozen(url):
    """Frozen parameters are neither saved nor touched."""
    options = StateDictOptions(ignore_frozen_params=True)

    def made(seed):
        model, _ = trained("fsdp2", seed, steps=0)
        for parameter in model.up.parameters():
            parameter.requires_grad_(requires_grad=False)
        return model

    model, other = made(1), made(2)
    before = {name: value.full_tensor() for name, value in other.up.named_parameters()}
    ckpt_cloud.save({"model": get_model_state_dict(model, options=options)}, checkpoint_id=url)
    state = {"model": get_model_state_dict(other, options=options)}
    result = ckpt_cloud.load(state, checkpoint_id=url, strict=True)
    set_model_state_dict(other, state["model"], options=StateDictOptions(strict=False))
    return (
        not any(name.startswith("up.") for name in state["model"]),
        result == ckpt_cloud.LoadResult(),
        all(torch.equal(value.full_tensor(), before[name]) for name, value in other.up.named_parameters()),
        torch.equal(other.down.weight.full_tensor(), model.down.weight.full_tensor()),
    )
