"""The model that a job cuts, opened from its files, with what travels with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lathe.checkpoint.hub import fetch
from lathe.checkpoint.load import CONFIG, open_checkpoint
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.quantization.place import fill
from lathe.reshape.spill import Tensors
from lathe.reshape.stream import StreamedTransformer, weights_of
from lathe.text.tokenizer import Tokenizer


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
        if self.directory is None:
            return None
        named = Path(self.name).expanduser()  # a directory, even where it is not seen from here any more
        parts = self.directory.absolute().parts
        is_local = named.exists() or not named.parts or parts[-len(named.parts) :] == named.parts
        return None if is_local else self.name


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


def require_numbers(source: Source) -> None:
    """Refuse weights that a training has blown up: nothing that is measured on them means anything."""
    for name, tensor in weights_of(source.model).items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RequestError(
                f"{source.name}: {name} holds numbers that are not finite (NaN or infinity); take a checkpoint from "
                "before that"
            )
