"""What T5, mT5, BART and mBART have in common, over random architectures."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given

from lathe.architecture import Architecture
from lathe.blueprint import stored
from lathe.families import family, objections, read_config, write_config
from lathe.families.adapter import to_disk
from tests.strategies import architectures

NAMES = ("t5", "mt5", "bart", "mbart")


def brought_in(architecture: Architecture) -> Architecture:
    """The architecture with every change made that its objections propose."""
    changes = [objection.changes for objection in objections(architecture)]
    return architecture.with_({path: value for each in changes for path, value in each.items()})


@pytest.mark.parametrize("name", NAMES)
@given(architecture=architectures(shapes=("both",), dropout=True))
def test_the_objections_lead_into_the_family(name: str, architecture: Architecture) -> None:
    inside = brought_in(architecture.with_(family=name))
    assert objections(inside) == []
    assert objections(read_config(write_config(inside))) == []


@pytest.mark.parametrize("name", NAMES)
@given(architecture=architectures(shapes=("both",)))
def test_a_file_holds_exactly_the_tensors_of_the_stock_class(name: str, architecture: Architecture) -> None:
    inside = brought_in(architecture.with_(family=name))
    config = write_config(inside)
    kind = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        theirs = kind(kind.config_class.from_dict(config))
    shapes = {tensor_name: tuple(tensor.shape) for tensor_name, tensor in theirs.state_dict().items()}
    language = inside.head.language
    for target, source in theirs.all_tied_weights_keys.items():
        # T5's stock config ties every head; one that the file stores apart is untied as it is read.
        if not (target == "lm_head.weight" and language is not None and not language.tied):
            assert shapes.pop(target) == shapes[source]
    written = {tensor_name: shape for tensor_name, shape, _ in to_disk(family(name), inside)}
    assert written == shapes
    held = {ours for entry in family(name).entries(inside) for ours in entry.ours}
    assert held == {parameter.name for parameter in stored(inside)}


@pytest.mark.parametrize("name", ["t5", "mt5"])
@given(architecture=architectures(shapes=("encoder",)))
def test_t5_has_encoders_too(name: str, architecture: Architecture) -> None:
    inside = brought_in(architecture.with_(family=name))
    assert objections(inside) == []
    assert read_config(write_config(inside)).decoder is None


@pytest.mark.parametrize("name", NAMES)
@given(architecture=architectures(shapes=("decoder",)))
def test_a_decoder_alone_is_beyond_repair(name: str, architecture: Architecture) -> None:
    (only,) = objections(architecture.with_(family=name))
    assert "no encoder" in only.reason
    assert not only.changes
