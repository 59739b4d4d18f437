"""What sharing loses of each layer, kept at low rank (Relaxed Recursive Transformers, Bae et al. 2024).

Layer l's matrix is the shared one plus what is left, W_l = W̄ + (W_l − W̄); the singular vectors of the r largest
singular values of what is left are a product B·A, which is a LoRA adapter. A layer that many layers share is one
module and can carry one adapter, the same at each use, so the adapters go on a copy that shares nothing and whose
layers are equal. That copy shares again without a change, so a file holds the shared model and the small adapter:

    model = with_remainder(parent, "all", rank=8)
    lathe.adapt.save_adapter(model, "remainder", name="remainder")

Biases and norms stay the mean of the layers'. `lathe resize SRC DST sharing=all remainder=8` writes the shared model to
DST and the adapter to DST/remainder, with a note of the sharing that it is for (`lathe.adapt.opening` unshares the
base when it is opened).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lathe.adapt import Adapter, adapter_names
from lathe.adapt.adapters import attach
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape.share import aligned, index_of, kinds_of, members_of, share, sublayer_of
from lathe.reshape.state import State, Step

REMAINDER = "remainder"  # what the adapter is called, and its directory

_MEASURES = "share of what the layers differ by, squared, that is kept"


def with_remainder(
    model: Transformer, sharing: str | Mapping[str, str], rank: int, *, method: str = "mean", name: str = REMAINDER
) -> Transformer:
    """A copy whose layers hold what `sharing` would make them share, each with its own remainder as a LoRA adapter.

    Args:
        sharing: the pattern, as `Sharing` reads it, of every stack; or stacks to patterns, the others being left.
        rank: of each matrix' remainder; at a matrix' own rank nothing of it is lost.
        method: what the shared layers are: `mean`, or `middle`.
        name: the adapter's.

    Returns:
        A model without sharing. Without the adapter, layers of one set are equal, so sharing it again is exact.

    Raises:
        RequestError: adapters on the model, a rank larger than a layer, or a pattern that the depth does not allow.
    """
    return _with_remainder(model, sharing, rank, method, name)[0]


def kept_remainder(parent: Transformer, shared: Transformer, rank: int, method: str) -> tuple[Transformer, Step, int]:
    """The remainder of layers that have come to share weights.

    Args:
        parent: the model before.
        shared: the model after, of the same sizes.

    Returns:
        A copy of `parent` as `with_remainder` makes it, what was kept, and how many parameters the adapter has.

    Raises:
        RequestError: nothing that came to be shared, or a rank larger than a layer.
    """
    before = dict(parent.architecture.stacks)
    patterns = {n: str(s.sharing) for n, s in shared.architecture.stacks if s.sharing != before[n].sharing}
    relaxed, kept, adapters = _with_remainder(parent, patterns, rank, method, REMAINDER)
    if not adapters:
        raise RequestError(f"remainder={rank}: no layers come to share weights here, so nothing is left of them")
    step = Step(f"keep what shared layers differ by, at rank {rank}", False, kept, _MEASURES)
    return relaxed, step, sum(tensor.numel() for pair in adapters.values() for tensor in pair)


Pairs = dict[str, tuple[Tensor, Tensor]]


def _with_remainder(
    model: Transformer, sharing: str | Mapping[str, str], rank: int, method: str, name: str
) -> tuple[Transformer, dict[str, float], Pairs]:
    """The model, the share of the remainder that was kept of each shared sublayer, and the adapters."""
    if adapter_names(model):
        raise RequestError("the model has adapters; merge and remove them before its layers share")
    patterns = (
        dict.fromkeys((n for n, _ in model.architecture.stacks), sharing) if isinstance(sharing, str) else sharing
    )
    start, adapters = State(model.architecture, model.state_dict()), Pairs()
    state, kept = start, dict[str, float]()
    for stack_name, pattern in patterns.items():
        shared, _ = share(state, stack_name, pattern, method)
        state, _ = share(shared, stack_name, "none")
        found, shares = _of_stack(start, shared, stack_name, rank)
        adapters |= found
        kept |= shares
    cast = state.cast(model.dtype)
    out = Transformer(cast.architecture, device="meta")
    out.load_state_dict({n: t.detach().to(model.device).clone() for n, t in cast.tensors.items()}, assign=True)
    placed = {
        path: Adapter(*(nn.Parameter(t.to(model.device, model.dtype).contiguous()) for t in pair), scale=1.0)
        for path, pair in adapters.items()
    }
    if placed:
        attach(out, name, placed)
    return out.train(model.training), kept, adapters


def _of_stack(start: State, shared: State, stack_name: str, rank: int) -> tuple[Pairs, dict[str, float]]:
    """A and B of every matrix of a stack's layers, and how much of the remainder they keep."""
    old, new = (dict(state.architecture.stacks)[stack_name] for state in (start, shared))
    adapters, kept = Pairs(), dict[str, float]()
    for kind in kinds_of(old):
        for index, layers in members_of(new, kind).items():
            base = sublayer_of(shared, f"{stack_name}.{kind}.{index}")
            sources = [index_of(old, kind, layer) for layer in layers]
            parts = {i: sublayer_of(start, f"{stack_name}.{kind}.{i}") for i in sources}
            if len(parts) == 1:
                continue
            ordered = aligned(parts, sources[len(sources) // 2], old, kind)
            left = found = 0.0
            for layer, source in zip(layers, sources, strict=True):
                for leaf, mean in base.items():
                    if mean.dim() == 2:
                        path = f"{stack_name}.{kind}.{layer}.{leaf.removesuffix('.weight')}"
                        difference = ordered[source][leaf] - mean
                        down, up = adapters[path] = _low_rank(path, difference, rank)
                        left += float(difference.square().sum())
                        found += float((up @ down).square().sum())
            kept[f"{stack_name}.{kind}.{index}"] = found / max(left, 1e-300)
    return adapters, kept


def _low_rank(path: str, left_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A, rank × I, and B, O × rank, of the nearest product."""
    if not 1 <= rank <= min(left_OI.shape):
        raise RequestError(f"rank={rank}: expected 1 to {min(left_OI.shape)}, the smaller side of {path}")
    u, s, vh = torch.linalg.svd(left_OI, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
