"""Small models of every kind that a format may hold, or not: random, every tensor drawn wide."""

from __future__ import annotations

import functools
from typing import Any

import torch

import lathe
from lathe.architecture import Architecture, Classifier, Pooler
from lathe.text.tokenizer import Tokenizer

SIZES: dict[str, Any] = {"d_model": 32, "n_heads": 4, "d_head": 8, "d_ff": 64, "n_layers": 2, "vocab_size": 64}


def small(preset: str, **more: Any) -> Architecture:
    """A preset at a width of 32 with 64 tokens."""
    big = lathe.preset(preset)
    tokens: dict[str, Any] = {"tokens.pad": 0, "tokens.bos": 1, "tokens.eos": (2,)}
    if big.tokens.decoder_start is not None:
        tokens["tokens.decoder_start"] = 0
    if any(stack.positions.kind == "learned" for _, stack in big.stacks):
        tokens |= dict.fromkeys(big.paths("max_positions"), 32)
    return big.with_(tokens, **{**SIZES, **more})


def bert(**more: Any) -> Architecture:
    """BERT's body."""
    return small("bert-base-uncased", **more).with_(
        {"head.language": None, "head.classifier": None, "head.pooler": Pooler(token="first", activation="tanh")}
    )


ARCHITECTURES: dict[str, Architecture] = {
    "t5": small("t5-small"),
    "t5, other heads, shared layers": small("t5-small", n_heads=3, d_head=6, sharing="all"),
    "t5 1.1": small("t5-v1_1-small"),
    "t5, a shallow decoder": small("t5-small").with_({"decoder.n_layers": 1}),
    "bart": small("bart-base"),
    "mbart": small("mbart-large-cc25"),
    "gpt2": small("gpt2"),
    "gpt2, other heads": small("gpt2", n_heads=3, d_head=6),
    "llama": small("llama-2-7b", d_ff=48, tied=True),
    "llama, grouped and other heads": small("llama-2-7b", n_heads=6, n_kv_heads=2, d_head=10, sharing="groups:2"),
    "llama, factorised": small("llama-2-7b", d_embed=16),
    "llama 3.1": small("llama-3.1-8b", n_kv_heads=2),
    "qwen2": small("qwen2-0.5b", n_kv_heads=2),
    "mistral": small("mistral-7b", n_kv_heads=2, window=12),
    "bert": bert(),
    "bert, other heads": bert(n_heads=3, d_head=6),
    "bert, three labels": bert().with_({"head.classifier": Classifier(n_labels=3)}),
    "albert": small("albert-base-v2", d_embed=16),
    "electra": small("electra-small-discriminator", d_embed=16),
}


@functools.cache
def model(name: str, seed: int = 0, tokenizer: Tokenizer | None = None) -> lathe.Model:
    """A model of that name; with a tokenizer its table has a row for each token."""
    architecture = ARCHITECTURES[name]
    if tokenizer is not None:
        architecture = architecture.with_(vocab_size=tokenizer.vocab_size)
    made = lathe.Model(architecture, seed=seed, tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return made
