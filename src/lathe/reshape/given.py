"""Text that a caller hands over as token ids, as the keyword arguments of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lathe.architecture import Tokens
from lathe.errors import RequestError
from lathe.model.loss import IGNORED
from lathe.model.transformer import Transformer


def given_batch(model: Transformer, given: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """One batch as the model's keyword arguments.

    Args:
        given: ids, rows × positions, which get a mask where rows end in pads; or keyword arguments of the model. An
            encoder-decoder that writes gets the ids as labels, too, where it is given none.

    Raises:
        RequestError: something else.
    """
    if isinstance(given, Tensor) and given.ndim == 2:
        tokens_BT = _unpadded(given, model.architecture.tokens)
        given = {"input_ids": given} if tokens_BT.all() else {"input_ids": given, "attention_mask": tokens_BT.long()}
    if not isinstance(given, Mapping) or not all(isinstance(each, Tensor) for each in given.values()):
        raise RequestError(
            "calibrate: expected a file, or batches of token ids, each a tensor of rows × positions or a mapping of "
            f"the model's arguments, and one is a {type(given).__name__}; model.tokenizer(texts) makes such a mapping"
        )
    ids_BT = given.get("input_ids")
    if ids_BT is not None and ids_BT.dtype not in (torch.int64, torch.int32):
        if ids_BT.is_floating_point() or ids_BT.dtype == torch.bool:
            raise RequestError(f"calibrate: token ids are whole numbers, and a batch holds {ids_BT.dtype}")
        ids_BT = ids_BT.long()
        given = {**given, "input_ids": ids_BT}
    if ids_BT is not None and not ids_BT.numel():
        raise RequestError(f"calibrate: a batch of {' × '.join(map(str, ids_BT.shape))} token ids; leave it out")
    reads = {"labels", "decoder_input_ids", "decoder_inputs_embeds"}
    writes = model.encoder is not None and model.decoder is not None and model.head.language is not None
    if not writes or ids_BT is None or reads & set(given):
        return given
    hidden = given["attention_mask"] == 0 if "attention_mask" in given else torch.zeros_like(ids_BT, dtype=torch.bool)
    return {**given, "labels": ids_BT.masked_fill(hidden, IGNORED)}


def _unpadded(ids_BT: Tensor, tokens: Tokens) -> Tensor:
    """Where rows of ids are not filled up at their end; where the end of a text is marked by the pad, one stays."""
    if tokens.pad is None:
        return torch.ones_like(ids_BT, dtype=torch.bool)
    filled_BT = (ids_BT == tokens.pad).flip(1).cumprod(1).flip(1).bool()
    if tokens.pad in tokens.eos:
        filled_BT = filled_BT & F.pad(filled_BT, (1, 0))[:, :-1]
    return ~filled_BT
