"""Tiny stock models of each family, and an adapter of `peft` on each."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

IDS = torch.tensor([[5, 9, 11, 40, 7, 1], [8, 3, 22, 17, 30, 1]])
_GPT2 = {"vocab_size": 64, "n_embd": 24, "n_head": 2, "n_layer": 2, "n_positions": 16, "bos_token_id": 1}
_BERT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}
_BART = {
    "vocab_size": 64,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 1,
}


@dataclass(frozen=True)
class Stock:
    """A class of `transformers`, the config it is built from, and the modules that an adapter goes on."""

    kind: str
    config: dict[str, Any]
    targets: Any


STOCK = {
    "t5": Stock(
        "T5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 24, "d_kv": 6, "num_heads": 3, "d_ff": 40, "num_layers": 2},
        ["q", "v", "wo"],
    ),
    "bert": Stock("BertForMaskedLM", _BERT, ["query", "value", "output.dense"]),
    "albert": Stock("AlbertForMaskedLM", {**_BERT, "embedding_size": 12}, ["query", "key", "ffn_output"]),
    "bart": Stock("BartForConditionalGeneration", _BART, r".*\.(q_proj|v_proj|fc1)"),
    "gpt2": Stock("GPT2LMHeadModel", {**_GPT2, "eos_token_id": 1}, ["c_attn", "mlp.c_proj"]),
    "llama": Stock(
        "LlamaForCausalLM",
        {**_BERT, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 1},
        ["q_proj", "k_proj", "down_proj"],
    ),
}


def stock(family: str) -> Any:
    """A stock model with random weights."""
    kind = getattr(transformers, STOCK[family].kind)
    model = kind(kind.config_class(**STOCK[family].config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.tie_weights()
    return model


def adapted(model: Any, targets: Any, **settings: Any) -> Any:
    """A copy of a stock model with an adapter of `peft` that changes what it computes."""
    config = peft.LoraConfig(target_modules=targets, **{"r": 4, "lora_alpha": 6, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    disturb(theirs)
    return theirs


def opened(model: Any, directory: Any) -> Any:
    """A copy of a stock model with the adapter in `directory`, as `peft` opens it; what it misses is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(directory)).eval()


def disturb(model: torch.nn.Module) -> None:
    """Move every adapter tensor, so that adapters do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or ".adapters." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


def logits(model: Any) -> Tensor:
    """The logits for some ids; an encoder-decoder is asked for the same ids."""
    config = model.config
    config = config if isinstance(config, dict) else config.to_dict()
    more = {"decoder_input_ids": IDS} if config.get("is_encoder_decoder") else {}
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, **more).logits
    return out
