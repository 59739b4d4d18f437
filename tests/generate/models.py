"""Small models that the generation tests continue text with: random ones, and twins in `transformers`."""

from __future__ import annotations

from typing import Any

import torch
import transformers

import lathe
from lathe.architecture import Architecture
from lathe.model.transformer import Transformer
from tests.families.contract import randomise

VOCABULARY = 61
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {**TOKENS, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
    "d_model": 20,
    "d_kv": 6,
    "num_heads": 3,
    "d_ff": 28,
    "num_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 28,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", BART),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "llama": ("LlamaForCausalLM", LLAMA),
}


def twins(name: str) -> tuple[Any, lathe.Model]:
    """A stock model with random weights, and Lathe's of it."""
    torch.manual_seed(3)
    kind, config = TWINS[name]
    stock = getattr(transformers, kind)
    theirs = stock(stock.config_class(**config)).eval()
    randomise(theirs)
    return theirs, lathe.load(theirs)


def random_model(architecture: Architecture, seed: int = 0) -> Transformer:
    """A model in float64 whose every tensor, norms and biases too, is drawn wide."""
    model = Transformer(architecture, seed=seed, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def sampler(name: str = "gpt2") -> lathe.Model:
    """A model in float64, in which a batch's company changes no draw by rounding."""
    torch.manual_seed(3)
    return lathe.load(twins(name)[0]).to(torch.float64)
