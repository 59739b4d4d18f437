"""OpenVINO through optimum-intel: exported once, weights compressed by NNCF without data, then `generate`.

optimum-intel needs an older `transformers` than the other contestants, so this runs in an environment of its own and
imports nothing else here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation.base import Ids, log_probs, versions

CLASSES = {"causal": "OVModelForCausalLM", "seq2seq": "OVModelForSeq2SeqLM", "encoder": "OVModelForFeatureExtraction"}


def version() -> str:
    """The library's, with the runtime's."""
    return versions(
        "openvino", "optimum-intel", missing="an environment with optimum-intel[openvino], named by --openvino"
    )


def prepare(model: Path, files: Path, kind: str, precision: str) -> None:
    """Export the stock directory and compress the weights."""
    import optimum.intel

    # Without a config nothing is compressed; the library compresses large models on its own if it is not told.
    compression: dict[str, Any] = {"load_in_8bit": False}
    if precision != "fp32":
        bits = {"int8": 8, "int4": 4}[precision]
        compression = {"quantization_config": optimum.intel.OVWeightQuantizationConfig(bits=bits)}
    own = getattr(optimum.intel, CLASSES[kind])
    own.from_pretrained(model.resolve(), export=True, compile=False, **compression).save_pretrained(files)


class Runner:
    """`generate` of the exported model, tuned for latency, as it comes otherwise."""

    def __init__(self, files: Path, kind: str, threads: int, precision: str) -> None:
        import optimum.intel
        import torch

        torch.set_num_threads(threads)
        self.torch, self.kind = torch, kind
        settings = {"INFERENCE_NUM_THREADS": str(threads), "PERFORMANCE_HINT": "LATENCY"}
        self.model: Any = getattr(optimum.intel, CLASSES[kind]).from_pretrained(files, ov_config=settings)
        if kind != "encoder":
            self.model.generation_config.eos_token_id = None  # so that every row runs to its full length
            self.model.generation_config.pad_token_id = 0

    def generate(self, prompts: Ids, new: int) -> Ids:
        """Greedy, with `transformers`' loop around OpenVINO's steps."""
        ids_BT = self.torch.tensor(prompts)
        found_BT = self.model.generate(
            ids_BT, attention_mask=self.torch.ones_like(ids_BT), max_new_tokens=new, do_sample=False
        )
        tokens: Ids = found_BT[:, -new:].tolist()
        return tokens

    def encode(self, rows: Ids) -> np.ndarray:
        """The last hidden states."""
        ids_BT = self.torch.tensor(rows)
        return np.asarray(self.model(ids_BT, attention_mask=self.torch.ones_like(ids_BT)).last_hidden_state)

    def score(self, prompt: list[int], target: list[int]) -> dict[str, np.ndarray]:
        """One pass over the text."""
        torch = self.torch
        if self.kind == "seq2seq":
            source, text = prompt, [self.model.config.decoder_start_token_id, *target[:-1]]
            ids_BT = torch.tensor([source])
            mask_BT = torch.ones_like(ids_BT)
            logits = self.model(ids_BT, attention_mask=mask_BT, decoder_input_ids=torch.tensor([text])).logits[0]
        else:
            ids_BT = torch.tensor([prompt + target[:-1]])
            logits = self.model(ids_BT, attention_mask=torch.ones_like(ids_BT)).logits[0, len(prompt) - 1 :]
        logits_TV = np.asarray(logits, dtype=np.float32)
        return {"logits": logits_TV, "log_probs": log_probs(logits_TV, target)}
