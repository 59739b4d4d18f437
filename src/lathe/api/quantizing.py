"""Fewer bits for the weights of a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from torch import Tensor

from lathe.api.given import batches_of, require_plain, require_tokenizer
from lathe.api.model import Model


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
    require_plain(model, "quantise it")
    if isinstance(calibrate, str | os.PathLike):
        from lathe.reshape.text import TextSettings, lay, read_documents

        text = TextSettings(file=os.fspath(calibrate), seed=seed)
        tokenizer = require_tokenizer(model, text.file)
        documents, _ = read_documents(text, tokenizer, apart=False)
        batches = lay(documents, text, model.architecture, tokenizer).inputs
    else:
        batches = batches_of(model, calibrate)
    chosen = quantise(model, settings, batches)
    return Model(
        model.architecture,
        {name: tensor.clone() for name, tensor in model.tensors().items() if name not in chosen.codes},
        codes=chosen.codes,
        tokenizer=model.tokenizer,
        generation=model.generation,
        config=model.config,
        device=model.device,
    )
