"""What llama.cpp's graphs hold, read off the architecture; every parameter has a place in the file."""

from __future__ import annotations

import re

import pytest
import torch

from lathe.architecture import Architecture
from lathe.blueprint import stored
from lathe.export.gguf_layouts import context_length, layout_of, neighbours, notes, objections, placed, sizes
from lathe.model.positions import rotate, rotation
from tests.export.models import ARCHITECTURES

HELD = {
    "t5": "t5",
    "t5, other heads, shared layers": "t5",
    "t5 1.1": "t5",
    "t5, a shallow decoder": "t5",
    "gpt2": "gpt2",
    "llama": "llama",
    "llama, grouped and other heads": "llama",
    "llama 3.1": "llama",
    "qwen2": "llama",
    "mistral": "llama",
    "bert": "bert",
    "bert, three labels": "bert",
}
REFUSED = {
    "bart": "a learned encoder and a learned decoder",
    "gpt2, other heads": "n_heads · d_head is 18 and d_model is 32",
    "bert, other heads": "n_heads · d_head is 18 and d_model is 32",
    "llama, factorised": r"its embedding is factorised \(d_embed is 16\)",
    "albert": "factorised",
    "electra": "factorised",
}


@pytest.mark.parametrize("name", HELD)
def test_a_graph_of_llama_cpp_fits(name: str) -> None:
    layout = layout_of(ARCHITECTURES[name])
    assert layout is not None
    assert layout.name == HELD[name]
    assert objections(ARCHITECTURES[name]) == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_computes_is_refused_with_the_reason(name: str) -> None:
    reasons = "; ".join(objections(ARCHITECTURES[name]))
    assert re.search(REFUSED[name], reasons)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (
            "t5",
            {"encoder.positions.max_distance": 64},
            "encoder's positions.max_distance is 64, and llama.cpp's t5 has 128",
        ),
        ("t5", {"decoder.feed_forward.d_ff": 96}, "encoder and decoder differ in heads, feed-forward"),
        ("t5, a shallow decoder", {"decoder.n_layers": 3}, "its decoder has 3 layers and its encoder 2"),
        ("t5", {"activation": "silu"}, "plain feed-forward has silu, and llama.cpp's t5 has relu there"),
        ("llama", {"activation": "gelu"}, "decoder's feed_forward.activation is gelu, and llama.cpp's llama has silu"),
        ("llama", {"norm_position": "post"}, "norm_position is post"),
        ("gpt2", {"n_kv_heads": 2}, "n_kv_heads is 2, and llama.cpp's gpt2 has none"),
        ("gpt2", {"embedding.scaled": True}, "its token vectors are scaled"),
    ],
)
def test_one_choice_that_the_graph_does_not_make_is_named(name: str, changes: dict[str, object], reason: str) -> None:
    assert reason in "; ".join(objections(ARCHITECTURES[name].with_(changes)))


@pytest.mark.parametrize("name", HELD)
def test_every_parameter_is_in_the_file(name: str) -> None:
    architecture = ARCHITECTURES[name]
    # A number of its own in each tensor: a concatenation or another order keeps it.
    marked = {p.name: torch.full(p.shape, float(place + 1)) for place, p in enumerate(stored(architecture))}
    scaled = architecture.head.language is not None and architecture.head.language.scaled
    found: set[float] = set()
    names = []
    for theirs, tensor in placed(architecture, marked):
        names.append(theirs)
        back = tensor * architecture.d_model**0.5 if scaled and theirs.startswith("dec.output_norm") else tensor
        found |= {round(number, 3) for number in back.unique().tolist()}
    left_out = {"head.pooler.weight", "head.pooler.bias"} if architecture.head.classifier is None else set()
    assert {float(place + 1) for place, p in enumerate(stored(architecture)) if p.name not in left_out} <= found
    assert len(names) == len(set(names))


def test_the_products_of_q_and_k_survive_their_other_order() -> None:
    heads, width = 3, 8
    q, k = (torch.randn(heads * width, 5) for _ in range(2))
    x, y = torch.randn(5), torch.randn(5)
    spec = ARCHITECTURES["llama"].decoder
    assert spec is not None
    cos, sin = rotation(torch.tensor([[3, 7]]), spec.positions, width)

    def scores(turned: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (turned * other).sum(-1)

    ours = [(rows @ vector).view(1, heads, 1, width) for rows, vector in ((q, x), (k, y))]
    at = [rotate(each, (cos[:, :, i : i + 1], sin[:, :, i : i + 1])) for i, each in enumerate(ours)]
    theirs = [(neighbours(rows, heads) @ vector).view(heads, width // 2, 2) for rows, vector in ((q, x), (k, y))]

    def turn(pairs: torch.Tensor, place: int) -> torch.Tensor:
        c, s = (each[0, 0, place, : width // 2] for each in (cos, sin))
        first, second = pairs[..., 0], pairs[..., 1]
        return torch.stack((first * c - second * s, first * s + second * c), -1).flatten(1)

    torch.testing.assert_close(
        scores(at[0], at[1]).flatten(), scores(turn(theirs[0], 0), turn(theirs[1], 1)), atol=1e-4, rtol=1e-4
    )


def test_sizes_name_heads_that_do_not_fill_the_width_and_a_window_as_context() -> None:
    keys = sizes(ARCHITECTURES["llama, grouped and other heads"])
    assert (keys["attention.head_count"], keys["attention.head_count_kv"], keys["attention.key_length"]) == (6, 2, 10)
    assert keys["rope.dimension_count"] == 10
    assert context_length(ARCHITECTURES["mistral"]) == 12
    assert "12 tokens" in " ".join(notes(ARCHITECTURES["mistral"]))


def test_a_shared_layer_is_written_for_each_layer_and_said_so() -> None:
    architecture: Architecture = ARCHITECTURES["t5, other heads, shared layers"]
    tensors = {p.name: torch.randn(p.shape) for p in stored(architecture)}
    written = dict(placed(architecture, tensors))
    assert torch.equal(written["enc.blk.0.ffn_up.weight"], written["enc.blk.1.ffn_up.weight"])
    assert "shares weights between layers" in " ".join(notes(architecture))
