from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from lathe.architecture import Architecture
from lathe.model.transformer import Transformer
from lathe.planner.activations import activations
from lathe.presets import preset
from tests.strategies import EOS, architectures

BATCH, LENGTH = 3, 11


def _kept(architecture: Architecture) -> int:
    """Bytes of the tensors that autograd keeps, each storage once, parameters and buffers left out."""
    model = Transformer(architecture, seed=0).train()
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    ids = torch.full((BATCH, LENGTH), 4)
    ids[:, -1] = EOS
    inputs = {"input_ids": ids}
    if architecture.encoder is not None and architecture.decoder is not None:
        inputs["decoder_input_ids"] = ids.clone()
    if architecture.head.language is not None:
        inputs["labels"] = ids.clone()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**inputs)  # held, so that no address is given out twice
    assert output.last_hidden_state is not None
    return sum(storage.nbytes() for storage in storages.values())


@settings(max_examples=25)
@given(architectures(max_layers=2))
def test_what_is_kept_is_what_autograd_keeps(architecture: Architecture) -> None:
    assert activations(architecture, BATCH, LENGTH).total == pytest.approx(_kept(architecture), rel=0.01)


@settings(max_examples=25)
@given(architectures(max_layers=2, dropout=True))
def test_what_is_kept_is_what_autograd_keeps_with_dropout(architecture: Architecture) -> None:
    assert activations(architecture, BATCH, LENGTH).total == pytest.approx(_kept(architecture), rel=0.01)


@given(architectures(dropout=True))
def test_the_parts_are_the_whole(architecture: Architecture) -> None:
    kept = activations(architecture, BATCH, LENGTH)
    assert kept.total == kept.body + kept.head + sum(each.n_layers * each.layer for each in kept.stacks)
    assert kept.attention_weights <= kept.total


@given(architectures(dropout=True))
def test_twice_the_rows_keep_twice_as_much_but_for_what_rows_share(architecture: Architecture) -> None:
    one, two = activations(architecture, 1, LENGTH), activations(architecture, 2, LENGTH)
    assert one.total < two.total <= 2 * one.total
    assert two.attention_weights == 2 * one.attention_weights


def test_checkpointing_keeps_one_layer_and_the_inputs_of_the_others() -> None:
    kept = activations(preset("llama-3.2-1b"), 8, 512)
    (stack,) = kept.stacks
    assert stack.input == 8 * 512 * 2048 * 4
    assert kept.checkpointed == kept.body + kept.head + 16 * stack.input + stack.layer
    assert kept.checkpointed < kept.total / 2


def test_sharing_keeps_as_many_activations() -> None:
    albert = preset("albert-base")
    assert activations(albert, 8, 128) == activations(albert.with_(sharing="none"), 8, 128)


@pytest.mark.parametrize(("name", "kept"), [("llama-3.2-1b", False), ("t5-small", True), ("gpt2", True)])
def test_attention_weights_are_kept_where_a_cpu_cannot_fuse(name: str, kept: bool) -> None:
    assert (activations(preset(name), 2, 64).attention_weights > 0) is kept


def test_without_dropout_and_bias_no_attention_weight_is_kept() -> None:
    assert activations(preset("gpt2").with_(dropout={}), 2, 64).attention_weights == 0
