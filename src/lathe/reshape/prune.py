"""Fewer feed-forward neurons, heads and layers: the least important go, and what is left takes over their part.

Importance (Minitron, Muralidharan et al. 2024, §3.1) is measured on text. A neuron's or a head channel's is
√Σ_batch (mean over positions |a|)² at the input of the output matrix that reads it. Query heads are ranked within
their key-value group, so that groups stay equally large; key-value heads go with their whole group. Where more query
heads than before are to share a key-value head, the heads that become one are averaged (GQA, Ainslie et al. 2023,
§2.1), and training has to repair it. A stack with
relative positions has one bias for all of its layers, so all drop the same heads. A layer's importance is
1 − cos(stream before, stream after).

*Writer refit.* Let S be what is kept and S̄ what goes. The kept activations predict the others by least squares, so
the output matrix can take over most of what the others wrote: `W' = W_S + W_S̄ Σ_S̄S (Σ_SS + λI)⁻¹`, with the moments
of the text and λ = 1e-4 of their mean diagonal. Where the writer has a bias, moments are taken about the mean and
the bias takes the rest. Where nothing goes, nothing changes. Shared layers are one matrix and are counted once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from lathe.architecture import Architecture, Attention, Stack
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape.calibrate import NO_TEXT, Batch, listening
from lathe.reshape.grow_heads import prefixes
from lathe.reshape.operation import Operation, by_stack, measured, plain
from lathe.reshape.spill import Tensors
from lathe.reshape.state import State, Step
from lathe.reshape.stream import blank, run_text
from lathe.reshape.walk import token_rows

_RIDGE = 1e-4
_ENERGY = "share of the energy that each output matrix still writes"


class Activity:
    """What a writer reads over the text: first and second moments, and each channel's importance.

    Args:
        products: where the sum of products goes, under the writer's `name`; in memory where left out.
    """

    def __init__(self, products: Tensors | None = None, name: str = "") -> None:
        self.tokens = 0
        self.total = torch.zeros(())
        self._products, self._name = Tensors() if products is None else products, name
        self.squares = torch.zeros(())

    def add(self, rows_ND: Tensor) -> None:
        """Count one batch's tokens."""
        wide = rows_ND.detach().to("cpu", torch.float64)
        if not len(wide):
            return
        self.tokens += len(wide)
        self.total = self.total + wide.sum(0)
        product = wide.T @ wide
        if self._name in self._products:
            product += self._products[self._name]
        self._products[self._name] = product
        self.squares = self.squares + wide.abs().mean(0).square()

    @property
    def importance(self) -> Tensor:
        """√Σ_batch (mean over positions |a|)², one number for each channel."""
        return self.squares.sqrt()

    def moments(self, *, centred: bool) -> Tensor:
        """E[a aᵀ], about the mean where `centred`."""
        second = self._products[self._name] / self.tokens
        mean = self.total / self.tokens
        return second - torch.outer(mean, mean) if centred else second


def activities(model: Transformer, batches: Iterable[Batch], writers: list[str]) -> dict[str, Activity]:
    """What each of `writers` (modules, by name) reads over the text.

    Raises:
        RequestError: no tokens.
    """
    products = blank(model)
    gathered = {name: Activity(products, name) for name in writers}
    current: Batch = {}

    def hear(batch: Batch, _: str) -> None:
        nonlocal current
        current = batch

    def listener(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def listen(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = token_rows(model, name, inputs[0].shape[:-1], current)
            gathered[name].add(inputs[0].flatten(0, -2)[rows])

        return listen

    with listening(model, {name: listener(name) for name in writers}), torch.no_grad():
        run_text(model, batches, hear)
    if not all(each.tokens for each in gathered.values()):
        raise RequestError(NO_TEXT)
    return gathered


@dataclasses.dataclass(frozen=True)
class Refit:
    """A writer that reads fewer channels.

    Args:
        weight: out × kept.
        bias: None where the writer has none.
        energy: the share of what it wrote, about the mean where it has a bias, that it still writes.
    """

    weight: Tensor
    bias: Tensor | None
    energy: float


def refit(weight: Tensor, bias: Tensor | None, activity: Activity, kept: Tensor) -> Refit:
    """The writer for the channels `kept`, which takes over what the others wrote as far as they can say it.

    Raises:
        RequestError: fewer tokens than channels that stay.
    """
    if activity.tokens < len(kept):
        raise RequestError(
            f"the calibration text has {activity.tokens} tokens, and fitting {len(kept)} channels needs at least as "
            f"many; give {10 * len(kept)} or more"
        )
    is_gone = torch.ones(weight.shape[1], dtype=torch.bool)
    is_gone[kept] = False
    gone = is_gone.nonzero()[:, 0]
    if not len(gone):
        return Refit(weight[:, kept], bias, 1.0)
    moments = activity.moments(centred=bias is not None)
    inner = moments[kept][:, kept]
    ridge = (_RIDGE * inner.diagonal().mean()).clamp_min(1e-30) * torch.eye(len(kept), dtype=torch.float64)
    predict = torch.linalg.solve(inner + ridge, moments[kept][:, gone])  # kept × gone
    moved = weight[:, gone] @ predict.T
    if bias is not None:
        mean = activity.total / activity.tokens
        bias = bias + weight[:, gone] @ mean[gone] - moved @ mean[kept]
    error = weight.clone()  # what is written no more, in terms of all the channels
    error[:, kept] = -moved
    return Refit(weight[:, kept] + moved, bias, 1.0 - _energy(error, moments) / max(_energy(weight, moments), 1e-300))


def _energy(weight: Tensor, moments: Tensor) -> float:
    return float((weight @ moments * weight).sum())


def _most(score: Tensor, count: int) -> Tensor:
    """The places of the `count` highest scores, in their old order."""
    return score.topk(count).indices.sort().values


def _refitted(
    state: State, writer: str, activity: Activity, kept: Tensor, energy: dict[str, float]
) -> dict[str, Tensor]:
    bias = f"{writer}.bias"
    fitted = refit(state.wide(f"{writer}.weight"), state.wide(bias) if bias in state.tensors else None, activity, kept)
    energy[writer] = fitted.energy
    return {f"{writer}.weight": fitted.weight} | ({} if fitted.bias is None else {bias: fitted.bias})


# --- feed-forward


def plan_feed_forward(done: Architecture, target: Architecture) -> list[Operation]:
    """An operation for each stack whose feed-forward becomes narrower."""
    return by_stack(done, target, "feed_forward.d_ff", partial(measured, prune_feed_forward), grows=False)


def prune_feed_forward(
    model: Transformer, batches: Iterable[Batch], state: State, stack_name: str, d_ff: int
) -> tuple[State, Step]:
    """A stack's feed-forwards with their `d_ff` most important neurons; `model` is the model of `state`.

    Raises:
        RequestError: no text, or fewer tokens than neurons that stay.
    """
    stack = dict(state.architecture.stacks)[stack_name]
    old = stack.feed_forward.d_ff
    layers = [f"{stack_name}.feed_forward.{index}" for index in range(stack.n_feed_forwards)]
    seen = activities(model, batches, [f"{layer}.down" for layer in layers])
    changed = state.blank()
    energy: dict[str, float] = {}
    for layer in layers:
        kept = _most(seen[f"{layer}.down"].importance, d_ff)
        for parameter, dim in state.along(f"{layer}.ffn"):
            if parameter.role == "reader":
                changed[parameter.name] = state.wide(parameter.name).index_select(dim, kept)
        changed |= _refitted(state, f"{layer}.down", seen[f"{layer}.down"], kept, energy)
    step = Step(f"prune {stack_name} feed-forward {old} → {d_ff}", d_ff == old, energy, _ENERGY)
    return state.with_(changed, {f"{stack_name}.feed_forward.d_ff": d_ff}), step


# --- heads


def plan_heads(done: Architecture, target: Architecture) -> list[Operation]:
    """Operations for each stack that loses heads: query heads come to share keys first, then heads go."""
    operations = []
    for name, stack in done.stacks:
        old, new = stack.attention, dict(target.stacks)[name].attention
        if new.kv_heads < old.kv_heads and new.n_heads // new.kv_heads > old.n_heads // old.kv_heads:
            _require_whole_groups(old, new, name)
            sizes = {f"{name}.attention.n_kv_heads": new.kv_heads}
            operations.append(Operation(sizes, plain(merge_keys, name, new.kv_heads)))
            old = dataclasses.replace(old, n_kv_heads=new.kv_heads)
        if new.n_heads < old.n_heads or new.kv_heads < old.kv_heads:
            if new.kv_heads > old.kv_heads:
                raise RequestError(
                    f"{name}.n_kv_heads={new.kv_heads}: more than the {old.kv_heads} there are, while query heads go; "
                    f"choose {old.kv_heads} or fewer"
                )
            sizes = {f"{name}.attention.n_heads": new.n_heads, f"{name}.attention.n_kv_heads": new.kv_heads}
            operations.append(Operation(sizes, measured(prune_heads, name, new.n_heads, new.kv_heads)))
    return operations


def _require_whole_groups(old: Attention, new: Attention, name: str) -> None:
    if old.kv_heads % new.kv_heads:
        divisors = [str(n) for n in range(1, old.kv_heads) if old.kv_heads % n == 0]
        raise RequestError(
            f"{name}.n_kv_heads={new.kv_heads}: {old.kv_heads} key-value heads cannot be merged into groups of one "
            f"size; choose {' or '.join(divisors)}"
        )


def merge_keys(state: State, stack_name: str, n_kv_heads: int) -> tuple[State, Step]:
    """A stack whose query heads share fewer key-value heads, each the mean of those it replaces (GQA, §2.1)."""
    stack = dict(state.architecture.stacks)[stack_name]
    spec = stack.attention
    changed = state.blank()
    for layer in prefixes(stack_name, stack):
        for name in (f"{layer}.{letter}.{leaf}" for letter in "kv" for leaf in ("weight", "bias")):
            if name in state.tensors:
                heads = state.wide(name).unflatten(0, (n_kv_heads, -1, spec.d_head))
                changed[name] = heads.mean(1).flatten(0, 1)
    name = f"merge {stack_name} key-value heads {spec.kv_heads} → {n_kv_heads}"
    sizes = {f"{stack_name}.attention.n_kv_heads": n_kv_heads}
    return state.with_(changed, sizes), Step(name, n_kv_heads == spec.kv_heads, {})


def prune_heads(
    model: Transformer, batches: Iterable[Batch], state: State, stack_name: str, n_heads: int, n_kv_heads: int
) -> tuple[State, Step]:
    """A stack's attentions with their most important heads; `model` is the model of `state`.

    Raises:
        RequestError: no text, or fewer tokens than channels that stay.
    """
    stack = dict(state.architecture.stacks)[stack_name]
    spec = stack.attention
    layers = prefixes(stack_name, stack)
    seen = activities(model, batches, [f"{layer}.o" for layer in layers])
    chosen = _chosen(state, stack_name, stack, seen, n_heads // n_kv_heads, n_kv_heads)
    changed = state.blank()
    energy: dict[str, float] = {}
    for layer in layers:
        queries, keys = (_channels(heads, spec.d_head) for heads in chosen[layer])
        for letter, kept in (("q", queries), ("k", keys), ("v", keys)):
            for leaf in ("weight", "bias"):
                name = f"{layer}.{letter}.{leaf}"
                if name in state.tensors:
                    changed[name] = state.wide(name).index_select(0, kept)
        changed |= _refitted(state, f"{layer}.o", seen[f"{layer}.o"], queries, energy)
    relative = f"{stack_name}.relative_bias.weight"
    if relative in state.tensors:
        changed[relative] = state.wide(relative).index_select(1, chosen[f"{stack_name}.attention.0"][0])
    name = f"prune {stack_name} heads {spec.n_heads} → {n_heads}"
    if spec.n_kv_heads is not None or n_kv_heads != n_heads:
        name += f", key-value heads {spec.kv_heads} → {n_kv_heads}"
    exact = n_heads == spec.n_heads and n_kv_heads == spec.kv_heads
    sizes = {f"{stack_name}.attention.n_heads": n_heads, f"{stack_name}.attention.n_kv_heads": n_kv_heads}
    return state.with_(changed, sizes), Step(name, exact, energy, _ENERGY)


def _chosen(
    state: State, stack_name: str, stack: Stack, seen: dict[str, Activity], per_group: int, groups: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """The query heads and key-value heads that stay, by attention."""
    spec = stack.attention

    def score(layer: str) -> Tensor:
        return seen[f"{layer}.o"].importance.view(spec.n_heads, spec.d_head).square().sum(1).sqrt()

    scores = {layer: score(layer) for layer in prefixes(stack_name, stack)}
    if f"{stack_name}.relative_bias.weight" in state.tensors:
        own = [layer for layer in scores if layer.startswith(f"{stack_name}.attention.")]
        # Each layer's own size says nothing beside another's, so every layer has one vote.
        total = torch.stack([scores[layer] / scores[layer].sum().clamp_min(1e-300) for layer in own]).sum(0)
        scores |= dict.fromkeys(own, total)
    return {layer: _ranked(each.view(spec.kv_heads, -1), per_group, groups) for layer, each in scores.items()}


def _ranked(score_GQ: Tensor, per_group: int, groups: int) -> tuple[Tensor, Tensor]:
    """The best heads of each group, then the groups whose best heads count most."""
    best = score_GQ.topk(per_group, dim=1).indices.sort(1).values
    kept = _most(score_GQ.gather(1, best).square().sum(1), groups)
    return (kept[:, None] * score_GQ.shape[1] + best[kept]).flatten(), kept


def _channels(heads: Tensor, d_head: int) -> Tensor:
    return (heads[:, None] * d_head + torch.arange(d_head)).flatten()
