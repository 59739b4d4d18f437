"""Adapters in runs: which model they are put on, what a checkpoint of such a run holds, and how one is folded in.

A checkpoint holds the adapter as PEFT's two files, the head's description, the tokenizer, and `trained/`: what the
run trains, tensor by tensor under the names that it has here. PEFT's form is not enough to go on from: of a fused
module (GPT-2's q, k and v) it has one A for three. The base is not written. It is named, and a sample of its numbers
tells whether a resumed run has the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lathe.adapt import LoraSettings, add_lora, save_adapter
from lathe.adapt.targets import linear_layers
from lathe.checkpoint.save import Companion
from lathe.checkpoint.tensors import write_tensors
from lathe.errors import RequestError
from lathe.model.transformer import Transformer
from lathe.train.checkpointing import TRAINED

_SAMPLE = 64  # numbers of each tensor


def put_on(model: Transformer, settings: LoraSettings, fresh: Sequence[str], seed: int) -> LoraSettings:
    """Put a new adapter on a trained model, with the layers that are new trained whole.

    Args:
        fresh: the parameters that were just drawn, which nobody trained.

    Returns:
        The settings with these layers among `whole`.

    Raises:
        RequestError: what `add_lora` refuses, and a new parameter that is of no linear layer.
    """
    layers = linear_layers(model.architecture)
    new = list(dict.fromkeys(name.rpartition(".")[0] for name in fresh))
    odd = [name for name in new if name not in layers]
    if odd:
        raise RequestError(
            f"adapter: {odd[0]} is new here and is no linear layer, which is all that an adapter can bring along; "
            "train the whole model under this head first"
        )
    whole = list(dict.fromkeys([*settings.whole_terms, *new]))
    full = replace(settings, whole=",".join(whole) or None)
    add_lora(model, full, seed=seed)
    return full


def write_adapter(model: Transformer, path: Path, base: str, tokenizer: Companion | None) -> None:
    """Write a checkpoint's model part for a model with an adapter: see the module."""
    save_adapter(model, path, base_model=base)
    if tokenizer is not None:
        tokenizer.save(path)
    (path / TRAINED).mkdir()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    write_tensors(path / TRAINED, trained)


def sample(model: Transformer) -> str:
    """A short name of a model's numbers, from some of each tensor: other weights, another name."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        at = torch.linspace(0, len(flat) - 1, min(_SAMPLE, len(flat)), device=flat.device).long()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat[at].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
