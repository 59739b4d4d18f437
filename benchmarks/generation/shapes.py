"""The models that everyone runs: random weights, drawn once by Lathe and saved as a stock Hugging Face directory.

Speed does not depend on the weights' values, so no trained model is needed; what a step has to read does depend
on the shape, and is counted here from the blueprint. A step of decoding reads every matrix of the decoder and of
the head once, whatever the batch. It reads no embedding table (only the rows of its tokens) and no key or value
matrix of cross-attention, whose results are kept from the first step on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from benchmarks.generation.base import Ids
    from lathe.architecture import Architecture

# A head that is the token table would find each token to be its own likeliest successor, and texts of one token are
# no test of who decodes alike. With a smaller table the layers' part of the stream, which they norm first, decides.
TABLE_SCALE = 0.02


@dataclass(frozen=True)
class Shape:
    """One model: a preset of Lathe's and what is changed in it.

    Args:
        name: as it is printed, and as `--shapes` takes it.
        preset: of Lathe's.
        kind: causal, seq2seq or encoder.
        changes: fields of the architecture.
        aimed: whether the aims are for it.
    """

    name: str
    preset: str
    kind: str
    changes: dict[str, Any] = field(default_factory=dict)
    aimed: bool = False

    def cut_to(self, layers: int | None) -> Shape:
        """This shape with so many layers; itself where None."""
        if layers is None:
            return self
        return replace(self, name=f"{self.name}-{layers}", changes={**self.changes, "n_layers": layers})

    def architecture(self) -> Architecture:
        """All its sizes."""
        import lathe

        return lathe.preset(self.preset).with_(self.changes)

    def build(self, folder: Path) -> Path:
        """The stock directory of its random weights in `folder`; made where it is not there yet."""
        import lathe

        if not folder.exists():
            model = lathe.Model(self.architecture(), seed=0)
            model.embedding.tokens.weight.data *= TABLE_SCALE
            model.save(folder)
        return folder

    def prompts(self, batch: int, length: int, seed: int) -> Ids:
        """Random rows of tokens, none of them among the special ones that the vocabulary begins with."""
        size = self.architecture().embedding.vocab_size
        found: Ids = np.random.default_rng(seed).integers(min(size // 2, 1000), size - 1, (batch, length)).tolist()
        return found

    def parameters(self) -> int:
        """How many numbers the model has."""
        from lathe.blueprint import count

        return count(self.architecture())

    def read_a_step(self) -> tuple[int, int]:
        """How many numbers of the layers' matrices and of the head's one step of decoding reads."""
        from lathe.blueprint import blueprint

        layers = head = 0
        for each in blueprint(self.architecture()):
            kept = each.component == "cross_attention" and each.name.endswith((".k.weight", ".v.weight"))
            if len(each.axes) < 2 or kept:
                continue
            if each.component == "head":
                head += each.size
            elif each.name.startswith("decoder.") and each.role in ("reader", "writer"):
                layers += each.size
        return layers, head


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("t5-small", "t5-small", "seq2seq", aimed=True),
        Shape(
            "llama",
            "llama-2-7b",
            "causal",
            {"d_model": 768, "n_layers": 12, "d_ff": 2048, "n_heads": 12, "n_kv_heads": 12, "d_head": 64},
            aimed=True,
        ),
        Shape("gpt2", "gpt2", "causal"),
        Shape("bert-base", "bert-base-uncased", "encoder"),
    )
}
