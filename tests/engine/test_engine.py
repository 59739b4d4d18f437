"""The native step against the modules: any architecture, any instruction set of this machine, any use of a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lathe.architecture import Architecture
from lathe.engine import Engine, native
from lathe.model.cache import Cache
from lathe.model.output import Output
from lathe.model.stack import Memory
from lathe.model.transformer import Transformer
from tests.strategies import EOS, architectures

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))

ALL_SETS = ("avx512vnni", "avx512", "avxvnni", "avx2", "portable")


def instruction_sets() -> list[str]:
    if native.why_not() is not None:
        return ["portable"]
    return [name for name in ALL_SETS if native.instructions(name)]


def drawn_model(architecture: Architecture, seed: int) -> Transformer:
    """A model in float32 whose every tensor, norms and biases too, is drawn wide."""
    model = Transformer(architecture, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def close(ours: Tensor | None, theirs: Tensor | None, exact: Tensor | None) -> None:
    """Ours within 1e-4 of what float64 gives, or, where the modules' own float32 is far from it, about as far."""
    assert ours is not None
    assert theirs is not None
    assert exact is not None
    assert ours.shape == exact.shape
    size = exact.abs().max().clamp(min=1e-3)
    errors = [float((each - exact).abs().max() / size) for each in (ours, theirs)]
    assert errors[0] < 1e-4 + 10 * errors[1]


def read(model: Any, ids_BT: Tensor, mask_BT: Tensor | None, cache: Cache, memory: Memory | None) -> Output:
    with torch.no_grad():
        if memory is None:
            out: Output = model(input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache)
        else:
            given: dict[str, Any] = {"encoder_outputs": memory, "past_key_values": cache}
            out = model(decoder_input_ids=ids_BT, decoder_attention_mask=mask_BT, **given)
    return out


MASKS = {
    "none": [[1] * 7, [1] * 7, [1] * 7],
    "right": [[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]],
    "left": [[1] * 7, [0] * 3 + [1] * 4, [0] + [1] * 6],
}


@settings(max_examples=40, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(
    architectures(),
    st.integers(0, 99),
    st.sampled_from(instruction_sets()),
    st.integers(1, 2),
    st.sampled_from([*MASKS]),
)
def test_a_pass_is_the_modules(
    architecture: Architecture, seed: int, instructions: str, threads: int, pads: str
) -> None:
    model = drawn_model(architecture, seed)
    engine = Engine(model, threads=threads, instructions=instructions)
    assert engine.native, engine.reason
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.tensor(MASKS[pads])
    ids_BT = torch.randint(4, architecture.embedding.vocab_size, (3, 7), generator=generator)
    ids_BT[torch.arange(3), (mask_BT * torch.arange(7)).argmax(1)] = EOS
    batch: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if architecture.embedding.token_types:
        batch["token_type_ids"] = torch.randint(0, 2, (3, 7), generator=generator)
    seen_BT = mask_BT.bool()
    if model.encoder is not None and model.decoder is not None:
        batch["decoder_input_ids"], seen_BT = ids_BT, torch.ones_like(seen_BT)
    with torch.no_grad():
        theirs, exact = model(**batch), copy.deepcopy(model).double()(**batch)
    ours = engine(**batch)
    assert ours.keys() == theirs.keys()
    for name in [*ours.keys()]:
        each = ours[name], theirs[name], exact[name]
        # What stands at a pad is nobody's.
        real_BT = mask_BT.bool() if "encoder" in name else seen_BT
        close(*(one[real_BT] if one.shape[:2] == (3, 7) else one for one in each))
    assert set(engine.fallbacks) <= {"a pooler reads a pad"}


@settings(max_examples=30, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(
    architectures(shapes=("decoder", "both"), language=True),
    st.integers(0, 99),
    st.sampled_from(instruction_sets()),
    st.integers(1, 2),
    st.sampled_from([*MASKS]),
)
def test_a_cache_goes_from_one_to_the_other(
    architecture: Architecture, seed: int, instructions: str, threads: int, pads: str
) -> None:
    model = drawn_model(architecture, seed)
    engine = Engine(model, threads=threads, instructions=instructions)
    generator = torch.Generator().manual_seed(seed)
    vocab_size = architecture.embedding.vocab_size
    mask_BT = torch.tensor(MASKS[pads])
    ids_BT = torch.randint(0, vocab_size, (3, 7), generator=generator)
    readers: list[Any] = [engine, model, copy.deepcopy(model).double()]
    caches = [Cache(architecture, 3, 12, dtype=reader.dtype) for reader in readers]
    memories: list[Memory | None] = [None, None, None]
    if model.encoder is not None:
        with torch.no_grad():
            memories = [reader.encode(ids_BT, mask_BT) for reader in readers]

    def both(ids: Tensor, mask: Tensor | None, seen: Tensor | None = None) -> None:
        seen = torch.ones_like(ids, dtype=torch.bool) if seen is None else seen
        found = [read(f, ids, mask, c, m).logits for f, c, m in zip(readers, caches, memories)]
        close(*(None if logits is None else logits[seen] for logits in found))

    both(ids_BT, mask_BT, mask_BT.bool())
    for cache in caches:
        cache.spread(2)
    next_B1 = torch.randint(0, vocab_size, (6, 1), generator=generator)
    both(next_B1, None)
    for cache in caches:
        cache.swap(torch.tensor([1, 0, 2, 2, 5, 4]))
    both(next_B1, None)
    kept_B = caches[0].lengths_B - torch.tensor([1, 2, 0, 1, 2, 0])
    for cache in caches:
        cache.rewind(kept_B, torch.tensor([1, 2, 1, 1, 2, 1]))
    two_BT = torch.randint(0, vocab_size, (6, 2), generator=generator)
    some_BT = torch.tensor([[1, 0], [1, 1], [1, 0]] * 2)
    both(two_BT, some_BT, some_BT.bool())
    # What one wrote the other reads on from.
    caches[:2] = caches[1::-1]
    both(next_B1, None)
