"""Other sizes for a trained model: as asked, or within a budget; and the training that makes up for it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lathe.adapt import adapter_names
from lathe.api.given import batches_of, require_model, require_plain, require_tokenizer
from lathe.api.model import Model
from lathe.errors import RequestError
from lathe.spec import plain

if TYPE_CHECKING:
    from lathe.reshape.budget_plan import BudgetPlan
    from lathe.reshape.vocabulary import Vocabulary
    from lathe.text.corpus import Corpus

log = logging.getLogger("lathe")


def resize(
    model: Model,
    *,
    calibrate: str | os.PathLike[str] | Iterable[Tensor | Mapping[str, Tensor]] = (),
    method: str = "rotate",
    search: int | None = None,
    refit: bool | None = None,
    share: str = "mean",
    seed: int = 0,
    own_form: bool = False,
    vocabulary: Vocabulary | Corpus | None = None,
    max_parameters: int | str | None = None,
    max_bytes: int | str | None = None,
    max_latency: float | None = None,
    **changes: Any,
) -> Model:
    """A copy of a trained model with other sizes; the model itself is left as it is.

    Args:
        calibrate: text of the kind that the model is used on: a file that `lathe.data.read` opens, of which 65,536
            tokens are drawn and shown to the model as its objective wants them, and a tenth is kept apart to measure
            the loss on; or batches: tensors of token ids, or
            mappings of the model's keyword arguments, where padding is marked by `attention_mask`. What only grows,
            and `truncate`, need none.
        method: how a width is cut: `rotate` (least loss), `select` or `truncate` (for comparison).
        search: how many steps the basis of a rotation is looked for, 0 for the principal one; None: 100 with a refit,
            fewer for a large model. It needs a refit.
        refit: whether the layers are then fitted to the parent's by least squares; None: except with `truncate`. Like
            `method` and `search` it is of a smaller `d_model` or `d_embed`, and refused without one.
        share: what layers that come to share weights start from: `mean`, aligned, or `middle`.
        seed: of the text that is drawn, of the weights that growth draws, and of the labels that a search draws.
        own_form: allow a width that the family's files cannot hold, where the heads would have to fill it.
        vocabulary: text whose tokens are kept, or of which new ones are learnt, as `vocab_size` says: a list of texts
            or a `Path`; or a `lathe.Vocabulary`, which also takes new words, ids, and a multiple to fill up to.
        max_parameters, max_bytes, max_latency: a budget in place of sizes; `plan_budget` says how it is spent.
        changes: fields to new values, as `Architecture.with_` takes them: `d_model=384`.

    Raises:
        RequestError: a change that cannot be made, an unknown method, or no calibration text where it is needed.

    Example:
        >>> import lathe, torch
        >>> tiny = lathe.preset("t5-small").with_(d_model=32, d_ff=64, n_layers=1, vocab_size=64)
        >>> text = torch.randint(2, 64, (4, 16))
        >>> lathe.resize(lathe.Model(tiny, seed=0), d_model=24, calibrate=[text]).architecture.d_model
        24
    """
    from lathe.reshape.at_hand import in_words, stored_digest
    from lathe.reshape.carry_out import Work
    from lathe.reshape.job import Silent
    from lathe.reshape.opening import job_at_hand
    from lathe.reshape.recipe import digest_of
    from lathe.reshape.request import ResizeRequest
    from lathe.reshape.source import Source
    from lathe.reshape.text import TextSettings
    from lathe.reshape.vocabulary import Vocabulary

    require_plain(model, "resize it")
    changes = {name: plain(value) for name, value in changes.items()}
    asked = vocabulary if vocabulary is None or isinstance(vocabulary, Vocabulary) else Vocabulary(vocabulary)
    text, batches = None, []
    if isinstance(calibrate, str | os.PathLike):
        text = TextSettings(file=os.fspath(calibrate), seed=seed)
        require_tokenizer(model, text.file)
    else:
        calibrate = batches = batches_of(model, calibrate)
    how: dict[str, Any] = {"method": method, "search": search, "refit": refit, "share": share}
    how |= {"seed": seed, "own_form": own_form}
    limits: dict[str, Any] = {"max_parameters": max_parameters, "max_bytes": max_bytes, "max_latency": max_latency}
    budget: dict[str, Any] | None = None
    if any(limit is not None for limit in limits.values()):
        if vocabulary is not None:
            raise RequestError("a budget chooses the vocabulary's size by itself: leave vocabulary out, or the budget")
        plan = plan_budget(model, calibrate=calibrate, **limits, **how, **changes)
        log.info("%s", plan)
        changes, budget = plan.changes, plan.to_dict()
    elif not changes and vocabulary is None:
        raise RequestError("nothing to change: give a size, as in d_model=384, a vocabulary, or a budget")
    request = ResizeRequest(
        source=model.name,
        changes=changes,
        **how,
        calibrate=text,
        vocabulary=in_words(asked),
        device=model.device.type,
    )
    where = model.directory if model.directory is not None and model.directory.is_dir() else None
    source = Source(model.name, where, model, model.tokenizer, model.generation, model.config)
    job = job_at_hand(
        request,
        source,
        stored_digest(model, where, model.tokenizer),
        batches=batches,
        vocabulary=asked,
        budget=budget,
        parent=None if model.history is None else model.history.recipe,
    )
    training = model.training
    model.eval()
    try:
        work = Work(job, Silent())
        done = work.resize(changes)
    finally:
        model.train(training)
    log.info("resized: %s", "; ".join(step.name for step in done.steps))
    resized = Model(
        done.architecture,
        done.tensors,
        tokenizer=done.tokenizer,
        generation=work.generation,
        config=work.config,
        device=model.device,
    )
    work.finish()
    work.history.weights = digest_of(resized.tensors())
    resized.steps, resized.history = done.steps, work.history
    return resized


def plan_budget(
    model: Model,
    *,
    calibrate: str | os.PathLike[str] | Iterable[Tensor | Mapping[str, Tensor]],
    max_parameters: int | str | None = None,
    max_bytes: int | str | None = None,
    max_latency: float | None = None,
    effort: int = 2,
    method: str = "rotate",
    search: int | None = None,
    refit: bool | None = None,
    share: str = "mean",
    seed: int = 0,
    own_form: bool = False,
    **changes: Any,
) -> BudgetPlan:
    """The sizes with which a model meets a budget at the least loss, and what each axis was measured to cost.

    Args:
        calibrate: as `resize` takes it. A tenth is kept apart and measured on. From batches of ids the vocabulary is
            not cut: there is no text to show to another tokenizer.
        max_parameters, max_bytes, max_latency: the budget, one of them: `"30M"`, `"40MB"`, milliseconds.
        effort: how many cuts are tried, from 1 on.
        method, search, refit, share, seed, own_form: as `resize` takes them.
        changes: sizes that are set in any case.

    Raises:
        RequestError: no budget, more than one, one that the model meets already, or one that no sizes meet, which
            says the least possible.

    Example:
        >>> import lathe, torch
        >>> tiny = lathe.preset("t5-small").with_(d_model=16, d_ff=16, n_layers=1, n_heads=2, d_head=8, vocab_size=32)
        >>> text = torch.randint(2, 32, (10, 8))
        >>> plan = lathe.plan_budget(lathe.Model(tiny, seed=0), calibrate=[text], max_parameters=2000, effort=1)
        >>> plan.after <= 2000
        True
    """
    from lathe.reshape.budget_cost import read_budget
    from lathe.reshape.budget_job import plan_for
    from lathe.reshape.request import refuse_idle_share
    from lathe.reshape.vocabulary import settings_ids

    require_plain(model, "resize it")
    limits: dict[str, Any] = {"max_parameters": max_parameters, "max_bytes": max_bytes, "max_latency": max_latency}
    settings = read_budget({**limits, "budget.effort": effort})
    if settings is None:
        raise RequestError("no budget: give max_parameters, max_bytes or max_latency")
    refuse_idle_share(share, changes)
    text: str | list[Mapping[str, Tensor]]
    if isinstance(calibrate, str | os.PathLike):
        text = os.fspath(calibrate)
    else:
        text = batches_of(model, calibrate)
    source = Model(model.architecture, model.tensors()) if adapter_names(model) else model
    return plan_for(
        source,
        settings,
        text,
        tokenizer=model.tokenizer,
        fixed={name: plain(value) for name, value in changes.items()},
        how={"method": method, "search": search, "refit": refit, "share": share},
        seed=seed,
        own_form=own_form,
        reserved=frozenset(settings_ids(model.generation) | settings_ids(model.config)),
    )


def heal(
    model: Model,
    teacher: Model,
    data: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Model:
    """Train a cut model, in place, to do what the model it was cut from does; it is returned.

    The loss is the divergence from the teacher's whole distribution on what the model's objective asks; `weight` below
    1 gives the text's own labels the rest.

    Args:
        teacher: the model before the cut, with the same vocabulary; it is not changed.
        data: a file that `lathe.data.read` opens.
        folder: keep the run there, so that it can be killed and, called again with the same cut and teacher, goes on;
            nowhere where left out. A model whose healing was interrupted is half healed: cut it again first.
        settings: fields of `lathe.reshape.heal.HealSettings`, among them `steps` (200) or `tokens`, `lr` (5e-3, or 1e-3
            with `optimizer="adamw"`), `weight` (1), `temperature` (1), `top_k`, `hidden` (0), `noise` (0), `rows` (16),
            `length`, `precision`; `field`, or `source`, `target` and `prefix` of pairs.

    Raises:
        RequestError: no tokenizer, another vocabulary, an unknown setting, text that does not fit the model, or a run
            in `folder` of other models or settings.
        LatheError: the loss is no number any more, or the disk is full.

    Example:
        >>> import lathe, pathlib, tempfile
        >>> from lathe.text import train_tokenizer
        >>> text = ["a lathe turns wood to the size that was asked for"] * 9
        >>> tokenizer = train_tokenizer(text, 280, convention="gpt2")
        >>> sizes = {"d_model": 16, "d_ff": 32, "n_layers": 1, "n_heads": 2, "d_head": 8, "max_positions": 32}
        >>> tiny = lathe.preset("gpt2").with_({**sizes, "vocab_size": 280, "tokens.bos": 0, "tokens.eos": [0]})
        >>> parent = lathe.Model(tiny, seed=0, tokenizer=tokenizer)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "text.txt"
        ...     _ = file.write_text("\\n".join(text), encoding="utf-8")
        ...     small = lathe.heal(lathe.resize(parent, d_ff=24, calibrate=file), parent, file, steps=2, rows=2)
        >>> small.steps[-1].name
        'heal for 2 steps on ... tokens'
    """
    from lathe.reshape.at_hand import digests, healed, stored_digest
    from lathe.reshape.carry_out import healed_step
    from lathe.reshape.heal import HealSettings
    from lathe.reshape.heal import heal as run
    from lathe.reshape.measure import is_two_sided, logits_of
    from lathe.reshape.text import endless, healing_text

    require_plain(model, "heal it")
    require_model(teacher, "heal from it")
    if not isinstance(data, str | os.PathLike):
        raise RequestError(f"data: expected a file that lathe.data.read opens, not a {type(data).__name__}")
    for name, instead in (
        ("file", "it is the third argument, data"),
        ("stages", "resize cuts in stages, heal in none"),
        ("whole", "a recipe's stages have it, and it follows from tokens"),
    ):
        if name in settings:
            raise RequestError(f"{name}={settings[name]!r}: {instead}; leave it out")
    asked = HealSettings.from_dict({"file": os.fspath(data), **settings})
    tokenizer = require_tokenizer(model, asked.file)
    history, before = model.history, None
    if history is not None:
        history = history.with_unknown(model, tokenizer) if history.was_changed(model) else history
        before = logits_of(model, history.reading.ids(model, tokenizer), both=is_two_sided(model))
        shown = history.reading.settings
        if asked.length is None and shown is not None:  # rows as long as the cut was fitted on
            asked = dataclasses.replace(asked, length=shown.length)
    documents = healing_text(asked.text, tokenizer, None if history is None else history.reading.apart)
    batches = endless(documents, asked.text, model.architecture, tokenizer)
    place = None if folder is None else Path(folder).expanduser()
    both = None if place is None else digests(model, teacher)
    done = run(model, teacher, batches, asked, place, tokenizer=tokenizer, config=model.config, asked=both)
    if history is not None and before is not None:
        digest = stored_digest(teacher, teacher.directory, teacher.tokenizer)
        is_source = digest is not None and digest == history.recipe.source.get("sha256")
        model.history = healed(history, model, tokenizer, asked, documents, done, before, is_from_source=is_source)
    model.steps = (*model.steps, healed_step(done))
    return model
