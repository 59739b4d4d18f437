"""What the calls of `lathe.api` are given: a model of one's own, text or batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lathe.api.model import Model
from lathe.errors import RequestError
from lathe.quantization.place import refuse_quantized
from lathe.reshape.given import given_batch
from lathe.text.tokenizer import Tokenizer


def batches_of(model: Model, calibrate: Iterable[Tensor | Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
    """Batches that a user gave, as keyword arguments of the model."""
    if not isinstance(calibrate, Iterable):
        raise RequestError(
            f"calibrate: expected a file, or batches of token ids, and it is a {type(calibrate).__name__}; leave it "
            "out where nothing is fitted"
        )
    return [given_batch(model, each) for each in calibrate]


def require_plain(model: Any, to_do: str) -> None:
    """Refuse what is no `lathe.Model`, and one that is quantised.

    Args:
        to_do: what was wanted, as "resize it".
    """
    require_model(model, to_do)
    refuse_quantized(model, to_do)


def require_model(model: Any, to_do: str) -> None:
    """Refuse what is no `lathe.Model`; arguments as for `require_plain`."""
    if not isinstance(model, Model):
        raise RequestError(
            f"cannot {to_do}: expected a lathe.Model, not a {type(model).__name__}; lathe.load opens a directory, a "
            "hub id or a model of transformers"
        )


def require_tokenizer(model: Model, file: str) -> Tokenizer:
    """The tokenizer that a file is to be read with."""
    if model.tokenizer is None:
        raise RequestError(
            f"the model has no tokenizer to read {file} with; set model.tokenizer, or give batches of ids"
        )
    return model.tokenizer
