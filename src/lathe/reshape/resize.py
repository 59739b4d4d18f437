"""Turn the sizes that were asked for into operations, and carry them out one after the other.

Each field that changes belongs to one operation, which a planner answers with (`lathe.reshape.operation`). What is cut
is cut before anything grows, so that text is only ever run through the model that it was written for, or a smaller
one; and layers go before heads and neurons, so that these are ranked in the layers that stay.

What a change drags along is added first, by one rule: where a stack's heads filled the width exactly and the model's
family insists on that, they still do, at another `d_head`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lathe.adapt import adapter_names, folded_tensors
from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.families import objections
from lathe.model.transformer import Transformer
from lathe.reshape import convert, cut, factorise, grow, grow_heads, grow_width, prune, prune_layers
from lathe.reshape.calibrate import Batch, there
from lathe.reshape.operation import Context, Operation, Planner
from lathe.reshape.share import plan_sharing
from lathe.reshape.spill import Tensors
from lathe.reshape.state import State, Step
from lathe.reshape.stream import StreamedTransformer, weights_of
from lathe.reshape.vocabulary import Renewed, Vocabulary, plan_vocabulary, settle
from lathe.text.tokenizer import Tokenizer

METHODS = ("rotate", "select", "truncate")
CHANGEABLE = (
    "d_model, d_embed, d_ff, d_head, n_heads, n_kv_heads, n_layers, sharing, vocab_size, family, "
    "and tied from true to false"
)
_OWN_FORM = "Lathe's own form can hold it as it is (--own-form, from Python own_form=True)"


@dataclass(frozen=True)
class Resized:
    """A reshaped model's architecture and tensors, its tokenizer, and what was done to get there.

    Args:
        vocabulary: how the new ids go back to the old, where they changed.
    """

    architecture: Architecture
    tensors: Mapping[str, Tensor]
    steps: tuple[Step, ...]
    tokenizer: Tokenizer | None = None
    vocabulary: Renewed | None = None

    def model(self) -> Transformer:
        """The model, ready to evaluate; streamed where the source was, else ready to train as well."""
        if isinstance(self.tensors, Tensors):
            return StreamedTransformer(self.architecture, self.tensors)
        model = Transformer(self.architecture, device="meta")
        model.load_state_dict(dict(self.tensors), assign=True)
        return model.requires_grad_(True).eval()


# Called after each operation with the model as it is then, its tokenizer, and the operation's steps.
After = Callable[[Transformer, "Tokenizer | None", Sequence[Step]], None]


def resize(
    model: Transformer,
    changes: Mapping[str, Any],
    *,
    calibrate: Sequence[Batch] = (),
    method: str = "rotate",
    search: int | None = None,
    refit: bool | None = None,
    share: str = "mean",
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    own_form: bool = False,
    vocabulary: Vocabulary | None = None,
    reserved: Iterable[int] = (),
    after: After | None = None,
) -> Resized:
    """Other sizes for a trained model.

    Args:
        changes: fields of the architecture to their new values, as `Architecture.with_` takes them.
        calibrate: batches of keyword arguments of the model, of the kind of text that it is used on;
            what only grows, and `truncate`, need none.
        method: how a width is cut: `rotate`, `select` or `truncate`.
        search: how many steps the basis of a rotation is looked for (`lathe.reshape.search`), 0 for the principal one;
            None: 100 with a refit, or fewer where the model is so large that they would take an hour.
        refit: whether the rest of the model is then fitted to its parent by least squares on the text; None: with
            `rotate` and `select`, which read text anyway.
        share: what layers that come to share weights start from: `mean`, aligned, or `middle`.
        seed: of the weights that growth draws, and of the labels that a basis is looked for by.
        tokenizer: the model's, for what changes the vocabulary.
        vocabulary: what the new vocabulary shall hold; a smaller `vocab_size` alone keeps the tokens that `calibrate`
            uses most.
        reserved: token ids to keep in any case, such as those in generation settings.
        own_form: the result may be one that its family's files cannot hold.
        after: called after each operation, to measure what it cost.

    Raises:
        RequestError: a change that cannot be made, an unknown method, or no calibration text where it is needed.
    """
    if adapter_names(model):  # what the model computes now, in weights of its own axes
        plain = Transformer(model.architecture, device="meta")
        plain.load_state_dict(folded_tensors(model), assign=True)
        model = plain.train(model.training)
    calibrate = there(calibrate, model.device)
    settled = settle(model.architecture, changes, tokenizer, vocabulary, batches=calibrate, reserved=reserved)
    if settled is not None:
        others = {name: value for name, value in changes.items() if not is_vocabulary(model.architecture, name)}
        changes = {**others, **settled.changes}
    target, operations = planned(
        model.architecture,
        changes,
        method=method,
        search=search,
        refit=refit,
        share=share,
        own_form=own_form,
        renews=settled is not None,
    )
    state = State(model.architecture, weights_of(model))
    steps: list[Step] = []
    context = Context(model, state, calibrate, torch.Generator().manual_seed(seed), tokenizer, settled)
    for operation in operations:
        state, done = operation.run(context, state)
        steps.extend(done)
        if after is not None:
            after(context.current(state), context.tokenizer, done)
    return _finished(state, target, model, steps, context)


def is_vocabulary(source: Architecture, name: str) -> bool:
    """Whether a field of an architecture is the vocabulary's size."""
    return source.paths(name) == ["embedding.vocab_size"]


def planned(
    source: Architecture,
    changes: Mapping[str, Any],
    *,
    method: str = "rotate",
    search: int | None = None,
    refit: bool | None = None,
    share: str = "mean",
    own_form: bool = False,
    renews: bool = False,
) -> tuple[Architecture, list[Operation]]:
    """The architecture that the changes lead to, and the operations on the way; no weights are touched.

    Args:
        renews: whether the vocabulary becomes another even where its size stays.

    Raises:
        RequestError: a change that cannot be made, or an unknown method.
    """
    check_how(method, search, refit)
    changes = with_followers(source, changes, own_form=own_form)
    target = source.with_(changes)
    if target.family != source.family:
        target = target.with_(convert.followers(target))
    return target, _operations(source, target, _planners(method, search, refit, share, renews))


def check_how(method: str, search: int | None, refit: bool | None) -> None:
    """Refuse words on how a width is cut that cannot be, alone or together.

    Raises:
        RequestError: the first one.
    """
    if method not in METHODS:
        raise RequestError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    if search is not None and (type(search) is not int or search < 0):
        raise RequestError(f"search={search!r}: expected a number of steps, 0 for none; leave it out for the usual one")
    if search is not None and method != "rotate":
        raise RequestError(
            f"search={search} with method={method}: only a rotation has a basis that can be looked for; leave out one"
        )
    if search and refit is False:
        raise RequestError(
            f"search={search} with refit={refit}: the search counts on readers that are fitted afterwards, and makes a "
            "cut without them worse; leave out one"
        )


def with_followers(source: Architecture, changes: Mapping[str, Any], *, own_form: bool = False) -> dict[str, Any]:
    """The changes and what they drag along, where the family could not hold the result without it.

    Args:
        own_form: where no whole number of channels per head fills the width, leave the heads as they are.

    Raises:
        RequestError: where no whole number of channels per head fills the width.
    """
    out = {**factorise.followers(source, source.with_(changes)), **changes}
    target = source.with_(out)
    if not objections(target):
        return out
    given = {path for change in changes for path in source.paths(change)}
    for name, stack in source.stacks:
        new = dict(target.stacks)[name].attention
        filled = stack.attention.d_q == source.d_model
        is_given = not given.isdisjoint({f"{name}.attention.d_head", f"{name}.attention", name})
        if not filled or new.d_q == target.d_model or is_given:
            continue
        if stack.positions.kind == "rotary":
            continue
        if target.d_model % new.n_heads:
            if own_form:
                continue
            if new.n_heads != stack.attention.n_heads:
                raise RequestError(
                    f"{name}.n_heads={new.n_heads}: the heads have to fill the width of {target.d_model}; choose a "
                    f"divisor of {target.d_model}, or give d_model too; {_OWN_FORM}"
                )
            raise RequestError(
                f"d_model={target.d_model}: {name} has {new.n_heads} heads that fill the width, and they cannot fill "
                f"this one; choose {_multiples(target.d_model, new.n_heads)}, or give {name}.attention.n_heads too; "
                f"{_OWN_FORM}"
            )
        out[f"{name}.attention.d_head"] = target.d_model // new.n_heads
    return out


def _multiples(near: int, of: int) -> str:
    """The multiples of a number on both sides of another."""
    below, above = near // of * of, near // of * of + of
    return f"a multiple of {of} ({below} or {above})" if below else f"a multiple of {of}"


def _planners(method: str, search: int | None, refit: bool | None, share: str, renews: bool) -> tuple[Planner, ...]:
    """Who may change what, in the order in which it is done."""
    return (
        convert.plan_family,
        grow.plan_untying,
        factorise.plan_embedding,
        prune_layers.plan_layers,
        partial(plan_sharing, method=share),
        prune.plan_heads,
        prune.plan_feed_forward,
        cut.plan_heads,
        partial(cut.plan_width, method=method, search=search, refitted=refit),
        grow_width.plan_width,
        grow_heads.plan_heads,
        grow.plan_feed_forward,
        grow.plan_depth,
        partial(plan_vocabulary, is_asked=renews),
    )


def _operations(source: Architecture, target: Architecture, planners: Sequence[Planner]) -> list[Operation]:
    """What has to be done, in order; a change that nothing does is an error."""
    operations: list[Operation] = []
    done = source
    for planner in planners:
        for operation in planner(done, target):
            operations.append(operation)
            done = done.with_(operation.changes)
    if done != target:
        names = ", ".join(_differences(done.to_dict(), target.to_dict()))
        raise RequestError(f"cannot change {names} of a trained model; resize changes {CHANGEABLE}")
    return operations


def _finished(state: State, target: Architecture, model: Transformer, steps: list[Step], context: Context) -> Resized:
    if state.architecture.d_model != target.d_model:
        raise AssertionError(f"reshaping ended at {state.architecture.d_model}, not at {target.d_model}")
    cast = state.cast(model.dtype)
    if isinstance(model, StreamedTransformer):
        return Resized(cast.architecture, cast.tensors, tuple(steps), context.tokenizer, context.vocabulary)
    # What operations made is on the CPU, wherever the model is. What none touched is still the model's own memory, and
    # layers may hold one tensor together: training one would change the other.
    taken = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    own: dict[str, Tensor] = {}
    for name, made in cast.tensors.items():
        tensor = made.to(model.device)
        own[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in taken else tensor
        taken.add(own[name].untyped_storage().data_ptr())
    return Resized(cast.architecture, own, tuple(steps), context.tokenizer, context.vocabulary)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> list[str]:
    out: list[str] = []
    for key, value in one.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict) and isinstance(other[key], dict):
            out += _differences(value, other[key], here)
        elif value != other[key]:
            out.append(here)
    return out
