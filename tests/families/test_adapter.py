"""The adapter itself, on families made for the purpose; the real ones are held by the contract."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from lathe.architecture import Architecture, Attention, Embedding, FeedForward, Head, LanguageHead, Stack
from lathe.blueprint import stored
from lathe.errors import RequestError
from lathe.families.adapter import Reader, fuse, to_disk
from lathe.families.base import Config, Entry, Family
from tests.families.contract import Tensors
from tests.strategies import architectures

BLOCK = Stack(n_layers=1, attention=Attention(n_heads=2, d_head=2), feed_forward=FeedForward(d_ff=5), causal=True)
TIED = Architecture(
    d_model=4, embedding=Embedding(vocab_size=7), decoder=BLOCK, head=Head(language=LanguageHead(offset=True))
)
UNTIED = TIED.with_(tied=False)
QKV = tuple(f"decoder.attention.0.{letter}.weight" for letter in "qkv")


def _entries(architecture: Architecture) -> Iterator[Entry]:
    """Every kind of entry: fused and transposed, a row, a copy, a name written twice, the name as it is."""
    special = {
        QKV[0]: Entry("body.qkv", QKV, transposed=True),
        "head.language.offset": Entry("offset", ("head.language.offset",), row=True),
        "embedding.tokens.weight": Entry(
            "body.table", ("embedding.tokens.weight",), copies=("body.old_table",), again=("body.table_again",)
        ),
        "head.language.output.weight": Entry("head", ("head.language.output.weight",)),
    }
    for parameter in stored(architecture):
        if parameter.name not in QKV[1:]:
            yield special.get(parameter.name, Entry(f"body.{parameter.name}", (parameter.name,)))


def _no_config(architecture: Architecture) -> dict[str, object]:
    raise AssertionError("the adapter asks for no config")


def _no_architecture(config: Config, name: str) -> Architecture:
    raise AssertionError("the adapter reads no config")


FAMILY = Family(
    name="made_up",
    read=_no_architecture,
    write=_no_config,
    entries=_entries,
    objections=lambda architecture: [],
    classes=("MadeUp",),
    prefix="body.",
    other_heads=("other.*",),
    ignored=("*.counter",),
    renamed=((r"\.gamma$", ".weight"),),
)


def _parameters(architecture: Architecture) -> dict[str, torch.Tensor]:
    return {p.name: torch.randn(p.shape) for p in stored(architecture)}


def _on_disk(architecture: Architecture, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    written = to_disk(FAMILY, architecture)
    return {name: fuse(entry, [parameters[ours] for ours in entry.ours]) for name, _, entry in written}


@pytest.mark.parametrize("architecture", [TIED, UNTIED], ids=["tied", "untied"])
def test_what_is_written_is_read_back(architecture: Architecture) -> None:
    parameters = _parameters(architecture)
    disk = _on_disk(architecture, parameters)
    reader = Reader(FAMILY, architecture, Tensors(disk))
    assert reader.architecture == architecture
    assert list(reader.names()) == list(parameters)
    for name, tensor in parameters.items():
        assert torch.equal(reader.tensor(name), tensor), name


def test_fused_and_transposed_tensors_have_the_shape_that_is_announced() -> None:
    disk = _on_disk(TIED, _parameters(TIED))
    announced = {name: shape for name, shape, _ in to_disk(FAMILY, TIED)}
    assert {name: tuple(tensor.shape) for name, tensor in disk.items()} == announced
    assert announced["body.qkv"] == (4, 12)
    assert announced["offset"] == (1, 7)
    assert announced["body.table_again"] == announced["body.table"] == (7, 4)
    assert "body.old_table" not in announced


def test_a_part_of_a_fused_tensor_owns_its_memory() -> None:
    reader = Reader(FAMILY, TIED, Tensors(_on_disk(TIED, _parameters(TIED))))
    part = reader.tensor(QKV[1])
    assert part.is_contiguous()


def test_older_names_and_names_without_the_prefix_are_read() -> None:
    parameters = _parameters(TIED)
    disk = _on_disk(TIED, parameters)
    old = {name.removeprefix("body.").replace("norm.weight", "norm.gamma"): tensor for name, tensor in disk.items()}
    assert any("gamma" in name for name in old)
    reader = Reader(FAMILY, TIED, Tensors(old))
    for name, tensor in parameters.items():
        assert torch.equal(reader.tensor(name), tensor), name


def test_other_heads_are_listed_and_buffers_passed_over() -> None:
    disk = _on_disk(TIED, _parameters(TIED)) | {"other.weight": torch.zeros(2), "body.counter": torch.zeros(1)}
    assert Reader(FAMILY, TIED, Tensors(disk)).left_out == ["other.weight"]


def test_a_stored_head_equal_to_the_table_stays_tied() -> None:
    disk = _on_disk(TIED, _parameters(TIED))
    disk["head"] = disk["body.table"].clone()
    assert Reader(FAMILY, TIED, Tensors(disk)).architecture == TIED


def test_a_stored_head_that_differs_from_the_table_is_untied() -> None:
    disk = _on_disk(TIED, _parameters(TIED))
    disk["head"] = disk["body.table"] + 1
    reader = Reader(FAMILY, TIED, Tensors(disk))
    assert reader.architecture == UNTIED
    assert torch.equal(reader.tensor("head.language.output.weight"), disk["head"])


def test_a_stored_head_of_another_shape_is_named() -> None:
    disk = _on_disk(TIED, _parameters(TIED)) | {"head": torch.zeros(9, 4)}
    with pytest.raises(RequestError, match="'head' is 9 × 4 and the config says 7 × 4"):
        Reader(FAMILY, TIED, Tensors(disk))


@pytest.mark.parametrize("copy", ["body.old_table", "body.table_again"])
def test_copies_are_read_alone_and_refused_where_they_differ(copy: str) -> None:
    disk = _on_disk(TIED, _parameters(TIED))
    table = disk.pop("body.table")
    del disk["body.table_again"]
    assert torch.equal(Reader(FAMILY, TIED, Tensors(disk | {copy: table})).tensor("embedding.tokens.weight"), table)
    with pytest.raises(RequestError, match=f"'body.table' and '{copy}' differ"):
        Reader(FAMILY, TIED, Tensors(disk | {"body.table": table, copy: table + 1}))


def test_a_missing_tensor_is_named() -> None:
    disk = _on_disk(TIED, _parameters(TIED))
    del disk["body.qkv"]
    with pytest.raises(RequestError, match=r"'body\.qkv' is missing"):
        Reader(FAMILY, TIED, Tensors(disk))


def test_a_tensor_too_many_is_named_as_the_file_has_it() -> None:
    disk = _on_disk(TIED, _parameters(TIED)) | {"body.decoder.attention.1.norm.gamma": torch.zeros(4)}
    with pytest.raises(RequestError, match=r"'body\.decoder\.attention\.1\.norm\.gamma' belongs to no parameter"):
        Reader(FAMILY, TIED, Tensors(disk))


def test_the_shape_is_asked_before_the_tensor_is_read() -> None:
    class Headers(Tensors):
        def tensor(self, name: str) -> torch.Tensor:
            raise AssertionError(f"{name} was read")

    disk = _on_disk(UNTIED, _parameters(UNTIED))
    del disk["body.table_again"]  # a copy has to be read, to be compared
    assert Reader(FAMILY, UNTIED, Headers(disk)).architecture == UNTIED


@given(architectures())
def test_every_architecture_passes_through(architecture: Architecture) -> None:
    plain = replace(FAMILY, entries=lambda a: [Entry(f"body.{p.name}", (p.name,)) for p in stored(a)], renamed=())
    parameters = _parameters(architecture)
    disk = {
        name: fuse(entry, [parameters[ours] for ours in entry.ours]) for name, _, entry in to_disk(plain, architecture)
    }
    reader = Reader(plain, architecture, Tensors(disk))
    assert reader.architecture == architecture
    assert all(torch.equal(reader.tensor(name), parameters[name]) for name in parameters)
