"""What sharing loses of each layer, kept at low rank (Relaxed Recursive Transformers, Bae et al. 2024).

Layer l's matrix is the shared one plus what is left, W_l = W̄ + (W_l − W̄); the singular vectors of the r largest
singular values of what is left are a product B·A, which is a LoRA adapter. A layer that many layers share is one
module and can carry one adapter, the same at each use, so the adapters go on a copy that shares nothing and whose
layers are equal. That copy shares again without a change, so a file holds the shared model and the small adapter:

    model = with_remainder(parent, "all", rank=8)
    lathe.adapt.save_adapter(model, "remainder", name="remainder")

Biases and norms stay the mean of the layers'.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lathe.adapt import Adapter, adapter_names
from lathe.adapt.adapters import attach
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape.share import aligned, index_of, kinds_of, members_of, share, sublayer_of
from lathe.reshape.state import State


def with_remainder(model: Transformer, sharing: str, rank: int, *, name: str = "remainder") -> Transformer:
    """A copy whose layers hold what `sharing` would make them share, each with its own remainder as a LoRA adapter.

    Args:
        sharing: the pattern, as `Sharing` reads it; every stack shares by itself.
        rank: of each matrix' remainder; at a matrix' own rank nothing of it is lost.
        name: the adapter's.

    Returns:
        A model without sharing. Without the adapter, layers of one set are equal, so sharing it again is exact.

    Raises:
        RequestError: adapters on the model, a rank larger than a layer, or a pattern that the depth does not allow.
    """
    if adapter_names(model):
        raise RequestError("the model has adapters; merge and remove them before its layers share")
    start, adapters = State(model.architecture, model.state_dict()), dict[str, tuple[Tensor, Tensor]]()
    state = start
    for stack_name, old in model.architecture.stacks:
        state, _ = share(state, stack_name, sharing)
        shared = state
        state, _ = share(state, stack_name, "none")
        new = dict(shared.architecture.stacks)[stack_name]
        for kind in kinds_of(old):
            for index, layers in members_of(new, kind).items():
                base = sublayer_of(shared, f"{stack_name}.{kind}.{index}")
                sources = [index_of(old, kind, layer) for layer in layers]
                parts = {i: sublayer_of(start, f"{stack_name}.{kind}.{i}") for i in sources}
                ordered = aligned(parts, sources[len(sources) // 2], old, kind)
                if len(parts) == 1:
                    continue
                for layer, source in zip(layers, sources, strict=True):
                    for leaf, mean in base.items():
                        if mean.dim() == 2:
                            path = f"{stack_name}.{kind}.{layer}.{leaf.removesuffix('.weight')}"
                            adapters[path] = _low_rank(path, ordered[source][leaf] - mean, rank)
    cast = state.cast(model.dtype)
    out = Transformer(cast.architecture, device="meta")
    out.load_state_dict({n: t.detach().to(model.device).clone() for n, t in cast.tensors.items()}, assign=True)
    placed = {
        path: Adapter(*(nn.Parameter(t.to(model.device, model.dtype).contiguous()) for t in pair), scale=1.0)
        for path, pair in adapters.items()
    }
    if placed:
        attach(out, name, placed)
    return out.train(model.training)


def _low_rank(path: str, left_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A, rank × I, and B, O × rank, of the nearest product."""
    if not 1 <= rank <= min(left_OI.shape):
        raise RequestError(f"rank={rank}: expected 1 to {min(left_OI.shape)}, the smaller side of {path}")
    u, s, vh = torch.linalg.svd(left_OI, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
