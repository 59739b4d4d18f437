"""`transformers`: as it comes, or with its static cache and its compiled forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation.base import Ids, Unfit, log_probs, versions


def version() -> str:
    """The library's, with torch's."""
    return versions("transformers", "torch", missing="pip install transformers")


def prepare(model: Path, files: Path, kind: str, compiled: str = "") -> None:
    """It opens the stock directory itself."""
    if compiled and kind == "encoder":
        raise Unfit("compiles decoders alone")
    files.symlink_to(model, target_is_directory=True)


class Runner:
    """`generate` in float32; `compiled`: with a static cache and `torch.compile`."""

    def __init__(self, files: Path, kind: str, threads: int, compiled: str = "") -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(threads)
        names = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "encoder": "AutoModel"}
        self.torch, self.kind = torch, kind
        self.model = getattr(transformers, names[kind]).from_pretrained(files.resolve(), dtype=torch.float32).eval()
        self.settings: dict[str, Any] = {}
        if kind != "encoder":
            # Without an end token every row runs to its full length.
            self.model.generation_config.eos_token_id = None
            self.model.generation_config.pad_token_id = 0
        if compiled:
            compiling = transformers.CompileConfig(fullgraph=False, dynamic=None)
            compiling._compile_all_devices = True  # its own switch for processors; without it only GPUs compile
            self.settings = {"cache_implementation": "static", "compile_config": compiling}

    def generate(self, prompts: Ids, new: int) -> Ids:
        """Greedy, with `transformers`' own loop."""
        ids_BT = self.torch.tensor(prompts)
        found_BT = self.model.generate(
            ids_BT,
            attention_mask=self.torch.ones_like(ids_BT),
            max_new_tokens=new,
            do_sample=False,
            **self.settings,
        )
        tokens: Ids = found_BT[:, -new:].tolist()
        return tokens

    def encode(self, rows: Ids) -> np.ndarray:
        """The last hidden states."""
        with self.torch.inference_mode():
            return np.asarray(self.model(self.torch.tensor(rows)).last_hidden_state.numpy())

    def score(self, prompt: list[int], target: list[int]) -> dict[str, np.ndarray]:
        """One forward pass over the text."""
        torch = self.torch
        with torch.inference_mode():
            if self.kind == "seq2seq":
                begun = [self.model.config.decoder_start_token_id, *target[:-1]]
                logits = self.model(torch.tensor([prompt]), decoder_input_ids=torch.tensor([begun])).logits[0]
            else:
                logits = self.model(torch.tensor([prompt + target[:-1]])).logits[0, len(prompt) - 1 :]
        logits_TV = logits.float().numpy()
        return {"logits": logits_TV, "log_probs": log_probs(logits_TV, target)}
