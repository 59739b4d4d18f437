"""What a user holds: a model that loads, saves, generates and turns into stock `transformers` and back.

import lathe
model = lathe.load("my-t5")
smaller = lathe.resize(model, d_model=384, calibrate="corpus.txt")
smaller.save("my-t5-384")
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from lathe.adapt import adapter_names, folded_tensors
from lathe.adapt.opening import base_of, is_adapter, open_adapted_as, tokenizer_of
from lathe.architecture import Architecture
from lathe.blueprint import stored
from lathe.checkpoint.load import Checkpoint, open_checkpoint
from lathe.checkpoint.save import DEFAULT_SHARD_BYTES, Saved, save_checkpoint
from lathe.errors import RequestError
from lathe.families import class_name, family, holder, read_config, write_config
from lathe.families.adapter import Reader, fuse, to_disk
from lathe.model.transformer import Transformer
from lathe.quantization.place import codes_of, fill, refuse_quantized
from lathe.spec import plain
from lathe.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lathe.export.job import Exported
    from lathe.model.codes import Codes
    from lathe.planner import Plan
    from lathe.reshape import Step
    from lathe.reshape.budget import BudgetPlan
    from lathe.reshape.history import History
    from lathe.reshape.vocabulary import Vocabulary
    from lathe.text.corpus import Corpus

log = logging.getLogger("lathe")


class Model(Transformer):
    """A transformer together with what travels with it: tokenizer, generation settings, the config it came with.

    Args:
        architecture: every size and choice.
        tensors: the weights by the blueprint's names, used as they are; None draws new ones from `seed`.
        codes: its quantised matrices, by the same names; they are none of `tensors`.
        tokenizer: text to ids and back; None where the model has none.
        generation: settings that `generate` starts from (`generation_config.json`).
        config: the Hugging Face config that the model came with.
        directory: where its files are, if it was read from any.

    >>> import lathe, torch
    >>> small = lathe.preset("t5-small").with_(d_model=32, d_ff=64, n_layers=1, vocab_size=64)
    >>> model = lathe.Model(small, seed=0)
    >>> model(torch.tensor([[5, 6, 1]]), labels=torch.tensor([[7, 1]])).logits.shape
    torch.Size([1, 2, 64])
    """

    def __init__(
        self,
        architecture: Architecture,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        codes: Mapping[str, Codes] | None = None,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        generation: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        directory: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        given = tensors is not None
        super().__init__(architecture, seed=None if given else seed, device="meta" if given else None)
        if tensors is not None:
            fill(self, tensors, codes or {})
        self.tokenizer = tokenizer
        self.generation = dict(generation or {})
        self.config = dict(config or {})
        self.steps: tuple[Step, ...] = ()  # what was done to get here, where the model was resized
        self.history: History | None = None  # the same with what it cost, for `save` to write down
        self.name, self.directory = "a model in memory", None if directory is None else Path(directory)
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)
        self.eval()

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The model of an opened checkpoint."""
        parameters = checkpoint.parameters
        tensors = {name: parameters.tensor(name) for name in parameters.names() if name not in checkpoint.codes}
        if parameters.left_out:
            log.warning(
                "left out %d tensors of heads that the config's class does not have: %s",
                len(parameters.left_out),
                ", ".join(parameters.left_out[:4]) + ("…" if len(parameters.left_out) > 4 else ""),
            )
        tokenizer = None
        if checkpoint.directory is not None and Tokenizer.is_in(checkpoint.directory):
            tokenizer = Tokenizer.load(checkpoint.directory)
        return cls(
            checkpoint.architecture,
            tensors,
            codes=checkpoint.codes,
            tokenizer=tokenizer,
            generation=checkpoint.generation,
            config=checkpoint.config,
            directory=checkpoint.directory,
            device=device,
            dtype=dtype,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every stored parameter by the blueprint's name, detached; an active adapter is folded in (`lathe.adapt`).

        Of a quantised matrix these are the numbers that its codes stand for.
        """
        return folded_tensors(self)

    def save(
        self,
        path: str | Path,
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        replace: bool = False,
        report: bool = True,
    ) -> Saved:
        """Write the model, its tokenizer and its generation settings to a directory.

        Stock `transformers` opens it where the architecture's family can hold it; otherwise it is Lathe's own
        form, and a warning names the reasons. An active adapter is folded in, so that what is opened computes what
        this model computes; `lathe.adapt.save_adapter` writes the adapter alone. A quantised model is written in
        codes (`lathe.checkpoint.compressed`).

        A model that was resized gets what `lathe resize` writes as well: its recipe (`lathe.json`), `report.html`, and
        a model card (`README.md`).

        Args:
            path: must not exist, unless `replace`.
            max_shard_bytes: the size past which the weights are split.
            report: open what was written once more, compare, and write the report and the card of a resized model.

        Raises:
            RequestError: `path` exists, or an adapter is on a quantised model.
            LatheError: the disk is full; nothing is left behind.

        >>> import lathe, tempfile
        >>> tiny = lathe.preset("gpt2").with_(d_model=24, n_heads=2, d_head=12, d_ff=48, n_layers=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lathe.Model(tiny, seed=0).save(folder + "/tiny").stock
        True
        """
        if self.history is None:
            codes = codes_of(self)
            if codes and adapter_names(self):
                raise RequestError(
                    "an adapter is on a quantised model, and folded in it would be rounded again: write the adapter "
                    "alone (lathe.adapt.save_adapter)"
                )
            saved = save_checkpoint(
                path,
                self.architecture,
                {name: tensor for name, tensor in self.tensors().items() if name not in codes},
                codes=codes,
                tokenizer=self.tokenizer,
                generation=self.generation,
                config=self.config,
                max_shard_bytes=max_shard_bytes,
                replace=replace,
            )
        else:
            saved = self._save_resized(self.history, Path(path), max_shard_bytes, replace=replace, report=report)
        if not saved.stock:
            why = "; ".join(saved.reasons) or "the architecture names no family"
            log.warning("saved %s in Lathe's own form, which stock transformers cannot open: %s", path, why)
        return saved

    def _save_resized(
        self, history: History, path: Path, max_shard_bytes: int, *, replace: bool, report: bool
    ) -> Saved:
        from lathe.report.resizing import pages
        from lathe.reshape.at_hand import save_with_pages
        from lathe.reshape.history import Made

        return save_with_pages(
            Made(self, self.tokenizer, self.generation, self.config),
            history,
            path,
            pages=pages if report else None,
            max_shard_bytes=max_shard_bytes,
            replace=replace,
        )

    def generate(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **settings: Any
    ) -> Tensor:
        """Token ids after the prompt, laid out as `transformers` lays them out; see `lathe.generate.generate`.

        >>> import lathe, torch
        >>> tiny = lathe.preset("gpt2").with_(d_model=24, n_heads=2, d_head=12, d_ff=48, n_layers=1)
        >>> lathe.Model(tiny, seed=0).generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape
        torch.Size([1, 5])
        """
        from lathe.generate import generate

        return generate(self, input_ids, attention_mask, stored=self.generation, **settings)

    def plan(self, **changes: Any) -> Plan:
        """What this model costs, and what it would cost with other sizes; see `lathe.plan`."""
        from lathe.planner import plan

        return plan(self.architecture, **changes)

    def export(
        self, path: str | Path, *, to: str, kind: str | None = None, body: bool = False, name: str | None = None
    ) -> Exported:
        """Write the model and its tokenizer for another program, and run it there; see `lathe.export.job.export`.

        Args:
            path: a file that ends in .gguf, or a directory; it must not exist.
            to: `gguf` (llama.cpp), `ctranslate2`, or `onnx` (encoders).
            kind: the type of the weights; the format's first where left out.
            body: leave the token head and the classifier out.
            name: what the file calls the model; the path's last part where left out.

        Raises:
            RequestError: what the format cannot hold, a package that is missing, a path that exists.
            LatheError: the program computes something else; nothing is left behind.
        """
        from lathe.export.job import export

        return export(self, path, to=to, kind=kind, body=body, tokenizer=self.tokenizer, name=name)

    def to_transformers(self) -> Any:
        """The same model as an object of stock `transformers`, with copies of the weights.

        Raises:
            RequestError: the architecture's family cannot hold it, or `transformers` is not installed.
        """
        try:
            import transformers
        except ImportError:
            raise RequestError("to_transformers needs the package transformers; pip install transformers") from None
        config = write_config(self.architecture, self.config)
        source = holder(self.architecture)
        assert source is not None
        kind = getattr(transformers, config["architectures"][0])
        tensors = self.tensors()
        disk = {
            name: fuse(entry, [tensors[ours] for ours in entry.ours]).clone()
            for name, _, entry in to_disk(source, self.architecture)
        }
        made = kind.from_pretrained(None, config=kind.config_class(**config), state_dict=disk, dtype=self.dtype)
        return made.to(self.device).train(self.training)


def load(
    model: Any,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """Load a model: a directory, a hub id, or a model object of `transformers`.

    The directory of an adapter (`lathe.adapt`) gives the base that it names with the adapter on it.

    Args:
        revision: a branch, tag or commit of the hub's repository.
        device: where to put the weights; the CPU where left out.
        dtype: what to convert the weights to; what the file holds where left out.

    Raises:
        RequestError: no such model, files missing or damaged, an unknown family, or tensors that do not fit the config.

    Example:
        >>> import lathe, tempfile
        >>> tiny = lathe.preset("t5-small").with_(d_model=32, d_ff=64, n_layers=1, vocab_size=64)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = lathe.Model(tiny, seed=0).save(folder + "/tiny")
        ...     lathe.load(folder + "/tiny").architecture.d_model
        32
    """
    if isinstance(model, torch.nn.Module):
        return _from_object(model, device, dtype)
    if is_adapter(model):
        if revision is not None:
            raise RequestError(f"revision={revision}: {model} is an adapter's directory, which has none; leave it out")
        return _from_adapter(model, device, dtype)
    checkpoint = open_checkpoint(model, revision, quantized=True)
    loaded = Model.from_checkpoint(checkpoint, device=device, dtype=dtype)
    loaded.name = str(model)
    return loaded


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
    from lathe.reshape.job import Silent, Source, job_at_hand
    from lathe.reshape.recipe import digest_of
    from lathe.reshape.request import ResizeRequest
    from lathe.reshape.text import TextSettings
    from lathe.reshape.vocabulary import Vocabulary

    _require_plain(model, "resize it")
    asked = vocabulary if vocabulary is None or isinstance(vocabulary, Vocabulary) else Vocabulary(vocabulary)
    text, batches = None, []
    if isinstance(calibrate, str | os.PathLike):
        text = TextSettings(file=os.fspath(calibrate), seed=seed)
        _require_tokenizer(model, text.file)
    else:
        calibrate = batches = _batches(model, calibrate)
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
    request = ResizeRequest(
        source=model.name,
        changes={name: plain(value) for name, value in changes.items()},
        **how,
        calibrate=text,
        vocabulary=in_words(asked),
        device=model.device.type,
    )
    source = Source(model.name, model.directory, model, model.tokenizer, model.generation, model.config)
    job = job_at_hand(
        request,
        source,
        stored_digest(model, model.directory, model.tokenizer),
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


def quantize(
    model: Model,
    *,
    bits: int = 8,
    calibrate: str | os.PathLike[str] | Iterable[Tensor | Mapping[str, Tensor]] = (),
    activations: str | None = None,
    group: int | None = None,
    symmetric: bool = True,
    method: str | None = None,
    tables: int = 8,
    keep: Iterable[str] = (),
    seed: int = 0,
) -> Model:
    """A copy of a model with its matrices in int8 or int4; the model itself is left as it is.

    Args:
        bits: of the linear layers: 8 or 4.
        calibrate: text that the codes are chosen on, as `resize` takes it; for 4 bits it is what keeps the loss.
        activations: `int8` rounds the inputs too, each token to its own scale, and multiplies whole numbers; `none`
            does not. `int8` where left out and there is a scale a row.
        group: weights of a row that share a scale: 32, 64, 128, or 0 for a row; 0 for 8 bits, 32 for 4.
        symmetric: whether codes have no zero point; with one, 4 bits are a little closer, and stock `transformers` does
            not open the files.
        method: `nearest`, or `gptq`, which has the codes of a layer make up for each other's errors on the text;
            `gptq` for 4 bits where there is text.
        tables: bits of the token table and the output matrix: 8, 4, or 16 to leave them alone.
        keep: layers that are left alone: names, the beginnings of names, or patterns with `*`.
        seed: of the text that is drawn.

    Raises:
        RequestError: a setting that cannot be, a layer that is not there, a model that is quantised already, or too
            little text.

    Example:
        >>> import lathe
        >>> tiny = lathe.preset("gpt2").with_(d_model=32, n_heads=2, d_head=16, d_ff=64, n_layers=1)
        >>> small = lathe.quantize(lathe.Model(tiny, seed=0), bits=4, keep=["decoder.attention"])
        >>> small.decoder.feed_forward[0].up
        QuantizedLinear(32 → 64, 4 bits, activations=none)
    """
    from lathe.quantization.quantise import quantise
    from lathe.quantization.settings import QuantizeSettings

    settings = QuantizeSettings(
        bits=bits,
        activations=activations,
        group=group,
        symmetric=symmetric,
        method=method,
        tables=tables,
        keep=tuple(keep),
    )
    _require_plain(model, "quantise it")
    if isinstance(calibrate, str | os.PathLike):
        from lathe.reshape.text import TextSettings, lay, read_documents

        text = TextSettings(file=os.fspath(calibrate), seed=seed)
        tokenizer = _require_tokenizer(model, text.file)
        documents, _ = read_documents(text, tokenizer, apart=False)
        batches = lay(documents, text, model.architecture, tokenizer).inputs
    else:
        batches = _batches(model, calibrate)
    chosen = quantise(model, settings, batches)
    return Model(
        model.architecture,
        {name: tensor for name, tensor in model.tensors().items() if name not in chosen.codes},
        codes=chosen.codes,
        tokenizer=model.tokenizer,
        generation=model.generation,
        config=model.config,
        device=model.device,
    )


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
    from lathe.reshape.vocabulary import settings_ids

    _require_plain(model, "resize it")
    limits: dict[str, Any] = {"max_parameters": max_parameters, "max_bytes": max_bytes, "max_latency": max_latency}
    settings = read_budget({**limits, "budget.effort": effort})
    if settings is None:
        raise RequestError("no budget: give max_parameters, max_bytes or max_latency")
    text: str | list[Mapping[str, Tensor]]
    if isinstance(calibrate, str | os.PathLike):
        text = os.fspath(calibrate)
    else:
        text = _batches(model, calibrate)
    source = Model(model.architecture, model.tensors()) if adapter_names(model) else model
    return plan_for(
        source,
        settings,
        text,
        tokenizer=model.tokenizer,
        fixed=changes,
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

    The loss is the teacher's whole distribution and the text's own labels, as the model's objective asks them.

    Args:
        teacher: the model before the cut, with the same vocabulary; it is not changed.
        data: a file that `lathe.data.read` opens.
        folder: keep the run there, so that it can be killed and, called again with the same cut and teacher, goes on;
            nowhere where left out.
        settings: fields of `lathe.reshape.heal.HealSettings`: `steps=500`, `tokens=`, `lr=2e-3`, `weight=0.9`,
            `hidden=0.1`, `rows=16`, `length=128`.

    Raises:
        RequestError: no tokenizer, another vocabulary, an unknown setting, text that does not fit the model, or a run
            in `folder` of other models or settings.
        LatheError: the loss is no number any more, or the disk is full.
    """
    from lathe.reshape.at_hand import digests, healed, stored_digest
    from lathe.reshape.carry_out import healing_text
    from lathe.reshape.heal import HealSettings
    from lathe.reshape.heal import heal as run
    from lathe.reshape.measure import is_two_sided, logits_of
    from lathe.reshape.text import endless

    _require_plain(model, "heal it")
    asked = HealSettings.from_dict({"file": os.fspath(data), **settings})
    tokenizer = _require_tokenizer(model, asked.file)
    history, before = model.history, None
    if history is not None:
        history = history.with_unknown(model, tokenizer) if history.was_changed(model) else history
        before = logits_of(model, history.reading.ids(model, tokenizer), both=is_two_sided(model))
        shown = history.reading.settings
        if asked.length is None and shown is not None:  # rows as long as the cut was fitted on
            asked = dataclasses.replace(asked, length=shown.length)
    documents = healing_text(asked, tokenizer, None if history is None else history.reading)
    batches = endless(documents, asked.text, model.architecture, tokenizer)
    place = None if folder is None else Path(folder)
    both = None if place is None else digests(model, teacher)
    done = run(model, teacher, batches, asked, place, tokenizer=tokenizer, config=model.config, asked=both)
    if history is not None and before is not None:
        digest = stored_digest(teacher, teacher.directory, teacher.tokenizer)
        is_source = digest is not None and digest == history.recipe.source.get("sha256")
        model.history = healed(history, model, tokenizer, asked, documents, done, before, is_from_source=is_source)
    return model


def _batches(model: Model, calibrate: Iterable[Tensor | Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
    from lathe.reshape.given import given_batch

    return [given_batch(model, each) for each in calibrate]


def _require_plain(model: Any, to_do: str) -> None:
    if not isinstance(model, Model):
        raise RequestError(
            f"cannot {to_do}: expected a lathe.Model, not a {type(model).__name__}; lathe.load opens a directory, a "
            "hub id or a model of transformers"
        )
    refuse_quantized(model, to_do)


def _require_tokenizer(model: Model, file: str) -> Tokenizer:
    if model.tokenizer is None:
        raise RequestError(
            f"the model has no tokenizer to read {file} with; set model.tokenizer, or give batches of ids"
        )
    return model.tokenizer


def _from_adapter(directory: str | Path, device: torch.device | str | None, dtype: torch.dtype | None) -> Model:
    """The base that an adapter names, with the adapter on it."""

    def make(architecture: Architecture, tensors: Mapping[str, Tensor], codes: Mapping[str, Codes]) -> Model:
        return Model(architecture, tensors, codes=codes, device=device, dtype=dtype)

    model, checkpoint = open_adapted_as(base_of(directory), directory, make)
    model.tokenizer = tokenizer_of(directory, checkpoint)
    model.generation = dict(checkpoint.generation)
    if model.architecture == checkpoint.architecture:
        model.config = dict(checkpoint.config)
    return model


class _ObjectSource:
    """A `transformers` model's weights as a source of tensors."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._tensors = model.state_dict()

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._tensors[name]
        return tensor.detach().clone()


def _from_object(model: torch.nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> Model:
    config_object = getattr(model, "config", None)
    if config_object is None or not hasattr(config_object, "to_dict"):
        raise RequestError(
            f"cannot load a {type(model).__name__}: expected a directory, a hub id or a transformers model"
        )
    config = {**config_object.to_dict(), "architectures": [type(model).__name__]}
    architecture = read_config(config)
    source = family(config["model_type"])
    class_name(config, source)
    generation = getattr(model, "generation_config", None)
    settings = generation.to_diff_dict() if generation is not None else {}
    reader = Reader(source, architecture, _ObjectSource(model))
    loaded = Model.from_checkpoint(Checkpoint(reader, None, config, settings), device=device, dtype=dtype)
    return loaded.train(model.training)


def parameter_count(model: Transformer) -> int:
    """How many trained numbers the model holds, tied tensors counted once."""
    return sum(p.size for p in stored(model.architecture) if p.trained)
