"""Who takes part: each row of the table, the module that runs it, and how many bytes a weight has there."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.generation.shapes import Shape


@dataclass(frozen=True)
class Row:
    """One contestant.

    Args:
        name: as it is printed.
        module: the part of `benchmarks.generation` that runs it, without `by_`.
        bits: of the weights of its layers; rows of the same width are compared.
        bytes_each: what a weight of the layers takes, with its share of the scales.
        head_bytes: the same of the head's weights, where that is another number.
        options: what the module is told.
        usual: whether it runs where nobody is named.
    """

    name: str
    module: str
    bits: int
    bytes_each: float
    head_bytes: float | None = None
    options: dict[str, str] = field(default_factory=dict)
    usual: bool = True

    @property
    def key(self) -> str:
        """The name as a word for options and files."""
        return self.name.lower().replace(",", "").replace(".", "").replace(" ", "-")

    @property
    def ours(self) -> bool:
        """Whether this is Lathe."""
        return self.module == "lathe"

    def read_a_step(self, shape: Shape) -> float:
        """Bytes of weights that a step of decoding reads, where the contestant does not tell them itself."""
        layers, head = shape.read_a_step()
        return layers * self.bytes_each + head * (self.bytes_each if self.head_bytes is None else self.head_bytes)


# llama.cpp's blocks: 32 weights with a scale of two bytes. Its Q4_0 files keep the head in Q6_K (210 bytes for 256).
# OpenVINO's INT4 has a scale of two bytes for each 128 weights and leaves the head in INT8.
ROWS = (
    Row("transformers", "transformers", 32, 4),
    Row("transformers, compiled", "transformers", 32, 4, options={"compiled": "yes"}, usual=False),
    Row("CTranslate2 float32", "ctranslate2", 32, 4, options={"precision": "float32"}),
    Row("CTranslate2 int8", "ctranslate2", 8, 1, options={"precision": "int8"}),
    Row("llama.cpp F32", "llama_cpp", 32, 4, options={"precision": "F32"}),
    Row("llama.cpp Q8_0", "llama_cpp", 8, 34 / 32, options={"precision": "Q8_0"}),
    Row("llama.cpp Q4_0", "llama_cpp", 4, 18 / 32, 210 / 256, options={"precision": "Q4_0"}),
    Row("OpenVINO FP32", "openvino", 32, 4, options={"precision": "fp32"}, usual=False),
    Row("OpenVINO INT8", "openvino", 8, 1, options={"precision": "int8"}),
    Row("OpenVINO INT4", "openvino", 4, 0.5 + 2 / 128, 1, options={"precision": "int4"}),
    Row("Lathe modules", "lathe", 32, 4),
    Row("Lathe float32", "lathe", 32, 4, options={"precision": "float32"}),
    Row("Lathe int8", "lathe", 8, 1, options={"precision": "int8"}),
    Row("Lathe int4", "lathe", 4, 0.5, options={"precision": "int4"}),
)


def chosen(words: list[str] | None) -> list[Row]:
    """The rows that `words` name, each a row's key or what keys begin with; the usual rows where there are none.

    Raises:
        ValueError: a word that names no row.
    """
    if not words:
        return [row for row in ROWS if row.usual]
    found: set[str] = set()
    for word in map(str.lower, words):
        exact = {row.key for row in ROWS if word in (row.key, "all")}
        named = exact or {row.key for row in ROWS if row.key.startswith(word)}
        if not named:
            raise ValueError(f"--contestants {word}: expected all, or one of {', '.join(row.key for row in ROWS)}")
        found |= named
    return [row for row in ROWS if row.key in found]
