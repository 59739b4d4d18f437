"""What every family is held to: a tiny random twin in `transformers`, computed with, saved and read back.

A family's test module subclasses `FamilyContract`, lists its `variants` (a stock class and the config it is
built from, awkward sizes first) and the architectures that lie `outside` it. Everything else is inherited:
each test runs for each variant. What is special in a family is a hook, not a copy of a test.

    class TestT5(FamilyContract):
        variants = (Variant("T5Model", {"d_model": 20, "num_heads": 3, "d_kv": 6}),)
        outside = (Outside({"norm_position": "post"}, "norm_position is post"),)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import lathe
from lathe.architecture import Architecture
from lathe.errors import RequestError
from lathe.families import family, holder, objections, read_config, write_config
from lathe.families.adapter import Reader

PADDINGS = ("none", "right", "left")
BATCH, LENGTH, TARGET_LENGTH, PADS = 3, 9, 7, 3

# Fields of stock outputs, and ours where the name differs. Those not listed are not compared.
FIELDS = {
    "logits": "logits",
    "prediction_logits": "logits",
    "seq_relationship_logits": "seq_relationship_logits",
    "sop_logits": "seq_relationship_logits",
    "last_hidden_state": "last_hidden_state",
    "pooler_output": "pooler_output",
    "encoder_last_hidden_state": "encoder_last_hidden_state",
    "hidden_states": "hidden_states",
    "encoder_hidden_states": "encoder_hidden_states",
    "decoder_hidden_states": "decoder_hidden_states",
    "attentions": "attentions",
    "encoder_attentions": "encoder_attentions",
    "decoder_attentions": "decoder_attentions",
    "cross_attentions": "cross_attentions",
    "loss": "loss",
}


@dataclass(frozen=True)
class Variant:
    """One twin: a class of `transformers`, the values its config is built from, and what is special about it."""

    kind: str
    config: Mapping[str, Any]
    note: str = ""
    untied: bool = False  # give the stock head a table of its own, whatever the config makes of it

    def __str__(self) -> str:
        return f"{self.kind}-{self.note}" if self.note else self.kind


@dataclass(frozen=True)
class Outside:
    """Changes that lead out of a family, and what its objection says.

    Args:
        changes: for `Architecture.with_`, on the architecture of the first variant or of the one of class `kind`.
        says: words of the reason.
        fits: whether the objections' changes lead back in.
    """

    changes: Mapping[str, Any]
    says: str
    kind: str | None = None
    fits: bool = True


@dataclass(frozen=True)
class Twin:
    """A stock model with random weights, the directory it saved itself to, and Lathe's reading of that."""

    variant: Variant
    theirs: Any
    path: Path
    ours: lathe.Model
    tensors: dict[str, Tensor] = field(repr=False)
    config: dict[str, Any] = field(repr=False)

    @property
    def architecture(self) -> Architecture:
        return self.ours.architecture


# Made once and asked by many tests. Not a fixture of a wider scope: pytest rebuilds those whenever two tests
# in a row want different variants.
_TWINS: dict[tuple[type, str], Twin] = {}


class Tensors:
    """Tensors by name, as the source that a `Reader` reads."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reader:
    """A family's reader over a config and tensors in memory."""
    return Reader(family(config["model_type"]), read_config(config), Tensors(tensors))


def randomise(model: torch.nn.Module) -> None:
    """Draw every parameter anew, wide enough that no term of the computation is lost in the others.

    Norm weights stand around 1 and biases around 0, both far enough off that mixing two up shows.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.3 * parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(std=0.3).add_(1.0 if name.endswith("weight") else 0.0)


def write_directory(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """A checkpoint directory of `config` and `tensors`."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def close(ours: Tensor, theirs: Tensor, valid: Tensor | None, what: str) -> None:
    """Assert that two tensors agree within 1e-4, at the valid positions only where `valid` says which."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    if valid is not None:
        ours, theirs = ours[valid], theirs[valid]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4, msg=lambda text: f"{what}: {text}")


F = TypeVar("F", bound=Callable[..., None])


def once_per_class(test: F) -> F:
    """Mark a test that asks about names and files: the first variant of each stock class is enough."""
    test.once_per_class = True  # type: ignore[attr-defined]
    return test


class FamilyContract:
    """The tests; a subclass says what they run on."""

    variants: ClassVar[tuple[Variant, ...]] = ()
    outside: ClassVar[tuple[Outside, ...]] = ()
    # The name under which a pretraining class takes its sentence labels.
    sentence_label: ClassVar[str] = "next_sentence_label"

    # Hooks

    @classmethod
    def finish(cls, model: Any, variant: Variant) -> None:
        """Change the stock model further, after its weights were drawn (a buffer, a table of its own)."""

    @classmethod
    def table_gradient(cls, model: Any) -> Tensor:
        """The gradient that has reached the stock model's token table."""
        gradient: Tensor = model.get_input_embeddings().weight.grad
        return gradient

    def field_pairs(self, theirs: Any) -> Iterable[tuple[str, str]]:
        """The stock output's fields that are compared, each with ours."""
        found = [(name, ours, theirs.get(name)) for name, ours in FIELDS.items()]
        # A stock encoder that is asked for attention adds an empty tuple for the cross-attention it lacks.
        return [(name, ours) for name, ours, value in found if isinstance(value, Tensor) or value]

    # Twins

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "twin" in metafunc.fixturenames:
            variants = self.variants
            if getattr(metafunc.function, "once_per_class", False):
                variants = tuple({each.kind: each for each in reversed(variants)}.values())[::-1]
            metafunc.parametrize("twin", variants, ids=str, indirect=True)
        if "out" in metafunc.fixturenames:
            metafunc.parametrize("out", self.outside, ids=lambda each: each.says.replace(" ", "_"))

    @pytest.fixture
    def twin(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twin:
        key = (type(self), str(request.param))
        if key not in _TWINS:
            _TWINS[key] = self.make_twin(request.param, tmp_path_factory.mktemp("twin") / "stock")
        return _TWINS[key]

    def make_twin(self, variant: Variant, path: Path) -> Twin:
        torch.manual_seed(0)
        kind = getattr(transformers, variant.kind)
        # Eager attention is the only one that returns its weights.
        theirs = kind(kind.config_class(**variant.config, attn_implementation="eager")).eval()
        if variant.untied:
            head = theirs.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        randomise(theirs)
        self.finish(theirs, variant)
        theirs.save_pretrained(path)
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return Twin(variant, theirs, path, lathe.load(path), load_file(path / "model.safetensors"), config)

    def architecture(self, kind: str | None = None) -> Architecture:
        """The architecture of the first variant, or of the first of class `kind`."""
        variant = next(each for each in self.variants if kind in (None, each.kind))
        config = getattr(transformers, variant.kind).config_class(**variant.config)
        return read_config({**config.to_dict(), "architectures": [variant.kind]})

    # Inputs

    def inputs(self, twin: Twin, padding: str = "none") -> dict[str, Tensor]:
        """A batch of random ids that the twin takes, with masks where `padding` is right or left."""
        a = twin.architecture
        batch = self._ids(a, LENGTH, padding, "input_ids", "attention_mask")
        if a.embedding.token_types:
            batch["token_type_ids"] = torch.randint(0, a.embedding.token_types, (BATCH, LENGTH))
        # A classifier with a decoder makes the decoder's ids itself, from the encoder's.
        if a.encoder is not None and a.decoder is not None and a.head.classifier is None:
            batch |= self._ids(a, TARGET_LENGTH, padding, "decoder_input_ids", "decoder_attention_mask")
        return batch

    def _ids(self, a: Architecture, length: int, padding: str, ids_name: str, mask_name: str) -> dict[str, Tensor]:
        special = {a.tokens.pad, a.tokens.bos, a.tokens.decoder_start, *a.tokens.eos}
        plain = torch.tensor([i for i in range(a.embedding.vocab_size) if i not in special])
        ids = plain[torch.randint(0, len(plain), (BATCH, length))]
        mask = torch.ones_like(ids)
        for row in range(BATCH if padding != "none" else 0):
            # Rows of different lengths, one of them full.
            pads = slice(length - row * PADS // 2, length) if padding == "right" else slice(0, row * PADS // 2)
            mask[row, pads] = 0
        if a.head.pooler is not None and a.head.pooler.token == "eos":
            last = (mask * torch.arange(length)).argmax(1)
            ids[torch.arange(BATCH), last] = a.tokens.eos[0]
        ids = torch.where(mask.bool(), ids, a.tokens.pad or 0)
        return {ids_name: ids} if padding == "none" else {ids_name: ids, mask_name: mask}

    def labels(self, twin: Twin, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Labels for every head of the twin, with some positions left out."""
        a, head = twin.architecture, twin.architecture.head
        given: dict[str, Tensor] = {}
        if head.language is not None:
            side = "decoder_" if a.encoder is not None and a.decoder is not None else ""
            labels = self._ids(a, batch[f"{side}input_ids"].shape[1], "none", "labels", "")["labels"]
            labels[:, -2:] = -100 if side else labels[:, -2:]
            mask = batch.get(f"{side}attention_mask", torch.ones_like(labels))
            given["labels"] = torch.where(mask.bool(), labels, -100)
        if head.classifier is not None:
            each = head.pooler is not None and head.pooler.token == "each"
            shape = batch["input_ids"].shape if each else (BATCH,)
            name = "labels" if head.language is None else self.sentence_label
            given[name] = torch.randint(0, max(2, head.classifier.n_labels), shape)
        return given

    # Computation

    def compare(self, theirs: Any, ours: Any, batch: Mapping[str, Tensor]) -> None:
        """Assert that every field of the stock output is in ours, and equal wherever a token stands."""
        pairs = list(self.field_pairs(theirs))
        assert pairs
        for name, our_name in pairs:
            expected, got = theirs[name], getattr(ours, our_name)
            assert got is not None, f"{name} is missing"
            side = "decoder_" if "decoder_input_ids" in batch and not name.startswith("encoder_") else ""
            mask = batch.get(f"{side}attention_mask")
            if isinstance(expected, tuple):
                assert len(got) == len(expected), f"{len(got)} {name} against {len(expected)}"
            else:
                got, expected = (got,), (expected,)
            for index, (one, other) in enumerate(zip(got, expected)):
                if name.endswith("attentions"):  # the queries' positions second, as in every other field
                    one, other = one.transpose(1, 2), other.transpose(1, 2)
                valid = mask.bool() if mask is not None and one.shape[:2] == mask.shape else None
                close(one, other, valid, f"{name}[{index}]")

    @pytest.mark.parametrize("padding", PADDINGS)
    def test_it_computes_what_the_stock_class_computes(self, twin: Twin, padding: str) -> None:
        batch = self.inputs(twin, padding)
        with torch.no_grad():
            self.compare(twin.theirs(**batch), twin.ours(**batch), batch)

    def test_hidden_states_and_attention_weights_are_the_stock_ones(self, twin: Twin) -> None:
        batch = self.inputs(twin, "right")
        asked = {"output_hidden_states": True, "output_attentions": True}
        with torch.no_grad():
            theirs, ours = twin.theirs(**batch, **asked), twin.ours(**batch, **asked)
        assert any("hidden_states" in name for name, _ in self.field_pairs(theirs))
        assert any("attentions" in name for name, _ in self.field_pairs(theirs))
        self.compare(theirs, ours, batch)

    def test_the_loss_is_the_stock_one(self, twin: Twin) -> None:
        if twin.architecture.head.language is None and twin.architecture.head.classifier is None:
            pytest.skip("this class has no head and so no loss")
        batch = self.inputs(twin, "right")
        labels = self.labels(twin, batch)
        if "decoder_input_ids" in batch:
            del batch["decoder_input_ids"], batch["decoder_attention_mask"]  # made from the labels
        with torch.no_grad():
            theirs, ours = twin.theirs(**batch, **labels), twin.ours(**batch, **labels)
        assert theirs.loss is not None
        assert ours.loss is not None
        close(ours.loss, theirs.loss, None, "loss")

    def test_gradients_are_the_stock_ones(self, twin: Twin) -> None:
        batch = self.inputs(twin)
        theirs = twin.theirs(**batch)
        name, our_name = next(iter(self.field_pairs(theirs)))
        for model, answer in ((twin.theirs, theirs[name]), (twin.ours, twin.ours(**batch)[our_name])):
            model.zero_grad()
            answer.square().mean().backward()
        expected = self.table_gradient(twin.theirs)
        got = twin.ours.embedding.tokens.weight.grad
        assert got is not None
        # The stock table leaves the row of its padding token without a gradient.
        rows = torch.arange(len(got)) != (twin.architecture.tokens.pad or 0)
        largest = float(expected.abs().max())
        assert largest > 0
        close(got / largest, expected / largest, rows, "the token table's gradient")

    # Files

    def test_saving_gives_back_every_tensor(self, twin: Twin, tmp_path: Path) -> None:
        saved = twin.ours.save(tmp_path / "out")
        assert saved.stock, saved.reasons
        back = load_file(tmp_path / "out" / "model.safetensors")
        assert back.keys() == twin.tensors.keys()
        for name, tensor in twin.tensors.items():
            assert back[name].dtype == tensor.dtype, name
            assert torch.equal(back[name], tensor), name

    def test_the_stock_class_opens_what_is_saved(self, twin: Twin, tmp_path: Path) -> None:
        twin.ours.save(tmp_path / "out")
        opened, info = type(twin.theirs).from_pretrained(
            tmp_path / "out", output_loading_info=True, attn_implementation="eager"
        )
        assert not any(info.values()), info
        batch = self.inputs(twin, "right")
        with torch.no_grad():
            theirs, again = twin.theirs(**batch), opened.eval()(**batch)
        name = next(name for name, _ in self.field_pairs(theirs))
        # Two names of one activation (gelu, gelu_python) differ in the last bit.
        torch.testing.assert_close(again[name], theirs[name], rtol=1e-6, atol=1e-6)

    @once_per_class
    def test_half_precision_is_kept(self, twin: Twin, tmp_path: Path) -> None:
        halved = {name: tensor.bfloat16() for name, tensor in twin.tensors.items()}
        config = {**twin.config, "dtype": "bfloat16"}
        model = lathe.load(write_directory(tmp_path / "half", config, halved))
        model.save(tmp_path / "out")
        back = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(back[name], tensor) for name, tensor in halved.items())
        assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"

    @once_per_class
    def test_names_are_read_with_and_without_the_prefix(self, twin: Twin) -> None:
        prefix = family(twin.config["model_type"]).prefix
        bare = {name.removeprefix(prefix): tensor for name, tensor in twin.tensors.items()}
        reader = read(twin.config, bare)
        for name, tensor in twin.ours.tensors().items():
            assert torch.equal(reader.tensor(name), tensor), name

    @once_per_class
    def test_a_pickled_file_with_every_copy_of_the_table_is_read(self, twin: Twin, tmp_path: Path) -> None:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "config.json").write_text(json.dumps(twin.config), encoding="utf-8")
        torch.save(twin.theirs.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
        model = lathe.load(tmp_path / "bin")
        assert model.architecture == twin.architecture
        for name, tensor in twin.ours.tensors().items():
            assert torch.equal(model.tensors()[name], tensor), name

    def test_the_config_survives_a_round_trip(self, twin: Twin) -> None:
        written = write_config(twin.architecture)
        assert read_config(written) == twin.architecture
        stock = type(twin.theirs.config).from_dict(written)
        back = read_config({**stock.to_dict(), "architectures": written["architectures"]})
        if twin.variant.untied:
            back = back.with_(tied=False)  # what the stock config may have forgotten, the stored head says
        assert back == twin.architecture

    @once_per_class
    def test_what_came_with_the_config_is_kept(self, twin: Twin, tmp_path: Path) -> None:
        labels = twin.architecture.head.classifier
        names = {str(i): f"feeling {i}" for i in range(labels.n_labels)} if labels is not None else {"0": "x"}
        came = {**twin.config, "something_of_the_owner": 7, "id2label": names}
        came["label2id"] = {name: int(i) for i, name in names.items()}
        lathe.load(write_directory(tmp_path / "in", came, twin.tensors)).save(tmp_path / "out")
        written = read_json(tmp_path / "out" / "config.json")
        assert written["something_of_the_owner"] == 7
        assert written["id2label"] == names
        assert written["label2id"] == came["label2id"]

    @once_per_class
    def test_other_sizes_are_not_undone_by_the_config_that_it_came_with(self, twin: Twin, tmp_path: Path) -> None:
        a = twin.architecture
        grown: dict[str, Any] = {}
        for name, stack in a.stacks:
            grown[f"{name}.n_layers"] = 2 * stack.n_layers
            grown[f"{name}.attention.n_heads"] = 2 * stack.attention.n_heads
            grown[f"{name}.feed_forward.d_ff"] = stack.feed_forward.d_ff + 8
        fits = [each for each in ({**grown, "d_model": 2 * a.d_model}, grown) if not objections(a.with_(each))]
        again = {theirs: twin.config[own] for theirs, own in type(twin.theirs.config).attribute_map.items()}
        model = lathe.Model(a.with_(fits[0]), seed=1, config={**twin.config, **again})
        model.save(tmp_path / "out")
        opened, info = type(twin.theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values()), info
        batch = self.inputs(replace(twin, ours=model), "right")
        with torch.no_grad():
            self.compare(opened.eval()(**batch), model.eval()(**batch), batch)

    # Objects

    @once_per_class
    def test_it_goes_to_a_stock_object_and_back(self, twin: Twin) -> None:
        stock = twin.ours.to_transformers()
        assert type(stock) is type(twin.theirs)
        theirs, given = twin.theirs.state_dict(), stock.state_dict()
        assert given.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(given[name], tensor), name
        back = lathe.load(stock)
        assert back.architecture == twin.architecture
        for name, tensor in twin.ours.tensors().items():
            assert torch.equal(back.tensors()[name], tensor), name

    # Generation

    @pytest.mark.parametrize("padding", ["none", "left"])
    def test_greedy_text_is_the_stock_one(self, twin: Twin, padding: str) -> None:
        a = twin.architecture
        if a.head.language is None or a.decoder is None:
            pytest.skip("this class generates nothing")
        batch = {k: v for k, v in self.inputs(twin, padding).items() if not k.startswith("decoder_")}
        settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
        # Without its cache, which has the encoder's depth and fails where the decoder is deeper.
        theirs = twin.theirs.generate(**batch, **settings, use_cache=False)
        assert torch.equal(twin.ours.generate(**batch, **settings), theirs)

    # What a family cannot hold

    def test_what_a_family_cannot_hold_is_named(self, out: Outside) -> None:
        a = self.architecture(out.kind).with_(out.changes)
        found = objections(a)
        assert any(out.says in each.reason for each in found), found
        assert holder(a) is None
        with pytest.raises(RequestError, match="cannot hold"):
            write_config(a)

    def test_the_changes_that_an_objection_proposes_lead_back(self, out: Outside) -> None:
        if not out.fits:
            pytest.skip("nothing leads back")
        a = self.architecture(out.kind).with_(out.changes)
        changes = [objection.changes for objection in objections(a)]
        a = a.with_({path: value for each in changes for path, value in each.items()})
        assert objections(a) == []
        assert read_config(write_config(a)).family == a.family

    def test_an_architecture_outside_is_saved_in_lathes_own_form(self, tmp_path: Path) -> None:
        a = self.architecture().with_(self.outside[0].changes)
        model = lathe.Model(a, seed=0)
        saved = model.save(tmp_path / "own")
        assert not saved.stock
        assert any(self.outside[0].says in reason for reason in saved.reasons)
        assert not (tmp_path / "own" / "config.json").exists()
        assert lathe.load(tmp_path / "own").architecture == a

    # Bad input

    @once_per_class
    def test_a_missing_tensor_is_named(self, twin: Twin) -> None:
        prefix = family(twin.config["model_type"]).prefix
        for name in self.needed(twin):
            rest = {other: tensor for other, tensor in twin.tensors.items() if other != name}
            with pytest.raises(RequestError, match="missing from the file") as error:
                read(twin.config, rest)
            assert name.removeprefix(prefix) in str(error.value)

    def needed(self, twin: Twin) -> list[str]:
        """One stored tensor of each kind, without those that the file can do without: copies, other heads."""
        reader = read(twin.config, twin.tensors)
        spare = set(reader.left_out)
        for entry in family(twin.config["model_type"]).entries(twin.architecture):
            # A head of its own that is gone makes a tied model, which is what the stock config may say.
            if entry.again or (twin.variant.untied and "head.language.output.weight" in entry.ours):
                spare |= set(entry.names)
        kinds = {re.sub(r"\d+", "0", name): name for name in twin.tensors if name not in spare}
        return list(kinds.values())

    @once_per_class
    def test_a_tensor_too_many_is_named(self, twin: Twin) -> None:
        extra = {**twin.tensors, "something.else.weight": torch.zeros(3)}
        with pytest.raises(RequestError, match=r"'something\.else\.weight' belongs to no parameter"):
            read(twin.config, extra)

    @once_per_class
    def test_a_tensor_of_another_shape_is_named(self, twin: Twin) -> None:
        for name in self.needed(twin):
            shape = twin.tensors[name].shape
            wrong = {**twin.tensors, name: torch.zeros(*shape[:-1], shape[-1] + 1)}
            with pytest.raises(RequestError) as error:
                read(twin.config, wrong)
            assert repr(name) in str(error.value)

    @once_per_class
    @pytest.mark.parametrize("value", [0, -1, "abc", 10**9, 2.5])
    def test_a_width_that_cannot_be_is_one_line(self, twin: Twin, value: object) -> None:
        for key in ("d_model", "hidden_size", "n_embd"):
            if key in twin.config:
                with pytest.raises(RequestError) as error:
                    read({**twin.config, key: value}, twin.tensors)
                assert str(value) in str(error.value).replace(",", "")
                assert "\n" not in str(error.value)
                return
        pytest.fail("the config names no width")

    @once_per_class
    def test_a_config_that_contradicts_its_tensors_writes_nothing(self, twin: Twin, tmp_path: Path) -> None:
        config = {**twin.config, "vocab_size": twin.config["vocab_size"] + 1}
        bad = write_directory(tmp_path / "bad", config, twin.tensors)
        with pytest.raises(RequestError, match="the config says"):
            lathe.load(bad)

    @once_per_class
    def test_an_unknown_class_is_named(self, twin: Twin) -> None:
        with pytest.raises(RequestError, match="unknown class 'NoSuchModel'"):
            read_config({**twin.config, "architectures": ["NoSuchModel"]})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object."""
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
