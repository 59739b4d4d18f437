"""Texts in, vectors or labels out: many texts through a model that reads and does not write.

Texts are sorted by length, so that a batch holds few pads, the longest first, so that what does not fit is known at
once. A batch holds as many rows as half of the free memory is planned for: a pass without a backward one keeps nothing
of a layer, so it is the largest layer's activations that count (`lathe.planner.activations`). Pads are masked and no
part of a mean, so a text's vector is what it is alone, but for rounding.

Shape suffixes: B rows, T positions, N texts, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from lathe.engine import Engine
from lathe.engine.choose import Reader, reader
from lathe.errors import RequestError
from lathe.generate.decode import evaluating
from lathe.generate.memory import free_bytes
from lathe.generate.rows import explain_no_numbers
from lathe.generate.text import is_empty
from lathe.model.output import Output
from lathe.model.transformer import Transformer
from lathe.planner.activations import activations
from lathe.planner.quantities import bytes_text
from lathe.text.batch import pad
from lathe.text.tokenizer import Tokenizer

Pool = Literal["mean", "first", "pooled"]
POOLS: tuple[Pool, ...] = ("mean", "first", "pooled")

# Tokens, pads counted, that one batch holds at most, unless a single text is longer.
_AT_ONCE = 8192
_SHARE = 0.5


@dataclass(frozen=True)
class Label:
    """What a classifier says of one text.

    Args:
        text: as it was given.
        label: the likeliest label's name.
        number: its number.
        probabilities: of every label, by number.
    """

    text: str
    label: str
    number: int
    probabilities: list[float]


@overload
def encode(
    model: Transformer,
    texts: Sequence[str],
    pool: Pool = "mean",
    *,
    tokenizer: Tokenizer | None = None,
    engine: str | Engine = "auto",
) -> Tensor: ...
@overload
def encode(
    model: Transformer,
    texts: Sequence[str],
    pool: None,
    *,
    tokenizer: Tokenizer | None = None,
    engine: str | Engine = "auto",
) -> list[Tensor]: ...


def encode(
    model: Transformer,
    texts: Sequence[str],
    pool: Pool | None = "mean",
    *,
    tokenizer: Tokenizer | None = None,
    engine: str | Engine = "auto",
) -> Tensor | list[Tensor]:
    """A vector for each text, in the order given, float32 on the CPU.

    Args:
        model: its last hidden states are read: the encoder's where there is one, else the decoder's.
        texts: of any lengths, within the model's positions.
        pool: "mean" of a text's tokens, those that the tokenizer sets around it included; the "first" token's; what
            the model's own pooler makes of it, "pooled"; None for every token's.
        tokenizer: the model's own where left out.
        engine: what computes: `auto`, `native`, `torch`, or an `Engine` of the model (`lathe.engine.choose`).

    Returns:
        N × D; for `pool=None` a list of N, each T × D.

    Raises:
        RequestError: no text, one without a token or with more than the positions, no tokenizer, an unknown `pool`,
            "pooled" of a model without a pooler, weights that are no numbers, a text that the memory does not hold.

    >>> import lathe
    >>> from lathe.text import train_tokenizer
    >>> tokenizer = train_tokenizer(["to be or not to be"] * 9, 18, convention="bert")
    >>> sizes = {"d_model": 16, "d_ff": 16, "n_layers": 1, "n_heads": 2, "d_head": 8, "vocab_size": 40}
    >>> model = lathe.Model(lathe.preset("bert-base-uncased").with_(sizes), seed=0, tokenizer=tokenizer)
    >>> lathe.encode(model, ["to be", "or not to be"]).shape
    torch.Size([2, 16])
    """
    if pool is not None and pool not in POOLS:
        raise RequestError(f"pool={pool!r}: expected one of {', '.join(POOLS)}, or none for every token's vector")
    spec = model.architecture.head.pooler
    if pool == "pooled" and (spec is None or spec.token == "each"):
        raise RequestError("pool='pooled': this model has no pooler; pass pool='mean' or 'first'")

    through = reader(model, engine)

    def read(ids_BT: Tensor, mask_BT: Tensor) -> list[Tensor]:
        if pool == "pooled":
            pooled = _forward(through, ids_BT, mask_BT).pooler_output
            assert pooled is not None
            return list(pooled)
        hidden_BTD = _hidden(through, ids_BT, mask_BT)
        if pool == "first":
            return list(hidden_BTD[:, 0])
        if pool == "mean":
            weights_BT1 = mask_BT[..., None].to(hidden_BTD.dtype)
            return list((hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1))
        # Copied, or every row would keep its batch with all its pads.
        return [row[:length].clone() for row, length in zip(hidden_BTD, mask_BT.sum(1).tolist())]

    rows = _all(model, texts, tokenizer, read)
    return rows if pool is None else torch.stack(rows)


def classify(
    model: Transformer,
    texts: Sequence[str],
    *,
    tokenizer: Tokenizer | None = None,
    names: Mapping[int | str, str] | None = None,
    engine: str | Engine = "auto",
) -> list[Label]:
    """The label of each text, in the order given.

    Args:
        model: a classifier of whole texts.
        names: the labels' names by number; the model's own (`id2label`) where left out, else `LABEL_0` and so on.

    Raises:
        RequestError: no classifier of whole texts, or of one number (regression) or several labels at once, and what
            `encode` refuses.

    >>> import lathe
    >>> from lathe.text import train_tokenizer
    >>> tokenizer = train_tokenizer(["to be or not to be"] * 9, 18, convention="bert")
    >>> sizes = {"d_model": 16, "d_ff": 16, "n_layers": 1, "n_heads": 2, "d_head": 8, "vocab_size": 40}
    >>> shape = lathe.preset("bert-base-uncased", head="classification").with_(sizes)
    >>> labels = lathe.classify(lathe.Model(shape, seed=0, tokenizer=tokenizer), ["to be", "or not to be"])
    >>> [each.text for each in labels], len(labels[0].probabilities)
    (['to be', 'or not to be'], 2)
    """
    spec, config = model.architecture.head, getattr(model, "config", {})
    if spec.classifier is None or spec.language is not None or (spec.pooler and spec.pooler.token == "each"):
        raise RequestError("this model is no classifier of texts; expected one with a classifier on a pooled state")
    if spec.classifier.n_labels < 2 or config.get("problem_type") == "multi_label_classification":
        raise RequestError("this model gives a number, or several labels at once; expected one label of two or more")
    found = names if names is not None else config.get("id2label") or {}
    called = {int(number): name for number, name in found.items()}

    through = reader(model, engine)

    def read(ids_BT: Tensor, mask_BT: Tensor) -> list[Tensor]:
        logits = _forward(through, ids_BT, mask_BT).logits
        assert logits is not None
        return list(logits.float().softmax(dim=-1))

    labels = []
    for text, probabilities in zip(texts, _all(model, texts, tokenizer, read)):
        number = int(probabilities.argmax())
        labels.append(Label(text, called.get(number, f"LABEL_{number}"), number, probabilities.tolist()))
    return labels


def _all(
    model: Transformer,
    texts: Sequence[str],
    tokenizer: Tokenizer | None,
    read: Callable[[Tensor, Tensor], list[Tensor]],
) -> list[Tensor]:
    """What `read` makes of each text, in the order given."""
    tokenizer = tokenizer or getattr(model, "tokenizer", None)  # `lathe.Model` carries its own
    if tokenizer is None:
        raise RequestError("this model has no tokenizer to read texts with; pass tokenizer=")
    if isinstance(texts, str) or not texts:
        raise RequestError("expected a list of at least one text; for a single one pass [text]")
    rows = tokenizer.encode_batch(texts)
    _check_lengths(model, rows)
    for number, (text, row) in enumerate(zip(texts, rows), start=1):
        if is_empty(tokenizer, text, row):
            raise RequestError(f"text {number} is {text!r} and holds no token; expected some text")
    found: dict[int, Tensor] = {}
    with evaluating(model), torch.no_grad():
        for chosen in list(_batches(model, [len(row) for row in rows])):
            # The mask hides the pads, so any id serves.
            batch = pad([rows[number] for number in chosen], tokenizer.pad_id or 0, side="right").to(model.device)
            for number, result in zip(chosen, read(batch["input_ids"], batch["attention_mask"])):
                found[number] = result.float().cpu()
            if not all(bool(found[number].isfinite().all()) for number in chosen):
                explain_no_numbers(model)
    return [found[number] for number in range(len(rows))]


def _batches(model: Transformer, lengths: Sequence[int]) -> Iterator[list[int]]:
    """The numbers of the texts of each batch, from the longest text to the shortest."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    free = free_bytes(model.device)
    at = 0
    while at < len(order):
        longest = lengths[order[at]]
        rows = max(1, _AT_ONCE // longest)
        if free is not None:
            kept = max(stack.layer for stack in activations(model.architecture, 1, longest).stacks)
            each = max(1, kept * model.dtype.itemsize // torch.float32.itemsize)
            if each > free:
                raise RequestError(
                    f"text {order[at] + 1} has {longest:,} tokens and does not fit into memory: reading it takes "
                    f"{bytes_text(each)} and {bytes_text(free)} are free; shorten it"
                )
            rows = max(1, min(rows, int(free * _SHARE) // each))
        yield order[at : at + rows]
        at += rows


def _check_lengths(model: Transformer, rows: Sequence[Sequence[int]]) -> None:
    limits = [stack.positions.limit for _, stack in model.architecture.stacks if stack.positions.limit is not None]
    for number, row in enumerate(rows, start=1):
        if limits and len(row) > min(limits):
            raise RequestError(
                f"text {number} has {len(row):,} tokens, more than this model's {min(limits):,} positions; shorten it"
            )


def _hidden(model: Reader, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The last hidden states, B × T × D, of the encoder where there is one."""
    if model.encoder is not None:
        return model.encode(ids_BT, mask_BT).hidden_BSD
    hidden_BTD = _forward(model, ids_BT, mask_BT).last_hidden_state
    assert hidden_BTD is not None
    return hidden_BTD


def _forward(model: Reader, ids_BT: Tensor, mask_BT: Tensor) -> Output:
    out: Output = model(ids_BT, mask_BT, logits_to_keep=1)
    return out
