"""A narrower stream where the stream itself is normed: post-norm stacks (BERT, BART), and norms on embeddings.

After every sublayer such a model's stream is `γz + β`, with another γ and β each time, so no rotation passes it
exactly. It is still the best start. One basis R is taken from the norms' outputs, turned so that its channels stay
as near as they can to the channels that carry most (γ works channel by channel). Then the narrow model is fitted to
its parent, sublayer after sublayer, each on what the narrow model itself produces up to there:

- a reader's weight is the ridge regression from the narrow stream to what the parent's reader gave,
- a writer's is the regression from its input to what is missing between the parent's sum, rotated, and its own skip,
- a norm's scale and bias are regressed channel by channel on the parent's output, rotated.

The plain rotation is what every ridge falls back to. Layers that share weights are fitted on all their uses at once.
The result is approximate at every width below the old one; healing repairs the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lathe.blueprint import blueprint
from lathe.model.transformer import Transformer
from lathe.reshape.calibrate import Batch
from lathe.reshape.state import State, Step, multiply
from lathe.reshape.transform import refit_transform
from lathe.reshape.width import norms_of, with_stored_positions, without_mean

_MOST_ROWS = 12_288
_RIDGE = 1e-4


def rotate_post_norm(state: State, batches: Sequence[Batch], width: int) -> tuple[State, list[Step]]:
    """The state with `d_model` = `width`, fitted sublayer by sublayer on the calibration text.

    Args:
        state: the parent, whose heads already have the width that they will have.
        batches: keyword arguments of the model, one mapping each.
    """
    state = with_stored_positions(state, "residual")
    teacher = _built(state)
    into, kept = _basis(state, teacher, batches, width)
    started = _plainly(state, into)
    student = _built(started)
    errors = {
        f"{sublayer}.norm": _fit_sublayer(sublayer, teacher, student, batches, into) for sublayer in _sublayers(student)
    }
    for name in _head_readers(student):
        _fit_head_reader(name, teacher, student, batches)
    fitted = State(started.architecture, {n: t.double() for n, t in student.state_dict().items()})
    old = state.architecture.d_model
    measures = (
        "energy: share of the norms' outputs that the basis keeps; norms: share of the parent's output not reached"
    )
    steps = [Step(f"rotate and refit d_model {old} → {width}", False, {"energy": kept, **errors}, measures)]
    language = fitted.architecture.head.language
    if language is not None and language.transform is not None and fitted.architecture.embedding.d_embed is None:
        old_NE = _listen(teacher, batches, ["head.language.norm"])["head.language.norm"][1]
        x_ND = _listen(student, batches, ["head.language.transform"])["head.language.transform"][0]
        if not language.tied:  # a table of its own needs not the stream's channels, but the transform's best ones
            into = _loudest(old_NE, width)
            table = "head.language.output.weight"
            fitted = fitted.with_({table: state.wide(table) @ into})
        fitted, step = refit_transform(state, fitted, x_ND, old_NE, into)
        steps.append(step)
    return fitted, steps


def _loudest(rows_NE: Tensor, width: int) -> Tensor:
    """Old channels × new ones without a mean of their own: the directions in which rows vary most."""
    centred = rows_NE - rows_NE.mean(0)
    directions: Tensor = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)
    return directions[:, : width - 1] @ without_mean(width).T


def _built(state: State) -> Transformer:
    cast = state.cast(torch.float32)
    model = Transformer(cast.architecture, device="meta")
    model.load_state_dict(dict(cast.tensors), assign=True)
    model.requires_grad_(False)
    return model.eval()


def _basis(state: State, teacher: Transformer, batches: Sequence[Batch], width: int) -> tuple[Tensor, float]:
    """R, old channels × new ones, and the share of the norms' outputs that it keeps."""
    norms = norms_of(state.architecture, "residual")
    outputs = [rows for _, rows in _listen(teacher, batches, norms).values()]
    rows = [out - out.mean(-1, keepdim=True) for out in outputs]
    total = torch.stack([each.T @ each / len(each) for each in rows]).sum(0)
    old = len(total)
    ones = torch.full((old, 1), old**-0.5, dtype=torch.float64)
    directions = torch.linalg.eigh(total).eigenvectors.flip(1)
    principal = torch.linalg.qr(torch.cat((ones, directions), 1)).Q[:, 1:width]
    # Of all bases of that space, the one nearest to the channels that carry most.
    loudest = torch.stack([each.square().mean(0) for each in outputs]).sum(0).topk(width).indices.sort().values
    chosen = torch.eye(old, dtype=torch.float64)[:, loudest]
    basis = without_mean(width)
    u, _, vh = torch.linalg.svd(principal.T @ chosen @ basis)
    kept = float((principal.T @ total @ principal).trace() / total.trace())
    return principal @ (u @ vh) @ basis.T, kept


def _plainly(state: State, into: Tensor) -> State:
    """The plain rotation: what every fit starts from."""
    width = into.shape[1]
    writing = into - into.mean(0, keepdim=True)
    growth = (into.shape[0] / width) ** 0.5
    changed: dict[str, Tensor] = {}
    for parameter, dim in state.along("residual"):
        whole = changed.get(parameter.name, state.wide(parameter.name))
        if parameter.role == "scale":
            changed[parameter.name] = growth * (into.square().T @ whole)
        elif parameter.role in ("shift", "table", "writer"):
            changed[parameter.name] = multiply(whole, dim, writing)
        else:
            changed[parameter.name] = multiply(whole, dim, into)
    for follower in ("pooled", "transform"):  # as wide as the stream by definition
        for parameter, dim in state.along(follower):
            whole = changed.get(parameter.name, state.wide(parameter.name))
            changed[parameter.name] = whole.narrow(dim, 0, width)
    return state.with_(changed, {"d_model": width})


def _sublayers(model: Transformer) -> Iterator[str]:
    """Every sublayer that ends in a norm on the stream, once each, in the order in which tokens pass them."""
    for name, spec in model.architecture.stacks:
        if spec.input_norm and model.architecture.embedding.d_embed is None:
            yield f"{name}.input"
        seen: set[str] = set()
        for layer in range(spec.n_layers):
            kinds = [("attention", spec.attention_index(layer)), ("feed_forward", spec.feed_forward_index(layer))]
            if spec.cross_attention:
                kinds.insert(1, ("cross_attention", spec.attention_index(layer)))
            for kind, index in kinds:
                path = f"{name}.{kind}.{index}"
                if path not in seen:
                    seen.add(path)
                    yield path


def _head_readers(model: Transformer) -> list[str]:
    """The head's linear layers that read the stream and keep their output's width."""
    names = [p.name for p in blueprint(model.architecture) if p.component == "head" and p.role == "reader"]
    readers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    fixed = {p.name for p in blueprint(model.architecture) if p.tied_to} | {"head.pooler.weight"}
    return [
        name
        for name in readers
        if f"{name}.weight" not in fixed
        and name != "head.language.transform"
        and _axis(model, f"{name}.weight", -1) == "residual"
    ]


def _axis(model: Transformer, name: str, dim: int) -> str:
    return next(p.axes[dim].group for p in blueprint(model.architecture) if p.name == name)


def _fit_sublayer(
    path: str, teacher: Transformer, student: Transformer, batches: Sequence[Batch], into: Tensor
) -> float:
    """Readers, then the writer, then the norm of one sublayer; the share of the norm's output that is not reached."""
    readers = [f"{path}.{n}" for n in ("q", "k", "v", "gate", "up") if _has(student, f"{path}.{n}")]
    writers = [f"{path}.{n}" for n in ("o", "down") if _has(student, f"{path}.{n}")]
    norm = f"{path}.norm"
    wanted = _listen(teacher, batches, [*readers, norm])
    heard = _listen(student, batches, readers) if readers else {}
    for reader in readers:
        _regress(student.get_submodule(reader), heard[reader][0], wanted[reader][1])
    for writer in writers:
        heard = _listen(student, batches, [writer, norm])
        # The parent's sum, rotated, beyond the narrow model's own skip.
        target = wanted[norm][0] @ into - (heard[norm][0] - heard[writer][1])
        _regress(student.get_submodule(writer), heard[writer][0], target)
    given = _listen(student, batches, [norm])[norm][0]
    return _fit_norm(student.get_submodule(norm), given, wanted[norm][1] @ into)


def _fit_head_reader(name: str, teacher: Transformer, student: Transformer, batches: Sequence[Batch]) -> None:
    target = _listen(teacher, batches, [name])[name][1]
    x = _listen(student, batches, [name])[name][0]
    _regress(student.get_submodule(name), x, target)


def _regress(linear: nn.Module, x_NI: Tensor, target_NO: Tensor) -> None:
    """Least squares from x to the target, held to the weights there are by a small ridge."""
    weight: Any = linear.weight
    bias: Any = linear.bias
    mean_x, mean_t = x_NI.mean(0), target_NO.mean(0)
    if bias is None:
        mean_x, mean_t = torch.zeros_like(mean_x), torch.zeros_like(mean_t)
    x, target = x_NI - mean_x, target_NO - mean_t
    gram = x.T @ x
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    fitted = weight.double()
    fitted = fitted + torch.linalg.solve(gram + ridge, x.T @ (target - x @ fitted.T)).T
    weight.copy_(fitted)
    if bias is not None:
        bias.copy_(mean_t - fitted @ mean_x)


def _fit_norm(norm: nn.Module, x_ND: Tensor, wanted_ND: Tensor) -> float:
    """A LayerNorm's scale and bias, channel by channel; the share of the wanted output that is not reached."""
    eps: Any = norm.eps
    layered = isinstance(norm, nn.LayerNorm)
    centre = x_ND.mean(-1, keepdim=True) if layered else 0.0
    z = x_ND - centre
    z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    bias = getattr(norm, "bias", None)
    mean_z, mean_w = (z.mean(0), wanted_ND.mean(0)) if bias is not None else (torch.zeros(()), torch.zeros(()))
    slope = ((z - mean_z) * (wanted_ND - mean_w)).sum(0) / (z - mean_z).square().sum(0).clamp_min(1e-12)
    scale: Any = norm.weight
    scale.copy_(slope)
    reached = slope * z
    if bias is not None:
        bias.copy_(mean_w - slope * mean_z)
        reached = reached + bias
    return float((wanted_ND - reached).square().sum() / wanted_ND.square().sum().clamp_min(1e-12))


def _has(model: nn.Module, path: str) -> bool:
    parent, _, leaf = path.rpartition(".")
    return getattr(model.get_submodule(parent), leaf, None) is not None


def _listen(model: Transformer, batches: Iterable[Batch], names: Sequence[str]) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Each module's inputs and outputs over the text, rows of tokens only."""
    heard: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}
    current: Batch = {}

    def ear(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hear(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            mask = _counted(name, given[0], current)
            heard[name][0].append(given[0].flatten(0, -2)[mask].double())
            heard[name][1].append(out.flatten(0, -2)[mask].double())

        return hear

    with _hooked(model, {name: ear(name) for name in names}), torch.no_grad():
        for batch in batches:
            current = batch
            model(**batch)
            if names and sum(len(rows) for rows in heard[names[0]][0]) >= _MOST_ROWS:
                break
    return {name: (torch.cat(given), torch.cat(out)) for name, (given, out) in heard.items()}


def _counted(name: str, x: Tensor, batch: Batch) -> Tensor:
    """Which rows are tokens; a memory's keys and values belong to the encoder's side."""
    of_memory = ".cross_attention." in name and name.endswith((".k", ".v"))
    side = "decoder_" if name.startswith("decoder") and not of_memory and "decoder_input_ids" in batch else ""
    counted = torch.ones(x.shape[:-1], dtype=torch.bool)
    if x.dim() != 3:
        return counted.flatten()
    mask, segments = batch.get(f"{side}attention_mask"), batch.get(f"{side}segment_ids")
    if mask is not None and mask.shape == counted.shape:
        counted &= mask.bool()
    if segments is not None and segments.shape == counted.shape:
        counted &= segments >= 0
    return counted.flatten()


@contextmanager
def _hooked(
    model: nn.Module, ears: Mapping[str, Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]]
) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_hook(ear) for name, ear in ears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
