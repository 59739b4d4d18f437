"""Lathe: its modules as they are, or its engine in a precision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.generation.base import Ids, Unfit, log_probs, versions

if TYPE_CHECKING:
    from torch import Tensor


def version() -> str:
    """Lathe's, with torch's."""
    return versions("lathe", "torch", missing="pip install lathe")


def prepare(model: Path, files: Path, kind: str, precision: str = "") -> None:
    """It opens the stock directory itself."""
    files.symlink_to(model.resolve(), target_is_directory=True)


class Runner:
    """A loaded model; `precision`: called through the engine, which must compute natively to count."""

    def __init__(self, files: Path, kind: str, threads: int, precision: str = "") -> None:
        import torch

        import lathe

        torch.set_num_threads(threads)
        self.torch, self.kind = torch, kind
        self.model: Any = lathe.load(files.resolve())
        self.called: Any = self.model
        self.engine: Any = "torch"
        if precision:
            self.called = self.engine = _engine(self.model, precision)
            self.step_bytes = self.called.step_bytes

    def generate(self, prompts: Ids, new: int) -> Ids:
        """Greedy; without an end token every row runs to its full length."""
        ids_BT = self.torch.tensor(prompts)
        found_BT = self.model.generate(ids_BT, max_new_tokens=new, eos_token_id=None, engine=self.engine)
        if self.called is not self.model and self.called.fallbacks:
            raise Unfit(f"PyTorch's modules computed in the engine's place: {', '.join(self.called.fallbacks)}")
        tokens: Ids = found_BT[:, -new:].tolist()
        return tokens

    def encode(self, rows: Ids) -> np.ndarray:
        """The last hidden states."""
        with self.torch.inference_mode():
            hidden: Tensor = self.called.encode(self.torch.tensor(rows), None).hidden_BSD
            return hidden.numpy()

    def score(self, prompt: list[int], target: list[int]) -> dict[str, np.ndarray]:
        """One forward pass over the text."""
        torch = self.torch
        with torch.inference_mode():
            if self.kind == "seq2seq":
                begun = [self.model.architecture.tokens.decoder_start, *target[:-1]]
                out = self.called(torch.tensor([prompt]), decoder_input_ids=torch.tensor([begun]))
            else:
                out = self.called(torch.tensor([prompt + target[:-1]]), logits_to_keep=len(target))
        logits_TV = out.logits[0].float().numpy()
        return {"logits": logits_TV, "log_probs": log_probs(logits_TV, target)}


def _engine(model: Any, precision: str) -> Any:
    from lathe.engine import Engine
    from lathe.errors import RequestError

    try:
        engine = Engine(model, precision)
    except RequestError as error:
        raise Unfit(str(error)) from None
    if not engine.native:
        raise Unfit(f"its native step does not serve here: {engine.reason}")
    return engine
