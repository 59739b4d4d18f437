"""Layers of a trained stack come to share their weights, or stop sharing them (ALBERT, Lan et al. 2020, §3.1).

Every layer uses one attention and one feed-forward, and a sharing pattern says which. So another pattern asks, for
each new set of weights, which old sets the layers held that will use it. One old set, or several equal ones: it is
copied, and nothing changes; that is all that unsharing is. Several: they become one,

- `mean`: the mean over the layers, each first written in the order of the middle one's heads and neurons
  (`lathe.reshape.align`; exact in itself), so that like is averaged with like;
- `middle`: the middle layer's weights as they are.

*Refit*, where there is text. On the way through the parent every layer's new sublayer is given what the old one read,
and its output matrix is fitted by least squares to what the old ones wrote, on all of its layers at once, with a small
ridge towards where it starts. A post-norm's weight and bias are then regressed in the same way, channel by channel.
The fit stays where it brings the predictions nearer to the parent's on rows that it has not seen.

Sharing saves parameters and bytes, not computation. Encoder and decoder are two stacks and share nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lathe.architecture import Architecture, Stack
from lathe.blueprint import stored
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.reshape.align import align_attention, align_feed_forward
from lathe.reshape.calibrate import Batch, token_rows
from lathe.reshape.divergence import Divergence
from lathe.reshape.operation import Context, Operation
from lathe.reshape.state import State, Step
from lathe.reshape.walk import split

SHARE_METHODS = ("mean", "middle")
_KINDS = ("attention", "cross_attention", "feed_forward")
_RIDGE = 1e-4
_MOST_TOKENS = 2**20
_SAME = 1e-6  # weights that differ by less than this share of their size are one layer's, written twice


def plan_sharing(done: Architecture, target: Architecture, method: str) -> list[Operation]:
    """An operation for each stack whose layers are to share their weights in another way.

    Raises:
        RequestError: an unknown method.
    """
    if method not in SHARE_METHODS:
        raise RequestError(f"share={method!r}: expected one of {', '.join(SHARE_METHODS)}")
    operations = []
    for name, stack in done.stacks:
        wanted = dict(target.stacks)[name].sharing
        if wanted != stack.sharing:
            wanted.check_depth(stack.n_layers)
            operations.append(Operation({f"{name}.sharing": wanted}, partial(_run, name, str(wanted), method)))
    return operations


def _run(name: str, sharing: str, method: str, context: Context, state: State) -> tuple[State, list[Step]]:
    shared, step = share(state, name, sharing, method)
    if step.exact or not context.batches:
        return shared, [step]
    fitted_on, held = split(context.batches, _MOST_TOKENS)
    if not held:
        return shared, [step, replace(_NO_REFIT, note="one row of text cannot be split")]
    parent = context.current(state)
    fitted, second = refit_shared(parent, fitted_on, state, shared, name)
    distance = Divergence(parent, held, torch.eye(parent.architecture.d_model, dtype=torch.float64))
    before, after = distance(context.current(shared)), distance(context.current(fitted))
    told = {"before": before, **second.detail, "after": after}
    measures = f"share of the wanted outputs missed; first and last, on text held out: {distance.measures}"
    if after < before:
        return fitted, [step, replace(second, detail=told, measures=measures)]
    left = replace(_NO_REFIT, detail=told, measures=measures, note="a fit came no nearer on text held out")
    return shared, [step, left]


_NO_REFIT = Step("no refit of what is shared", True, {})


def share(state: State, stack_name: str, sharing: str, method: str = "mean") -> tuple[State, Step]:
    """A stack whose layers share their weights as `sharing` says; no text is read.

    The step is exact where every new set of weights comes from one old one or from equal ones. Its detail holds, for
    each new set that does not, the share of its layers' squared weights that it lost.
    """
    old = dict(state.architecture.stacks)[stack_name]
    architecture = state.architecture.with_({f"{stack_name}.sharing": sharing})
    new = dict(architecture.stacks)[stack_name]
    tensors, lost, difference = dict(state.tensors), dict[str, float](), 0.0
    for kind in kinds_of(old):
        for index, layers in members_of(new, kind).items():
            sources = [index_of(old, kind, layer) for layer in layers]
            parts = {i: sublayer_of(state, f"{stack_name}.{kind}.{i}") for i in dict.fromkeys(sources)}
            merged, apart = _merged(parts, sources, old, kind, method)
            for leaf, tensor in merged.items():
                tensors[f"{stack_name}.{kind}.{index}.{leaf}"] = tensor
            if len(parts) > 1:
                lost[f"{stack_name}.{kind}.{index}"] = apart
                difference = max(difference, apart)
    wanted = {p.name for p in stored(architecture)}
    kept = {name: tensor for name, tensor in tensors.items() if name in wanted}
    exact = difference <= _SAME**2
    title = f"share {stack_name} layers {old.sharing} → {new.sharing}"
    return State(architecture, kept), Step(f"{title} ({method})" if lost else title, exact, lost)


def kinds_of(stack: Stack) -> list[str]:
    """The kinds of sublayer that the stack has."""
    return [kind for kind in _KINDS if kind != "cross_attention" or stack.cross_attention]


def index_of(stack: Stack, kind: str, layer: int) -> int:
    """Which set of weights of a kind a layer uses."""
    return stack.feed_forward_index(layer) if kind == "feed_forward" else stack.attention_index(layer)


def members_of(stack: Stack, kind: str) -> dict[int, list[int]]:
    """The layers that use each set of weights of a kind."""
    members: dict[int, list[int]] = {}
    for layer in range(stack.n_layers):
        members.setdefault(index_of(stack, kind, layer), []).append(layer)
    return members


def sublayer_of(state: State, path: str) -> dict[str, Tensor]:
    """The tensors below a path, by the rest of their names, float64."""
    prefix = f"{path}."
    return {n.removeprefix(prefix): state.wide(n) for n in state.tensors if n.startswith(prefix)}


def _merged(
    parts: dict[int, dict[str, Tensor]], sources: Sequence[int], stack: Stack, kind: str, method: str
) -> tuple[dict[str, Tensor], float]:
    """One set of weights for all of `sources`, and the share of their squared weights that it is away from them."""
    middle = sources[len(sources) // 2]
    reference = parts[middle]
    if len(parts) == 1:
        return reference, 0.0
    ordered = aligned(parts, middle, stack, kind)
    each = [ordered[index] for index in sources]
    merged = reference
    if method == "mean":
        merged = {leaf: torch.stack([part[leaf] for part in each]).mean(0) for leaf in reference}
    apart = sum(float((part[leaf] - merged[leaf]).square().sum()) for part in each for leaf in merged)
    size = sum(float(part[leaf].square().sum()) for part in each for leaf in merged)
    return merged, apart / max(size, 1e-300)


def aligned(
    parts: Mapping[int, dict[str, Tensor]], middle: int, stack: Stack, kind: str
) -> dict[int, dict[str, Tensor]]:
    """Sublayers of one kind, by number, in the order of the heads and neurons of number `middle`. Exact."""
    reference, out = parts[middle], dict(parts)
    for index, part in parts.items():
        if index == middle:
            continue
        if kind == "feed_forward":
            out[index] = align_feed_forward(reference, part)
        else:
            out[index] = align_attention(reference, part, stack, cross=kind == "cross_attention")
    return out


# --- the refit on text


class _Fit:
    """Sums over the text for one matrix: what it reads and what it should write, with a 1 for the bias."""

    def __init__(self) -> None:
        self.read = torch.zeros(())
        self.cross = torch.zeros(())
        self.missing = 0.0  # squares of what the matrix that there is does not write
        self.wanted = 0.0

    def add(self, x_NI: Tensor, missing_NO: Tensor, wanted_NO: Tensor, *, bias: bool) -> None:
        x = x_NI.to("cpu", torch.float64)
        if bias:
            x = torch.cat((x, torch.ones(len(x), 1, dtype=torch.float64)), 1)
        missing = missing_NO.to("cpu", torch.float64)
        self.read = self.read + x.T @ x
        self.cross = self.cross + x.T @ missing
        self.missing += float(missing.square().sum())
        self.wanted += float(wanted_NO.double().square().sum())

    def missed(self, step: Tensor) -> float:
        """The share of what should be written, squared, that is not once `step` is added."""
        left = self.missing - 2 * float((step * self.cross).sum()) + float((step * (self.read @ step)).sum())
        return max(left, 0.0) / max(self.wanted, 1e-300)

    def step(self) -> Tensor:
        """What to add to the matrix, inputs × outputs."""
        size = (_RIDGE * self.read.diagonal().mean()).clamp_min(1e-30)
        fitted: Tensor = torch.linalg.solve(
            self.read + size * torch.eye(len(self.read), dtype=torch.float64), self.cross
        )
        return fitted


def refit_shared(
    parent: Transformer, batches: Iterable[Batch], before: State, shared: State, stack_name: str
) -> tuple[State, Step]:
    """The shared sublayers' output matrices, and post-norms, fitted to what the parent's layers wrote.

    Args:
        parent: the model of `before`.
        shared: what `share` made of it.

    Returns:
        The fitted state, and a step whose detail is the share of the writers' output that each set still misses.

    Raises:
        RequestError: no tokens.
    """
    stack = dict(shared.architecture.stacks)[stack_name]
    teacher = _unshared(before, stack_name, parent)
    uses = {
        f"{stack_name}.{kind}.{index}": [f"{stack_name}.{kind}.{layer}" for layer in members]
        for kind in kinds_of(stack)
        for index, members in members_of(stack, kind).items()
        if len(members) > 1
    }
    missed: dict[str, float] = {}
    for leaves in [("o", "down")] if stack.norm_position == "pre" else [("o", "down"), ("norm",)]:
        student = _unshared(shared, stack_name, parent)
        changed, errors = _one_pass(teacher, student, batches, shared, uses, leaves)
        shared = shared.with_(changed)
        missed |= errors
    return shared, Step(f"refit what the {stack_name}'s layers share", False, missed)


def _unshared(state: State, stack_name: str, like: Transformer) -> Transformer:
    """A model of the state in which every layer of the stack has modules of its own, so that each can be heard."""
    copied, _ = share(state, stack_name, "none")
    cast = copied.cast(like.dtype)
    model = Transformer(cast.architecture, device="meta")
    model.load_state_dict({n: t.detach().to(like.device) for n, t in cast.tensors.items()}, assign=True)
    return model.eval()


def _one_pass(
    teacher: Transformer,
    student: Transformer,
    batches: Iterable[Batch],
    state: State,
    uses: dict[str, list[str]],
    leaves: tuple[str, ...],
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Fit `o` and `down`, or `norm`, of every shared sublayer, each layer reading what the parent's layer read."""
    name = next(iter(uses)).split(".")[0]
    forced = [
        f"{path}.{leaf}"
        for path in _sublayers(name, dict(teacher.architecture.stacks)[name])
        for leaf in ("o", "down", "norm")
        if _has(teacher, path, leaf)
    ]
    fits: dict[str, _Fit] = {}
    norms: dict[str, list[tuple[Tensor, Tensor]]] = {}
    said: dict[str, Tensor] = {}
    owner = {use: path for path, each in uses.items() for use in each}
    current: Batch = {}

    def hear(name: str, _: Tensor, out: Tensor) -> Tensor:
        said[name] = out
        return out

    def answer(name: str, given: Tensor, out: Tensor) -> Tensor:
        path, _, leaf = name.rpartition(".")
        wanted = said[name]
        if path in owner and leaf in leaves:
            rows = token_rows(given, name, current)
            x, made, should = (t.detach().flatten(0, -2)[rows] for t in (given, out, wanted))
            target = f"{owner[path]}.{leaf}"
            if leaf == "norm":
                norms.setdefault(target, []).append((_normed(student.get_submodule(name), x), should.double()))
            else:
                has_bias = f"{target}.bias" in state.tensors
                fits.setdefault(target, _Fit()).add(x, should - made, should, bias=has_bias)
        # Pre-norm's norms feed a sublayer, which is the student's own; all else goes on as in the parent.
        return out if leaf == "norm" and _is_pre(student, path) else wanted

    with torch.no_grad():
        for batch in batches:
            current = batch
            with _through(teacher, forced, hear):
                teacher(**batch)
            with _through(student, forced, answer):
                student(**batch)
    if not said:
        raise RequestError("the calibration text is empty; give text of the kind that the model is used on")
    changed: dict[str, Tensor] = {}
    missed: dict[str, float] = {}
    for target, fit in fits.items():
        step, before = fit.step(), state.wide(f"{target}.weight")
        inputs = before.shape[1]
        changed[f"{target}.weight"] = before + step[:inputs].T
        if f"{target}.bias" in state.tensors:
            changed[f"{target}.bias"] = state.wide(f"{target}.bias") + step[inputs]
        missed[target] = fit.missed(step)
    for target, pairs in norms.items():
        changed |= _fitted_norm(state, target, torch.cat([z for z, _ in pairs]), torch.cat([t for _, t in pairs]))
    return changed, missed


def _normed(norm: nn.Module, x_ND: Tensor) -> Tensor:
    """What a norm gives before its weight and bias, float64."""
    x, eps = x_ND.double(), _eps(norm)
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _eps(norm: nn.Module) -> float:
    eps: Any = norm.eps
    return float(eps)


def _fitted_norm(state: State, norm: str, z_ND: Tensor, wanted_ND: Tensor) -> dict[str, Tensor]:
    """A norm's weight and bias, regressed channel by channel."""
    has_bias = f"{norm}.bias" in state.tensors
    mean_z = z_ND.mean(0) if has_bias else torch.zeros(z_ND.shape[1], dtype=torch.float64)
    mean_w = wanted_ND.mean(0) if has_bias else torch.zeros_like(mean_z)
    slope = ((z_ND - mean_z) * (wanted_ND - mean_w)).sum(0) / (z_ND - mean_z).square().sum(0).clamp_min(1e-12)
    changed = {f"{norm}.weight": slope}
    if has_bias:
        changed[f"{norm}.bias"] = mean_w - slope * mean_z
    return changed


def _sublayers(name: str, stack: Stack) -> list[str]:
    """The paths of the sublayers of a stack that shares nothing."""
    return [f"{name}.{kind}.{layer}" for kind in kinds_of(stack) for layer in range(stack.n_layers)]


def _has(model: Transformer, path: str, leaf: str) -> bool:
    return getattr(model.get_submodule(path), leaf, None) is not None


def _is_pre(model: Transformer, path: str) -> bool:
    return dict(model.architecture.stacks)[path.split(".")[0]].norm_position == "pre"


Answer = Callable[[str, Tensor, Tensor], Tensor]


@contextmanager
def _through(model: Transformer, names: Iterable[str], answer: Answer) -> Iterator[None]:
    """Let `answer(name, input, output)` say what each module of these names gives."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda _, given, out: answer(name, given[0], out)

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
