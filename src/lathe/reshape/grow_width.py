"""A wider residual stream that computes the same.

The new stream is `x' = G x`: k copies of the old channels, then r spare ones, D = k·d + r. Three cases let every
norm of the model do to x' what it did to x:

- *RMSNorm only*: one copy and zeros. The mean square shrinks by d/D, so γ' = γ√(d/D) and eps' = eps·d/D. Any D.
- *LayerNorm before each sublayer* (LEMON, Wang et al. 2024, §4): k = ⌊D/d⌋ copies, and spare channels that carry the
  mean of x. The mean stays, the variance shrinks by kd/D: γ' = γ√(kd/D), eps' = eps·kd/D. A normed spare channel is
  zero. Any D. Zeros in place of the mean would move the mean and be wrong.
- *Anything else* (post-norm, a norm on the embeddings, a masked-LM head's norm behind an activation, an RMSNorm stack
  beside a LayerNorm stack): whole copies, D = k·d, which no norm notices. A spare channel could not carry the mean of
  what such a norm has just scaled.

Writers repeat their rows. A reader divides its columns among the copies with random weights that sum to one: equal
ones would give all copies the same gradient for ever. Its columns for spare channels are random where those channels
are zero when read, and zero otherwise. A tied table cannot weigh its copies apart, so the norm in front of it
takes 1/k. The factors of the forward pass that depend on the width (√d on embeddings, 1/√d before the head)
are undone in the same places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.architecture import Architecture
from lathe.blueprint import Parameter
from lathe.errors import RequestError
from lathe.reshape.grow import drawn
from lathe.reshape.operation import Operation, drawing
from lathe.reshape.spill import Tensors
from lathe.reshape.state import State, Step
from lathe.reshape.width import with_stored_positions


@dataclass(frozen=True)
class Widening:
    """G: how old channels become new ones.

    Args:
        old, new: d and D.
        copies: k.
        mean: whether spare channels carry the mean; otherwise they are zero.
    """

    old: int
    new: int
    copies: int
    mean: bool = False

    @property
    def spare(self) -> int:
        """r, how many channels are no copies."""
        return self.new - self.copies * self.old

    @property
    def share(self) -> float:
        """kd/D, by which a norm's mean square shrinks."""
        return self.copies * self.old / self.new

    def write(self, tensor: Tensor, dim: int) -> Tensor:
        """What writes the stream, with its new channels along `dim`."""
        channels = tensor.movedim(dim, -1)
        shape = (*channels.shape[:-1], self.spare)
        rest = channels.mean(-1, keepdim=True).expand(shape) if self.mean else torch.zeros(shape, dtype=torch.float64)
        return torch.cat((*[channels] * self.copies, rest), -1).movedim(-1, dim)

    def read(self, weight: Tensor, *, normed: bool, generator: torch.Generator) -> Tensor:
        """What reads the stream with its last dimension; `normed` says whether it reads through a norm."""
        weights = 0.5 + torch.rand((self.copies, self.old), generator=generator, dtype=torch.float64)
        weights = weights / weights.sum(0)
        shape = (*weight.shape[:-1], self.spare)
        is_zero = normed or not self.mean
        rest = drawn(weight, shape, generator) if is_zero else torch.zeros(shape, dtype=torch.float64)
        return torch.cat((*[weight * part for part in weights], rest), -1)

    def scale(self, weight: Tensor) -> Tensor:
        """A norm's weight; a spare channel's touches nothing yet and starts at one."""
        ones = torch.ones(self.spare, dtype=torch.float64)
        return torch.cat((weight.repeat(self.copies) * math.sqrt(self.share), ones))

    def shift(self, bias: Tensor) -> Tensor:
        """A norm's bias."""
        return torch.cat((bias.repeat(self.copies), torch.zeros(self.spare, dtype=torch.float64)))


def plan_width(done: Architecture, target: Architecture) -> list[Operation]:
    """The operation that makes the stream wider, if it is to be."""
    if target.d_model <= done.d_model:
        return []
    find_widening(done, target.d_model)  # says what is wrong before anything is done
    _tied_factor(done, target.d_model)
    return [Operation({"d_model": target.d_model}, drawing(widen, target.d_model))]


def find_widening(architecture: Architecture, size: int) -> Widening:
    """How the stream can become `size` wide without changing what is computed.

    Raises:
        RequestError: it cannot; the line names the nearest sizes that can.
    """
    old = architecture.d_model
    reason = _why_whole_copies(architecture)
    if reason is None:
        layer_norm = next(architecture.stacks)[1].norm.kind == "layer"
        return Widening(old, size, size // old if layer_norm else 1, mean=layer_norm)
    if size % old:
        below, above = size // old * old, (size // old + 1) * old
        fits = f"{above}" if below == old else f"{below} or {above}"
        raise RequestError(
            f"d_model={size}: {reason}, so only whole copies of the {old} channels leave it unchanged; choose {fits}"
        )
    return Widening(old, size, size // old)


def _why_whole_copies(architecture: Architecture) -> str | None:
    """What keeps the stream from having spare channels; None where nothing does."""
    factorised, language = architecture.embedding.d_embed is not None, architecture.head.language
    transforms = language is not None and language.transform is not None
    stacks = dict(architecture.stacks)
    if len({stack.norm.kind for stack in stacks.values()}) > 1:
        return "the encoder and the decoder have different norms"
    if factorised and (transforms or any(stack.input_norm for stack in stacks.values())):
        return "the embedding has norms of its own width with the same eps"
    if next(iter(stacks.values())).norm.kind == "rms":
        return None
    for name, stack in stacks.items():
        if stack.norm_position == "post":
            return f"the {name} is post-norm with LayerNorm"
        if stack.input_norm:
            return f"the {name} has a LayerNorm on its embeddings"
    if transforms:
        return "the head has a LayerNorm behind an activation"
    if language is not None and language.tied and not factorised and not list(stacks.values())[-1].final_norm:
        return "a tied head reads the stream without a norm"
    return None


def widen(state: State, size: int, *, generator: torch.Generator) -> tuple[State, Step]:
    """The model with `d_model` = `size`. Exact.

    Raises:
        RequestError: a size that no exact widening reaches, or a tied head with nothing to take its factor.
    """
    before = state.architecture
    how = find_widening(before, size)
    tied = _tied_factor(before, size)
    state = with_stored_positions(state, "residual")
    changed = state.blank()
    for group in ("residual", "transform"):
        for parameter, dim in state.along(group):
            tensor = changed.get(parameter.name, state.wide(parameter.name))
            changed[parameter.name] = _widened(how, parameter, dim, tensor, generator)
    for parameter, dim in state.along("pooled"):
        tensor = changed.get(parameter.name, state.wide(parameter.name))
        changed[parameter.name] = _more_pooled(parameter, dim, tensor, size, generator)
    _rescale(before, how, changed, tied)
    eps = {f"{name}.norm.eps": stack.norm.eps * how.share for name, stack in before.stacks}
    detail = {"copies": float(how.copies), "spare": float(how.spare)}
    return state.with_(changed, {"d_model": size, **eps}), Step(f"widen d_model {how.old} → {size}", True, detail)


def _widened(how: Widening, parameter: Parameter, dim: int, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if parameter.role == "scale":
        return how.scale(tensor)
    if parameter.role == "shift":
        return how.shift(tensor)
    # A head's transform is a reader whose output is an axis that is widened too: that side writes.
    if parameter.role == "reader" and dim == 1:
        return how.read(tensor, normed=parameter.norm is not None, generator=generator)
    return how.write(tensor, dim)


def _more_pooled(parameter: Parameter, dim: int, tensor: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A pooler's new channels are random in; a classifier reads none of them yet."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    is_pooler = dim == 0 and not parameter.is_bias
    new = drawn(tensor, tuple(shape), generator) if is_pooler else torch.zeros(shape, dtype=torch.float64)
    return torch.cat((tensor, new), dim)


def _rescale(architecture: Architecture, how: Widening, changed: Tensors, tied: tuple[str, float]) -> None:
    """Undo, in place, the factors of the forward pass that depend on the width, and a tied head's sum over copies."""
    language, growth = architecture.head.language, math.sqrt(how.new / how.old)
    if architecture.embedding.scaled and architecture.embedding.d_embed is None:
        changed["embedding.tokens.weight"] = changed["embedding.tokens.weight"] / growth
    if language is not None and language.scaled:
        weights = (f"head.language.{part}.weight" for part in ("transform", "projection", "output"))
        first = next((name for name in weights if name in changed), None)
        if first is not None:  # a tied table that reads the stream itself is not scaled: the norm before it is
            changed[first] = changed[first] * growth
    norm, factor = tied
    for part in ("weight", "bias"):
        if f"{norm}.{part}" in changed:
            changed[f"{norm}.{part}"] = changed[f"{norm}.{part}"] * factor
    if norm and norm != _HEAD_NORM:
        for name in ("head.pooler.weight", "head.classifier.weight"):  # they read the same norm
            if name in changed and not (name == "head.classifier.weight" and "head.pooler.weight" in changed):
                changed[name] = changed[name] / factor


_HEAD_NORM = "head.language.norm"


def _tied_factor(architecture: Architecture, size: int) -> tuple[str, float]:
    """The norm in front of a tied table that reads the stream, and what it is multiplied with; "" and 1 for none.

    Raises:
        RequestError: there has to be one and is none.
    """
    language = architecture.head.language
    if language is None or not language.tied or architecture.embedding.d_embed is not None:
        return "", 1.0
    growth = math.sqrt(size / architecture.d_model)
    factor = (growth if architecture.embedding.scaled else 1.0) / find_widening(architecture, size).copies
    if language.transform is not None:
        return _HEAD_NORM, factor
    factor *= growth if language.scaled else 1.0
    norm = _last_norm(architecture)
    if norm is None and factor != 1.0:
        raise RequestError(
            f"d_model={size}: the tied head has to be scaled by {factor:.4g}, and no norm stands before it alone; "
            "add tied=false, which gives the head a table of its own"
        )
    return norm or "", factor


def _last_norm(architecture: Architecture) -> str | None:
    """The norm whose output is the last hidden state and nothing else, by module name."""
    name, stack = list(architecture.stacks)[-1]
    if stack.final_norm:
        return f"{name}.norm"
    last = stack.feed_forward_index(stack.n_layers - 1)
    users = [layer for layer in range(stack.n_layers) if stack.feed_forward_index(layer) == last]
    return f"{name}.feed_forward.{last}.norm" if stack.norm_position == "post" and len(users) == 1 else None
