"""The last part of a refit: what reads the last stream, and the norm and the table that have to read with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lathe.blueprint import Parameter, blueprint
from lathe.model.heads import LanguageHead
from lathe.reshape.calibrate import Ear, heard
from lathe.reshape.fitting import Both, Fitting, Site, linear_tensors
from lathe.reshape.refit_predictions import follow_predictions
from lathe.reshape.regress import Linear, best
from lathe.reshape.transform import fitted_transform, onto_table, products
from lathe.reshape.walk import asked_rows, read_by, stack_of, token_rows

_MOST_ROWS = 16_384
_TABLE_RIDGES = (0.03, 0.3, 3.0, 30.0)
_TRANSFORM_RIDGES = (1e-4, 1e-2)
_OTHERS = (0.0, 0.1, 1.0)  # what a row counts that the head is asked nothing about
_TOKENS = "embedding.tokens.weight"
_OUTPUT = "head.language.output"


def head_products(work: Fitting, table: str) -> tuple[Tensor, Tensor]:
    """R'ᵀR' and R'ᵀR of the head's tables, each token as often as the parent predicts it.

    A softmax does not see what is added to every token's logit alike, so the tables count about their mean.
    """
    scales = _scales(work)
    gram, reading = products(work.state.tensors[table], work.before.tensors[table], work.divergence.often)
    return gram * scales[0] ** 2, reading * scales[0] * scales[1]


def last_site(work: Fitting, name: str, rows: Callable[[int], Tensor] | None = None) -> Site:
    """A stack's last norm, where the streams stand behind the last layer; on the rows that the head is asked about."""

    def run(ears: Mapping[str, Ear], number: int, which: int) -> None:
        model = (work.parent, work.child)[which]
        with heard(model, ears):
            stack_of(model, name).leave(work.streams[which][number].x_BTD)

    return Site(run, rows or (lambda number: _asked(work, number)), lambda model: ())


def _asked(work: Fitting, number: int) -> Tensor:
    return asked_rows(work.child, work.streams[1].shape(number), work.batches[number])


def fit_head(work: Fitting, pooled: Tensor | None) -> None:
    """What reads the last stream; from here on the child's predictions can judge, since little stands behind."""
    work.now = work.divergence(work.child)
    head = work.state.architecture.head
    name = list(work.state.architecture.stacks)[-1][0]
    language = head.language
    if language is not None and language.transform is not None:
        _transform(work, name)
    elif language is not None:
        own = [p for p in _head_readers(work) if p.name.startswith("head.language.")]
        for parameter in own:
            module = parameter.name.removesuffix(".weight")
            _fit_reader(work, module)
        if language.tied and not own:
            _tied_table(work, name)
    if head.pooler is not None and head.pooler.activation is not None:
        _pooler(work, pooled)
    if head.classifier is not None:
        work.fit_readers("head.classifier", ["head.classifier"], _at_head(work, "head.classifier"))
    work.now = work.divergence(work.child)


def _head_readers(work: Fitting) -> Iterator[Parameter]:
    for parameter in blueprint(work.state.architecture):
        if parameter.component != "head" or parameter.role != "reader" or parameter.is_bias:
            continue
        if parameter.axes[-1].group == "residual" and parameter.tied_to is None:
            yield parameter


def _at_head(work: Fitting, module: str) -> Both:
    """What a module of the head reads in the child and in the parent."""
    name, pairs = list(work.state.architecture.stacks)[-1][0], Both()
    with work.keeping(lambda model: (model.head, model.embedding.tokens)):
        for number, batch in enumerate(work.batches):
            read: list[Tensor] = []
            for which, model in enumerate((work.parent, work.child)):
                left_BTD = stack_of(model, name).leave(work.streams[which][number].x_BTD)
                given = read_by(model, module, batch, left_BTD)
                # One row a sequence where there are two dimensions.
                read.append(given if given.dim() == 2 else given.flatten(0, -2)[_asked(work, number)])
            (pairs.fitted if number < work.n_fitted else pairs.held).add(read[1], read[0])
    return pairs


def _tied_table(work: Fitting, name: str) -> None:
    """A compromise between the table that writes the stream and the one that reads it best."""
    scales = _scales(work)
    dropout = f"{name}.output_dropout"
    pairs = work.gather(
        last_site(work, name),
        [dropout],
        lambda p, c: (c[dropout][1].double() * scales[0], p[dropout][1].double() * scales[1], None),
    )
    wanted = pairs.fitted.through(work.before.tensors[_TOKENS].detach(), None)
    for ridge in _TABLE_RIDGES:
        # The least ridge that helps: what is held more fits the head less. Put away at once, a table is large.
        fitted = work.state.blank()
        for candidate in Linear(work.state.wide(_TOKENS), None).fits(wanted, (ridge,)):
            fitted[_TOKENS] = candidate.weight
            del candidate
        if fitted and work.attempt(_TOKENS, fitted):
            return
    work.left.append(_TOKENS)


def _transform(work: Fitting, name: str) -> None:
    """A masked-LM head's transform, which is no linear layer: its rows are kept, as many as it takes."""
    language = work.state.architecture.head.language
    assert language is not None
    with work.keeping(lambda model: (model.head, model.embedding.tokens)):
        x_ND, old_NE, asked_N, h_ND = _transform_rows(work, name)
    read = _TOKENS if language.tied else f"{_OUTPUT}.weight"
    onto = onto_table(work.state.tensors[read], work.before.tensors[read], work.divergence.often)
    before, is_kept = work.state, False
    for others, ridge in itertools.product(_OTHERS, _TRANSFORM_RIDGES):
        # Rows that are asked nothing say less of what is asked, but where these are few they say it of more text.
        weight_N = torch.where(asked_N, 1.0, others).double()
        if not float(weight_N.sum()) > 0:
            continue
        changed, step = fitted_transform(work.before, before, x_ND, old_NE, onto.T, weight_N=weight_N, ridge=ridge)
        is_kept |= work.attempt("head.language.transform", changed, step.detail["unexplained"])
        if bool(asked_N.all()) and ridge == _TRANSFORM_RIDGES[-1]:
            break
    if not is_kept:
        work.left.append("head.language.transform")
    if not bool(asked_N.any()):
        return
    scales = _scales(work)
    with work.keeping(lambda model: (model.head, model.embedding.tokens)):
        led = follow_predictions(
            _language(work, 1),
            work.child.embedding.tokens,
            x_ND[asked_N] / scales[0],
            _language(work, 0),
            work.parent.embedding.tokens,
            h_ND[asked_N] / scales[1],
        )
    label = "head.language.transform, by predictions"
    if not work.attempt(label, {f"head.language.{tensor}": value for tensor, value in led.items()}):
        work.left.append(label)


def _transform_rows(work: Fitting, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the child's transform reads, what the parent's norm gives, which rows are asked, the parent's stream."""
    head = _language(work, 0)
    assert head.transform is not None
    assert head.norm is not None
    rows: dict[str, list[Tensor]] = {"x": [], "old": [], "asked": [], "streams": []}
    for number in range(work.n_fitted):
        shape, batch = work.streams[1].shape(number), work.batches[number]
        mask = token_rows(work.child, name, shape, batch)
        child, parent = (
            stack_of(model, name).leave(work.streams[which][number].x_BTD).flatten(0, 1)[mask] * scale
            for which, model, scale in zip((1, 0), (work.child, work.parent), _scales(work))
        )
        rows["x"].append(child.to("cpu", torch.float64))
        rows["streams"].append(parent.to("cpu", torch.float64))
        old = head.norm(head.activation(head.transform(parent)))
        rows["old"].append(old.to("cpu", torch.float64))
        rows["asked"].append(asked_rows(work.child, shape, batch)[mask])
        if sum(map(len, rows["x"])) >= _MOST_ROWS:
            break
    x_ND, old_NE, asked_N, h_ND = (torch.cat(each) for each in rows.values())
    return x_ND, old_NE, asked_N, h_ND


def _language(work: Fitting, which: int) -> LanguageHead:
    """The parent's (0) or the child's (1) language head."""
    head = (work.parent, work.child)[which].head.language
    assert head is not None
    return head


def _pooler(work: Fitting, pooled: Tensor | None) -> None:
    """The pooled channels that stay, each as the parent's was."""
    name = "head.pooler"
    pairs = _at_head(work, name)
    weight, bias = work.parents(name)
    kept = torch.arange(work.state.architecture.d_model) if pooled is None else pooled
    assert bias is not None
    fitted, held = (
        each.through(weight[kept.to(weight.device)], bias[kept.to(bias.device)]) for each in (pairs.fitted, pairs.held)
    )
    chosen, before, missed = best(work.linear(name), fitted, held)
    work.keep(name, linear_tensors(name, chosen), missed, before)


def _fit_reader(work: Fitting, module: str) -> None:
    pairs, onto = _at_head(work, module), None
    if module == "head.language.projection" and work.embed is not None:
        read = _TOKENS if f"{_OUTPUT}.weight" not in work.state.tensors else f"{_OUTPUT}.weight"
        onto = onto_table(work.state.tensors[read], work.before.tensors[read], work.divergence.often)
    work.fit_readers(module, [module], pairs, onto)


def _scales(work: Fitting) -> tuple[float, float]:
    """What the head multiplies the stream with, in the child and in the parent."""
    return _language(work, 1).scale, _language(work, 0).scale
