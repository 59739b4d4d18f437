"""FSDP2: every parameter of a model cut into parts, one for each rank, and made whole where it is used.

A unit is what is gathered together, in one message, shortly before it is computed, and let go of afterwards: forward
and again backward. Each attention and each feed-forward of a layer is a unit. What is used in more than one place
stays gathered from the first use to the last, as one unit more: embeddings (a tied output reads them again),
sublayers that layers share (ALBERT §3.1: gathered once, not once a layer), and the norms, which a layer calls from
outside its sublayers and which are small.

Under bf16 a unit whose weights are read by matrix products alone travels in bf16, which is what autocast would have
made of it on arrival. Gradients are summed in fp32.

This module is imported where a model is sharded, and only there: it loads a good part of `torch.distributed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lathe.model.transformer import Transformer


def shard(outermost: nn.Module, model: Transformer, device: torch.device, size: int, precision: str) -> None:
    """Shard every parameter over all ranks, unit by unit: what is not sharded yet waits where it is.

    Args:
        outermost: the module that is called, which holds `model`. The norms become its children as well.
        device: where the parts lie, and where they are computed with.
        size: how many ranks there are.
    """
    mesh = init_device_mesh(device.type, (size,))
    norms = nn.ModuleList()
    for unit in _units(model):
        norm = unit.get_submodule("norm")
        norms.append(norm)
        fully_shard(unit, mesh=mesh, mp_policy=_travels_as(unit, precision), ignored_params=set(norm.parameters()))
    # As children of the outermost module, outside their sublayers, the norms belong to its unit.
    outermost.register_module("norms", norms)
    fully_shard(outermost, mesh=mesh)


def let_go(outermost: nn.Module) -> None:
    """Give up what a forward pass without a backward one left gathered."""
    for module in outermost.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's full value, for which every rank must ask; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor, cut as `parameter` is; all of it where the shapes differ (a count)."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    moved = tensor.to(parameter.device)
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _units(model: Transformer) -> Iterator[nn.Module]:
    """The sublayers that one layer alone uses."""
    for stack in (model.encoder, model.decoder):
        if stack is None:
            continue
        spec, numbers = stack.spec, range(stack.spec.n_layers)
        attentions = Counter(spec.attention_index(number) for number in numbers)
        feed_forwards = Counter(spec.feed_forward_index(number) for number in numbers)
        for used, sublayers in (
            (attentions, stack.attention),
            (attentions, stack.cross_attention or ()),
            (feed_forwards, stack.feed_forward),
        ):
            yield from (sublayer for i, sublayer in enumerate(sublayers) if used[i] == 1)


def _travels_as(unit: nn.Module, precision: str) -> MixedPrecisionPolicy:
    """In what precision a unit's weights are gathered."""
    norm = set(unit.get_submodule("norm").parameters())
    owners = [m for m in unit.modules() if any(p not in norm for p in m.parameters(recurse=False))]
    if precision == "bf16" and all(type(owner) is nn.Linear for owner in owners):
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy()
