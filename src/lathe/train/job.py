"""From a request to a trained model: what `lathe train` does, and what a program may do as well.

    run_job(read_request({"model": "t5-small", …}, {}))

The model is a preset (or an architecture's file) with new weights drawn from the run's seed, or a trained one
from a directory or the hub. New weights take their vocabulary and special tokens from the tokenizer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lathe.adapt import adapter_names, folded_tensors
from lathe.adapt.opening import base_of, is_adapter, open_adapted
from lathe.architecture import Architecture
from lathe.checkpoint.load import open_checkpoint
from lathe.checkpoint.save import save_checkpoint
from lathe.data.batches import Batches
from lathe.data.tokenise import special_tokens
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.objectives.base import Objective
from lathe.objectives.by_name import OBJECTIVES, objective
from lathe.presets import heads, names, preset
from lathe.quantization.place import install
from lathe.text.tokenizer import Tokenizer
from lathe.train.adapting import put_on, sample, write_adapter
from lathe.train.loop import StepReport, TrainResult
from lathe.train.machine import pick_device
from lathe.train.parallel import choose
from lathe.train.ranks import ALONE, Ranks
from lathe.train.reading import training_corpus, validation_corpus
from lathe.train.request import RunSettings
from lathe.train.run import fit

log = logging.getLogger("lathe")

_HEAD = "head"


@dataclass
class Subject:
    """What is trained, and what travels with it."""

    model: Transformer
    tokenizer: Tokenizer
    generation: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None  # where its trained weights are from; None: they are new
    fresh: tuple[str, ...] = ()  # the parameters that the base has no values for

    def write(self, path: Path) -> None:
        """Write the model as a directory that stock tools open, where its family can hold it.

        Of a model with an adapter, the adapter is written (`lathe.train.adapting`).
        """
        if adapter_names(self.model):
            assert self.base is not None
            here = Path(self.base).expanduser()
            # A path as it was typed would be another one, or a hub id, for who stands elsewhere.
            write_adapter(self.model, path, str(here.absolute()) if here.exists() else self.base, self.tokenizer)
            return
        save_checkpoint(
            path,
            self.model.architecture,
            folded_tensors(self.model),
            tokenizer=self.tokenizer,
            generation=self.generation,
            config=self.config,
        )


@dataclass(frozen=True)
class Job:
    """A request with everything that it names opened and checked against each other."""

    request: RunSettings
    subject: Subject
    batches: Batches
    evaluation: list[Any] | None
    ranks: Ranks = ALONE
    asked: Mapping[str, Any] = field(default_factory=dict)  # more that a resume must ask again

    def run(self, *, resume: bool = False, on_step: Callable[[StepReport], None] | None = None) -> TrainResult:
        """Train; see `lathe.train.fit`."""
        request = self.request
        return fit(
            self.subject.model,
            self.batches,
            request.training(self.subject.model.device.type),
            request.folder,
            write_model=self.subject.write,
            save=request.save,
            evaluation=self.evaluation,
            resume=resume,
            asked={"data": {"rows": request.data.rows}, **self.asked},
            notes={"run.json": json.dumps(request.to_dict(), indent=2, ensure_ascii=False) + "\n"},
            on_step=on_step,
            ranks=self.ranks,
        )


def open_job(request: RunSettings, ranks: Ranks = ALONE) -> Job:
    """Open the model, the tokenizer and the data of a request, and check that they fit.

    Of several ranks on one machine the first opens everything before the others do: what has to be downloaded or
    tokenised is in the caches then.

    Raises:
        RequestError: something is missing, or does not fit the rest.
    """
    choose(request, ranks)
    device = str(pick_device(request.device, ranks))
    return ranks.one_first(lambda: _opened(request, ranks, device))


def _opened(request: RunSettings, ranks: Ranks, device: str) -> Job:
    # A quantised model is trained through adapters alone.
    quantized = request.adapter is not None
    subject = open_subject(
        request.model, request.tokenizer, request.architecture, request.seed, device, quantized=quantized
    )
    made = make_objective(subject, request.objective)
    data = request.data
    batches = Batches(
        training_corpus(data, subject.tokenizer, made),
        made,
        length=data.length,
        target_length=data.target_length,
        rows=data.rows,
        seed=data.seed,
        rank=ranks.rank,
        n_ranks=ranks.size,
    )
    batches.fit(subject.model.architecture)
    held_out = None
    text = validation_corpus(data, subject.tokenizer, made)
    if text is not None:
        try:  # what does not fit is found now, and not at the first evaluation
            fixed = Batches(
                text, made, length=data.length, target_length=data.target_length, rows=data.rows, seed=data.seed
            )
            fixed.fit(subject.model.architecture)
        except RequestError as error:
            raise RequestError(f"data.validation: {error}") from None
        held_out = fixed.one_pass(data.validation_batches)
    return Job(request, subject, batches, held_out, ranks, _adapt(request, subject))


def _adapt(request: RunSettings, subject: Subject) -> dict[str, Any]:
    """Put the adapter that a request asks for on its model; what a resume must ask again of the weights."""
    if adapter_names(subject.model):
        if request.adapter is not None:
            raise RequestError(
                f"{request.model} is an adapter, and training goes on with it as it is: leave adapter out, or fold it "
                "into its base first (lathe adapt merge BASE ADAPTER DESTINATION)"
            )
        return {"adapter": "from its directory", "base_weights": sample(subject.model)}
    if request.adapter is None:
        # New weights follow from the architecture and the seed, which a resume must ask again as well.
        return {"start_weights": "new" if subject.base is None else sample(subject.model)}
    if subject.base is None:
        raise RequestError(
            f"adapter: {request.model} is new here, and an adapter is for a model that is trained; give a directory or "
            "a hub id, or leave adapter out"
        )
    base = sample(subject.model)
    settings = put_on(subject.model, request.adapter, subject.fresh, request.seed)
    return {"adapter": settings.to_dict(), "base_weights": base}


def make_objective(subject: Subject, asked: Mapping[str, Any]) -> Objective:
    """The objective that a request names, for this model and its tokenizer."""
    settings = {key: value for key, value in asked.items() if key != "name"}
    kind, classifier = OBJECTIVES.get(asked["name"]), subject.model.architecture.head.classifier
    if kind is not None and "n_labels" in kind.field_names() and classifier is not None:
        settings.setdefault("n_labels", classifier.n_labels)
    made = objective(asked["name"], special_tokens(subject.tokenizer, subject.model.architecture), **settings)
    made.fit(subject.model.architecture)
    return made


def open_subject(
    model: str,
    tokenizer: str | None,
    changes: Mapping[str, Any],
    seed: int,
    device: str = "auto",
    *,
    adapter: str | None = None,
    quantized: bool = False,
) -> Subject:
    """New weights of a preset or an architecture's file; the weights of a directory or a hub id.

    Args:
        model: may be the directory of an adapter, which names its base.
        adapter: the directory of an adapter to put on the model.
        quantized: whether a quantised model will do.

    Raises:
        RequestError: no such model, no tokenizer, sizes for a model that has its weights already, or a quantised one
            where that will not do.
    """
    where = pick_device(device)
    if is_adapter(model):
        if adapter is not None:
            raise RequestError(f"{model} is an adapter and no model: expected the base of {adapter}")
        if changes:
            key, value = next(iter(changes.items()))
            raise RequestError(f"{key}={value}: the adapter {model} is for one base and one head; leave the sizes out")
        return _adapted(base_of(model), model, tokenizer, where)
    if adapter is not None:
        return _adapted(model, adapter, tokenizer, where)
    new = _architecture(model, changes.get(_HEAD))
    if new is None:
        return _trained(model, tokenizer, changes, seed, where, quantized)
    if tokenizer is None:
        raise RequestError(
            f"{model} has no tokenizer of its own: give tokenizer=DIRECTORY "
            "(lathe tokenizer DIRECTORY --from FILE makes one)"
        )
    text = Tokenizer.load(tokenizer)
    sizes = {key: value for key, value in changes.items() if not (key == _HEAD and isinstance(value, str))}
    architecture = new.with_({**_from_tokenizer(new, text), **sizes})
    return Subject(Transformer(architecture, seed=seed).to(where), text)


def _trained(
    model: str, tokenizer: str | None, changes: Mapping[str, Any], seed: int, where: Any, quantized: bool
) -> Subject:
    """Trained weights; under another head they stay, and what only that head has is new."""
    checkpoint = open_checkpoint(model, quantized=quantized)
    architecture = _with_head(checkpoint.architecture, model, changes)
    text = _tokenizer(tokenizer, checkpoint.directory, model)
    parameters = checkpoint.parameters
    built = Transformer(architecture, seed=seed)
    own = built.state_dict()
    kept = {name: parameters.tensor(name) for name in parameters.names() if name in own}
    # A classifier of other labels is another classifier.
    kept = {name: tensor for name, tensor in kept.items() if tensor.shape == own[name].shape}
    fresh = tuple(name for name in own if name not in kept)
    if fresh:
        log.warning("these parameters are new, and drawn from seed %d: %s", seed, ", ".join(fresh))
    built.load_state_dict({**own, **kept})
    install(built, {name: matrix for name, matrix in checkpoint.codes.items() if name in kept})
    config = checkpoint.config if architecture is checkpoint.architecture else {}
    # Scales come in the type of the weights that they were made from; what is trained and measured here is float32.
    return Subject(built.float().to(where), text, checkpoint.generation, config, model, fresh)


def _adapted(base: str, adapter: str, tokenizer: str | None, where: Any) -> Subject:
    """A base with an adapter on it, under the adapter's head."""
    model, checkpoint = open_adapted(base, adapter)
    own = Path(adapter).expanduser()
    text = _tokenizer(tokenizer, own if Tokenizer.is_in(own) else checkpoint.directory, base)
    return Subject(model.float().to(where), text, checkpoint.generation, base=base)


def _tokenizer(asked: str | None, beside: Path | None, model: str) -> Tokenizer:
    place = Path(asked) if asked is not None else beside
    if place is None or not Tokenizer.is_in(place):
        raise RequestError(f"{place or model} holds no tokenizer: give tokenizer=DIRECTORY")
    return Tokenizer.load(place)


def _with_head(architecture: Architecture, model: str, changes: Mapping[str, Any]) -> Architecture:
    """The architecture with the head of that name, as the presets of its family have it."""
    allowed = {_HEAD, "n_labels", "head.classifier.n_labels"} if _HEAD in changes else set()
    for key, value in changes.items():
        if key not in allowed:
            raise RequestError(
                f"{key}={value}: {model} has trained weights of its own sizes; train a preset with these sizes"
            )
    if not changes:
        return architecture
    wanted = changes[_HEAD]
    family = [name for name in names() if preset(name).family == architecture.family]
    like = next((name for name in family if wanted in heads(name)), None)
    if like is None:
        known = sorted({head for name in family for head in heads(name)})
        raise RequestError(f"head={wanted}: {model} can have the heads {', '.join(known) or 'none'}")
    rest = {key: value for key, value in changes.items() if key != _HEAD}
    return architecture.with_({"head": preset(like, wanted).head.to_dict()}).with_(rest)


def _architecture(model: str, head: Any) -> Architecture | None:
    """The architecture of new weights; None where `model` names trained ones."""
    if model in names():
        return preset(model, head if isinstance(head, str) else None)
    path = Path(model).expanduser()
    if path.is_file():
        return Architecture.from_json(path.read_text(encoding="utf-8"))
    if path.is_dir() or "/" in model:
        return None
    try:
        return preset(model)
    except RequestError as error:
        raise RequestError(f"{error} Or give a directory, or a hub id as owner/name") from None


def _from_tokenizer(architecture: Architecture, tokenizer: Tokenizer) -> dict[str, Any]:
    """The vocabulary's size and the special tokens; the decoder starts with the same role as before."""
    before = architecture.tokens
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    tokens = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "mask": tokenizer.mask_id, "eos": eos}
    start: int | None = None
    if before.decoder_start is not None:
        roles = ((before.pad, tokenizer.pad_id), (before.bos, tokenizer.bos_id), (before.eos[:1], tokenizer.eos_id))
        start = next((now for then, now in roles if then in (before.decoder_start, (before.decoder_start,))), None)
    values = {**before.to_dict(), **tokens, "decoder_start": start}
    return {"vocab_size": tokenizer.vocab_size, "tokens": values}
