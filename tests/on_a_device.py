"""A model works where it is: on a device that refuses the CPU's tensors it gives the same as on the CPU.

Run by tests/test_devices.py, each family in a process of its own: torch counts its devices at the first backward pass.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration

import lathe
from lathe.adapt import LoraSettings, add_lora, merge
from lathe.generate.text import complete, complete_in_turns
from lathe.text.train import train_tokenizer
from tests.pretended import NAME, Pretence, device

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot make a device of Python alone",
)
TEXT = "a lathe turns wood metal stone to the size that was asked for and not"
FAMILIES: dict[str, tuple[str, str | None, int]] = {
    "gpt2": ("gpt2", None, 280),
    "bert": ("bert-base-uncased", "masked", 40),
    "llama": ("llama-3.2-1b", None, 300),
}
SIZES: dict[str, Any] = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8, "d_ff": 24, "max_positions": 64}
IDS = torch.randint(5, 30, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def pretence() -> Iterator[None]:
    device()
    with Pretence():
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = random.Random(0)
    file = tmp_path_factory.mktemp("devices") / "text.txt"
    file.write_text("\n".join(" ".join(chance.choices(TEXT.split(), k=30)) for _ in range(60)), encoding="utf-8")
    return file


@pytest.fixture(params=FAMILIES)
def both(request: pytest.FixtureRequest, text: Path) -> tuple[lathe.Model, lathe.Model]:
    """The same model on the CPU and on the device."""
    preset, head, size = FAMILIES[request.param]
    tokenizer = train_tokenizer(text.read_text(encoding="utf-8").splitlines(), size, convention=request.param)
    base = lathe.preset(preset, head=head)
    ids: dict[str, Any] = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "mask": tokenizer.mask_id}
    ids["eos"] = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    sizes = {**SIZES, **({"n_kv_heads": 1} if request.param == "llama" else {})}
    shape = base.with_({**sizes, "vocab_size": tokenizer.vocab_size, "tokens": {**base.tokens.to_dict(), **ids}})
    here = lathe.Model(shape, seed=0, tokenizer=tokenizer)
    return here, lathe.Model(shape, seed=0, tokenizer=tokenizer).to(NAME)


def logits(model: lathe.Model) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS.to(model.device)).logits
    assert found.device == model.device
    return found.cpu()


def agree(there: lathe.Model, here: lathe.Model) -> None:
    assert (there.device.type, here.device.type) == (NAME, "cpu")
    torch.testing.assert_close(logits(there), logits(here), atol=1e-4, rtol=0)


def test_a_model_computes_and_learns_there(both: tuple[lathe.Model, lathe.Model]) -> None:
    here, there = both
    agree(there, here)
    ids = IDS.to(NAME)
    with pytest.raises(RuntimeError, match="two devices"):
        there(IDS)
    loss = there(ids, labels=ids).loss
    assert loss is not None
    loss.backward()
    assert {p.grad.device.type for p in there.parameters() if p.grad is not None} == {NAME}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        {"do_sample": True, "seed": 1, "top_p": 0.9, "typical_p": 0.9},
        {"stop_strings": ["a"]},
    ],
    ids=str,
)
def test_a_model_writes_there(both: tuple[lathe.Model, lathe.Model], settings: dict[str, Any]) -> None:
    here, there = both
    if here.architecture.decoder is None:
        pytest.skip("an encoder writes nothing")
    assert torch.equal(
        there.generate(IDS, max_new_tokens=5, **settings).cpu(), here.generate(IDS, max_new_tokens=5, **settings)
    )
    for write in (complete, complete_in_turns):
        texts = []
        for each in both:
            assert each.tokenizer is not None
            texts.append(write(each, each.tokenizer, ["a lathe", "wood"], max_new_tokens=4, **settings))
        assert [each.ids for each in texts[0]] == [each.ids for each in texts[1]]


CUTS: list[dict[str, Any]] = [
    {"d_model": 8, "search": 0},
    {"d_model": 8, "method": "select"},
    {"d_ff": 12},
    {"n_layers": 1},
    {"d_embed": 8},
    {"sharing": "all"},
    {"vocab_size": -5},
]


@pytest.mark.parametrize("changes", CUTS, ids=str)
def test_a_model_is_cut_on_text_there(
    both: tuple[lathe.Model, lathe.Model], changes: dict[str, Any], text: Path
) -> None:
    here, there = both
    if "vocab_size" in changes:
        changes = {"vocab_size": here.architecture.embedding.vocab_size + changes["vocab_size"]}
    cut = [lathe.resize(each, calibrate=text, own_form=True, **changes) for each in (there, here)]
    assert there.device.type == NAME
    agree(*cut)


DONE: dict[str, Callable[[lathe.Model, Path], lathe.Model]] = {
    "grown": lambda model, text: lathe.resize(model, d_ff=30),
    "of ids": lambda model, text: lathe.resize(model, d_ff=12, calibrate=[IDS.repeat(8, 1)]),
    "int8": lambda model, text: lathe.quantize(model, calibrate=text, activations="none"),
    "int4 by GPTQ": lambda model, text: lathe.quantize(model, bits=4, calibrate=text, method="gptq"),
}


@pytest.mark.parametrize("how", DONE)
def test_a_model_becomes_another_there(both: tuple[lathe.Model, lathe.Model], how: str, text: Path) -> None:
    here, there = both
    agree(DONE[how](there, text), DONE[how](here, text))


@pytest.mark.parametrize("both", ["gpt2"], indirect=True)  # it is many cuts of the kinds above
def test_a_budget_is_spent_there(both: tuple[lathe.Model, lathe.Model], text: Path) -> None:
    most = sum(p.numel() for p in both[0].parameters()) * 4 // 5
    here, there = (
        lathe.resize(each, max_parameters=most, calibrate=text, effort=1, search=0, own_form=True) for each in both
    )
    agree(there, here)


def test_a_model_is_healed_adapted_and_saved_there(
    both: tuple[lathe.Model, lathe.Model], text: Path, tmp_path: Path
) -> None:
    _, there = both
    small = lathe.resize(there, d_ff=12, calibrate=text)
    lathe.heal(small, there, text, steps=2, rows=2, length=32, hidden=0.1, noise=0.2)
    assert small.device.type == there.device.type == NAME
    add_lora(small, LoraSettings(rank=2, dora=True))
    ids = IDS.to(NAME)
    loss = small(ids, labels=ids).loss
    assert loss is not None
    loss.backward()
    merge(small)
    small.save(tmp_path / "small")
    torch.testing.assert_close(logits(lathe.load(tmp_path / "small")), logits(small), atol=1e-5, rtol=0)
