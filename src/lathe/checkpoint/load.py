"""A directory or hub id, opened as an architecture and its parameters under Lathe's names.

Two forms are read. Hugging Face's: `config.json` beside safetensors (or `.bin`), mapped by the family that
its `model_type` names. Lathe's own: `lathe.json` with the architecture, beside safetensors that hold the
blueprint's names; it can hold what no family can. Tensors are read when they are asked for, one by one.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lathe.architecture import Architecture
from lathe.blueprint import stored
from lathe.checkpoint.compressed import KEY, CompressedSource
from lathe.checkpoint.hub import fetch
from lathe.errors import RequestError
from lathe.families import family, read_config
from lathe.families.adapter import Reader, Source

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lathe.model.codes import Codes

log = logging.getLogger("lathe")

CONFIG, OWN, GENERATION = "config.json", "lathe.json", "generation_config.json"
_ADAPTER = "adapter_config.json"  # as `lathe.adapt` has it


class Parameters(Protocol):
    """Parameters under Lathe's names, read one at a time."""

    architecture: Architecture
    left_out: list[str]

    def names(self) -> Iterator[str]:
        """Every parameter's name."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One parameter."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Args:
        parameters: the architecture and its tensors.
        directory: where it lies; None for a model that came as an object.
        config: the Hugging Face config it came with, keys that Lathe does not use included; empty for Lathe's form.
        generation: its generation settings, as stored.
        codes: the quantised matrices, by name; `parameters` gives the numbers that they stand for.
    """

    parameters: Parameters
    directory: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    codes: Mapping[str, Codes] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture:
        """The sizes and choices of the stored model."""
        return self.parameters.architecture


def read_architecture(model: str | Path, revision: str | None = None) -> Architecture:
    """The architecture of a directory or hub id, from its config alone; no weights are read or fetched.

    Raises:
        RequestError: no such model, no config, one that Lathe cannot read, or a quantised model.
    """
    directory = fetch(model, revision, weights=False)
    described, stock = _described(directory)
    _refuse_quantised(model, described)
    return read_config(described) if stock else _own_architecture(directory, described)


def open_checkpoint(model: str | Path, revision: str | None = None, *, quantized: bool = False) -> Checkpoint:
    """Open a directory or hub id.

    Args:
        quantized: whether a quantised model will do: its `codes` then have to be looked at.

    Raises:
        RequestError: no such model, files missing or damaged, an unknown family, tensors that do not fit the config,
            or a quantised model where that will not do.
    """
    from lathe.checkpoint.tensors import open_tensors

    directory = fetch(model, revision)
    described, stock = _described(directory)
    if not quantized:
        _refuse_quantised(model, described)
    asked = described.pop(KEY, None)
    architecture = read_config(described) if stock else _own_architecture(directory, described)
    tensors = open_tensors(directory)
    source = tensors if asked is None else CompressedSource(tensors, asked)
    reader: Reader | OwnReader
    if stock:
        reader = Reader(family(described["model_type"]), architecture, source)
    else:
        reader = OwnReader(architecture, source)
    config = described if stock else {}
    if isinstance(source, CompressedSource):
        return Checkpoint(reader, directory, config, _generation(directory, config), _codes(reader, source))
    return Checkpoint(of_one_type(reader, source), directory, config, _generation(directory, config))


def _refuse_quantised(model: str | Path, described: Mapping[str, Any]) -> None:
    asked = described.get(KEY)
    if asked is not None:
        kind = asked.get("quant_method") if isinstance(asked, dict) else None
        raise RequestError(
            f"{model} is quantised already{f' ({kind})' if kind else ''}: give the model as it was before that"
        )


def _codes(reader: Reader | OwnReader, source: CompressedSource) -> dict[str, Codes]:
    """The quantised matrices under Lathe's names."""
    found: dict[str, Codes] = {}
    rounds_again = any(scheme.activations != "none" for scheme in source.again.values())
    for parameter in stored(reader.architecture):
        name, alone = reader.stored_as(parameter.name)
        codes = source.codes(name)
        if codes is None:
            continue
        if not alone:
            raise RequestError(
                f"the quantised tensor {name!r} is stored transposed, or with others in one: Lathe reads quantised "
                "matrices one by one; give the model as it was before that"
            )
        # Inputs of a tied table are those of the module that multiplies with it, which is stored a second time.
        tied = parameter.role == "table" and rounds_again
        found[parameter.name] = replace(codes, activations="int8") if tied else codes
    return found


# Settings of generation that older configs hold, from before they had a file of their own; `transformers` still reads
# them there. The tokens that the architecture holds are not among them.
GENERATION_KEYS = (
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "stop_strings", "max_time"),
    *("do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("num_return_sequences", "num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"),
    *("repetition_penalty", "encoder_repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "renormalize_logits"),
    *("suppress_tokens", "begin_suppress_tokens", "sequence_bias", "force_words_ids", "constraints"),
    *("exponential_decay_length_penalty", "penalty_alpha", "guidance_scale", "watermarking_config"),
    *("remove_invalid_values", "token_healing", "dola_layers", "prompt_lookup_num_tokens"),
)


def _generation(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    if (directory / GENERATION).is_file():
        return _json(directory / GENERATION)
    return {key: config[key] for key in GENERATION_KEYS if config.get(key) is not None}


def of_one_type(reader: Reader | OwnReader, source: TypedSource) -> Parameters:
    """The parameters, in the widest of their types where they have several.

    `transformers` keeps some matrices of a float16 file in float32, whose range they need (a T5's `wo`), and converts
    on the way; here a model computes in one type.
    """
    import torch

    kinds = {source.dtype(reader.stored_as(name)[0]) for name in reader.names()}
    floating = [kind for kind in kinds if kind.is_floating_point]
    if len(floating) < 2:
        return reader
    # Nothing is promoted from 8 bits: those numbers are read in the type of the others, in float32 where there is none.
    wide = [kind for kind in floating if kind.itemsize > 1] or [torch.float32]
    widest = functools.reduce(torch.promote_types, wide)
    log.info("the weights are of %d types; all are read as %s", len(floating), str(widest).removeprefix("torch."))
    return _Widened(reader, widest)


class TypedSource(Source, Protocol):
    """A source that knows the types of its tensors without reading them."""

    def dtype(self, name: str) -> torch.dtype:
        """The type of one."""
        ...


class _Widened:
    """Parameters in one floating-point type."""

    def __init__(self, reader: Parameters, dtype: torch.dtype) -> None:
        self.architecture, self.left_out = reader.architecture, reader.left_out
        self._reader, self._dtype = reader, dtype

    def names(self) -> Iterator[str]:
        """Every parameter's name."""
        return self._reader.names()

    def tensor(self, name: str) -> Tensor:
        """One parameter."""
        tensor = self._reader.tensor(name)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


class OwnReader:
    """Lathe's own form: tensors that already have the blueprint's names.

    Raises:
        RequestError: a tensor too many, too few, or of another shape than the architecture says.
    """

    def __init__(self, architecture: Architecture, source: Source) -> None:
        self.architecture = architecture
        self.left_out: list[str] = []
        self._source = source
        expected = {p.name: p.shape for p in stored(architecture)}
        found = {name: source.shape(name) for name in source.names()}
        for name in [*expected, *found]:
            if name not in found:
                raise RequestError(f"the tensor {name!r} is missing from the file; expected the whole model")
            if name not in expected:
                raise RequestError(f"the tensor {name!r} belongs to no parameter of the architecture in {OWN}")
            if found[name] != expected[name]:
                raise RequestError(f"the tensor {name!r} has shape {found[name]} and {OWN} says {expected[name]}")
        self._names = list(expected)

    def names(self) -> Iterator[str]:
        """Every parameter's name, in the blueprint's order."""
        return iter(self._names)

    def tensor(self, name: str) -> Tensor:
        """One parameter."""
        return self._source.tensor(name)

    def stored_as(self, name: str) -> tuple[str, bool]:
        """The tensor that holds a parameter, and whether it is that and nothing else: always."""
        return name, True


def _described(directory: Path) -> tuple[dict[str, Any], bool]:
    """A directory's config and True, or what Lathe's own form has instead and False."""
    if (directory / CONFIG).is_file():
        return _json(directory / CONFIG), True
    if not (directory / OWN).is_file():
        if (directory / _ADAPTER).is_file():
            raise RequestError(
                f"{directory} is an adapter and no model: expected a model's directory; fold it into its base first "
                "(lathe adapt merge BASE ADAPTER DESTINATION)"
            )
        raise RequestError(f"{directory} holds neither {CONFIG} nor {OWN}; expected a model's directory")
    return _json(directory / OWN), False


def _own_architecture(directory: Path, values: Mapping[str, Any]) -> Architecture:
    if not isinstance(values.get("architecture"), dict):
        raise RequestError(f"{directory / OWN} has no architecture; expected a file that Lathe wrote")
    return Architecture.from_dict(values["architecture"])


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not JSON ({error}); is the file complete?") from None
    if not isinstance(values, dict):
        raise RequestError(f"{path} holds {type(values).__name__}, not an object; expected a config")
    return values
