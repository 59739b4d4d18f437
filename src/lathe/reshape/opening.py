"""Open a resize: the model and the texts of a request, of a model at hand, or of a recipe that is done again.

A job comes out whose sizes can be had and whose texts can be read: what is wrong with a request is found here, before
any work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from lathe.architecture import Architecture
from lathe.checkpoint.hub import fetch
from lathe.errors import RequestError
from lathe.families import objections
from lathe.reshape.calibrate import Batch
from lathe.reshape.heal import HealSettings
from lathe.reshape.job import Job, walked
from lathe.reshape.recipe import Recipe, Written, require_same, source_digest, warn_of_differences
from lathe.reshape.request import ResizeRequest
from lathe.reshape.resize import is_vocabulary, planned
from lathe.reshape.room import check_healing, reason_to_stream
from lathe.reshape.row_length import best_length
from lathe.reshape.source import Source, open_source, refuse_quantised, require_numbers
from lathe.reshape.stages import half_way
from lathe.reshape.text import (
    TextSettings,
    VocabularySettings,
    endless,
    healing_text,
    read_all,
    read_documents,
)
from lathe.reshape.vocabulary import Vocabulary
from lathe.spec import Spec
from lathe.train.distil import check_top_k
from lathe.train.machine import pick_device


def open_job(request: ResizeRequest) -> Job:
    """Open the model and the text of a request, and check that the sizes can be had.

    A request with a budget has no stages yet: `lathe.reshape.budget_job.spend` finds its sizes.

    Raises:
        RequestError: something is missing, or cannot be done, or only Lathe's own form could hold the result.
    """
    source, why = _opened(request)
    assert source.directory is not None
    architecture = source.model.architecture
    if request.budget is not None:
        request.check_use(architecture)
        if request.heal is not None:
            check_top_k(request.heal.top_k, architecture.embedding.vocab_size)
        return replace(_with_text(request, source, source_digest(source.directory), (), None), why_streamed=why)
    renews = request.vocabulary is not None
    target, operations = planned(architecture, request.changes, **request.how, own_form=request.own_form, renews=renews)
    if not operations:
        sizes = ", ".join(f"{name}={value}" for name, value in request.changes.items())
        raise RequestError(f"{request.source} has {sizes} already: nothing to change")
    request.check_use(architecture)
    _require_holder(architecture, target, request)
    stages = _stages(architecture, request)
    job = _with_text(request, source, source_digest(source.directory), stages, None)
    if request.heal is not None and job.is_streamed:
        check_healing(target, request.heal)
    return replace(job, why_streamed=why)


def _opened(request: ResizeRequest) -> tuple[Source, str]:
    """The source of a request, and why it is streamed where that was not asked for."""
    refuse_quantised(request.source)
    why = ""
    if request.stream is None and request.streams:
        budget = request.budget is not None
        why = reason_to_stream(request.source, request.changes, request.calibrate, request.how, budget=budget)
    return open_source(request.source, stream=bool(request.stream or why)), why


def job_at_hand(
    request: ResizeRequest,
    source: Source,
    sha256: str | None,
    *,
    batches: Sequence[Batch] = (),
    vocabulary: Vocabulary | None = None,
    budget: Mapping[str, Any] | None = None,
    parent: Recipe | None = None,
) -> Job:
    """The job of a request about a model that is in memory.

    Args:
        sha256: of the files that hold the same model; None where none do.
        batches: text to fit on, as the model's keyword arguments.
        vocabulary: what the new vocabulary shall hold, where the request cannot say it.
        budget: how the sizes were found.
        parent: the recipe by which the model was made.

    Raises:
        RequestError: text that cannot be read, or words on how a width is cut where none is.
    """
    if budget is None:
        request.check_use(source.model.architecture)
    job = _with_text(request, source, sha256, ({"resize": request.changes},), None)
    vocabulary = vocabulary if request.vocabulary is None else job.vocabulary
    return replace(job, batches=batches, vocabulary=vocabulary, budget=budget, parent=parent)


def with_sizes(job: Job, changes: Mapping[str, Any], budget: Mapping[str, Any]) -> Job:
    """The job of a budget with the sizes that were found for it.

    Args:
        budget: how they were found, as plain values.

    Raises:
        RequestError: the sizes cannot be healed as was asked.
    """
    request = replace(job.request, changes=dict(changes))
    stages = _stages(job.source.model.architecture, request)
    done = replace(job, request=request, stages=stages, budget=budget, why_streamed="")
    if request.heal is not None and job.is_streamed:
        check_healing(done.target, request.heal)
    return done


def open_replay(
    written: Written,
    source: str,
    *,
    calibrate: str | None = None,
    vocabulary: str | None = None,
    heal: str | None = None,
    data: TextSettings | None = None,
    device: str = "auto",
    stream: bool | None = None,
) -> Job:
    """The job that a recipe describes, on a source that must be the one it was written for.

    Args:
        calibrate, vocabulary, heal: where the texts are now, if not where the recipe says.
        data: other text to measure on.
        stream: hold a layer at a time; None: where memory is short.

    Raises:
        RequestError: another source or another text.
    """
    recipe = written.recipe
    warn_of_differences(written)
    if recipe.obstacle:
        raise RequestError(f"this recipe cannot be done again: {recipe.obstacle}")
    digest = source_digest(fetch(source))
    require_same(source, str(recipe.source.get("sha256")), digest)
    changes: dict[str, Any] = {}
    stages: list[Mapping[str, Any]] = []
    healed: HealSettings | None = None
    for stage in recipe.stages:
        if "resize" in stage:
            changes |= stage["resize"]
            stages.append({"resize": stage["resize"]})
        else:
            healed = HealSettings.from_dict({**stage["heal"], **({"file": heal} if heal else {})}, "heal")
            stages.append({"heal": healed, "sha256": stage.get("sha256")})
    if healed is None:
        _refuse_unread("heal", heal)
    text = _asked_again(TextSettings, recipe.calibrate, calibrate, "calibrate")
    tokens = _asked_again(VocabularySettings, recipe.vocabulary, vocabulary, "vocabulary")
    request = ResizeRequest(
        source=source,
        changes=changes,
        **recipe.how,
        remainder=recipe.remainder,
        calibrate=text,
        vocabulary=tokens,
        data=data,
        heal=healed,
        objective=recipe.objective,
        seed=recipe.seed,
        own_form=True,  # the recipe was carried out once
        device=device,
        stream=stream,
    )
    opened, why = _opened(request)
    job = _with_text(request, opened, digest, tuple(stages), written)
    if healed is not None and job.is_streamed:
        check_healing(job.target, healed)
    return replace(job, budget=recipe.budget, why_streamed=why)


A = TypeVar("A", bound=Spec)


def _asked_again(kind: type[A], noted: Mapping[str, Any] | None, file: str | None, name: str) -> A | None:
    """The settings of a text as a recipe holds them, with the file where it is now."""
    if noted is None:
        _refuse_unread(name, file)
        return None
    values = {key: value for key, value in noted.items() if key in kind.field_names()}
    return kind.from_dict({**values, **({"file": file} if file else {})}, name)


def _refuse_unread(name: str, file: str | None) -> None:
    if file is not None:
        raise RequestError(f"{name}={file}: the recipe names no {name} text, so none is read; leave it out")


# --- checks and stages ----------------------------------------------------------------------------------


def _stages(architecture: Architecture, request: ResizeRequest) -> tuple[Mapping[str, Any], ...]:
    """What is done, in order."""
    if request.heal is None:
        return ({"resize": request.changes},)
    if request.vocabulary is None:  # else its size is not known before it is made
        target = walked(architecture, ({"resize": request.changes},), request)
        check_top_k(request.heal.top_k, target.embedding.vocab_size)
    first = None
    if request.heal.stages != 1:
        first = half_way(architecture, request.changes, {**request.how, "own_form": request.own_form})
        if first is None and request.heal.stages == 2:
            raise RequestError("heal.stages=2: nothing is cut to less than half here; leave it out, or give 1")
    if first is None:
        return {"resize": request.changes}, {"heal": request.heal.parts(1)[0]}
    half, other = request.heal.parts(2)
    # The vocabulary is made in the first stage, and may be larger by then than what was asked: a multiple of 64.
    rest = {name: value for name, value in request.changes.items() if not is_vocabulary(architecture, name)}
    return {"resize": first}, {"heal": half}, {"resize": rest}, {"heal": other}


def _require_holder(source: Architecture, target: Architecture, request: ResizeRequest) -> None:
    """Refuse what the family's files cannot hold, unless that was asked for."""
    found = objections(target)
    if not found or request.own_form or objections(source):
        return
    fitting = {name: value for each in found for name, value in each.changes.items()}
    sizes = ", ".join(f"{name}={_shown(value)}" for name, value in fitting.items())
    helps = bool(sizes) and all(each.changes for each in found) and target.with_(fitting) != source
    hint = f"it can with {sizes}, and " if helps else ""
    raise RequestError(
        f"a stock {target.family} file cannot hold this: {'; '.join(each.reason for each in found)}; "
        f"{hint}Lathe's own form can hold it as it is (--own-form)"
    )


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _with_text(
    request: ResizeRequest,
    source: Source,
    digest: str | None,
    stages: tuple[Mapping[str, Any], ...],
    expected: Written | None,
) -> Job:
    """The job with the documents that it is fitted and measured on."""
    texts = {name: each.file for name in ("calibrate", "data", "heal") if (each := getattr(request, name)) is not None}
    if request.vocabulary is not None and request.vocabulary.file is not None:
        texts["vocabulary"] = request.vocabulary.file
    if texts and source.tokenizer is None:
        raise RequestError(
            f"{request.source} holds no tokenizer to read the {next(iter(texts))} text with; put its tokenizer "
            "beside it"
        )
    require_numbers(source)
    pick_device(request.device)
    job = Job(request, source, digest, stages, expected=expected)
    if request.heal is not None and next(iter(read_all(request.heal.text)), None) is None:
        raise RequestError(f"{request.heal.file} holds no text to heal on; give one that holds some")
    before = (expected.recipe.calibrate or {}) if expected is not None else {}
    fitted = held = apart = None
    if request.calibrate is not None:
        assert source.tokenizer is not None
        fitted, kept = read_documents(request.calibrate, source.tokenizer, apart=job.divides)
        held = apart = kept or None
        if not fitted:
            raise RequestError(f"{request.calibrate.file} has no token that {request.source}'s tokenizer can read")
        if expected is not None:
            require_same(request.calibrate.file, str(before.get("sha256")), fitted.digest)
    if request.data is not None:
        assert source.tokenizer is not None
        found, _ = read_documents(request.data, source.tokenizer, apart=False)
        held = found or None
    vocabulary = used = None
    if request.vocabulary is not None:
        vocabulary, used = request.vocabulary.opened()
        if expected is not None and used is not None:
            noted = expected.recipe.vocabulary or {}
            require_same(str(request.vocabulary.file), str(noted.get("sha256")), used.digest)
    job = replace(job, fitted=fitted, held=held, apart=apart, vocabulary=vocabulary, used=used)
    if request.heal is not None:
        _require_text_to_heal_on(job)
    return job if expected is not None else _with_rows(job)


def _require_text_to_heal_on(job: Job) -> None:
    """Refuse now what healing would refuse once the cut is done; another vocabulary's tokenizer is not there yet."""
    settings, source = job.request.heal, job.source
    if job.request.vocabulary is not None:
        return
    assert settings is not None
    assert source.tokenizer is not None
    documents = healing_text(settings.text, source.tokenizer, job.apart)
    if not documents:
        raise RequestError(
            f"{settings.file} holds no text to heal on but what was kept apart to measure on; give another, or more"
        )
    positions = {f"{name}.positions": stack.positions for name, stack in job.target.stacks}
    endless(
        documents, settings.text, source.model.architecture.with_(positions), source.tokenizer, job.request.objective
    )


def _with_rows(job: Job) -> Job:
    """The job with one length of rows for each of its texts that was not given any."""
    request, source = job.request, job.source
    settings, documents = request.calibrate or request.data, job.fitted or job.held
    if settings is None or documents is None or source.tokenizer is None:
        return job
    found = best_length(source.model, documents, settings, source.tokenizer, request.objective)
    texts = {name: each for name in ("calibrate", "data", "heal") if (each := getattr(request, name)) is not None}
    same = {name: replace(each, length=each.length or found.positions) for name, each in texts.items()}
    # Parted anew: how many tokens all of them read together follows from the length.
    heals = iter(same["heal"].parts(sum("heal" in stage for stage in job.stages)) if "heal" in same else ())
    stages = tuple({"heal": next(heals)} if "heal" in stage else stage for stage in job.stages)
    return replace(job, request=replace(request, **same), stages=stages, rows=found.told)
