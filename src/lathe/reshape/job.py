"""From a model's directory to another one of other sizes: what `lathe resize` does.

    run_job(open_job(read_request("my-t5", {"d_model": 384, "calibrate": "text.txt"})), Path("my-t5-384"), pages=…)

Open the source and the text, cut (in two stages where more than half goes and the model heals), measure after every
operation, write, open what was written once more, and write down how it was done and what it cost. All of it happens
in a temporary directory that becomes DST at the end, so DST is whole or not there.

Pages are made by whoever calls, from the `Outcome`: this package draws nothing.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from lathe.architecture import Architecture
from lathe.blueprint import stored
from lathe.checkpoint.atomic import atomic_directory
from lathe.checkpoint.hub import fetch
from lathe.checkpoint.load import CONFIG, open_checkpoint
from lathe.errors import RequestError
from lathe.families import objections
from lathe.model.transformer import Transformer
from lathe.quantization.place import fill
from lathe.reshape.calibrate import Batch
from lathe.reshape.heal import HealSettings
from lathe.reshape.outcome import Outcome
from lathe.reshape.recipe import (
    Recipe,
    Written,
    digest_of_batches,
    machine,
    require_same,
    source_digest,
    warn_of_differences,
)
from lathe.reshape.request import ResizeRequest
from lathe.reshape.resize import is_vocabulary, planned
from lathe.reshape.room import check_healing, reason_to_stream
from lathe.reshape.row_length import best_length
from lathe.reshape.spill import Tensors
from lathe.reshape.stages import half_way
from lathe.reshape.stream import StreamedTransformer, weights_of
from lathe.reshape.text import Documents, TextSettings, VocabularySettings, read_all, read_documents
from lathe.reshape.vocabulary import Vocabulary
from lathe.spec import Spec
from lathe.text.tokenizer import Tokenizer
from lathe.train.distil import check_top_k

log = logging.getLogger("lathe")

Advance = Callable[[int, str], None]
Pages = Callable[[Outcome, Recipe], Mapping[str, str]]


class Reporter(Protocol):
    """How a job tells what it is doing."""

    def say(self, line: str) -> None:
        """One line about what is being done."""
        ...

    def work(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Show work of `total` units; the function yielded is told how many are done."""
        ...


class Silent:
    """A reporter that says nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def work(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Nothing."""
        return nullcontext(lambda done, note: None)


@dataclass(frozen=True)
class Source:
    """The model that is cut, and what travels with it.

    Args:
        directory: where its files are; None for a model that is in memory alone.
    """

    name: str
    directory: Path | None
    model: Transformer
    tokenizer: Tokenizer | None
    generation: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def hub_id(self) -> str | None:
        """The name where it is one that a model card can link to."""
        return None if self.directory is None or Path(self.name).expanduser().exists() else self.name


@dataclass(frozen=True)
class Job:
    """A request with everything that it names opened and checked.

    Args:
        source_sha256: None for a source in memory that no files hold.
        stages: what is done, in order: `{"resize": changes}` and `{"heal": settings}`.
        fitted: the text that the cut is fitted on.
        held: the text that it is measured on.
        apart: what was kept apart of the text to fit on.
        expected: a recipe that this is a replay of.
        budget: how the sizes were found, where a budget was given; see `lathe.reshape.budget_job`.
        vocabulary: what the new vocabulary shall hold; the first stage makes it.
        used: the text of a file that it is made from.
        batches: the text to fit on where it was given as token ids.
        parent: the recipe by which a source in memory was made.
        rows: why rows of text are shorter than the model has room for.
        why_streamed: the line to tell where the job streams without having been asked to.
    """

    request: ResizeRequest
    source: Source
    source_sha256: str | None
    stages: tuple[Mapping[str, Any], ...]
    fitted: Documents | None = None
    held: Documents | None = None
    apart: Documents | None = None
    expected: Written | None = None
    budget: Mapping[str, Any] | None = None
    vocabulary: Vocabulary | None = None
    used: Documents | None = None
    batches: Sequence[Batch] = ()
    parent: Recipe | None = None
    rows: str = ""
    why_streamed: str = ""

    @property
    def is_streamed(self) -> bool:
        """Whether one layer is held at a time."""
        return isinstance(self.source.model, StreamedTransformer)

    @property
    def target(self) -> Architecture:
        """The architecture in the end."""
        return _walked(self.source.model.architecture, self.stages, self.request)

    @property
    def shown_changes(self) -> dict[str, Any]:
        """What was asked for, as a reader of the report is told."""
        shown, asked = dict(self.request.changes), self.request.vocabulary
        if asked is not None and asked.file is not None:
            shown["vocabulary"] = asked.file
        if self.vocabulary is not None:
            shown |= self.vocabulary.told
        return shown | ({} if self.request.remainder is None else {"remainder": self.request.remainder})


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
        why = reason_to_stream(request.source, request.changes, request.calibrate, request.how)
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
    """
    request = replace(job.request, changes=dict(changes))
    stages = _stages(job.source.model.architecture, request)
    return replace(job, request=request, stages=stages, budget=budget, why_streamed="")


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
        return None
    values = {key: value for key, value in noted.items() if key in kind.field_names()}
    return kind.from_dict({**values, **({"file": file} if file else {})}, name)


def open_source(name: str, *, stream: bool = False, quantized: bool = False) -> Source:
    """A directory or hub id as a model with what travels with it.

    Args:
        stream: read each weight when it is used, and keep none.
        quantized: whether a quantised model will do.

    Raises:
        RequestError: no such model, or a quantised one where that will not do.
    """
    if not quantized:
        refuse_quantised(name)
    checkpoint = open_checkpoint(name, quantized=quantized)
    parameters = checkpoint.parameters
    assert checkpoint.directory is not None
    model: Transformer
    if stream:
        model = StreamedTransformer(checkpoint.architecture, Tensors.reading(parameters.names(), parameters.tensor))
    else:
        model, codes = Transformer(checkpoint.architecture, device="meta"), checkpoint.codes
        fill(model, {each: parameters.tensor(each) for each in parameters.names() if each not in codes}, codes)
    tokenizer = Tokenizer.load(checkpoint.directory) if Tokenizer.is_in(checkpoint.directory) else None
    return Source(name, checkpoint.directory, model.eval(), tokenizer, checkpoint.generation, checkpoint.config)


def refuse_quantised(name: str) -> None:
    """Refuse a config that names a quantisation, before any weights are fetched."""
    file = fetch(name, weights=False) / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return  # no JSON: whoever opens the checkpoint says so
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if found:
        kind = found.get("quant_method") if isinstance(found, dict) else None
        raise RequestError(
            f"{name} is quantised already{f' ({kind})' if kind else ''} (quantization_config in its {CONFIG}): cut the "
            "model as it was before that, and quantise the result"
        )


def recipe_of(job: Job) -> Recipe:
    """The recipe as far as it is known before the work; the job's run fills in what each stage did."""
    request, calibrate, vocabulary = job.request, None, None
    if request.calibrate is not None and job.fitted is not None:
        calibrate = {**request.calibrate.to_dict(), **job.fitted.known, "apart": request.data is None}
    elif job.batches:
        calibrate = {"batches": len(job.batches), "sha256": digest_of_batches(job.batches)}
    if job.vocabulary is not None:
        vocabulary = job.vocabulary.told if request.vocabulary is None else request.vocabulary.to_dict()
        vocabulary |= {} if job.used is None else job.used.known
    source: dict[str, Any] = {"model": request.source, "sha256": job.source_sha256}
    if job.parent is not None:
        source["recipe"] = job.parent.to_dict()
    return Recipe(
        source=source,
        stages=[],
        how=request.how,
        seed=request.seed,
        objective=request.objective,
        calibrate=calibrate,
        vocabulary=vocabulary,
        remainder=request.remainder,
        budget=None if job.budget is None else dict(job.budget),
        made_with=machine(),
        obstacle=_obstacle(job),
    )


def _obstacle(job: Job) -> str:
    """Why a recipe could not be done again from files; empty where it could."""
    if job.source_sha256 is None:
        return "its source was a model in memory that no files hold"
    if job.batches:
        return "it was fitted on token ids that no file holds"
    if job.vocabulary is not None and job.request.vocabulary is None:
        return "its vocabulary was given from Python, and no file holds that"
    return ""


def run_job(
    job: Job, directory: Path, *, pages: Pages, run: Path | None = None, reporter: Reporter | None = None
) -> Outcome:
    """Do it, and write DST.

    Args:
        directory: where the result goes; it must not exist, or be empty.
        pages: makes the text files that describe the result, name to content.
        run: where healing keeps its checkpoints; `directory` + `.heal` where left out, which is removed at the end.

    Raises:
        RequestError: `directory` exists, or text that is too short.
        LatheError: the disk is full. Nothing is left at `directory`; what healing had reached stays in its run.
    """
    from lathe.reshape.carry_out import carry_out

    started = time.perf_counter()
    itemsize = torch.empty(0, dtype=job.source.model.dtype).element_size()
    nbytes = itemsize * sum(parameter.size for parameter in stored(job.target))
    if job.is_streamed:  # what operations make on the way is float64
        nbytes += 8 * sum(parameter.size for parameter in stored(job.source.model.architecture))
    reporter = reporter or Silent()
    if job.why_streamed:
        reporter.say(job.why_streamed)
    with atomic_directory(directory, nbytes=nbytes) as made:
        with _scratch(made / ".scratch") if job.is_streamed else nullcontext() as scratch:
            work = job if scratch is None else through(job, scratch)
            outcome, recipe = carry_out(work, made, run or heal_folder(directory), reporter, directory.name)
        outcome.seconds = time.perf_counter() - started
        for name, text in pages(outcome, recipe).items():
            (made / name).write_text(text, encoding="utf-8")
    if run is None:
        shutil.rmtree(heal_folder(directory), ignore_errors=True)
    return outcome


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for what a streamed resize puts aside; it is gone before the result is published."""
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def through(job: Job, scratch: Path) -> Job:
    """The streamed job with a model whose operations put their tensors into `scratch`."""
    old = job.source.model
    model = StreamedTransformer(old.architecture, Tensors.of(weights_of(old), scratch))
    return replace(job, source=replace(job.source, model=model))


def heal_folder(directory: Path) -> Path:
    """Where healing keeps its run until the result is written."""
    whole = directory.expanduser().resolve()
    return whole.with_name(f"{whole.name}.heal")


# --- checks and stages ----------------------------------------------------------------------------------


def _stages(architecture: Architecture, request: ResizeRequest) -> tuple[Mapping[str, Any], ...]:
    """What is done, in order."""
    if request.heal is None:
        return ({"resize": request.changes},)
    if request.vocabulary is None:  # else its size is not known before it is made
        target = _walked(architecture, ({"resize": request.changes},), request)
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


def _walked(source: Architecture, stages: tuple[Mapping[str, Any], ...], request: ResizeRequest) -> Architecture:
    for stage in stages:
        if "resize" in stage:
            renews = request.vocabulary is not None and stage is stages[0]
            source, _ = planned(source, stage["resize"], **request.how, own_form=request.own_form, renews=renews)
    return source


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


def _require_numbers(source: Source) -> None:
    """Refuse weights that a training has blown up: nothing that is measured on them means anything."""
    for name, tensor in weights_of(source.model).items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RequestError(
                f"{source.name}: {name} holds numbers that are not finite (NaN or infinity); take a checkpoint from "
                "before that"
            )


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
    _require_numbers(source)
    if request.heal is not None and next(iter(read_all(request.heal.text)), None) is None:
        raise RequestError(f"{request.heal.file} holds no text to heal on; give one that holds some")
    before = (expected.recipe.calibrate or {}) if expected is not None else {}
    # A replay divides the text as the first time, whatever it is measured on.
    is_apart = bool(before["apart"]) if "apart" in before else request.data is None
    fitted = held = apart = None
    if request.calibrate is not None:
        assert source.tokenizer is not None
        fitted, kept = read_documents(request.calibrate, source.tokenizer, apart=is_apart)
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
    job = Job(request, source, digest, stages, fitted, held, apart, expected, vocabulary=vocabulary, used=used)
    return job if expected is not None else _with_rows(job)


def _with_rows(job: Job) -> Job:
    """The job with one length of rows for each of its texts that was not given any."""
    request, source = job.request, job.source
    settings, documents = request.calibrate or request.data, job.fitted or job.held
    if settings is None or documents is None or source.tokenizer is None:
        return job
    found = best_length(source.model, documents, settings, source.tokenizer, request.objective)
    texts = {name: each for name in ("calibrate", "data", "heal") if (each := getattr(request, name)) is not None}
    same = {name: replace(each, length=each.length or found.positions) for name, each in texts.items()}
    stages = tuple(
        {"heal": replace(stage["heal"], length=stage["heal"].length or found.positions)} if "heal" in stage else stage
        for stage in job.stages
    )
    return replace(job, request=replace(request, **same), stages=stages, rows=found.told)
