"""What a model's predictions feel of each norm's output: which directions of the stream matter, and how much.

The stream moves most in some directions and is listened to in others. Change a norm's output h by a small e: the
predictions then differ, in nats a token, by ½ eᵀGe on average, where G is the Fisher information (Amari 1998) with
respect to h. It is gathered as the second moment of gradients, G = E[g gᵀ] with g = ∂(−log p(y)) / ∂h, for labels y
that are drawn from what the model itself predicts. The text's own labels would give another matrix (Kunstner et al.
2019), and need to be there.

A classifier's labels are drawn from its predictions in the same way. What has no language head and no classifier is
read as it is: every direction of its last stream then counts alike, and the gradient is that of a standard normal
draw's product with it.

Text goes through the model a few rows at a time, and each layer is run again in the backward pass: what is kept until
then is the stream between the layers, and a streamed model holds no more than one layer's weights. The logits go a few
at a time, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lathe.model.transformer import Transformer
from lathe.reshape.calibrate import Batch, Ear, heard, unit
from lathe.reshape.spill import Tensors, release
from lathe.reshape.stream import blank, heads_held
from lathe.reshape.walk import asked_rows, left, stack_of, standing, token_rows

MOST_TOKENS = 2048  # of a batch, at once
MOST_LOGITS = 2**22  # 16 MiB


@dataclass(frozen=True)
class Sensitivity:
    """What was seen at each norm.

    Args:
        rows: the norms' inputs at some tokens, each divided by its size as the norm does, in float32: N × D; none where
            none were asked for.
        felt: G of each norm's output for one prediction, summed over the tokens that it was made from: D × D.
    """

    rows: Tensors
    felt: Tensors


def sensitivity(
    model: Transformer,
    batches: Sequence[Batch],
    tokens: Mapping[str, int],
    *,
    least_rows: int,
    generator: torch.Generator,
) -> Sensitivity:
    """Run the text through the model, forward and back.

    Args:
        tokens: the norms, and how many tokens of the text pass each.
        least_rows: of how many tokens, spread evenly over the text, the norms' inputs are kept at least, where there
            are as many (`rows_kept`); 0 keeps none.
        generator: draws the labels.
    """
    seen = Sensitivity(blank(model), blank(model))
    asked, norms = 0, {name: _Norm(name, count, least_rows, seen) for name, count in tokens.items()}
    with _recomputing(model):
        for batch in _parts(batches):
            asked += _forward_and_back(model, batch, norms, generator)
            release()  # what is kept lies between what is not
    for name in norms:
        seen.felt[name] = seen.felt[name] / max(asked, 1)
    return seen


def rows_kept(tokens: int, least: int) -> int:
    """Of how many tokens a norm's inputs are kept: all where there are fewer than `least`, else never twice as many."""
    every = _every(tokens, least)
    return -(-tokens // every) if every else 0


def _every(tokens: int, least: int) -> int:
    return max(tokens // least, 1) if least else 0


class _Norm:
    """One norm: every so manieth token's input, and the gradients of its output, put to what was seen before.

    They are put there at once, because those of all norms together may be larger than the model.

    Args:
        tokens: that will pass it.
        least: of how many the inputs are kept at least; 0 for none.
    """

    def __init__(self, name: str, tokens: int, least: int, seen: Sensitivity) -> None:
        self._name, self._seen = name, seen
        self._every, self._all = _every(tokens, least), rows_kept(tokens, least)
        self._passed = self._kept = 0

    def listen(self, given: Tensor, out: Tensor, tokens: Tensor, *, centred: bool) -> None:
        """What passes the norm once, and which of its rows are tokens; where layers share it, several times."""
        if self._every:
            self._keep(given.detach().flatten(0, -2)[tokens], centred=centred)

        def back(gradient: Tensor) -> None:
            wide = gradient.detach().flatten(0, -2)[tokens].to("cpu", torch.float64)
            more_DD, known_DD = wide.T @ wide, self._seen.felt.get(self._name)
            self._seen.felt[self._name] = more_DD if known_DD is None else known_DD.add_(more_DD)

        out.register_hook(back)

    def _keep(self, every_ND: Tensor, *, centred: bool) -> None:
        rows_ND = unit(every_ND[-self._passed % self._every :: self._every], centred=centred).cpu().float()
        self._passed += len(every_ND)
        all_ND = self._seen.rows.get(self._name)
        if all_ND is None:
            all_ND = torch.zeros(self._all, rows_ND.shape[1])
        all_ND[self._kept : self._kept + len(rows_ND)] = rows_ND
        self._kept += len(rows_ND)
        self._seen.rows[self._name] = all_ND


def _forward_and_back(model: Transformer, batch: Batch, norms: Mapping[str, _Norm], generator: torch.Generator) -> int:
    """One batch; how many predictions were asked of it."""
    starts: list[Tensor] = []
    listens = True

    def enter(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        # The gradients end here: no weight gets one.
        starts.append(given[0].detach().requires_grad_())
        return (starts[-1], *given[1:])

    def ear(name: str) -> Ear:
        centred = isinstance(model.get_submodule(name), nn.LayerNorm)

        def hear(given: Tensor, out: Tensor) -> None:
            if listens:  # not when the backward pass runs a layer again
                norms[name].listen(given, out, token_rows(model, name, out.shape[:-1], batch), centred=centred)

        return hear

    with ExitStack() as stack, torch.enable_grad():
        for name, _ in model.architecture.stacks:
            stack.callback(stack_of(model, name).input.register_forward_pre_hook(enter).remove)
        stack.enter_context(heard(model, {name: ear(name) for name in norms}))
        left_BTD = left(model, batch)
        listens = False
        gradient_BTD, asked = _at_the_end(model, batch, left_BTD.detach(), generator)
        torch.autograd.grad(left_BTD, starts, gradient_BTD)
    return asked


def _at_the_end(model: Transformer, batch: Batch, left_BTD: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """The gradient of the last stream, and how many predictions it is of."""
    asked_N = asked_rows(model, left_BTD.shape[:2], batch).to(left_BTD.device)
    gradient_BTD = torch.zeros_like(left_BTD)
    if model.head.language is not None:
        rows_ND = left_BTD.flatten(0, 1)[asked_N]
        parts = [_of_tokens(model, part_ND, generator) for part_ND in rows_ND.split(_at_once(model))]
        gradient_BTD.flatten(0, 1)[asked_N] = torch.cat(parts) if parts else rows_ND
        return gradient_BTD, len(rows_ND)
    if model.head.classifier is None:
        noise_ND = torch.randn((int(asked_N.sum()), left_BTD.shape[-1]), generator=generator)
        gradient_BTD.flatten(0, 1)[asked_N] = noise_ND.to(left_BTD)
        return gradient_BTD, len(noise_ND)
    return _of_labels(model, batch, left_BTD, asked_N, generator)


def _at_once(model: Transformer) -> int:
    return max(MOST_LOGITS // model.architecture.embedding.vocab_size, 1)


def _of_tokens(model: Transformer, rows_ND: Tensor, generator: torch.Generator) -> Tensor:
    """The gradients of some rows by tokens drawn from what the language head says."""
    head = model.head.language
    assert head is not None
    rows_ND = rows_ND.requires_grad_()
    with heads_held(model):
        logits_NV = head(rows_ND[None], model.embedding.tokens)[0]
        return torch.autograd.grad(_surprise(logits_NV, generator), rows_ND)[0]


def _of_labels(
    model: Transformer, batch: Batch, left_BTD: Tensor, asked_N: Tensor, generator: torch.Generator
) -> tuple[Tensor, int]:
    """The gradient by labels drawn from what the classifier says."""
    left_BTD = left_BTD.requires_grad_()
    with standing(model, left_BTD), heads_held(model):
        logits: Tensor = model(**batch).logits
    if model.head.token == "each":  # one or more labels for every token
        logits = logits.flatten(0, 1)[asked_N]
    if logits.dim() == 1:  # a mark, yes or no: two classes, of which one has the logit 0
        logits = torch.stack((torch.zeros_like(logits), logits), -1)
    if logits.shape[-1] > 1:
        loss = _surprise(logits, generator)
    else:  # a number, with normal errors
        loss = (logits * torch.randn(logits.shape, generator=generator).to(logits)).sum()
    return torch.autograd.grad(loss, left_BTD)[0], len(logits)


def _surprise(logits_NV: Tensor, generator: torch.Generator) -> Tensor:
    """−log p(y), summed, of labels drawn from the logits."""
    given_NV = logits_NV.detach().to("cpu", torch.float32).softmax(-1)
    drawn_N = torch.multinomial(given_NV, 1, generator=generator)[:, 0].to(logits_NV.device)
    return nn.functional.cross_entropy(logits_NV, drawn_N, reduction="sum")


def _parts(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The batches, a few rows at a time: what the backward pass needs of a batch is held at once."""
    for batch in batches:
        rows = len(next(iter(batch.values())))
        longest = max(tensor[:1].numel() for tensor in batch.values())
        some = max(MOST_TOKENS // max(longest, 1), 1)
        for start in range(0, rows, some):
            yield {key: tensor[start : start + some] for key, tensor in batch.items()}


@contextmanager
def _recomputing(model: Transformer) -> Iterator[None]:
    """The backward pass runs each layer again: neither what it computed is kept until then, nor streamed weights."""
    training, before = model.training, [stack_of(model, name).checkpointing for name, _ in model.architecture.stacks]
    model.eval()
    model.set_checkpointing(True)
    try:
        yield
    finally:
        model.train(training)
        for (name, _), was in zip(model.architecture.stacks, before):
            stack_of(model, name).checkpointing = was
